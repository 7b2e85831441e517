"""The benchmark runs from end to end, and what it compares with computes the same."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PUMA, ROOT, run_python
from helpers import random_generator, random_log_probs, random_model
from torch import Tensor

from bench import dense
from bench.__main__ import main
from bench.arithmetic import arithmetic
from bench.head import dense as dense_head
from bench.head import ours as our_head
from bench.head import random_problem, torch_chunked
from bench.measure import interleave, peak_of
from bench.rows import synthetic_rows
from bench.step import exponent
from config import Config, SamplingRule
from data.stream import SequenceStream
from data.sudoku import check_boards
from model.transformer import build_model
from progressive import PumaPool, draw_target
from runtime.config_file import parse_config, read_config
from runtime.distributed import start_world
from samplers.full import sample_full
from training.run import Run, build_run
from training.update import Updater

KEYS = {"name", "ours_ms", "dense_ms", "ratio", "ours_peak_gib", "dense_peak_gib"}
CPU = torch.device("cpu")
QUICK = ["--iterations", "2", "--seconds", "0"]


def bench(*arguments: object, json_file: Path) -> list[dict]:
    """Rows of a benchmark that runs in this process."""
    main([*map(str, arguments), "--json", str(json_file), *QUICK])
    rows = json.loads(json_file.read_text())
    assert all(entry.keys() >= KEYS | {"machine", "torch", "date", "command"} for entry in rows)
    return rows


# The plain form has no deeper pool.
PLAIN = PUMA | {"pool_batches": 1}


def tiny_config(config_file, **changes) -> Config:
    return read_config(config_file(**changes))


# The commands.


@pytest.mark.slow
def test_step_as_a_command_measures_memory_too(config_file, tmp_path):
    file = tmp_path / "rows.json"
    result = run_python("-m", "bench", "step", "--config", config_file(PLAIN), "--json", file, *QUICK)
    assert result.returncode == 0, result.stderr
    rows = {entry["name"]: entry for entry in json.loads(file.read_text())}
    assert rows.keys() == {"puma", "uniform"}
    for entry in rows.values():
        assert entry.keys() >= KEYS
        assert entry["ratio"] == entry["dense_ms"] / entry["ours_ms"] > 0
        assert 0 < entry["ours_peak_gib"] < 2
        assert 0 < entry["dense_peak_gib"] < 2
    assert "PUMA / uniform, ours" in result.stdout


def test_step_with_other_sizes(config_file, tmp_path):
    options = ["--batch", 3, "--length", 24, "--vocab", 50, "--no-memory"]
    rows = bench("step", "--config", config_file(PLAIN), *options, json_file=tmp_path / "rows.json")
    assert [entry["name"] for entry in rows] == ["puma", "uniform"]
    for entry in rows:
        assert (entry["batch"], entry["length"], entry["vocab"]) == (3, 24, 50)
        assert entry["ours_peak_gib"] is None


@pytest.mark.parametrize("name", ["uniform", "autoregressive"])
def test_step_of_other_objectives(config_file, tmp_path, name):
    rows = bench("step", "--config", config_file({"name": name}), "--no-memory", json_file=tmp_path / "rows.json")
    assert [entry["name"] for entry in rows] == [name]


def test_step_on_the_shape_of_tinygsm_needs_no_files(config_file, tmp_path):
    """The shipped settings with a small model; their data is not on disk."""
    small = ["model.hidden_size=8", "model.intermediate_size=8", "model.num_hidden_layers=1"]
    rows = bench(
        "step", "--config", ROOT / "yaml_files" / "tinygsm_puma.yaml", "--batch", 2, "--length", 32, "--vocab", 5000,
        "--no-memory", *small, "model.num_attention_heads=2", "training.device=cpu", json_file=tmp_path / "rows.json",
    )  # fmt: skip
    assert [entry["length"] for entry in rows] == [32, 32]


def test_profile(config_file, tmp_path, capsys):
    """The products of the model are among the dearest operations, and shares are of one whole."""
    rows = bench("step", "--config", config_file(PLAIN), "--profile", json_file=tmp_path / "rows.json")
    assert "aten::mm" in {entry["name"] for entry in rows}
    shares = [float(entry["share"].removesuffix("%")) for entry in rows]
    assert shares == sorted(shares, reverse=True)
    assert 20 < sum(shares) <= 100.5
    assert all(entry["ours_ms"] > 0 and entry["n_calls"] > 0 for entry in rows)
    assert "Where the time goes" in capsys.readouterr().out


@pytest.mark.slow
def test_sizes(config_file, tmp_path, capsys):
    rows = bench("step", "--config", config_file(PLAIN), "--sizes", json_file=tmp_path / "rows.json")
    for axis in ("batch", "length", "vocab"):
        assert sum(entry["axis"] == axis for entry in rows) == 4
    assert capsys.readouterr().out.count("the arithmetic as size^") == 3


def test_head(tmp_path):
    sizes = ["--positions", 40, "--width", 8, "--vocab", 100, "--no-memory"]
    (entry,) = bench("head", *sizes, json_file=tmp_path / "rows.json")
    assert entry["torch_ms"] is None or entry["torch_ms"] > 0
    assert 0 < entry["n_scored"] < 40


def test_sample(tmp_path):
    options = ["--small", "--steps", 2, "--rows", 3, "--no-memory"]
    rows = bench("sample", *options, json_file=tmp_path / "rows.json")
    assert [entry["name"] for entry in rows] == ["sudoku", "tinygsm"]
    assert all(entry["agreement"] == "100.0%" for entry in rows)


@pytest.mark.slow
def test_data(tmp_path):
    rows = {entry["name"]: entry for entry in bench("data", "--rows", 40, json_file=tmp_path / "rows.json")}
    assert rows.keys() == {"generator", "stream", "tokens", "grader"}
    assert rows["generator"]["dense_ms"] is None
    assert rows["grader"]["ratio"] > 0


def test_block_is_passed_on(tmp_path, monkeypatch, capsys):
    from bench import block

    monkeypatch.setattr(block, "run", lambda path: [{"path": str(path)}])
    main(["block", "--json", str(tmp_path / "rows.json")])
    assert json.loads(capsys.readouterr().out) == [{"path": str(tmp_path / "rows.json")}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--config", "no.yaml"], "no.yaml"),
        (["step", "--config", "yaml_files/sudoku_puma.yaml", "objective.uniform_fraction=0.5"], "no plain form"),
        (["step", "--config", "yaml_files/sudoku_puma.yaml", "objective.pool_batches=2"], "no plain form"),
        (["step", "--config", "yaml_files/sudoku_puma.yaml", "--memory-of", "x/ours"], "x/ours"),
    ],
)
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--no-memory"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# The plain paths compute what the fast ones do.


def our_run(config: Config, tmp_path: Path) -> Run:
    return build_run(config, start_world("cpu"), tmp_path, synthetic_rows(config))


@pytest.mark.parametrize("name", ["puma", "uniform", "autoregressive"])
def test_a_step_changes_the_weights_alike(config_file, tmp_path, name):
    objective = {"name": name} | ({"n_stages": 3, "collapse_threshold": 0.9} if name == "puma" else {})
    config = tiny_config(config_file, objective=objective, training__warmup_steps=0, training__weight_decay=0.0)
    run = our_run(config, tmp_path)
    model = build_model(config)
    model.load_state_dict(run.model.state_dict())
    batches = list(run.objective.microbatches(0))
    copies = [(batch.xt.clone(), batch.x0.clone(), batch.weight.clone()) for batch in batches]  # the pool moves on

    class Given:
        """The batch of the fast path's objective."""

        def batch(self) -> dense.Batch:
            (batch,) = copies
            return batch

        def advance(self, confidence: torch.Tensor) -> None:
            self.confidence = confidence

    given: Any = Given()
    run_objective: Any = run.objective
    run_objective.microbatches = lambda step: iter(batches)
    trainer = dense.DenseTrainer(model, config, None, CPU)
    seen: list[Tensor] = []
    run_objective.observe = lambda batch, confidence: seen.append(confidence)
    Updater(run).step()
    trainer.step(given)
    torch.testing.assert_close(torch.tensor(trainer.loss), run.loss_sum.float())
    scored = copies[0][2] != 0
    torch.testing.assert_close(given.confidence[scored], seen[0][scored])
    for ours, plain in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_loss_and_gradients_are_the_same(shifted):
    """Before the optimizer, whose first step hides the size of a gradient."""
    model = random_model()
    model.shifted = shifted
    xt, x0 = torch.randint(0, 23, (2, 3, 7), generator=random_generator(1))
    weight = torch.rand(3, 7, generator=random_generator(2)) * (torch.rand(3, 7, generator=random_generator(3)) < 0.5)
    scores = model(xt, x0, weight)
    scores.loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss, confidence = dense.score(dense.aligned_logits(model, xt), x0, weight)
    loss.backward()
    torch.testing.assert_close(loss, scores.loss)
    torch.testing.assert_close(confidence[weight != 0], scores.confidence[weight != 0])
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("collapse_threshold", [None, 0.8])
def test_the_pool_advances_alike(config_file, collapse_threshold):
    n_rows, n_stages = 24, 5
    objective = {"name": "puma", "n_stages": n_stages, "collapse_threshold": collapse_threshold}
    config = tiny_config(config_file, objective=objective)
    ours = PumaPool(_queue(config, n_rows), n_rows, n_stages, collapse_threshold, random_generator(0))
    for step in range(4):
        confidence = random_log_probs(ours.x0.shape, seed=step)
        targets = draw_target(ours.stage + 1, n_stages, ours.maskable.sum(1), _twin(ours.generator))
        rows = [
            dense.Row(ours.x0[i].clone(), ours.maskable[i].clone(), ours.masked[i].clone(), int(ours.stage[i]))
            for i in range(n_rows)
        ]
        finished = [
            dense.advance_row(row, confidence[i], int(targets[i]), n_stages, collapse_threshold)
            for i, row in enumerate(rows)
        ]
        n_finished = int(ours.n_finished)
        ours.advance(confidence)
        assert int(ours.n_finished) - n_finished == sum(finished)
        for i, row in enumerate(rows):
            if not finished[i]:
                assert torch.equal(ours.masked[i], row.masked)
                assert int(ours.stage[i]) == row.stage
    assert int(ours.n_finished) > 0


