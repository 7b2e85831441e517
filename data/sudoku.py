"""Sudoku: puzzles from generated boards, files, the published set or a Hugging Face data set.

To check a file of boards, and that each puzzle has exactly one solution (not required for training):

    python -m data.sudoku check FILE

Shapes: B boards, n questions, S size, C = S * S cells, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from data.dataset import DataSet, DataSettings, Judged, Reference
from data.foreign import CommandParser, ends_with_message, fail, shorten
from data.settings import FREE_ON_RESUME, Seed
from data.sudoku_boards import (
    BOX_SHAPE,
    SudokuData,
    SudokuLayout,
    check_boards,
    check_shape,
    count_shared_puzzles,
    format_bad_rows,
    legal_solutions,
    load_hub,
    load_published,
    load_sudoku_file,
    mask_token,
    published_available,
    read_boards,
    sequence_length,
)

Split = Literal["train", "test"]


class SudokuSettings(DataSettings):
    """Source of the Sudoku boards, and their layout as sequences."""

    dataset: Literal["sudoku"]
    data_dir: str = Field(
        "data/sudoku_new",
        description="folder of the published set and of generated boards",
        json_schema_extra=FREE_ON_RESUME,
    )
    size: Literal[4, 6, 9] = Field(9, description="rows and columns of a board; size 6 has boxes of 2 x 3")
    layout: SudokuLayout = Field(
        "two_halves",
        description="two_halves: puzzle cells, then solution cells, as published; in_place: one board, clues given",
    )
    source: Literal["published_or_generated", "published", "generated", "files", "hub"] = Field(
        "published_or_generated", description="where the boards are read from"
    )
    n_train: int = Field(1_000_000, gt=0, description="generated: number of training puzzles")
    n_test: int = Field(2000, gt=0, description="generated: number of test puzzles, none of them in the training set")
    min_clues: int = Field(30, gt=0, description="generated: minimum number of clues")
    max_clues: int = Field(40, gt=0, description="generated: maximum number of clues")
    seed: Seed = Field(0, description="generated: seed of the puzzles")
    train_file: str | None = Field(None, description="files: .csv, .npz or .npy file of the training boards")
    test_file: str | None = Field(None, description="files: the same for the test boards")
    hub_name: str | None = Field(None, description="hub: name of a Hugging Face data set")
    train_split: str = Field("train", description="hub: split for training")
    test_split: str = Field("test", description="hub: split for the test")
    puzzle_column: str = Field("puzzle", description="hub: column of the puzzles")
    solution_column: str = Field("solution", description="hub: column of the solutions")
    rating_column: str | None = Field(
        None,
        description="files (.csv, .npz), hub: column with the difficulty of test puzzles; accuracy is reported by it",
        json_schema_extra=FREE_ON_RESUME,
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> SudokuSettings:
        problems = []
        if self.min_clues > self.max_clues:
            problems.append(f"min_clues {self.min_clues} is above max_clues {self.max_clues}")
        may_be_generated = self.source in ("generated", "published_or_generated")
        if self.layout == "in_place" and may_be_generated and self.max_clues >= self.size**2:
            problems.append(
                f"max_clues {self.max_clues}: with layout in_place a full board has nothing to predict; lower it"
            )
        if self.source in ("published", "published_or_generated") and self.size != 9:
            problems.append(
                f"source {self.source!r} has only 9x9 boards, but size is {self.size}: set source: generated"
            )
        if self.source == "files" and not (self.train_file and self.test_file):
            problems.append("source 'files' needs train_file and test_file")
        if self.source != "files" and (self.train_file or self.test_file):
            problems.append(f"train_file and test_file are ignored by source {self.source!r}: set source: files")
        if self.source == "hub" and not self.hub_name:
            problems.append("source 'hub' needs hub_name")
        if self.source != "hub" and self.hub_name:
            problems.append(f"hub_name is ignored by source {self.source!r}: set source: hub")
        if self.rating_column and self.source not in ("files", "hub"):
            problems.append(f"rating_column is ignored by source {self.source!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    @override
    def length(self) -> int:
        """Tokens per sequence."""
        return sequence_length(self.size, self.layout)

    @property
    @override
    def min_vocab_size(self) -> int:
        """Tokens: empty cell, digits and mask token."""
        return self.size + 2

    @override
    def mask_id_in(self, vocab_size: int) -> int:
        """The mask token, the first after the digits."""
        return mask_token(self.size)

    @override
    def describe(self) -> str:
        size = f"{self.size}x{self.size}"
        generated = f"{self.n_train:,} generated {size} boards with {self.min_clues} to {self.max_clues} clues"
        if self.source == "published_or_generated":
            if published_available(self.data_dir):
                return f"the published Sudoku set in {self.data_dir}"
            return f"{generated}, since {self.data_dir} does not have the published Sudoku set"
        if self.source == "generated":
            return generated
        location = {"published": self.data_dir, "files": self.train_file, "hub": self.hub_name}[self.source]
        return f"{size} boards from {location}"

    @override
    def open(self, vocab_size: int) -> Sudoku:
        return Sudoku(self)


class Sudoku(DataSet):
    """Boards to train on and puzzles to solve."""

    figures = ("accuracy", "cell_accuracy")
    questions = "puzzles"
    question_option = "puzzle"

    def __init__(self, settings: SudokuSettings) -> None:
        self.settings = settings

    @cached_property
    @override
    def train(self) -> SudokuData:
        return load_split(self.settings, "train")

    @cached_property
    @override
    def validation(self) -> SudokuData:
        """The test split; its puzzles are also the test questions."""
        return load_split(self.settings, "test")

    @property
    @override
    def n_questions(self) -> int:
        return len(self.validation)

    @override
    def prompts(self, indices: np.ndarray) -> np.ndarray:
        tokens, prompt_mask = self.validation.rows(indices)
        return np.where(prompt_mask, tokens, self.validation.mask_id)

    @override
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> Judged:
        """See `judge_boards`. Returns no samples, since sampled grids are hard to read."""
        data = self.validation
        grid = tokens[:, -data.n_cells :]  # in both layouts
        return Judged(judge_boards(grid, data.puzzles[indices], data.solutions[indices], data.size))

    @override
    def encode(self, question: str) -> np.ndarray:
        """A puzzle of C characters, `.` or `0` for empty cells, as a row [L]."""
        puzzle = np.array(parse_puzzle(question, self.settings.size))  # [C]
        mask_id = mask_token(self.settings.size)
        if self.settings.layout == "in_place":
            return np.where(puzzle == 0, mask_id, puzzle)
        return np.concatenate([puzzle, np.full_like(puzzle, mask_id)])

    @override
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> str:
        """The solved board and the order in which its cells were filled."""
        n_cells, mask_id = self.settings.size**2, mask_token(self.settings.size)
        puzzle = np.where(prompt[:n_cells] == mask_id, 0, prompt[:n_cells])  # in both layouts
        return format_boards(puzzle, tokens[-n_cells:], order[-n_cells:], self.settings.size)

    @override
    def example(self) -> str:
        """The first puzzle of the test split."""
        return "".join(str(digit) if digit else "." for digit in self.validation.puzzles[0])

    @override
    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Number of clues and, if the data has ratings, the rating rounded down."""
        data = self.validation
        measures = {"clues": (data.puzzles[indices] != 0).sum(1)}
        if data.ratings is not None:
            measures["rating"] = np.floor(data.ratings[indices])
        return measures

    @override
    def reference(self, indices: np.ndarray) -> Reference:
        """What naked and hidden singles solve, the two simplest rules of human solvers."""
        from data.sudoku_solver import solve_singles  # imports numba, which is slow

        data = self.validation
        filled = solve_singles(data.puzzles[indices], data.size)
        return Reference("naked and hidden singles", (filled != 0).all(1))

    @override
    def warnings(self) -> Sequence[str]:
        """Warn about test puzzles that are also in the training set."""
        n_shared = count_shared_puzzles(self.train, self.validation)
        return [f"{n_shared} of the {len(self.validation)} test puzzles are in the training set"] if n_shared else []


