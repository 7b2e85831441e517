"""Additions: right sums, carry chains of every length in the test, and no test question in the training rows."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
import yaml
from conftest import ROOT
from docs_check import small_settings

import sampling
import train
from data.addition import (
    GROUPS,
    MIN_UNSEEN_DIGITS,
    Addition,
    AdditionSettings,
    add,
    carry_chains,
    count_digits,
    draw_chains,
    draw_operands,
)

MASK_ID = 12


def open_addition(**changes: object) -> Addition:
    settings = {"dataset": "addition", "max_digits": 20, "n_train": 3000, "n_test": 400} | changes
    return AdditionSettings(**settings).open(MASK_ID + 1)


def as_numbers(operands: np.ndarray) -> list[tuple[int, int]]:
    """Operands as Python's integers, which have no largest value."""
    first, second = (
        [int("".join(map(str, digits[::-1]))) for digits in each.tolist()] for each in operands.swapaxes(0, 1)
    )
    return list(zip(first, second, strict=True))


def as_operands(*questions: tuple[int, int], max_digits: int = 20) -> np.ndarray:
    pairs = [[list(map(int, reversed(str(number).zfill(max_digits)))) for number in pair] for pair in questions]
    return np.array(pairs, dtype=np.uint8)


def slow_chain(first: int, second: int) -> int:
    """For each column that produces a carry on its own, walk on while the digits add up to 9."""
    columns = [int(a) + int(b) for a, b in zip(f"{first:050}"[::-1], f"{second:050}"[::-1], strict=True)]
    longest = 0
    for start, column in enumerate(columns):
        if column >= 10:
            end = start + 1
            while columns[end] == 9:
                end += 1
            longest = max(longest, end - start)
    return longest


@pytest.mark.parametrize(
    ("question", "length"),
    [
        ((0, 0), 0),
        ((123, 456), 0),
        ((9, 90), 0),  # all columns pass a carry on, but none produces one
        ((999, 0), 0),
        ((5, 5), 1),
        ((555, 555), 1),  # every column produces its own
        ((999, 1), 3),
        ((1, 999), 3),
        ((99_099, 1), 2),
        ((10**20 - 1, 1), 20),
        ((10**20 - 1, 10**20 - 1), 1),
        ((1_999_019, 1_001), 3),  # two columns produce a carry; only the second one's is passed on
        ((4_455_506, 5_544_494), 7),
    ],
)
def test_carry_chain_by_hand(question, length):
    assert carry_chains(as_operands(question)).tolist() == [slow_chain(*question)] == [length]


def test_sums_and_chains_of_random_operands():
    rng = np.random.default_rng(0)
    operands = rng.integers(0, 10, (2000, 2, 20), dtype=np.uint8)
    passes = rng.random((2000, 20)) < 0.5  # half of the columns add up to 9, so that chains get long
    operands[:, 1] = np.where(passes, 9 - operands[:, 0], operands[:, 1])
    numbers = as_numbers(operands)
    sums = [int("".join(map(str, digits[::-1]))) for digits in add(operands).tolist()]
    assert sums == [first + second for first, second in numbers]
    expected = [slow_chain(*pair) for pair in numbers]
    assert carry_chains(operands).tolist() == expected
    assert max(expected) >= 10


@pytest.mark.parametrize("max_digits", [1, 2, 12, 20, 40])
def test_drawn_chains_have_the_lengths_asked_for(max_digits):
    lengths = 1 + np.arange(20 * max_digits) % max_digits
    operands = draw_chains(np.random.default_rng(0), lengths, max_digits)
    assert [slow_chain(*pair) for pair in as_numbers(operands)] == lengths.tolist()
    if max_digits > 2:
        n_smaller = count_digits(operands).min(1)
        assert (n_smaller < lengths).any(), "a chain runs past the smaller operand"
        assert (n_smaller > lengths).any(), "and ends before"
        assert (count_digits(operands) == n_smaller[:, None]).mean(0).min() > 0.3, "either operand may be the smaller"


def test_numbers_of_digits_are_uniform_and_independent():
    n_digits = count_digits(draw_operands(np.random.default_rng(0), 16_000, 4))
    counts = Counter(map(tuple, n_digits.tolist()))
    assert {*counts} == {*product(range(1, 5), repeat=2)}
    assert max(abs(count - 1000) for count in counts.values()) < 200  # 6 standard deviations
    assert count_digits(as_operands((0, 7), (10, 999))).tolist() == [[1, 1], [2, 3]]