def _queue(config: Config, n_rows: int):
    from data.row_queue import RowQueue

    return RowQueue(SequenceStream(synthetic_rows(config), 0), n_rows, CPU)


def _twin(generator: torch.Generator) -> torch.Generator:
    """A generator that will draw the same."""
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin


def test_plain_batches_are_masked_and_weighted_as_ours(config_file):
    for objective in ({"name": "puma", "n_stages": 3}, {"name": "uniform"}):
        config = tiny_config(config_file, objective=objective)
        data = synthetic_rows(config)
        plain = dense.build_dense_objective(config, SequenceStream(data, 0), CPU)
        for _ in range(5):
            xt, x0, weight = plain.batch()
            masked = xt == config.mask_id
            assert torch.equal(xt[~masked], x0[~masked])
            assert torch.equal(weight != 0, masked)
            torch.testing.assert_close(weight.sum(1), torch.full((len(x0),), 1 / len(x0)))
            assert masked.any(1).all()
            assert not masked[:, : data.length // 2].any(), "prompts"
            plain.advance(random_log_probs(x0.shape, seed=0))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_samples_are_the_same(tokens_per_step, shifted):
    model, mask_id = random_model(), 22
    model.shifted = shifted
    xt = torch.randint(0, 22, (5, 9), generator=random_generator(0))
    xt[torch.rand(5, 9, generator=random_generator(1)) < 0.7] = mask_id
    xt[:, 0] = 1  # a shifted model says the same of tokens 0 and 1, and rounding would break the tie
    xt[:, 4] = 2  # a row that is masked throughout scores all positions alike, and rounding would choose
    xt[3] = 1  # nothing to fill
    ours = sample_full(model, xt, mask_id, SamplingRule(tokens_per_step=tokens_per_step)).tokens
    assert torch.equal(dense.sample(model, xt, mask_id, tokens_per_step), ours)


def test_heads_agree():
    options = Namespace(positions=40, width=8, vocab=100, scored=0.4)
    problem = random_problem(options, CPU, None)
    scored = problem.weight != 0
    loss, confidence = our_head(problem)
    gradients = problem.gradients()
    others: list[Any] = [dense_head]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        others.append(lambda problem: torch_chunked(problem, with_confidence=True))
    for other in others:
        other_loss, other_confidence = other(problem)
        torch.testing.assert_close(other_loss, loss)
        torch.testing.assert_close(other_confidence[scored], confidence[scored])
        for mine, its in zip(gradients, problem.gradients(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


# What the figures rest on.


@pytest.mark.parametrize("size", [4, 6, 9])
def test_synthetic_boards_are_legal_and_differ(config_file, size):
    changes = {"data__size": size, "model__vocab_size": size + 2, "data__min_clues": 8, "data__max_clues": 12}
    changes["model__learned_positions"] = None
    data: Any = synthetic_rows(tiny_config(config_file, **changes))
    assert check_boards(data.boards, size) == []
    assert len({board.tobytes() for board in data.solutions}) > 50  # of size 4 there are few


def test_random_rows_hold_no_mask_and_short_prompts():
    config = read_config(ROOT / "yaml_files" / "tinygsm_puma.yaml")
    data = synthetic_rows(config)
    tokens, prompt_mask = data.rows(torch.arange(200).numpy())
    assert tokens.shape == prompt_mask.shape == (200, 512)
    assert tokens.max() < config.mask_id
    assert 0.13 < prompt_mask.mean() < 0.19


def test_arithmetic_counts_every_matrix(config_file):
    config = tiny_config(config_file)
    model = build_model(config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    work = arithmetic(config.model, n_rows=3, length=10, n_scored=7)
    assert work.backbone == 6 * matrices * 30
    assert work.head == 6 * model.lm_head.weight.numel() * 7
    longer = arithmetic(config.model, n_rows=3, length=20, n_scored=7)
    assert (longer.backbone, longer.attention) == (2 * work.backbone, 4 * work.attention)


def test_exponent_of_a_power():
    assert exponent([1, 2, 4, 8], [3 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_paths_are_called_in_turn():
    called: list[str] = []

    def path(name: str) -> Callable[[], None]:
        def call() -> None:
            called.append(name)
            time.sleep(0.06)

        return call

    calls = {name: path(name) for name in "ab"}
    times = interleave(calls, CPU, n_rounds=4, seconds=0)
    assert called[:4] == ["a", "b", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}, "three rounds at least"


def test_peak_counts_what_a_call_needs_for_a_moment():
    peak = peak_of(lambda: lambda: torch.ones(200 << 18).sum(), CPU)
    assert 0.15 < peak < 0.5, "200 MiB"


def test_a_plain_step_in_parts(config_file):
    """A plain step in parts gives the same loss as at once."""
    config = tiny_config(config_file, objective={"name": "uniform"})
    raw = config.model_dump(mode="json")
    raw["training"]["micro_batch_size"] = 2
    model = random_model(vocab_size=6)
    batch = dense.build_dense_objective(config, SequenceStream(synthetic_rows(config), 0), CPU).batch()
    whole, parts = (dense.DenseTrainer(model, each, None, CPU) for each in (config, parse_config(raw, "test")))
    assert [len(part[0]) for part in parts._parts(batch)] == [2, 2, 2, 2]
    losses = [dense.score(model.logits(xt), x0, weight)[0].item() for xt, x0, weight in parts._parts(batch)]
    (only,) = whole._parts(batch)
    assert sum(losses) == pytest.approx(dense.score(model.logits(only[0]), *only[1:])[0].item(), rel=1e-5)
