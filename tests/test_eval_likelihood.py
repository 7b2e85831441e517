"""The likelihood bound against full enumeration, its error, and the exact value of autoregressive models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from conftest import PUMA, UNIFORM, run_ranks, tiny_settings
from helpers import random_model
from torch import Tensor

import train
from config import Config
from data.dataset import ArrayData
from eval import likelihood as command
from eval.likelihood import Likelihood, likelihood, ratio_error
from model.token_scores import TokenScores
from runtime.config_file import parse_config
from runtime.distributed import World

MASK_ID, LENGTH = 22, 6
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BLOCK = {"name": "block_uniform", "block_size": 3, "block_attention": "prefix"}


def config_of(objective: dict[str, Any], batch_size: int = 5) -> Config:
    settings = tiny_settings(objective, Path())
    settings["data"] |= {"size": 9, "min_clues": 30, "max_clues": 40}
    settings["validation"]["batch_size"] = batch_size
    settings["model"] |= {"vocab_size": 23, "learned_positions": None}
    return parse_config(settings, "test")


def rows(n_rows: int, seed: int = 0) -> ArrayData:
    """Rows with a given token at the start and perhaps others; EOS is token 0."""
    rng = np.random.default_rng(seed)
    prompt_mask = rng.random((n_rows, LENGTH)) < 0.2
    prompt_mask[:, 0], prompt_mask[:, -1] = True, False
    return ArrayData(rng.integers(0, 6, (n_rows, LENGTH)), prompt_mask, MASK_ID, eos_id=0)


def measure(
    model: Any,
    data: ArrayData,
    objective: dict[str, Any],
    n_draws: int,
    batch_size: int = 5,
    device: torch.device = CPU,
) -> Likelihood:
    config = config_of(objective, batch_size)
    return likelihood(model, config, data, World(0, 1, device), n_rows=len(data), n_draws=n_draws)


@torch.no_grad()
def enumerated(model: Any, data: ArrayData, block_size: int, counted: np.ndarray | None = None) -> list[float]:
    """The bound of each row: for each block all sets of masked positions, the tokens before the block clean.

    `counted` (bool [N, L]): the positions whose part it is.
    """
    bounds = []
    counted = np.ones_like(data.prompt_mask) if counted is None else counted
    for row, (tokens, prompt_mask) in enumerate(zip(torch.from_numpy(data.tokens), data.prompt_mask, strict=True)):
        bound = 0.0
        for start in range(0, LENGTH, block_size):
            end = start + block_size
            places = [place for place in range(start, end) if not prompt_mask[place]]
            for n in range(1, len(places) + 1):
                sets = list(itertools.combinations(places, n))
                for masked in sets:
                    xt = tokens[:end].clone()
                    xt[list(masked)] = MASK_ID
                    logits = model.logits(xt[None])[0]
                    nll = [-float(oracle.log_softmax(logits[place])[tokens[place]]) for place in masked]
                    bound += sum(np.array(nll) * counted[row, list(masked)]) / n / len(sets)
        bounds.append(bound)
    return bounds


@pytest.mark.parametrize(("objective", "block_size"), [(UNIFORM, LENGTH), (BLOCK, 3)], ids=["full", "blocks"])
def test_the_bound_is_the_sum_over_all_masks(objective: dict[str, Any], block_size: int) -> None:
    model, data = random_model(), rows(4)
    found = measure(model, data, objective, n_draws=160)
    expected = sum(enumerated(model, data, block_size)) / found.n_tokens.sum()
    assert 0 < found.mask_error < 0.03 * expected
    assert abs(found.nats_per_token - expected) < 4 * found.mask_error


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [UNIFORM, BLOCK], ids=["full", "blocks"])
def test_a_gpu_finds_the_bound_of_a_cpu(objective: dict[str, Any]) -> None:
    model, data = random_model(), rows(9)
    expected = measure(model, data, objective, n_draws=4)
    found = measure(model.to(GPU), data, objective, n_draws=4, device=GPU)
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-4)
    assert found.mask_error == pytest.approx(expected.mask_error, rel=1e-2)


def test_more_draws_shrink_the_error_as_the_square_root_of_their_number() -> None:
    """Systematic draws of n make it a little better than that. The stated error is that of the estimate."""
    model, data = random_model(), rows(40)
    expected = sum(enumerated(model, data, LENGTH)) / measure(model, data, UNIFORM, 2).n_tokens.sum()
    few, many = (measure(model, data, UNIFORM, n_draws, batch_size=40) for n_draws in (8, 128))
    assert 3 < few.mask_error / many.mask_error < 7
    for found in (few, many):
        assert abs(found.nats_per_token - expected) < 4 * found.mask_error


class Exact:
    """Stands for a model that knows the distribution of its data, a table of probabilities of all bit strings."""

    def __init__(self, probabilities: Tensor) -> None:
        self.table = probabilities  # float64 [2, ..., 2], one axis per position

    def __call__(self, xt: Tensor, x0: Tensor, weight: Tensor) -> TokenScores:
        nll = torch.zeros(weight.shape)
        for row, place in weight.nonzero().tolist():
            known = tuple(slice(None) if token == MASK_ID else int(token) for token in xt[row])
            n_before = sum(token == MASK_ID for token in xt[row, :place].tolist())
            likely = self.table[known].movedim(n_before, 0).reshape(2, -1).sum(1)
            nll[row, place] = -math.log(likely[x0[row, place]] / likely.sum())
        return TokenScores((weight * nll).sum(), nll, nll, nll)


def test_the_bound_of_a_model_that_knows_its_data_is_their_entropy() -> None:
    """Every order of filling then gives the same probability."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 9, (2,) * 4, generator=generator)
    tokens = [list(string) for string in itertools.product((0, 1), repeat=4) for _ in range(int(counts[string]))]
    data = ArrayData(np.array(tokens), np.zeros((len(tokens), 4), dtype=bool), MASK_ID)
    table = counts.double() / counts.sum()
    entropy = -sum(float(p) * math.log(p) for p in table.flatten() if p > 0)
    found = measure(Exact(table), data, UNIFORM, n_draws=64)
    assert not found.exact
    assert found.mask_error < 0.02
    assert abs(found.nats_per_token - entropy / 4) < 4 * found.mask_error