@pytest.mark.parametrize("order", ["least_first", "most_first"])
def test_a_row_is_the_question_and_the_sum(order):
    data = open_addition(max_digits=3, order=order)
    tokens, prompt_mask = data.test.rows(np.arange(400))
    assert tokens.dtype == np.int64
    assert tokens.shape == prompt_mask.shape == (400, data.settings.length)
    assert (prompt_mask == (np.arange(12) < 8)).all()
    for row, (first, second) in zip(tokens, as_numbers(data.test.operands), strict=True):
        step = 1 if order == "most_first" else -1
        written = [f"{first:03}", f"{second:03}", f"{first + second:04}"]
        text = f"{written[0][::step]}+{written[1][::step]}={written[2][::step]}"
        assert "".join("0123456789+="[token] for token in row) == text


def test_the_test_has_every_chain_length_and_the_training_rows_are_natural():
    data = open_addition(n_test=2000, n_train=20_000)
    chains = [slow_chain(*pair) for pair in as_numbers(data.test.operands)]
    assert chains[1::2] == [1 + i % 20 for i in range(1000)], "50 of each, in any prefix too"
    natural, train = np.array(chains[::2]), carry_chains(data.train.operands)
    assert np.array_equal(data.validation.operands, data.test.operands[::2])
    for length in (0, 1, 2):  # 5 standard deviations
        assert abs((natural == length).mean() - (train == length).mean()) < 0.08
    assert 0 < (train >= 4).mean() < 0.01


def test_no_training_row_is_a_test_question():
    """In either order; with this little data many would be. Small operands are too few, so those are in both."""
    data = open_addition(max_digits=2, n_test=2000, n_train=20_000)
    test, train = ({tuple(sorted(pair)) for pair in as_numbers(each.operands)} for each in (data.test, data.train))
    n_digits = {pair: len(str(pair[0])) + len(str(pair[1])) for pair in test & train}
    assert n_digits
    assert max(n_digits.values()) < MIN_UNSEEN_DIGITS
    assert any(min(pair) >= 10 for pair in train)
    drawn = draw_operands(np.random.default_rng([0, 0]), 20_000, 2)  # as they are before any is redrawn
    assert any(min(pair) >= 10 for pair in test & {tuple(sorted(pair)) for pair in as_numbers(drawn)})


def test_training_rows_can_be_drawn_when_the_test_has_every_large_question():
    data = open_addition(max_digits=2, n_test=200_000, n_train=1000)
    assert count_digits(data.train.operands).sum(1).max() < MIN_UNSEEN_DIGITS


def test_the_seed_decides_the_rows():
    first, again, other = (open_addition(seed=seed) for seed in (0, 0, 1))
    for split in ("train", "test"):
        operands = [getattr(data, split).operands for data in (first, again, other)]
        assert np.array_equal(operands[0], operands[1])
        assert not np.array_equal(operands[0], operands[2])
    assert not np.array_equal(first.train.operands[:400], first.test.operands)


def test_difficulty_names_the_lowest_value_of_a_group():
    data = open_addition()
    indices = np.arange(5, 400, 3)
    measures = data.difficulty(indices)
    numbers = [as_numbers(data.test.operands)[i] for i in indices]
    expected = {
        "carry_chain": [slow_chain(*pair) for pair in numbers],
        "digits": [len(str(max(pair))) for pair in numbers],
    }
    for name, values in expected.items():
        assert measures[name].tolist() == [max(g for g in GROUPS.tolist() if g <= value) for value in values]
    assert {*measures["carry_chain"].tolist()} == {0, 1, 2, 3, 5, 9, 17}


@pytest.mark.parametrize("order", ["least_first", "most_first"])
def test_answers_are_judged_digit_by_digit(order):
    data = open_addition(max_digits=4, order=order)
    indices = np.array([3, 0, 7, 8])
    tokens, _ = data.test.rows(indices)
    tokens[1, -1] = (tokens[1, -1] + 1) % 10
    tokens[2, -5:] = 10  # a symbol, not a digit
    tokens[3, 0] = 11  # the question is not judged
    figures = data.judge(tokens, indices).figures
    assert {*figures} == {*data.figures}
    assert figures["accuracy"].tolist() == [1, 0, 0, 1]
    assert figures["digit_accuracy"].tolist() == pytest.approx([1, 0.8, 0, 1])
    assert all(values.dtype == np.float32 for values in figures.values())


@pytest.mark.parametrize("order", ["least_first", "most_first"])
def test_questions_in_text(order):
    data = open_addition(order=order)
    for index in range(20):
        first, second = as_numbers(data.test.operands[index : index + 1])[0]
        expected = data.prompts(np.array([index]))[0]
        for question in (f"{first}+{second}", f" {first} + {second} = ", f"00{first}+000{second}"):
            assert np.array_equal(data.encode(question), expected)
    assert np.array_equal(data.encode(data.question(0).text), data.prompts(np.array([0]))[0])
    assert (data.encode("0+" + "9" * 20) == MASK_ID).sum() == 21
    assert np.array_equal(data.encode("0" * 30 + "+1"), data.encode("0+1"))


