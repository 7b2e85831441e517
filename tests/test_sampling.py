"""Sampling against the oracle, its independence of the batch, and its random draws."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT, UNIFORM, tiny_gsm_settings, tiny_settings
from helpers import assert_distribution, assert_same_samples, model_settings, random_generator, random_model
from PIL import Image, ImageSequence
from test_data_text_pairs import LENGTH, VOCAB, write_pairs
from torch import Tensor

import sampling
import train
from config import Confidence, SamplingRule
from data.dataset import AnswerVerdict
from data.sudoku import Sudoku, parse_puzzle
from data.text import decode_whole
from eval import evaluate as evaluation
from model.attention import KeyValueCache
from model.hub import pack_run
from model.transformer import Transformer, build_model
from runtime.config_file import parse_config
from runtime.distributed import World
from samplers.full import sample_full
from samplers.step import Samples

MASK_ID = 22
THRESHOLD = 0.3  # fills some positions of `random_model` early, not all
RULES: list[Confidence] = ["top_prob", "top_prob_margin", "neg_entropy"]
every_rule = pytest.mark.parametrize("rule", [*RULES, "random"])
REVISING: list[dict[str, Any]] = [
    {"revise": "remask", "remask_share": 0.3},
    {"revise": "plan"},
    {"revise": "running_confidence"},
]
FILLING: list[dict[str, Any]] = [
    {"threshold": THRESHOLD},
    {"threshold": 0.15, "kl_bound": 0.15},
    {"entropy_bound": 0.0},
    {"entropy_bound": 2.5},
    {"entropy_bound": 2.5, "confidence": "neg_entropy"},
    {"entropy_bound": 100.0},
]
OTHER_RULES = [*FILLING, *({**each, "n_passes": 6} for each in REVISING)]


def masked_rows(n_rows: int, length: int, seed: int = 0) -> Tensor:
    """Rows of all kinds: the first with nothing masked, the second with everything but one position, others between.

    Not everything: positions of a row that holds one token alone are all equal to a bidirectional model.
    """
    generator = random_generator(seed)
    xt = torch.randint(MASK_ID, (n_rows, length), generator=generator)
    share = torch.rand(n_rows, 1, generator=generator)
    share[:2] = torch.tensor([[0.0], [1.0]])
    masked = torch.rand(n_rows, length, generator=generator) < share
    masked[:, length // 2] = False
    return xt.masked_fill(masked, MASK_ID)


def model_of_one_distribution(probabilities: list[float]) -> tuple[Transformer, int]:
    """A model that gives every masked position these probabilities; the mask token, its last, has a larger logit yet.

    Its layers add nothing to the residual stream, where the mask token stands alone on the first axis.
    """
    width, mask_id = 4, len(probabilities)
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = Transformer(model_settings(vocab_size=mask_id + 1, rms_norm_eps=1e-12, **shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
        model.model.embed_tokens.weight[mask_id, 0] = 1.0
        log_p = torch.tensor([*probabilities, 100.0]).log()
        model.lm_head.weight[:, 0] = log_p / width**0.5  # the last norm makes the 1 a 2
    return model, mask_id


def rows_alone(model: Transformer, xt: Tensor, rule: SamplingRule, seed: int) -> Samples:
    """Each row sampled in a batch of its own, under the number that it has in xt."""
    single = [
        sample_full(model, xt[i : i + 1], MASK_ID, rule, seed=seed, row_ids=torch.tensor([i])) for i in range(len(xt))
    ]
    return Samples(
        torch.cat([one.tokens for one in single]),
        torch.cat([one.order for one in single]),
        torch.cat([one.nfe for one in single]),
        torch.cat([one.confidence for one in single]),
    )


# Against the oracle


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 50])
@pytest.mark.parametrize("threshold", [None, THRESHOLD])
def test_sampling_equals_the_oracle(rule: Any, tokens_per_step: int, threshold: float | None) -> None:
    model, xt = random_model(), masked_rows(6, 12)
    options: dict[str, Any] = {"tokens_per_step": tokens_per_step, "threshold": threshold}
    found = sample_full(model, xt, MASK_ID, SamplingRule(confidence=rule, **options))
    with torch.no_grad():
        expected = [oracle.sample_row(model.logits, row, MASK_ID, rule, **options) for row in xt]
    assert found.tokens.tolist() == [row.tokens for row in expected]
    assert found.order.tolist() == [row.order for row in expected]
    assert found.nfe.tolist() == [row.nfe for row in expected]


@pytest.mark.parametrize("options", FILLING, ids=str)
@torch.no_grad()
def test_rules_that_choose_how_many_equal_the_oracle(options: dict[str, Any]) -> None:
    model, xt = random_model(), masked_rows(8, 12)
    found = sample_full(model, xt, MASK_ID, SamplingRule(**options))
    options = {"rule": options.get("confidence", "top_prob")} | options
    options.pop("confidence", None)
    assert_rows(found, [oracle.sample_row(model.logits, row, MASK_ID, **options) for row in xt])


@pytest.mark.parametrize("n_passes", [1, 4, 9, 30])
@pytest.mark.parametrize("options", REVISING, ids=str)
@torch.no_grad()
def test_rules_that_revise_equal_the_oracle_and_keep_to_their_passes(options: dict[str, Any], n_passes: int) -> None:
    model, xt = random_model(), masked_rows(8, 12)
    rule = SamplingRule(**options, n_passes=n_passes)
    found = sample_full(model, xt, MASK_ID, rule)
    assert_rows(
        found,
        [
            oracle.sample_row_revising(model.logits, row, MASK_ID, rule.revise, n_passes, rule.remask_share)
            for row in xt
        ],
    )
    assert int(found.nfe.max()) <= n_passes


def assert_rows(found: Samples, expected: list[oracle.SampledRow]) -> None:
    assert found.tokens.tolist() == [row.tokens for row in expected]
    assert found.order.tolist() == [row.order for row in expected]
    assert found.nfe.tolist() == [row.nfe for row in expected]


@pytest.mark.parametrize("options", OTHER_RULES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_rule_changes_what_is_given_or_leaves_a_mask(options: dict[str, Any], temperature: float) -> None:
    model, xt = random_model(), masked_rows(8, 12)
    found = sample_full(model, xt, MASK_ID, SamplingRule(**options, temperature=temperature), record=2)
    masked = xt == MASK_ID
    assert torch.equal(found.tokens[~masked], xt[~masked])
    assert not (found.tokens == MASK_ID).any()
    assert torch.equal(found.order > 0, masked)
    assert torch.equal(found.order.amax(1), found.nfe), "every pass writes something, the last one too"
    assert torch.equal(found.confidence.isnan(), ~masked)
    if "revise" in options:
        history = [found.history(row) for row in range(len(xt))]
        again = [
            bool(((before.tokens != MASK_ID) & (after.tokens == MASK_ID)).any())
            for passes in history
            for before, after in itertools.pairwise(passes)
        ]
        assert any(again), "or nothing was revised"


def test_the_rules_that_choose_how_many_differ_here() -> None:
    model, xt = random_model(), masked_rows(8, 12)
    results = [sample_full(model, xt, MASK_ID, SamplingRule(**options)) for options in [{}, *OTHER_RULES]]
    distinct = {str(each.order.tolist()) for each in results}
    assert len(distinct) == len(results) - 1, "a bound of 0 is one position per pass; all else differs"


def test_the_rules_of_the_oracle_differ_here() -> None:
    """Or the test above could not tell them apart; and the threshold fills some positions early, not all."""
    model, xt = random_model(), masked_rows(6, 12)
    orders = {rule: sample_full(model, xt, MASK_ID, SamplingRule(confidence=rule)).order for rule in RULES}
    assert not torch.equal(orders["top_prob"], orders["top_prob_margin"])
    assert not torch.equal(orders["top_prob"], orders["neg_entropy"])
    assert not torch.equal(orders["top_prob_margin"], orders["neg_entropy"])
    early = sample_full(model, xt, MASK_ID, SamplingRule(threshold=THRESHOLD))
    assert 1 < int(early.nfe[1]) < 11


@torch.no_grad()
def test_entropy_confidence_fills_the_least_uncertain_position_first() -> None:
    """The published code's fills the most uncertain."""
    model, xt = random_model(), masked_rows(2, 12)[1:]
    entropy = {}
    for position in (xt[0] == MASK_ID).nonzero().flatten().tolist():
        log_p = oracle.log_softmax(model.logits(xt)[0, position, :MASK_ID])  # the mask token is the last
        entropy[position] = -float((log_p.exp() * log_p).sum())
    order = sample_full(model, xt, MASK_ID, SamplingRule(confidence="neg_entropy")).order[0].tolist()
    assert order.index(1) == min(entropy, key=lambda position: entropy[position])