@pytest.mark.parametrize("attention", ["prefix", "block_causal"])
def test_blocks_of_one_token_take_one_pass_each_and_are_exact(attention: str) -> None:
    """The only mask is that of the token itself, so further draws would repeat it."""
    model, data = random_model(), rows(6)
    if attention == "block_causal":
        model.block_size = 1
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found = measure(model, data, BLOCK | {"block_size": 1, "block_attention": attention}, n_draws=16, batch_size=6)
    assert len(passes) == (1 if attention == "block_causal" else LENGTH)
    assert found.exact
    assert found.mask_error == 0
    if attention == "prefix":
        assert padding_of(data).any()
        np.testing.assert_allclose(found.per_row, enumerated(model, data, 1, ~padding_of(data)), rtol=1e-5)
        assert not found.padding.any(), "what follows the answer does not bear on it"


def padding_of(data: ArrayData) -> np.ndarray:
    """Positions after the first EOS that is not of the prompt, bool [N, L]."""
    ends = (data.tokens == 0) & ~data.prompt_mask
    return (ends.cumsum(1) - ends > 0) & ~data.prompt_mask


def test_the_part_for_padding_is_that_after_the_first_end() -> None:
    model, data = random_model(), rows(6)
    found = measure(model, data, BLOCK, n_draws=1000)
    expected = np.array(enumerated(model, data, 3, padding_of(data)))
    assert expected.any()
    np.testing.assert_allclose(found.padding, expected, rtol=0.05)
    assert (found.padding < found.per_row).all()
    assert found.padding_per_token == pytest.approx(found.padding.sum() / found.n_tokens.sum())


@torch.no_grad()
def test_an_autoregressive_model_gets_the_chain_rule_up_to_the_first_end() -> None:
    model, data = random_model(causal=True), rows(7)
    model.shifted = True
    found = measure(model, data, {"name": "autoregressive"}, n_draws=2)
    assert found.exact
    assert found.mask_error == 0
    assert not found.padding.any()
    for row in range(7):
        tokens, expected, n = torch.from_numpy(data.tokens[row]), 0.0, 0
        for place in (place for place in range(1, LENGTH) if not data.prompt_mask[row, place]):
            expected -= float(oracle.log_softmax(model.logits(tokens[None, :place])[0, -1])[tokens[place]])
            n += 1
            if tokens[place] == 0:
                break
        assert found.per_row[row] == pytest.approx(expected, rel=1e-5)
        assert found.n_tokens[row] == n