def load_split(settings: SudokuSettings, split: Split) -> SudokuData:
    """One split of the boards; generated boards are made on first use and cached in `data_dir`.

    Raises:
        ValueError: a file is missing or has a bad row; the message names it.
    """
    is_train, layout, source = split == "train", settings.layout, settings.source
    rating_column = None if is_train else settings.rating_column
    if source == "published_or_generated":
        source = "published" if published_available(settings.data_dir) else "generated"
    if source == "published":
        return load_published(settings.data_dir, split, layout)
    if source == "hub":
        assert settings.hub_name is not None  # checked by the settings, as are the files below
        return load_hub(
            settings.hub_name,
            settings.train_split if is_train else settings.test_split,
            settings.puzzle_column,
            settings.solution_column,
            settings.size,
            layout,
            rating_column,
        )
    if source == "files":
        path = settings.train_file if is_train else settings.test_file
        assert path is not None
        return load_sudoku_file(path, settings.size, layout, rating_column)
    from data.generate_sudoku import cached_generated  # imports numba, which is slow

    paths = cached_generated(
        settings.data_dir,
        settings.size,
        settings.n_train,
        settings.n_test,
        settings.min_clues,
        settings.max_clues,
        settings.seed,
    )
    return load_sudoku_file(paths[0 if is_train else 1], settings.size, layout)


