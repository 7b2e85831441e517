"""Sampling against the oracle, its independence of the batch, and its random draws."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_distribution, model_settings, random_generator, random_model
from torch import Tensor

import sampling
import train
from config import Confidence, SamplingRule
from data.sudoku import format_boards, parse_puzzle
from model.transformer import Transformer
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
    )


def assert_same_samples(ours: Samples, theirs: Samples) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.order, theirs.order)
    assert torch.equal(ours.nfe, theirs.nfe)


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
    assert found.confidence is not None
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
    assert_same_samples(together, Samples(turned.tokens.flip(0), turned.order.flip(0), turned.nfe.flip(0)))


def test_finished_rows_leave_the_batch() -> None:
    """The network sees each row as often as its nfe says."""
    n_seen = []

    class Counting(Transformer):
        def predict(self, xt: Tensor, *arguments: Any, **options: Any) -> Any:
            n_seen.append(len(xt))
            return super().predict(xt, *arguments, **options)

    xt = masked_rows(7, 12)
    found = sample_full(Counting(model_settings()).eval(), xt, MASK_ID)
    assert len(n_seen) == int(found.nfe.max()) == 11
    assert n_seen == [int((found.nfe >= step).sum()) for step in range(1, 12)]


def test_nothing_to_fill() -> None:
    model = random_model()
    for xt in (torch.zeros(3, 5, dtype=torch.long), torch.empty(0, 5, dtype=torch.long)):
        found = sample_full(model, xt, MASK_ID)
        assert_same_samples(found, Samples(xt, torch.zeros_like(xt), torch.zeros(len(xt), dtype=torch.long)))


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


def test_boards_show_clues_in_brackets_and_the_order() -> None:
    puzzle = torch.tensor([1, 0, 0, 0] + [0] * 12)
    solution = torch.tensor([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    order = torch.arange(16)
    lines = format_boards(puzzle, solution, order, 4).splitlines()
    assert len(lines) == 5
    assert lines[1].split() == ["[1]", "2", "3", "4", ".", "1", "2", "3"]
    assert lines[4].split() == ["4", "3", "2", "1", "12", "13", "14", "15"]


PUZZLE = "12.40000.....004"


@pytest.mark.parametrize("layout", ["two_halves", "in_place"])
def test_the_command_prints_the_board_the_order_and_the_nfe(
    layout: str, config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a model that has been trained for one step; a puzzle of another size is refused."""
    config = config_file(training__max_steps=1, data__layout=layout)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "final.json").read_text())
    assert 0 < result["evaluation"]["samplers"][0]["details"]["cell_accuracy"] < 1
    capsys.readouterr()
    sampling.main(["--checkpoint", str(tmp_path / "run"), "--puzzle", PUZZLE, "--tokens-per-step", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    filled = [int(number) for line in lines[1:5] for number in line.split()[4:] if number != "."]
    assert sorted(filled) == [1 + rank // 3 for rank in range(len(filled))]
    assert lines[5] == f"{max(filled)} network forward evaluations"
    assert " ".join(lines[1:5]).count("[") == 4
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--checkpoint", str(tmp_path / "run"), "--puzzle", PUZZLE[:-1]])
    assert stop.value.code == 2
    assert "has 15 cells" in capsys.readouterr().err


def test_answers_in_python(config_file: Callable[..., Path], tmp_path: Path) -> None:
    train.main(["--config", str(config_file(training__max_steps=1)), "--run-dir", str(tmp_path / "run")])
    trained = sampling.load(str(tmp_path / "run"), "cpu")
    answers = sampling.sample(trained, [PUZZLE, "." * 16], SamplingRule(tokens_per_step=8))
    assert [answer.nfe for answer in answers] == [2, 2]
    assert len(answers[0].text.splitlines()) == 5
    assert answers[0].tokens.shape == answers[0].order.shape == (32,)
    assert sampling.sample(trained, []) == []
    with pytest.raises(ValueError, match="list of texts"):
        sampling.sample(trained, PUZZLE)
    with pytest.raises(ValueError, match="device 'gpu' must be one of auto, cpu, cuda"):
        sampling.load(str(tmp_path / "run"), "gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nowhere"),
        (["--tokens-per-step", "0"], "--tokens-per-step: must be an integer from 1 to 9223372036854775807, got 0"),
        (["--threshold", "1.5"], "--threshold 1.5: input should be less than 1"),
        (["--seed", "-1"], "--seed: must be an integer from 0 to 4294967295, got -1"),
        (["--temperature", "-1"], "--temperature -1.0: input should be greater than or equal to 0"),
    ],
)
def test_the_command_refuses_bad_input_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--checkpoint", "nowhere", "--puzzle", PUZZLE, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
