"""The interface of a data set: its settings, and everything that training, evaluation and sampling need from it.

A data set is one file with a settings class derived from `DataSettings` and a class derived from `DataSet`.
`docs/adding.md` adds one step by step. No code outside that file depends on which data set is used, but the page of a
run draws the boards of Sudoku.

Shapes: B rows, L positions, n questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data.hashes import hash_arrays
from data.questions import Question
from data.settings import Settings
from data.text import TOKENIZER_DIR

if TYPE_CHECKING:
    from rich.text import Text


class SequenceData(Protocol):
    """Rows of tokens."""

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        ...

    @property
    def mask_id(self) -> int:
        """The mask token, which occurs in no sequence."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends and pads a sequence; None if all sequences have the same length."""
        ...

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of the rows with these indices."""
        ...

    def hashes(self) -> dict[str, str]:
        """Hashes that together cover every row, by the name of the file or other source that each covers."""
        ...


@dataclass(frozen=True)
class ArrayData:
    """A `SequenceData` in memory."""

    tokens: np.ndarray  # int64 [N, L]
    prompt_mask: np.ndarray  # bool [N, L]
    mask_id: int
    eos_id: int | None = None
    source: str = "its rows"  # for messages

    def __post_init__(self) -> None:
        """Raise ValueError unless the arrays are as above, and each row has tokens to predict and no mask token."""
        for name, array, dtype in (("tokens", self.tokens, np.int64), ("prompt_mask", self.prompt_mask, np.bool_)):
            if array.ndim != 2 or not array.shape[1] or array.shape != self.tokens.shape or array.dtype != dtype:
                shape = "[N, L]" if array is self.tokens else f"{list(self.tokens.shape)}, as of tokens"
                raise ValueError(
                    f"{self.source}: {name} is {array.dtype} {list(array.shape)}, needed is {dtype.__name__} {shape}"
                )
        self._refuse(self.tokens < 0, "has a token below 0")
        self._refuse(self.tokens == self.mask_id, f"has the mask token {self.mask_id}")
        self._refuse(self.prompt_mask.min(1, keepdims=True), "is all prompt, so there is nothing to predict")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a token is not below `vocab_size`."""
        self._refuse(self.tokens >= vocab_size, f"has a token that model.vocab_size {vocab_size} does not have")

    def _refuse(self, bad: np.ndarray, problem: str) -> None:
        """Raise ValueError if an entry of `bad` (bool [N, any]) is true."""
        if bad.any():
            raise ValueError(f"{self.source}: row {bad.any(1).argmax()} (from 0) {problem}")

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of these rows."""
        return self.tokens[indices], self.prompt_mask[indices]

    def hashes(self) -> dict[str, str]:
        """See `SequenceData`."""
        return {self.source: hash_arrays(self.tokens, self.prompt_mask)}


@dataclass(frozen=True)
class JudgedAnswers:
    """Results of judging answers, row by row.

    Evaluation refuses figures that are not as `DataSet.figures` and `DataSet.numbers` say, and names the value.
    """

    figures: dict[str, np.ndarray]  # by name, those of `DataSet.figures` and `DataSet.numbers`; float32 [n]
    samples: list[dict[str, Any]] = field(default_factory=list)  # readable, one per row, or empty


@dataclass(frozen=True)
class AnswerVerdict:
    """What can be said of an answer to any question, not only to one of the test."""

    answer: str  # on its own, as plain text: cells, a program, a number
    right: bool | None = None  # None: unknown, because the right answer is not known
    reason: str = ""  # one line; empty if there is nothing to say
    facts: dict[str, Any] = field(default_factory=dict)  # more for files; the same keys for all answers of a data set
    wrong: dict[int, str] = field(default_factory=dict)  # what is wrong with a position of the row


@dataclass(frozen=True)
class Board:
    """A square board whose cells are consecutive positions of a row, for pictures."""

    size: int  # rows and columns
    box_height: int
    box_width: int
    first: int  # position of the top left cell
    puzzle_first: int  # position of the top left cell of the puzzle, which holds the clues
    empty: int  # token of the puzzle's empty cells


@dataclass(frozen=True)
class Reference:
    """Which of the same questions a simple method solves, for comparison."""

    name: str
    solved: np.ndarray  # bool [n]


class DataSettings(Settings, ABC):
    """Base of a data set's settings. A subclass has a field `dataset`, a `Literal` with its name in YAML files."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens per sequence."""

    @property
    @abstractmethod
    def min_vocab_size(self) -> int:
        """Smallest vocabulary with all tokens, including the mask token."""

    @property
    def remedy_for_no_start(self) -> str | None:
        """How to get rows that begin with a given token, which shifted predictions need; None: all rows do."""
        return None

    def mask_id_in(self, vocab_size: int) -> int:
        """The mask token of a model with `vocab_size` tokens; by default the last token."""
        return vocab_size - 1

    @abstractmethod
    def describe(self) -> str:
        """One line: which data a run uses, and the reason if the settings leave the choice open.

        Runs of different descriptions are not compared as seeds of one setting.
        """

    @abstractmethod
    def open(self, vocab_size: int) -> DataSet:
        """The data set for a model with `vocab_size` tokens. Reads no file yet."""

    def resolved(self) -> DataSettings:
        """These settings, with what they leave to the machine decided, as a run records them. By default nothing is."""
        return self

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the settings name no tokenizer, so that one is trained on the data."""
        return False

    def with_tokenizer(self, folder: Path) -> DataSettings:
        """The same data, tokenized with the tokenizer of a folder. By default these settings: there is no choice."""
        return self

    def in_run(self, run_dir: Path) -> DataSettings:
        """The same data with the tokenizer of a run, which `DataSet.keep_tokenizer` has written to its directory.

        The model of the run knows the tokens of no other. Where the settings say, another may be found by now.

        Raises:
            ValueError: the run has none, and it cannot be made again.
        """
        folder = run_dir / TOKENIZER_DIR
        if folder.is_dir():
            return self.with_tokenizer(folder)
        if self.trains_tokenizer:
            raise ValueError(f"{folder} is missing, the tokenizer that was trained for the run: copy it with the run")
        return self


class DataSet(ABC):
    """A data set: rows to train on, questions to answer, and a judge of answers.

    Properties read their files on first use and cache the result. They raise ValueError if a file is missing or has a
    bad row; the message names it.
    """

    # Names of what `judge` reports. Accuracy comes first and is 0 or 1 per question, since intervals, groups of
    # difficulty and samples tell right answers from wrong ones. The others are shares from 0 to 1, such as a graded
    # score, and are shown as percentages.
    figures: tuple[str, ...] = ("accuracy",)
    numbers: tuple[str, ...] = ()  # names of what `judge` reports besides, any finite numbers: an edit distance
    question_noun: str = "questions"  # for messages: "solved 95.9% of 2000 test puzzles"
    question_option: str = "prompt"  # the option of sampling.py that takes a question
    takes_gold: bool = False  # whether `verdicts` needs right answers: they do not follow from the questions

    @property
    @abstractmethod
    def train(self) -> SequenceData:
        """Rows to train on."""

    @property
    @abstractmethod
    def validation(self) -> SequenceData:
        """Rows for the validation loss, not used in training."""

    @property
    def test(self) -> SequenceData:
        """Rows whose prompts are the questions of the test: by default those of `validation`.

        Not used where a data set defines `n_questions` and `prompts` itself.
        """
        return self.validation

    @property
    def n_questions(self) -> int:
        """Number of questions in the test: by default one per row of `test`."""
        return len(self.test)

    def prompts(self, indices: np.ndarray) -> np.ndarray:
        """Questions as rows, int64 [n, L], with mask tokens in place of the answer: by default those of `test`."""
        tokens, prompt_mask = self.test.rows(indices)
        return np.where(prompt_mask, tokens, self.test.mask_id)

    @abstractmethod
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> JudgedAnswers:
        """Judge `tokens` (int64 [n, L]), sampled from the prompts with these indices."""

    @abstractmethod
    def encode(self, question: str) -> np.ndarray:
        """Encode a question as a row (int64 [L]), with mask tokens in place of the answer; ValueError if invalid."""

    @abstractmethod
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> str | Text:
        """Format a sampled row for a terminal, with colours if it is a `rich.text.Text`.

        Args:
            prompt: int64 [L], from `encode`.
            tokens: int64 [L], sampled.
            order: int64 [L], step at which a position was filled, from 1; 0 for given positions.
        """

    def verdicts(
        self, prompts: np.ndarray, tokens: np.ndarray, golds: Sequence[str | None] | None = None
    ) -> list[AnswerVerdict]:
        """Judge answers to any questions; by default only as text, as `show` gives it.

        Args:
            prompts: int64 [n, L], from `encode`.
            tokens: int64 [n, L], sampled.
            golds: the right answers, from `check_gold`; None where one is not known.
        """
        order = np.zeros(tokens.shape[1], dtype=np.int64)
        return [AnswerVerdict(str(self.show(*row, order))) for row in zip(prompts, tokens, strict=True)]

    def check_gold(self, gold: str) -> str:
        """A right answer in the form that `verdicts` takes; ValueError if it can be none."""
        return gold

    def token_text(self, token: int) -> str:
        """What a token is called in pictures: by default its text, or its number without a tokenizer."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))

    @property
    def board(self) -> Board | None:
        """Where a row has a board; None: rows are drawn as text, token after token."""
        return None

    @abstractmethod
    def question(self, index: int) -> Question:
        """A question of the test in the form that `encode` takes, with the right answer if `verdicts` needs it."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer; None if all rows have the same length."""
        return None

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; None if tokens are not text."""
        return None

    def keep_tokenizer(self, run_dir: Path) -> None:
        """Write the tokenizer to a run's directory, for `DataSettings.in_run`; by default there is none.

        Raises:
            WriteError: it cannot be written.
        """

    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of difficulty by name, each [n]: the lowest value of the question's group, or NaN if unknown."""
        return {}

    def reference(self, indices: np.ndarray) -> Reference | None:
        """What a simple method solves of these questions; None if the data set has no such method."""
        return None

    def warnings(self) -> Sequence[str]:
        """Warnings about the data to show before training. They need a pass over the data, which may take seconds."""
        return ()

    def load(self, *, train: bool) -> DataSet:
        """Read what evaluation needs and, if asked, the training rows. The first call may generate or download data.

        Raises:
            ValueError: the rows cannot be read, or end in another token than `eos_id` says.
        """
        validation, _ = self.validation, self.n_questions
        if validation.eos_id != self.eos_id:
            raise ValueError(
                f"{type(self).__name__}.eos_id is {self.eos_id}, but the rows of the validation have eos_id "
                f"{validation.eos_id}: they must be equal, since answers end there"
            )
        if train:
            _ = self.train
        return self