# What every way of sampling keeps to


@every_rule
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_given_tokens_stay_and_the_masked_are_filled_in_order(
    rule: Any, temperature: float, tokens_per_step: int
) -> None:
    model, xt = random_model(), masked_rows(8, 12)
    before, masked = xt.clone(), xt == MASK_ID
    found = sample_full(
        model, xt, MASK_ID, SamplingRule(confidence=rule, temperature=temperature, tokens_per_step=tokens_per_step)
    )
    assert torch.equal(xt, before)  # the argument is not written to
    assert torch.equal(found.tokens[~masked], xt[~masked])
    assert not (found.tokens == MASK_ID).any()
    assert torch.equal(found.order > 0, masked)
    n_masked = masked.sum(1).tolist()
    assert n_masked[:2] == [0, 11]
    assert found.nfe.tolist() == [-(-n // tokens_per_step) for n in n_masked]  # rounded up
    for order, n in zip(found.order.tolist(), n_masked, strict=True):
        steps = sorted(step for step in order if step)
        assert steps == [1 + rank // tokens_per_step for rank in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [*({"confidence": rule} for rule in [*RULES, "random"]), *OTHER_RULES], ids=str)
def test_a_row_does_not_depend_on_its_neighbours_or_the_batch_size(options: dict[str, Any], temperature: float) -> None:
    model, xt = random_model(), masked_rows(7, 12)
    rule = SamplingRule(**options, temperature=temperature)
    together = sample_full(model, xt, MASK_ID, rule, seed=5)
    assert_same_samples(together, rows_alone(model, xt, rule, seed=5))
    turned = sample_full(model, xt.flip(0), MASK_ID, rule, seed=5, row_ids=torch.arange(7).flip(0))
    parts = (turned.tokens, turned.order, turned.nfe, turned.confidence)
    assert_same_samples(together, Samples(*(part.flip(0) for part in parts)))


def test_finished_rows_leave_the_batch() -> None:
    """The network sees each row as often as its nfe says."""
    n_seen = []

    class Counting(Transformer):
        def hidden_states(self, xt: Tensor, cache: KeyValueCache | None = None) -> Tensor:
            n_seen.append(len(xt))
            return super().hidden_states(xt, cache)

    xt = masked_rows(7, 12)
    found = sample_full(Counting(model_settings()).eval(), xt, MASK_ID)
    assert len(n_seen) == int(found.nfe.max()) == 11
    assert n_seen == [int((found.nfe >= step).sum()) for step in range(1, 12)]


def test_nothing_to_fill() -> None:
    model = random_model()
    for xt in (torch.zeros(3, 5, dtype=torch.long), torch.empty(0, 5, dtype=torch.long)):
        found = sample_full(model, xt, MASK_ID)
        nothing = torch.full(xt.shape, torch.nan)
        assert_same_samples(found, Samples(xt, torch.zeros_like(xt), torch.zeros(len(xt), dtype=torch.long), nothing))


@every_rule
@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_the_mask_token_is_never_produced(rule: Any, temperature: float) -> None:
    """Though its logit is the largest; the published code can produce it, and then fills the position again."""
    model, mask_id = model_of_one_distribution([0.5, 0.3, 0.2])
    xt = torch.full((200, 6), mask_id)
    assert (model.logits(xt).argmax(2) == mask_id).all()
    found = sample_full(model, xt, mask_id, SamplingRule(confidence=rule, temperature=temperature))
    assert not (found.tokens == mask_id).any()
    assert (found.nfe == 6).all()


# Threshold and ties


@pytest.mark.parametrize(("threshold", "nfe"), [(None, 6), (0.69, 1), (0.71, 6)])
def test_all_above_the_threshold_are_filled_at_once(threshold: float | None, nfe: int) -> None:
    """Every position's best token has probability 0.7 once the mask token is struck out."""
    model, mask_id = model_of_one_distribution([0.1, 0.7, 0.2])
    found = sample_full(model, torch.full((2, 6), mask_id), mask_id, SamplingRule(threshold=threshold))
    assert (found.tokens == 1).all()
    assert found.nfe.tolist() == [nfe, nfe]


@pytest.mark.parametrize("rule", RULES)
def test_equal_confidences_are_filled_from_the_left(rule: Any) -> None:
    model, mask_id = model_of_one_distribution([0.1, 0.7, 0.2])
    found = sample_full(model, torch.full((1, 6), mask_id), mask_id, SamplingRule(confidence=rule, tokens_per_step=2))
    assert found.order.tolist() == [[1, 1, 2, 2, 3, 3]]


# Random draws


@pytest.mark.parametrize("tokens_per_step", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(temperature: float, tokens_per_step: int) -> None:
    """Both positions of a row independently, whether filled at one step or at two in random order."""
    probabilities = [0.5, 0.3, 0.2]
    model, mask_id = model_of_one_distribution(probabilities)
    found = sample_full(
        model,
        torch.full((20_000, 2), mask_id),
        mask_id,
        SamplingRule(confidence="random", temperature=temperature, tokens_per_step=tokens_per_step),
        seed=1,
    )
    single = torch.tensor(probabilities, dtype=torch.float64) ** (1 / temperature)
    single /= single.sum()
    pairs = found.tokens[:, 0] * 3 + found.tokens[:, 1]
    assert_distribution(pairs.bincount(minlength=9), torch.outer(single, single).flatten())


def test_tokens_are_drawn_anew_at_each_step() -> None:
    """The position whose draw is more probable is filled; what the other one had drawn is forgotten.

    So the first to be filled gets the rare token only where both have drawn it.
    """
    model, mask_id = model_of_one_distribution([0.7, 0.3])
    found = sample_full(model, torch.full((10_000, 2), mask_id), mask_id, SamplingRule(temperature=1.0))
    in_order = found.tokens.gather(1, found.order.argsort(1))
    expected = torch.outer(torch.tensor([0.91, 0.09]), torch.tensor([0.7, 0.3]))
    assert_distribution((in_order[:, 0] * 2 + in_order[:, 1]).bincount(minlength=4), expected.flatten())


def test_random_confidence_fills_in_any_order_equally_often_and_whatever_the_token() -> None:
    model, mask_id = model_of_one_distribution([0.5, 0.5])
    found = sample_full(
        model,
        torch.full((24_000, 3), mask_id),
        mask_id,
        SamplingRule(confidence="random", temperature=1.0, tokens_per_step=1),
    )
    orders = found.order @ torch.tensor([9, 3, 1])
    tokens = found.tokens @ torch.tensor([4, 2, 1])
    _, order_numbers = orders.unique(return_inverse=True)
    assert int(order_numbers.max()) == 5  # all six orders
    assert_distribution((order_numbers * 8 + tokens).bincount(minlength=48), torch.full((48,), 1 / 48))


def test_successive_seeds_and_rows_draw_independently() -> None:
    """Row 0 of one seed beside row 0 of the next, and row beside row."""
    model, mask_id = model_of_one_distribution([0.5, 0.5])
    first, second = (
        sample_full(
            model, torch.full((8000, 2), mask_id), mask_id, SamplingRule(temperature=1.0, tokens_per_step=2), seed=seed
        ).tokens
        for seed in (3, 4)
    )
    seeds = first[:, 0] * 2 + second[:, 0]
    rows = first[:-1, 1] * 2 + first[1:, 1]
    for pairs in (seeds, rows):
        assert_distribution(pairs.bincount(minlength=4), torch.full((4,), 0.25))


def test_a_seed_repeats_its_samples_and_another_does_not() -> None:
    model, xt = random_model(), masked_rows(6, 12)
    options: dict[str, Any] = {"temperature": 1.0, "confidence": "random"}
    first = sample_full(model, xt, MASK_ID, SamplingRule(**options), seed=1)
    torch.manual_seed(99)  # no draw depends on the global generator
    assert_same_samples(first, sample_full(model, xt, MASK_ID, SamplingRule(**options), seed=1))
    other = sample_full(model, xt, MASK_ID, SamplingRule(**options), seed=2)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.order, other.order)


def test_a_low_temperature_is_close_to_none() -> None:
    model, xt = random_model(), masked_rows(6, 12)
    cold = sample_full(model, xt, MASK_ID, SamplingRule(temperature=1e-6))
    assert_same_samples(cold, sample_full(model, xt, MASK_ID))


# The command


def test_a_puzzle_is_read_with_dots_or_zeros() -> None:
    assert parse_puzzle("12.40000.....004", 4) == [1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "has 2 cells"),
        ("1" * 17, "has 17 cells"),
        ("5" + "." * 15, r"contains \['5'\]"),
        ("x" * 16, r"contains \['x'\]"),
    ],
)
def test_a_wrong_puzzle_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_puzzle(text, 4)


PUZZLE, SOLUTION = "12.4............", "1234341221434321"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A run on 4x4 boards in place, of one step."""
    folder = tmp_path_factory.mktemp("sampling")
    settings = tiny_settings(dict(UNIFORM), data_dir)
    settings["data"]["layout"] = "in_place"
    settings["training"]["max_steps"] = 1
    (folder / "tiny.json").write_text(json.dumps(settings))
    train.main(["--config", str(folder / "tiny.json"), "--run-dir", str(folder / "run")])
    return folder / "run"


@pytest.mark.parametrize("layout", ["two_halves", "in_place"])
def test_the_command_prints_the_board_the_order_the_verdict_and_the_nfe(
    layout: str, config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(training__max_steps=1, data__layout=layout)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    capsys.readouterr()
    sampling.main(["--checkpoint", str(tmp_path / "run"), "--puzzle", PUZZLE, "--tokens-per-step", "3"])
    head, *board, legend, verdict, nfe = capsys.readouterr().out.splitlines()
    assert head.split() == ["filled", "board", "filled", "at", "step"]
    start = head.index("filled at step")
    steps = [int(number) for line in board for number in re.findall(r"\d+", line[start:])]
    assert sorted(steps) == [1 + rank // 3 for rank in range(len(steps))]
    assert legend.startswith("[5] clue")
    assert verdict.startswith("not solved: "), "an untrained model"
    assert nfe == f"{max(steps)} network forward evaluations"


def test_many_questions_from_options_files_and_standard_input(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are answered in order, whatever the batches; a .jsonl and a .csv file hold the same."""
    other = SOLUTION[:14] + ".."
    (tmp_path / "in.csv").write_text(f"puzzle,solution\n{PUZZLE},{SOLUTION}\n{other},{SOLUTION}\n")
    (tmp_path / "in.txt").write_text(f"{PUZZLE}\n\n{other}\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"puzzle": text}) + "\n" for text in (PUZZLE, other)))
    monkeypatch.setattr("sys.stdin", StringIO(f"\ufeff{PUZZLE}\n{other}\n"))  # as spreadsheets write
    found = []
    for i, questions in enumerate(
        [["--puzzle", PUZZLE, "--puzzle", other]]
        + [["--input", str(tmp_path / f"in.{suffix}")] for suffix in ("csv", "txt", "jsonl")]
        + [["--input", "-"]]
    ):
        out = tmp_path / f"{i}.jsonl"
        sampling.main(["--checkpoint", str(run_dir), *questions, "--batch-size", str(1 + i % 2), "--out", str(out)])
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[1:] == found[:1] * 4
    assert [answer["puzzle"] for answer in found[0]] == [PUZZLE, other]
    assert found[0][0].keys() == {"puzzle", "answer", "right", "verdict", "legal", "clues_kept", "n_wrong", "nfe"}
    assert [answer["nfe"] for answer in found[0]] == [13, 2]
    assert found[0][1]["right"] == (found[0][1]["answer"] == SOLUTION), "its only solution"
    n_right = sum(answer["right"] for answer in found[0])
    assert f"{n_right} of 2 right" in capsys.readouterr().out
    sampling.main(["--checkpoint", str(run_dir), "--input", str(tmp_path / "in.txt"), "--out", str(tmp_path / "a.csv")])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {key: str(value or "" if value is None else value) for key, value in row.items()} for row in found[0]
    ]
    sampling.main(["--checkpoint", str(run_dir), "--input", str(tmp_path / "in.txt")])
    printed = capsys.readouterr().out
    assert printed.index(PUZZLE) < printed.index("13 network") < printed.index(other) < printed.index("2 network")


def test_the_command_draws_by_its_seed_whatever_the_batches(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*options: str) -> str:
        sampling.main(["--checkpoint", str(run_dir), "--puzzle", PUZZLE, "--temperature", "1", *options])
        return capsys.readouterr().out

    capsys.readouterr()
    assert printed("--seed", "0") == printed() != printed("--seed", "1") == printed("--seed", "1")
    two = printed("--puzzle", PUZZLE)
    assert printed("--puzzle", PUZZLE, "--batch-size", "1") == two


def test_answers_that_nobody_can_judge_are_not_counted_as_wrong(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [AnswerVerdict("", right) for right in (True, None, False, None)]
    monkeypatch.setattr(Sudoku, "verdicts", lambda *_: verdicts)
    sampling.main(["--checkpoint", str(run_dir), *["--puzzle", PUZZLE] * 4])
    assert "1 of 2 right, 2 unknown" in capsys.readouterr().out


def test_colours_only_on_a_terminal_that_wants_them(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for variable in ("", "FORCE_COLOR", "NO_COLOR"):
        if variable:
            monkeypatch.setenv(variable, "1")
        sampling.main(["--checkpoint", str(run_dir), "--puzzle", PUZZLE])
        shown.append(capsys.readouterr().out)
    assert "\x1b" not in shown[0]
    color = re.compile(r"\x1b\[[0-9;]*[34][0-8][;m]")
    assert color.search(shown[1])
    assert not color.search(shown[2])
    assert [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in shown] == [shown[0]] * 3


def test_answers_in_python(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sampling.load(run_dir, "cpu")
    answers = model.solve([PUZZLE, "." * 16], SamplingRule(tokens_per_step=8))
    assert [answer.nfe for answer in answers] == [2, 2]
    assert answers[0].tokens.shape == answers[0].order.shape == answers[0].confidence.shape == (16,)
    assert np.array_equal(np.isnan(answers[0].confidence), answers[0].order == 0)
    assert answers[0].confidence.dtype == np.float32
    assert answers[0].verdict.right == (answers[0].verdict.answer == SOLUTION)
    assert model.solve([]) == []
    single = model.solve(PUZZLE, SamplingRule(tokens_per_step=8))
    assert np.array_equal(single.tokens, answers[0].tokens)
    with pytest.raises(ValueError, match="trace=True"):
        single.save_trace(tmp_path / "a.html")
    with pytest.raises(ValueError, match="complete: this model was trained on sudoku; use solve"):
        model.complete("1+1")
    with pytest.raises(ValueError, match=r"2 of 3 puzzles are invalid\n  question 1: .*\n  question 3: "):
        model.solve(["1", PUZZLE, "2"])
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        model.solve([PUZZLE], batch_size=0)
    with pytest.raises(ValueError, match="seed -1 must be at least 0 and less than 2"):
        model.solve([PUZZLE], seed=-1)
    assert list(model.answer_test([])) == []
    with pytest.raises(ValueError, match="device 'gpu' must be one of auto, cpu, cuda"):
        sampling.load(run_dir, "gpu")
    pack_run(str(run_dir), tmp_path / "packed")
    monkeypatch.setattr(sampling, "SHIPPED", tmp_path / "packed")
    assert sampling.load().solve(PUZZLE).nfe == 13
    monkeypatch.setattr(sampling, "SHIPPED", tmp_path / "none")
    with pytest.raises(ValueError, match="name a run directory"):
        sampling.load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--puzzle", "11" + "." * 14], "contradicting clues: row 1 has more than one 1, at row 1 column 1 and row 1"),
        (["--puzzle", SOLUTION], "is a finished, legal board"),
        (["--puzzle", PUZZLE[:-1]], "has 15 cells"),
        (["--prompt", "1+1"], "--prompt: this model was trained on sudoku; use --puzzle"),
        (["--puzzle", PUZZLE, "--puzzle", "1"], "--puzzle 2: puzzle '1' has 1 cells"),
        (["--input", "nowhere.txt"], "questions nowhere.txt cannot be read (No such file or directory)"),
        (["--input", "a.png"], "questions a.png cannot be read (its suffix is '.png'): give .txt, .csv, .jsonl"),
        (["--puzzle", PUZZLE, "--out", "a.txt"], "--out a.txt: the suffix must be .jsonl or .csv"),
        (["--puzzle", PUZZLE, "--out", "none/a.csv"], "the folder none does not exist"),
        (["--puzzle", PUZZLE, "--puzzle", PUZZLE, "--trace", "a.gif"], "2 questions, but it holds at most 1"),
    ],
)
def test_questions_and_files_that_cannot_be_used_end_with_one_message(
    arguments: list[str],
    message: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--checkpoint", str(run_dir), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_right_answers_are_refused_where_they_follow_from_the_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(dict(UNIFORM), tmp_path)
    settings["data"] = {"dataset": "addition", "max_digits": 3, "n_train": 50, "n_test": 20}
    settings["model"] |= {"vocab_size": 13, "learned_positions": 12}
    settings["training"]["max_steps"] = 1
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    train.main(["--config", str(tmp_path / "tiny.json"), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "1+2", "--gold", "3"])
    assert stop.value.code == 2
    assert "--gold: additions need no right answers, leave it out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="gold: additions need no right answers"):
        sampling.load(tmp_path / "run", "cpu").complete("1+2", gold=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nowhere"),
        (["--tokens-per-step", "0"], "--tokens-per-step: must be an integer from 1 to 9223372036854775807, got 0"),
        (["--threshold", "1.5"], "--threshold 1.5: input should be less than 1"),
        (["--seed", "-1"], "--seed: must be an integer from 0 to 4294967295, got -1"),
        (["--gold", "1"], "--gold: 1 for 0 of --prompt"),
        (["--temperature", "-1"], "--temperature -1.0: input should be greater than or equal to 0"),
        (["--temperature", "1e30"], "--temperature 1e+30: input should be less than or equal to 1000"),
    ],
)
def test_the_command_refuses_bad_input_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--checkpoint", "nowhere", "--puzzle", PUZZLE, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_examples_of_the_page_run(
    config_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a model of one step in place of the repository's."""
    sizes = {"data__size": 9, "data__min_clues": 30, "data__max_clues": 40, "data__layout": "in_place"}
    model = tiny_settings(dict(UNIFORM), tmp_path)["model"] | {"vocab_size": 11, "learned_positions": 81}
    changes: dict[str, Any] = {f"model__{key}": value for key, value in model.items()}
    config = config_file(dict(UNIFORM), training__max_steps=1, **sizes, **changes)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    pack_run(str(tmp_path / "run"), tmp_path / "packed")
    monkeypatch.setattr(sampling, "SHIPPED", tmp_path / "packed")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    setup, trace, samples, predictions = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, Any] = {}
    exec(setup.replace("/path/to/puma", str(tmp_path)), names)
    assert sys.path[0] == str(tmp_path)
    capsys.readouterr()
    exec(trace, names)
    assert "not solved" in capsys.readouterr().out
    exec(samples, names)
    assert len(names["filled"]) == 51
    exec(predictions, names)
    assert names["log_p"].shape == (1, 81, 11)
    assert names["log_p"].isfinite().all()
    assert len({sample.tokens.tobytes() for sample in names["samples"]}) == 4
    with Image.open("sampling.gif") as made, Image.open(ROOT / "docs" / "sampling.gif") as shown:
        assert made.size == shown.size
        assert len(list(ImageSequence.Iterator(made))) == 18, "51 empty cells, three per pass"
    assert sampling.load().solve("." * 81, SamplingRule(tokens_per_step=81), trace=True)._repr_html_() is not None


BLOCKS = {"name": "block_uniform", "block_size": 4}
RANDOM_RULE = {"confidence": ["random"], "tokens_per_step": [3], "temperature": 1.0}


@pytest.mark.parametrize(
    ("objective", "validation", "text"),
    [
        (UNIFORM, RANDOM_RULE, False),
        (BLOCKS | {"block_attention": "prefix"}, RANDOM_RULE, False),
        (BLOCKS | {"block_attention": "block_causal"}, RANDOM_RULE, True),
        ({"name": "autoregressive"}, {"temperature": 1.0}, True),
    ],
    ids=["uniform", "prefix", "block_causal", "autoregressive"],
)
def test_answers_to_the_test_are_those_of_an_evaluation(
    objective: dict[str, Any], validation: dict[str, Any], text: bool, data_dir: Path, tmp_path: Path
) -> None:
    """By the sampler of the objective, which stops at the end of a text; also by a rule that draws random numbers."""
    settings = tiny_settings(objective, data_dir)
    settings["validation"] |= validation
    if text:
        write_pairs(tmp_path / "pairs.jsonl", 60)
        source = {"source": str(tmp_path / "pairs.jsonl"), "data_dir": str(tmp_path), "max_len": LENGTH}
        settings["data"] = {"dataset": "text", "n_held_out": 20} | source
        settings["model"]["vocab_size"] = VOCAB
    config = parse_config(settings, "test")
    data = config.open_data().load(train=False)
    model = build_model(config)
    model.reset_parameters(random_generator(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # probabilities that depend on the context
        if data.eos_id is not None:  # the same on one axis of all positions, so that some texts end early
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[data.eos_id, 0] = 1.0
    trained = sampling.TrainedModel(model.eval(), config, data, torch.device("cpu"))
    (rule,) = config.validation.rules()
    answers = list(trained.answer_test(range(20), rule, seed=config.training.seed, trace=True))
    found = evaluation.evaluate(model, config, data, World(0, 1, torch.device("cpu")), 20)
    assert [sample["answer"] for sample in found.samples] == [answer.verdict.answer for answer in answers]
    assert [sample["prompt" if text else "puzzle"] for sample in found.samples] == [each.question for each in answers]
    assert found.samplers[0].nfe == pytest.approx(np.mean([answer.nfe for answer in answers]))
    backwards = list(trained.answer_test([17, 3], rule, seed=config.training.seed))
    assert [answer.verdict for answer in backwards] == [answers[17].verdict, answers[3].verdict]
    if text:
        n_last = [(answer.order == answer.nfe).sum() for answer in answers]
        assert max(n_last) > 3, "or no text ended early, with EOS in all other positions at the last pass"


def test_holes_of_texts_are_filled_and_the_rest_is_kept(tmp_path: Path) -> None:
    config = parse_config(tiny_gsm_settings(tmp_path), "test")
    model = build_model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    trained = sampling.TrainedModel(model.eval(), config, config.open_data(), torch.device("cpu"))
    first, second = trained.fill(["return <3>+ x", "return<1>"], trace=True)
    assert first.text.startswith("return ")
    assert first.text.endswith("+ x")
    assert (first.nfe, second.nfe) == (3, 1)
    assert first.verdict.right is None
    assert first.trace is not None
    assert np.array_equal(trained.fill("return <3>+ x").tokens, first.tokens)
    ended = first.tokens.copy()
    ended[2] = trained.data.eos_id
    text = decode_whole(trained.data.tokenizer, ended)
    assert text.endswith("+ x"), "an end inside does not cut off what the template gives"
    with pytest.raises(ValueError, match=r"2 of 2 .* are invalid\n  template 1: .* has no hole"):
        trained.fill(["return x", "return <0>"])


def test_templates_go_with_no_other_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--template", "return <3>", "--puzzle", PUZZLE])
    assert stop.value.code == 2
    assert "--template goes with no other question" in capsys.readouterr().err