@pytest.mark.parametrize(
    "question",
    [
        "",
        "12",
        "1+2+3",
        "-1+2",
        "1.5+2",
        "a+b",
        "1+" + "9" * 21,
        "1 2+3",
        "١+٢",
        "1+2=3",
        pytest.param("0" * 200_000, id="long"),
    ],
)
def test_a_bad_question_is_refused(question):
    with pytest.raises(ValueError) as error:  # in linear time
        open_addition().encode(question)
    assert str(error.value) == (f"prompt {question!r} must be two whole numbers of at most 20 digits, such as 123+456")


@pytest.mark.parametrize("order", ["least_first", "most_first"])
def test_a_shown_answer(order):
    data = open_addition(max_digits=3, order=order)
    prompt = data.encode("995+17")
    tokens, steps = prompt.copy(), np.zeros(12, dtype=np.int64)
    step = 1 if order == "most_first" else -1
    tokens[8:], steps[8:] = [1, 0, 1, 2][::step], [4, 1, 2, 3][::step]
    lines = ["995 + 17 = 1012", "digit             1   0   1   2", "filled at step    4   1   2   3"]
    assert data.show(prompt, tokens, steps).splitlines() == lines
    assert data.verdicts(prompt[None], tokens[None])[0].right
    tokens[8:] = [0, 0, 10, 2][::step]
    assert data.show(prompt, tokens, steps).splitlines()[0] == "995 + 17 = +2"
    (wrong,) = data.verdicts(prompt[None], tokens[None])
    assert (wrong.right, wrong.reason, wrong.answer) == (False, "wrong: the sum is 1012", "+2")
    assert wrong.wrong == ({8: "must be 1", 10: "must be 1"} if step > 0 else {9: "must be 1", 11: "must be 1"})


def test_tokens_of_a_larger_vocabulary_have_no_symbol():
    data = AdditionSettings(dataset="addition", max_digits=3, n_train=9, n_test=9).open(40)
    prompt = data.encode("995+17")
    tokens = prompt.copy()
    tokens[8:] = [2, 1, 30, 39]
    answer = data.show(prompt, tokens, np.zeros(12, dtype=np.int64)).splitlines()
    assert answer[:2] == ["995 + 17 = ??12", "digit             ?   ?   1   2"]
    (verdict,) = data.verdicts(prompt[None], tokens[None])
    assert (verdict.right, verdict.answer, verdict.facts) == (False, "??12", {"sum": "1012"})
    assert verdict.wrong == {10: "must be 0", 11: "must be 1"}
    assert [data.token_text(token) for token in (9, 11, 12, 39)] == ["9", "=", "?", "?"]


@pytest.mark.parametrize("sizes", [{"n_train": 10**12}, {"n_test": 10**12}, {"max_digits": 10**10}])
def test_sizes_beyond_the_memory_are_refused_by_name(sizes):
    ((name, size),) = sizes.items()
    with pytest.raises(ValueError, match=rf"data\.{name} {size:,}.* GiB are free"):
        open_addition(**sizes).train  # noqa: B018


def test_settings_fit_the_rows():
    data = open_addition(max_digits=7, n_test=1, n_train=5)
    assert (data.settings.length, data.settings.min_vocab_size) == (24, 13)
    assert (data.train.length, data.validation.length, data.n_questions) == (24, 24, 1)
    assert data.train.mask_id == data.validation.mask_id == MASK_ID
    assert data.settings.describe() == "5 random additions of numbers of 1 to 7 digits"


@pytest.mark.parametrize("name", ["puma", "baseline"])
def test_a_run_records_accuracy_by_carry_chain_and_its_model_answers(name, tmp_path, capsys):
    settings = small_settings(yaml.safe_load((ROOT / "yaml_files" / f"addition_{name}.yaml").read_text()))
    settings["validation"] |= {"n_examples": 64, "n_final_examples": 64, "batch_size": 64}
    settings["data"]["n_test"] = 64
    config, run_dir = tmp_path / "addition.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(settings))
    train.main(["--config", str(config), "--run-dir", str(run_dir)])
    final = json.loads((run_dir / "final.json").read_text())
    groups = final["evaluation"]["samplers"][0]["groups"]
    chains = {int(group["value"]): group["n"] for group in groups if group["by"] == "carry_chain"}
    assert sum(chains.values()) == 64
    assert min(chains[5], chains[9]) >= 8, "4 of 12 lengths each, 32 questions"
    capsys.readouterr()
    sampling.main(["--checkpoint", str(run_dir), "--prompt", final["example"]])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(final["example"].replace("+", " + ") + " = ")
    steps = next(line for line in shown if line.startswith("filled at step")).split()[3:]
    assert sorted(map(int, steps)) == list(range(1, 14))