@pytest.mark.parametrize("objective", [UNIFORM, BLOCK], ids=["full", "blocks"])
def test_a_row_has_the_same_masks_in_every_batch_and_draws_nothing_from_generators(objective: dict[str, Any]) -> None:
    model, data = random_model(), rows(9)
    state = torch.get_rng_state()
    whole = measure(model, data, objective, n_draws=4, batch_size=9)
    assert torch.equal(torch.get_rng_state(), state)
    part = ArrayData(data.tokens[:4], data.prompt_mask[:4], MASK_ID, eos_id=0)
    np.testing.assert_allclose(measure(model, part, objective, 4, 3).per_row, whole.per_row[:4], rtol=1e-5)


def test_the_error_of_a_ratio_is_that_of_drawn_rows() -> None:
    """Rows with more tokens have more nats: the error of the ratio is smaller than that of the sum."""
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(5, 50, (2000, 40))
    nats = n_tokens * 2.0 + rng.normal(size=n_tokens.shape) * n_tokens
    ratios = nats.sum(1) / n_tokens.sum(1)
    stated = np.mean([ratio_error(nats[i], n_tokens[i]) for i in range(2000)])
    assert stated == pytest.approx(ratios.std(), rel=0.06)
    assert math.isnan(ratio_error(nats[0, :1], n_tokens[0, :1]))
    # With equal numbers of tokens it is that of a mean.
    assert ratio_error(np.array([1.0, 3.0]), np.array([2, 2])) == pytest.approx(0.5)