def judge_boards(grid: np.ndarray, puzzle: np.ndarray, solution: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Judge filled boards of either layout.

    A puzzle is solved if the grid is legal and keeps every clue. If a puzzle has several solutions, each of them
    counts. (The published code accepts a grid that keeps any of the clues.)

    Args:
        grid: [B, C], sampled.
        puzzle: [B, C], 0 for empty cells.
        solution: [B, C], from the data.

    Returns:
        `accuracy` float32 [B], 1 if solved; `cell_accuracy` float32 [B], share of the puzzle's empty cells that equal
        `solution` (1 if no cell is empty).
    """
    empty = puzzle == 0
    solved = legal_solutions(grid, size) & (empty | (grid == puzzle)).all(1)
    n_right, n_empty = ((grid == solution) & empty).sum(1), empty.sum(1)
    cell_accuracy = np.where(n_empty > 0, n_right / np.maximum(n_empty, 1), 1.0)
    return {"accuracy": solved.astype(np.float32), "cell_accuracy": cell_accuracy.astype(np.float32)}


def parse_puzzle(text: str, size: int) -> list[int]:
    """Cells of a puzzle written as C characters, `.` or `0` for empty cells.

    Raises:
        ValueError: wrong length or an invalid character.
    """
    digits = {".": 0} | {str(digit): digit for digit in range(size + 1)}
    wrong = sorted(set(text) - set(digits))
    if len(text) != size * size or wrong:
        detail = f"contains {wrong}" if wrong else f"has {len(text)} cells"
        raise ValueError(
            f"puzzle {shorten(repr(text), 100)} {shorten(detail, 80)}: a {size}x{size} puzzle has {size * size} cells, "
            f"each . or 0 to {size}"
        )
    return [digits[character] for character in text]


def format_boards(puzzle: np.ndarray, solution: np.ndarray, order: np.ndarray, size: int) -> str:
    """The solved board, clues in brackets, beside the order in which its cells were filled; arguments are [C]."""
    lines = [f"{'solution, [clues]':<{4 * size}}  filled at step (. = clue)"]
    for row in range(size):
        cells = range(row * size, (row + 1) * size)
        left = "".join(f"[{solution[i]}] " if puzzle[i] else f" {solution[i]}  " for i in cells)
        right = "".join(f"{int(order[i]) or '.':>4}" for i in cells)
        lines.append(f"{left:<{4 * size}}  {right}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad rows or files give exit status 2."""
    from data.sudoku_solver import check_uniqueness  # imports numba, which is slow

    parser = CommandParser(description="Check a file of Sudoku boards.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", help=".csv, .npz or .npy")
    parser.add_argument("--size", type=int, default=9, choices=sorted(BOX_SHAPE))
    options = parser.parse_args(arguments)
    with ends_with_message():
        tokens, _ = read_boards(options.file, options.size)
        check_shape(tokens, options.size, options.file)
    bad = check_boards(tokens, options.size)
    good = np.setdiff1d(np.arange(len(tokens)), [row for row, _ in bad])
    several = check_uniqueness(tokens[good, : options.size**2].astype(np.uint8), options.size)
    bad = sorted(bad + [(int(good[row]), reason) for row, reason in several])
    if bad:
        fail(f"{options.file}: {format_bad_rows(bad, len(tokens))}")
    print(f"{len(tokens)} good rows, one solution each")


if __name__ == "__main__":
    main()
