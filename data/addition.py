"""Addition: the sum of two numbers of many digits, to measure where an order of unmasking fails.

A digit of the sum depends on the two digits of its column and on the carry into it. A column whose digits add up to 10
or more produces a carry whatever enters it, at most 8 produces none, and exactly 9 passes on what enters it. So one
column is usually enough to know a carry; many are needed where columns that add up to 9 follow each other.

A carry chain is a column whose digits add up to 10 or more and the columns directly after it whose digits add up to
exactly 9; its length is the number of these columns. The carry chain of a question is its longest, 0 if no column
produces a carry. 999 + 1 has length 3; 555 + 555 has length 1, since each column produces its own carry.

A row has a fixed length, so that the same position always holds the same column. N is `max_digits`:

    first operand [N] + second operand [N] = sum [N + 1]

Numbers are padded with zeros, not with a token of their own: every column follows one rule, and no token shows where
the sum ends. All positions of the sum are maskable, including the padding.

Each operand has its own number of digits, uniform from 1 to N, and random digits. Unequal operands are the general
case, and chains of every length up to N occur, since a chain may continue past the smaller operand through 9s of the
larger one. But each further column makes a chain about ten times rarer: with N = 20, one row in 30 has length 3 or
more, one in 3,400 has 5 or more. Training rows are left like this. In the test, every second question is drawn by
carry chain instead, with the lengths 1 to N in turn, so that there are as many questions of each. Most of these
lengths do not occur in training: they measure whether the model has learned the rule.

A training row has the operands of no test question, in either order, if they have `MIN_UNSEEN_DIGITS` digits or more
together. There are only 1,900 smaller questions; these may be in both.

Shapes: n questions, N digits of an operand, L = 3 N + 3 positions. Arrays of digits begin with the units.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from base.memory import check_memory
from data.dataset import AnswerVerdict, DataSet, DataSettings, JudgedAnswers
from data.hashes import hash_arrays
from data.questions import Question
from data.settings import Seed

SYMBOLS = "0123456789+="  # by token; the mask token is the last of the vocabulary
PLUS, EQUALS = SYMBOLS.index("+"), SYMBOLS.index("=")
GROUPS = np.array([0, 1, 2, 3, 5, 9, 17])  # lowest values of the groups of `difficulty`
MIN_UNSEEN_DIGITS = 4  # of both operands together

DigitOrder = Literal["least_first", "most_first"]


class AdditionSettings(DataSettings):
    """Random additions."""

    dataset: Literal["addition"]
    max_digits: int = Field(20, gt=0, description="largest number of digits of an operand; the smallest is 1")
    order: DigitOrder = Field("least_first", description="which digit of operands and sum comes first")
    n_train: int = Field(200_000, gt=0, description="number of training rows")
    n_test: int = Field(2000, gt=0, description="number of test questions; every second one is drawn by carry chain")
    seed: Seed = Field(0, description="seed of the numbers")

    @property
    @override
    def length(self) -> int:
        """Tokens per sequence."""
        return 3 * self.max_digits + 3

    @property
    @override
    def min_vocab_size(self) -> int:
        """Tokens: digits, plus, equals and mask token."""
        return len(SYMBOLS) + 1

    @override
    def describe(self) -> str:
        return f"{self.n_train:,} random additions of numbers of 1 to {self.max_digits} digits"

    @override
    def open(self, vocab_size: int) -> Addition:
        return Addition(self, self.mask_id_in(vocab_size))


@dataclass(frozen=True)
class AdditionData:
    """Additions in memory; a `data.dataset.SequenceData`."""

    operands: np.ndarray  # uint8 [n, 2, N], from the units
    order: DigitOrder
    mask_id: int
    eos_id: None = None

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return 3 * self.operands.shape[2] + 3

    def __len__(self) -> int:
        return len(self.operands)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of these rows."""
        operands = self.operands[indices]
        parts = (operands[:, 0], operands[:, 1], add(operands))
        first, second, total = parts if self.order == "least_first" else (digits[:, ::-1] for digits in parts)
        plus, equals = np.full((len(operands), 1), PLUS), np.full((len(operands), 1), EQUALS)
        tokens = np.concatenate([first, plus, second, equals, total], axis=1, dtype=np.int64)
        is_prompt = np.arange(self.length) < 2 * operands.shape[2] + 2
        return tokens, np.tile(is_prompt, (len(tokens), 1))

    def hashes(self) -> dict[str, str]:
        """See `SequenceData`."""
        return {"its rows": hash_arrays(self.operands)}