@pytest.mark.parametrize("differs", ["nothing", "a token", "a prompt"])
def test_a_difference_is_given_only_for_the_same_rows_and_prompts(
    differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sudoku boards in place with other clues have the same tokens."""
    first, second = rows(4), rows(4)
    if differs == "a token":
        second.tokens[0, -1] += 1
    elif differs == "a prompt":
        second.prompt_mask[0, 1] ^= True
    config = config_of(UNIFORM)
    monkeypatch.setattr(command, "start_world", lambda device: World(0, 1, CPU))
    data = {
        name: SimpleNamespace(validation=each, tokenizer=None) for name, each in (("first", first), ("second", second))
    }
    monkeypatch.setattr(
        command,
        "load_model",
        lambda name, overrides: SimpleNamespace(
            model=random_model(), config=SimpleNamespace(**vars(config), open_data=lambda: data[name])
        ),
    )
    monkeypatch.setattr(command, "likelihood", lambda model, _, *rest, **more: likelihood(model, config, *rest, **more))
    found = command.compare(["first", "second"], [], 4, 2)
    assert (found[1].difference is None) == (differs != "nothing")
    assert command.table(found)[0].startswith("The first 4 held-out rows.")
    data["second"].validation = ArrayData(second.tokens[:3], second.prompt_mask[:3], MASK_ID, eos_id=0)
    shorter = command.compare(["first", "second"], [], 4, 2)
    assert command.table(shorter)[0].startswith("The first 4 and 3 held-out rows.")
    (single, _) = command.compare(["first", "second"], [], 1, 2)
    assert (single.standard_error, single.difference_error) == (None, None), "JSON has no nan"


def test_checkpoints_are_compared_with_the_first_per_token_and_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first, not with the one before; lower is better, so a negative difference is better than the first."""
    data, nats, n_tokens = rows(4), np.array([3.0, 4.0, 9.0, 5.0]), np.array([2, 3, 5, 4])
    gaps = {"one": np.zeros(4), "two": np.array([1.0, 2.0, 1.5, 0.5]), "three": np.array([-1.0, 0.5, -2.0, -0.5])}

    def found(loaded: Any, *_: Any, **__: Any) -> Likelihood:
        exact = loaded.name == "three"
        return Likelihood(exact, nats + gaps[loaded.name], np.ones(4), n_tokens, 0.0 if exact else 0.49)

    def load(name: str, overrides: list[str]) -> Any:
        return SimpleNamespace(name=name, config=config_of(UNIFORM))

    monkeypatch.setattr(command, "start_world", lambda device: World(0, 1, CPU))
    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr(command, "_open_held_out", lambda config: SimpleNamespace(validation=data))
    monkeypatch.setattr(command, "_measure", found)
    monkeypatch.setattr(command, "count_answer_bytes", lambda data, n_rows: 30)
    results = command.compare(list(gaps), [], 4, 16)
    assert [each.checkpoint for each in results] == list(gaps)
    assert [each.n_draws for each in results] == [16, 16, 0]
    for result, gap in zip(results, gaps.values(), strict=True):
        assert (result.n_rows, result.n_tokens) == (4, 14)
        assert result.nats_per_token == pytest.approx((21 + gap.sum()) / 14)
        assert result.padding_per_token == pytest.approx(4 / 14)
        assert result.bits_per_byte == pytest.approx((21 + gap.sum()) / math.log(2) / 30)
        assert result.difference == pytest.approx(gap.sum() / 14)
        assert result.difference_error == pytest.approx(ratio_error(gap, n_tokens))
    *_, one, two, three = (line.strip("| ").split(" | ") for line in command.table(results))
    assert one == ["one", "14", "<= 1.5 (0.3)", "0.29", "0.098", "-", "<= 1.01", "16"]
    assert two == ["two", "14", "<= 1.857 (0.38)", "0.29", "0.098", "+0.357 (0.22)", "<= 1.25", "16"]
    assert three == ["three", "14", "1.286 (0.2)", "0.29", "0", "-0.214 (0.26)", "0.8656", "exact"]


def test_the_bytes_are_those_of_the_answers_of_the_measured_rows() -> None:
    """Bytes, not letters or tokens, of the text between prompt and EOS."""
    letters = "\0abcdö"  # token 0 is EOS
    tokenizer = SimpleNamespace(
        eos_token_id=0, decode=lambda tokens, skip_special_tokens: "".join(letters[token] for token in tokens)
    )
    tokens = np.array([[1, 2, 5, 0, 0, 0], [1, 1, 1, 5, 5, 0], [1, 2, 3, 4, 1, 2]])
    prompt_mask = np.arange(6) < np.array([[1], [3], [2]])
    held_out = ArrayData(tokens, prompt_mask, MASK_ID, eos_id=0)
    data: Any = SimpleNamespace(tokenizer=tokenizer, validation=held_out)
    assert [command.count_answer_bytes(data, n_rows) for n_rows in (1, 2, 3, 9)] == [3, 7, 11, 11]
    data.tokenizer = None
    assert command.count_answer_bytes(data, 3) is None


def test_a_measurement_asks_before_every_batch_whether_to_go_on() -> None:
    """Rows of several batches; an exception ends it, which is how an evaluation answers a signal."""
    model, data = random_model(), rows(9)
    passes: list[str] = []
    model.register_forward_hook(lambda *_: passes.append("pass"))
    for n_allowed in (0, 3):
        passes.clear()

        def ask(n_allowed: int = n_allowed) -> None:
            if passes.count("asked") == n_allowed:
                raise KeyboardInterrupt
            passes.append("asked")

        with pytest.raises(KeyboardInterrupt):
            likelihood(model, config_of(UNIFORM), data, World(0, 1, CPU), n_rows=9, n_draws=2, before_pass=ask)
        assert passes == ["asked", "pass"] * n_allowed


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_command_measures_in_eval_mode_and_in_the_precision_of_training(precision: str) -> None:
    """As the evaluation of a run does, so that both give the same figure."""
    config = config_of(UNIFORM)
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
    model = random_model().train()
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda *_: seen.append((torch.is_autocast_enabled("cpu"), model.training)))
    loaded, data = SimpleNamespace(model=model, config=config), SimpleNamespace(validation=rows(2))
    command._measure(loaded, data, World(0, 1, CPU), n_rows=2, n_draws=2, bar=None)
    assert seen == [(precision == "bfloat16", False)] * 2


def test_two_processes_report_once_what_one_does(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(PUMA, data_dir)
    settings["training"]["max_steps"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    train.main(["--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run")])
    words = [str(tmp_path / "run"), "--rows", "5", "--draws", "2", "--json"]
    capsys.readouterr()
    command.main([*words, str(tmp_path / "alone.json")])
    together = run_ranks(2, "-m", "eval.likelihood", *words, tmp_path / "together.json")
    assert together.returncode == 0, together.stderr
    assert together.stdout == capsys.readouterr().out
    (one,), (two,) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "together"))
    assert two.keys() == one.keys()
    assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-5)
    assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-4)


def test_options_may_come_before_more_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "compare", lambda *words: asked.append(words))
    monkeypatch.setattr(command, "table", lambda rows: ["table"])
    command.main(["first", "--rows", "4", "second", "training.seed=1"])
    assert asked == [(["first", "second"], ["training.seed=1"], 4, 16)]


def test_the_file_is_checked_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "compare", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as stop:
        command.main(["run", "--json", str(tmp_path)])
    assert stop.value.code == 2
    assert f"--json {tmp_path} is a folder" in capsys.readouterr().err
