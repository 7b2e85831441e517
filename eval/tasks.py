"""What a model is asked and how its answers are judged: all that evaluation knows about a data set.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from config import Config, TinyGsmSettings
from data.gsm8k import Prompts
from data.load import find_tokenizer, load_prompts, load_split
from data.stream import SequenceData
from data.sudoku import SudokuData
from data.sudoku_solver import solve_singles
from data.text import decode_programs
from eval.sudoku_eval import judge_boards
from grader.grade import grade, reason_shares


@dataclass(frozen=True)
class Judged:
    """Answers judged, row by row."""

    figures: dict[str, Tensor]  # the task's `figures`, float32 [B]
    samples: list[dict[str, Any]]  # readable, one per row, or none at all


@dataclass(frozen=True)
class Reference:
    """What a simple method makes of the same questions, to compare a model with."""

    name: str
    solved: np.ndarray  # bool [n]


class Task(Protocol):
    """A test set."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what `judge` reports; `accuracy` is one of them."""
        ...

    @property
    def validation(self) -> SequenceData:
        """Rows of the validation loss, which training never sees."""
        ...

    def __len__(self) -> int:
        """Questions that can be asked."""
        ...

    def prompts(self, indices: np.ndarray) -> Tensor:
        """Questions as rows int64 [B, L], masked where the answer goes."""
        ...

    def judge(self, tokens: Tensor, indices: np.ndarray) -> Judged:
        """Judge rows int64 [B, L] that were sampled from the prompts with these indices."""
        ...

    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of difficulty by name: for each of these questions the lowest value of its group [n], or NaN."""
        ...

    def reference(self, indices: np.ndarray) -> Reference | None:
        """What a simple method makes of these questions; None where there is none."""
        ...


@dataclass(frozen=True)
class SudokuTask:
    """Solve the puzzles of the test split."""

    validation: SudokuData
    figures = ("accuracy", "cell_accuracy")

    def __len__(self) -> int:
        return len(self.validation)

    def prompts(self, indices: np.ndarray) -> Tensor:
        """See `Task`."""
        tokens, prompt_mask = (torch.from_numpy(part) for part in self.validation.rows(indices))
        return tokens.masked_fill(~prompt_mask, self.validation.mask_id)

    def judge(self, tokens: Tensor, indices: np.ndarray) -> Judged:
        """See `Task`; no samples, since a grid says little to a reader."""
        data = self.validation
        puzzle, solution = (torch.from_numpy(part[indices]).long() for part in (data.puzzles, data.solutions))
        grid = tokens[:, -data.n_cells :].cpu()  # in both layouts
        return Judged(judge_boards(grid, puzzle, solution, data.size), [])

    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """By number of clues, and by whole steps of the rating where the file has one."""
        data = self.validation
        measures = {"clues": (data.puzzles[indices] != 0).sum(1)}
        if data.ratings is not None:
            measures["rating"] = np.floor(data.ratings[indices])
        return measures

    def reference(self, indices: np.ndarray) -> Reference:
        """What naked and hidden singles solve, the two rules that every human solver begins with."""
        data = self.validation
        filled = solve_singles(data.puzzles[indices], data.size)
        return Reference("naked and hidden singles", (filled != 0).all(1))


@dataclass(frozen=True)
class ProgramTask:
    """Write a program for each question, which is run and must return the answer."""

    validation: SequenceData
    test: Prompts
    tokenizer: Any
    mask_id: int
    figures = ("accuracy", "fails_to_parse", "fails_to_run", "out_of_time")

    def __len__(self) -> int:
        return len(self.test.problems)

    def prompts(self, indices: np.ndarray) -> Tensor:
        """See `Task`."""
        return torch.from_numpy(self.test.xt[indices])

    def judge(self, tokens: Tensor, indices: np.ndarray) -> Judged:
        """See `Task`; runs the programs."""
        problems = [self.test.problems[i] for i in indices]
        programs = decode_programs(self.tokenizer, tokens.cpu().numpy(), self.test.xt[indices] != self.mask_id)
        # The ranks of a machine share its cores.
        n_workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        verdicts = grade(programs, [problem.answer for problem in problems], n_workers=n_workers)
        shares = [{"accuracy": float(verdict.verdict)} | reason_shares([verdict]) for verdict in verdicts]
        figures = {name: torch.tensor([share[name] for share in shares]) for name in self.figures}
        samples = [
            {
                "question": problem.question,
                "program": program,
                "value": verdict.value,
                "answer": problem.answer,
                "verdict": verdict.reason,
            }
            for problem, program, verdict in zip(problems, programs, verdicts, strict=True)
        ]
        return Judged(figures, samples)

    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing is known of it."""
        return {}

    def reference(self, indices: np.ndarray) -> None:
        """There is none."""


def load_task(config: Config) -> Task:
    """The test set of the data set that the settings name; ValueError where it cannot be read."""
    validation = load_split(config, "test")
    if isinstance(config.data, TinyGsmSettings):
        tokenizer = find_tokenizer(config.data)
        test = load_prompts(config.data, tokenizer, config.mask_id)
        return ProgramTask(validation, test, tokenizer, config.mask_id)
    assert isinstance(validation, SudokuData)
    return SudokuTask(validation)