class Addition(DataSet):
    """Additions to train on and to answer."""

    figures = ("accuracy", "digit_accuracy")
    question_noun = "additions"

    def __init__(self, settings: AdditionSettings, mask_id: int) -> None:
        self.settings, self.mask_id = settings, mask_id

    @cached_property
    @override
    def train(self) -> AdditionData:
        settings = self.settings
        # Random digits and their copies; `keys` of the rows that are drawn anew.
        n_bytes = settings.n_train * (16 * settings.max_digits + 200)
        check_memory(n_bytes, f"data.n_train {settings.n_train:,} with data.max_digits {settings.max_digits:,}")
        rng = np.random.default_rng([settings.seed, 0])
        unseen = self.test.operands[count_digits(self.test.operands).sum(1) >= MIN_UNSEEN_DIGITS]
        keys = {*operand_keys(unseen), *operand_keys(unseen[:, ::-1])}
        operands = draw_operands(rng, settings.n_train, settings.max_digits)
        redrawn = np.arange(len(operands))
        # This ends for any test, since smaller operands are never redrawn.
        while len(redrawn := redrawn[[key in keys for key in operand_keys(operands[redrawn])]]):
            operands[redrawn] = draw_operands(rng, len(redrawn), settings.max_digits)
        return self._data(operands)

    @cached_property
    @override
    def validation(self) -> AdditionData:
        """The test questions that are drawn as the training rows are."""
        return self._data(self.test.operands[::2])

    @cached_property
    @override
    def test(self) -> AdditionData:
        """The test questions: at odd indices stratified by carry chain."""
        n_test, max_digits = self.settings.n_test, self.settings.max_digits
        # Chains are drawn with integers of eight bytes.
        check_memory(n_test * (64 * max_digits + 200), f"data.n_test {n_test:,} with data.max_digits {max_digits:,}")
        rng = np.random.default_rng([self.settings.seed, 1])
        operands = draw_operands(rng, n_test, max_digits)
        operands[1::2] = draw_chains(rng, 1 + np.arange(n_test // 2) % max_digits, max_digits)
        return self._data(operands)

    @override
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> JudgedAnswers:
        """Accuracy, and the share of the N + 1 digits of the sum that are right, padding included."""
        expected, prompt_mask = self.test.rows(indices)
        right = ((tokens == expected) & ~prompt_mask).sum(1)  # [n]
        n_digits = self.settings.max_digits + 1
        samples = [
            {
                "question": self.question(index).text,
                "answer": verdict.answer,
                "sum": verdict.facts["sum"],
                "verdict": "right" if verdict.right else "wrong",
            }
            for index, verdict in zip(indices, self.verdicts(self.prompts(indices), tokens), strict=True)
        ]
        return JudgedAnswers(
            {
                "accuracy": (right == n_digits).astype(np.float32),
                "digit_accuracy": (right / n_digits).astype(np.float32),
            },
            samples,
        )

    @override
    def encode(self, question: str) -> np.ndarray:
        """Two numbers with a plus between them, such as 123+456; spaces and an equals sign at the end are allowed."""
        max_digits = self.settings.max_digits
        match = re.fullmatch(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*=?\s*", question)
        operands = [number.lstrip("0") for number in match.groups()] if match else []
        if match is None or max(map(len, operands)) > max_digits:
            raise ValueError(
                f"prompt {question!r} must be two whole numbers of at most {max_digits} digits, such as 123+456"
            )
        numbers = [[int(digit) for digit in reversed(number.zfill(max_digits))] for number in operands]
        tokens, prompt_mask = self._data(np.array([numbers], dtype=np.uint8)).rows(np.array([0]))
        return np.where(prompt_mask, tokens, self.mask_id)[0]

    @override
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> str:
        """The sum, and the order in which its digits were filled."""
        *operands, digits = self._numbers(tokens)
        first, second, total = map(format_number, (*operands, digits))
        *_, steps = self._numbers(order)
        return "\n".join(
            [
                f"{first} + {second} = {total}",
                "digit          " + "".join(f"{symbol(token):>4}" for token in digits),
                "filled at step " + "".join(f"{step:>4}" for step in steps),
            ]
        )

    @override
    def verdicts(
        self, prompts: np.ndarray, tokens: np.ndarray, golds: Sequence[str | None] | None = None
    ) -> list[AnswerVerdict]:
        """Facts: the right `sum`. Needs no gold answers."""
        operands = [[digits[::-1] for digits in self._numbers(prompt)[:2]] for prompt in prompts]
        expected, _ = self._data(np.array(operands, dtype=np.uint8)).rows(np.arange(len(prompts)))
        verdicts = []
        for row, wanted in zip(tokens, expected, strict=True):
            answer, total = (format_number(self._numbers(each)[2]) for each in (row, wanted))
            wrong = {int(i): f"must be {symbol(wanted[i])}" for i in np.flatnonzero(row != wanted)}
            reason = f"wrong: the sum is {total}" if wrong else "right"
            verdicts.append(AnswerVerdict(answer, not wrong, reason, {"sum": total}, wrong))
        return verdicts

    @override
    def token_text(self, token: int) -> str:
        return symbol(token)

    def _numbers(self, row: np.ndarray) -> list[np.ndarray]:
        """Values of a row (int64 [L]) at both operands and the sum, the most significant digit first."""
        n_digits = self.settings.max_digits
        bounds = (slice(n_digits), slice(n_digits + 1, 2 * n_digits + 1), slice(2 * n_digits + 2, None))
        return [self._most_first(row[bound]) for bound in bounds]

    def _most_first(self, digits: np.ndarray) -> np.ndarray:
        """Digits in the order of a row as the most significant first."""
        return digits if self.settings.order == "most_first" else digits[::-1]

    @override
    def question(self, index: int) -> Question:
        """Two numbers of the test."""
        return Question("+".join(format_number(digits[::-1]) for digits in self.test.operands[index]))

    @override
    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Carry chain, and number of digits of the larger operand."""
        operands = self.test.operands[indices]
        measures = {"carry_chain": carry_chains(operands), "digits": count_digits(operands).max(1)}
        return {name: GROUPS[np.searchsorted(GROUPS, values, "right") - 1] for name, values in measures.items()}

    def _data(self, operands: np.ndarray) -> AdditionData:
        return AdditionData(operands, self.settings.order, self.mask_id)


def add(operands: np.ndarray) -> np.ndarray:
    """Sums, uint8 [n, N + 1], of `operands` (uint8 [n, 2, N]); no integer type has room for them."""
    columns = operands.sum(1, dtype=np.uint8)  # [n, N]
    digits = np.zeros((len(columns), columns.shape[1] + 1), dtype=np.uint8)
    for column in range(columns.shape[1]):
        total = columns[:, column] + digits[:, column]  # the carry waits where the next digit goes
        digits[:, column], digits[:, column + 1] = total % 10, total // 10
    return digits


def carry_chains(operands: np.ndarray) -> np.ndarray:
    """Lengths of the longest carry chains, int64 [n], of `operands` (uint8 [n, 2, N]); see the top of this file."""
    columns = operands.sum(1, dtype=np.uint8)  # [n, N]
    longest = running = np.zeros(len(columns), dtype=np.int64)
    for column in columns.T:
        passed_on = np.where((column == 9) & (running > 0), running + 1, 0)
        running = np.where(column >= 10, 1, passed_on)
        longest = np.maximum(longest, running)
    return longest


def count_digits(operands: np.ndarray) -> np.ndarray:
    """Numbers of digits without padding, int64 [n, 2], of `operands` (uint8 [n, 2, N]); 0 has one digit."""
    return np.maximum(((operands != 0) * np.arange(1, operands.shape[2] + 1)).max(2), 1)


def operand_keys(operands: np.ndarray) -> list[bytes]:
    """A hashable key for each pair of operands (uint8 [n, 2, N])."""
    return [pair.tobytes() for pair in np.ascontiguousarray(operands)]


def draw_operands(rng: np.random.Generator, n: int, max_digits: int) -> np.ndarray:
    """Operands (uint8 [n, 2, N]) with 1 to N random digits each; only the number 0 begins with a 0."""
    n_digits = rng.integers(1, max_digits + 1, (n, 2, 1))
    column = np.arange(max_digits)
    digits = rng.integers(0, 10, (n, 2, max_digits), dtype=np.uint8)
    leading = rng.integers(1, 10, (n, 2, 1), dtype=np.uint8)
    digits = np.where((column == n_digits - 1) & (n_digits > 1), leading, digits)
    return np.where(column < n_digits, digits, np.uint8(0))


def draw_chains(rng: np.random.Generator, lengths: np.ndarray, max_digits: int) -> np.ndarray:
    """Operands (uint8 [n, 2, N]) whose longest carry chains have these lengths (int64 [n], 1 to N).

    The larger operand has up to N digits, the other one up to as many, and the chain starts anywhere in both.
    """
    operands = np.zeros((len(lengths), 2, max_digits), dtype=np.uint8)
    column = np.arange(max_digits)
    missing = np.arange(len(lengths))
    while len(missing):
        length = lengths[missing, None]  # [n, 1]
        n_larger = rng.integers(length, max_digits + 1)
        n_smaller = rng.integers(1, n_larger + 1)
        start = rng.integers(0, np.minimum(n_larger - length + 1, n_smaller))
        first, second = rng.integers(0, 10, (2, len(missing), max_digits))  # int64 [n, N]
        first, second = np.where(column < n_larger, first, 0), np.where(column < n_smaller, second, 0)
        # The column that produces the carry, then those that pass it on.
        produces = rng.integers(1, 10, length.shape)
        first = np.where(column == start, produces, first)
        second = np.where(column == start, rng.integers(10 - produces, 10), second)
        passes = (column > start) & (column < start + length)
        first = np.where(passes, np.where(column < n_smaller, 9 - second, 9), first)
        drawn = np.stack([first, second], axis=1).astype(np.uint8)
        swapped = rng.integers(0, 2, len(missing)) == 1
        drawn[swapped] = drawn[swapped, ::-1]
        # A digit after the chain may continue it, and other columns may have a longer one.
        good = carry_chains(drawn) == lengths[missing]
        operands[missing[good]] = drawn[good]
        missing = missing[~good]
    return operands


def format_number(tokens: np.ndarray) -> str:
    """Tokens, most significant digit first, as text without padding."""
    return "".join(map(symbol, tokens)).lstrip("0") or "0"


def symbol(token: int) -> str:
    """The text of a token; `?` if it is none of the symbols, as a model with a larger vocabulary may write."""
    return SYMBOLS[token] if token < len(SYMBOLS) else "?"
