"""The contract of a data set: what its settings say, and everything that training, evaluation and sampling ask of it.

One file holds a data set: a settings class derived from `DataSettings`, and a class derived from `DataSet`.
`docs/adding.md` adds one step by step. Nothing outside of that file asks which data set it works on.

Shapes: B rows, L positions, n questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data.settings import Settings


class SequenceData(Protocol):
    """Rows of tokens."""

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        ...

    @property
    def mask_id(self) -> int:
        """The mask token, which no sequence holds."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends a sequence and pads it; None where all are of one length."""
        ...

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of the rows with these indices."""
        ...


@dataclass(frozen=True)
class ArrayData:
    """A `SequenceData` in memory."""

    tokens: np.ndarray  # int64 [N, L]
    prompt_mask: np.ndarray  # bool [N, L]
    mask_id: int
    eos_id: int | None = None

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of these rows."""
        return self.tokens[indices], self.prompt_mask[indices]


@dataclass(frozen=True)
class Judged:
    """Answers judged, row by row."""

    figures: dict[str, np.ndarray]  # `DataSet.figures` by name, float32 [n]
    samples: list[dict[str, Any]] = field(default_factory=list)  # readable, one per row, or none at all


@dataclass(frozen=True)
class Reference:
    """What a simple method makes of the same questions, to compare a model with."""

    name: str
    solved: np.ndarray  # bool [n]


class DataSettings(Settings, ABC):
    """Base of the settings of a data set. A subclass has a field `dataset`, a `Literal` of its name in YAML files."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens per sequence."""

    @property
    @abstractmethod
    def min_vocab_size(self) -> int:
        """Smallest vocabulary that holds all tokens, the mask token included."""

    def mask_id_in(self, vocab_size: int) -> int:
        """The mask token of a model with this vocabulary; by default its last token."""
        return vocab_size - 1

    @abstractmethod
    def describe(self) -> str:
        """One line that says which data a run uses, and why where the settings leave it open."""

    @abstractmethod
    def open(self, vocab_size: int) -> DataSet:
        """The data set, for a model with this vocabulary. Reads nothing yet."""


class DataSet(ABC):
    """A data set: rows to learn from, questions to answer, and which answers are right.

    Properties read their files at first use and keep them. They raise ValueError where a file is missing or holds a bad
    row; the message names it.
    """

    figures: tuple[str, ...] = ("accuracy",)  # names of what `judge` reports; accuracy comes first
    questions: str = "questions"  # what the test asks, as a noun: "solved 95.9% of 2000 unseen puzzles"
    question_option: str = "prompt"  # the option of sampling.py that gives a question

    @property
    @abstractmethod
    def train(self) -> SequenceData:
        """Rows to train on."""

    @property
    @abstractmethod
    def validation(self) -> SequenceData:
        """Rows of the validation loss, which training never sees."""

    @property
    @abstractmethod
    def n_questions(self) -> int:
        """Questions of the test."""

    @abstractmethod
    def prompts(self, indices: np.ndarray) -> np.ndarray:
        """Questions as rows int64 [n, L], the mask token where the answer goes."""

    @abstractmethod
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> Judged:
        """Judge rows int64 [n, L] that were sampled from the prompts with these indices."""

    @abstractmethod
    def encode(self, question: str) -> np.ndarray:
        """A user's question as a row int64 [L], the mask token where the answer goes; ValueError if it is none."""

    @abstractmethod
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> str:
        """A sampled row as text for a terminal.

        Args:
            prompt: int64 [L], of `encode`.
            tokens: int64 [L], sampled.
            order: int64 [L], step at which each position was filled, from 1; 0 where it was given.
        """

    @abstractmethod
    def example(self) -> str:
        """A question of the test as `encode` takes it."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer; None where all rows are of one length."""
        return None

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; None where tokens are not text."""
        return None

    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of difficulty by name: for each of these questions the lowest value of its group [n], or NaN."""
        return {}

    def reference(self, indices: np.ndarray) -> Reference | None:
        """What a simple method makes of these questions; None where there is none."""
        return None

    def warnings(self) -> Sequence[str]:
        """What a user should know about the data before training; read from the data, so it may take seconds."""
        return ()

    def load(self) -> DataSet:
        """Read everything that training and evaluation need; what is generated or downloaded is made on first use."""
        _ = self.train, self.validation, self.n_questions
        return self
