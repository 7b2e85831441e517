"""Sudoku: puzzles from generated boards, files, the published set or a Hugging Face data set.

To check a file of boards, and that each puzzle has exactly one solution (not required for training):

    python -m data.sudoku check FILE

Shapes: B boards, n questions, S size, C = S * S cells, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from base.commands import CommandParser, ends_with_message, fail
from base.text import shorten
from data.dataset import AnswerVerdict, Board, DataSet, DataSettings, JudgedAnswers, Reference
from data.generate_sudoku import cached_generated
from data.questions import Question
from data.settings import FREE_ON_RESUME, Seed
from data.sudoku_boards import (
    BOX_SHAPE,
    Split,
    SudokuData,
    SudokuLayout,
    check_boards,
    check_request,
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

if TYPE_CHECKING:
    from rich.text import Text


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
        if self.source == "generated" or self.min_clues > self.max_clues:
            try:
                check_request(self.size, self.min_clues, self.max_clues)
            except ValueError as error:
                problems.append(str(error))
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
        if self.source == "hub" and not self.hub_name:
            problems.append("source 'hub' needs hub_name")
        # Not those of generated boards: a run has them, and `data.source=files` evaluates it on other boards.
        for keys, sources in (
            (("train_file", "test_file"), ("files",)),
            (("hub_name", "train_split", "test_split", "puzzle_column", "solution_column"), ("hub",)),
            (("rating_column",), ("files", "hub")),
        ):
            given = [key for key in keys if not self.is_default(key)]
            if given and self.source not in sources:
                listed = " or ".join(map(repr, sources))
                problems.append(f"{', '.join(given)}: only used by source {listed}, but source is {self.source!r}")
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
    def remedy_for_no_start(self) -> str | None:
        """For one board, whose first cell may be empty."""
        return "set data.layout: two_halves" if self.layout == "in_place" else None

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
    def resolved(self) -> SudokuSettings:
        """With the source that there is."""
        if self.source != "published_or_generated":
            return self
        source = "published" if published_available(self.data_dir) else "generated"
        return self.model_copy(update={"source": source})

    @override
    def open(self, vocab_size: int) -> Sudoku:
        return Sudoku(self)


class Sudoku(DataSet):
    """Boards to train on and puzzles to solve."""

    figures = ("accuracy", "cell_accuracy")
    question_noun = "puzzles"
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

    @override
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> JudgedAnswers:
        """See `judge_boards`; samples are the boards as lines of cells."""
        data = self.validation
        grid, puzzles = tokens[:, -data.n_cells :], data.puzzles[indices]  # in both layouts
        figures = judge_boards(grid, puzzles, data.solutions[indices], data.size)
        changed = ((puzzles != 0) & (grid != puzzles)).any(1)
        samples = [
            {
                "puzzle": format_cells(puzzle),
                "answer": format_cells(cells),
                "verdict": "solved" if solved else "changes a clue" if is_changed else "is not legal",
            }
            for puzzle, cells, solved, is_changed in zip(puzzles, grid, figures["accuracy"], changed, strict=True)
        ]
        return JudgedAnswers(figures, samples)

    @override
    def encode(self, question: str) -> np.ndarray:
        """A puzzle of C characters, `.` or `0` for empty cells, as a row [L]; ValueError if it cannot be solved."""
        puzzle, mask_id = np.array(parse_puzzle(question, self.settings.size)), mask_token(self.settings.size)  # [C]
        check_puzzle(puzzle, self.settings.size)
        if self.settings.layout == "in_place":
            return np.where(puzzle == 0, mask_id, puzzle)
        return np.concatenate([puzzle, np.full_like(puzzle, mask_id)])

    @override
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> Text:
        """See `format_boards`."""
        grid, puzzle = self._cells(tokens), self._puzzle(prompt)
        return format_boards(puzzle, grid, self._cells(order), find_faults(grid, puzzle, self.settings.size))

    @override
    def verdicts(
        self, prompts: np.ndarray, tokens: np.ndarray, golds: Sequence[str | None] | None = None
    ) -> list[AnswerVerdict]:
        """Facts: whether the board is `legal`, whether the clues are kept, and the number of wrong cells if known.

        Needs no gold answers: any legal board that keeps all clues is right.
        """
        return [
            describe_board(self._cells(row), self._puzzle(prompt), self.settings.size, self.board.first)
            for prompt, row in zip(prompts, tokens, strict=True)
        ]

    @override
    def token_text(self, token: int) -> str:
        return str(token)

    @property
    @override
    def board(self) -> Board:
        size = self.settings.size
        empty = mask_token(size) if self.settings.layout == "in_place" else 0
        return Board(size, *BOX_SHAPE[size], first=self.settings.length - size**2, puzzle_first=0, empty=empty)

    def _cells(self, row: np.ndarray) -> np.ndarray:
        """The part of a row ([L]) that is the solved board, [C]."""
        return row[-(self.settings.size**2) :]  # in both layouts

    def _puzzle(self, prompt: np.ndarray) -> np.ndarray:
        """The puzzle of a prompt ([L]), int64 [C], 0 for empty cells."""
        cells = prompt[: self.settings.size**2]  # in both layouts
        return np.where(cells == mask_token(self.settings.size), 0, cells)

    @override
    def question(self, index: int) -> Question:
        """A puzzle of the test split."""
        return Question(format_cells(self.validation.puzzles[index]))

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
    is_train, layout, source = split == "train", settings.layout, settings.resolved().source
    rating_column = None if is_train else settings.rating_column
    if source == "published":
        return load_published(settings.data_dir, split, layout)
    if source == "hub":
        assert settings.hub_name is not None  # checked by the settings, as are the files below
        return load_hub(
            settings.hub_name,
            settings.train_split if is_train else settings.test_split,
            puzzle_column=settings.puzzle_column,
            solution_column=settings.solution_column,
            size=settings.size,
            layout=layout,
            rating_column=rating_column,
        )
    if source == "files":
        path = settings.train_file if is_train else settings.test_file
        assert path is not None
        return load_sudoku_file(path, settings.size, layout, rating_column)
    cached = cached_generated(
        settings.data_dir,
        settings.size,
        n_train=settings.n_train,
        n_test=settings.n_test,
        min_clues=settings.min_clues,
        max_clues=settings.max_clues,
        seed=settings.seed,
        split=split,
    )
    return load_sudoku_file(cached, settings.size, layout)


def judge_boards(grid: np.ndarray, puzzle: np.ndarray, solution: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Judge filled boards of either layout.

    A puzzle is solved if the grid is legal and keeps every clue. If a puzzle has several solutions, each of them
    counts.

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


def format_cells(cells: np.ndarray) -> str:
    """Cells [C] on one line, `.` for empty ones, `?` for tokens that are no digit."""
    return "".join(".123456789"[digit] if digit < 10 else "?" for digit in cells)


def check_puzzle(puzzle: np.ndarray, size: int) -> None:
    """Raise ValueError if a puzzle ([C], 0 for empty cells) has contradicting clues or no empty cell."""
    text = shorten(repr(format_cells(puzzle)), 100)
    repeats = find_repeats(puzzle, size)
    if repeats:
        group, digit, cells = repeats[0]
        places = " and ".join(f"row {cell // size + 1} column {cell % size + 1}" for cell in cells)
        more = f"; {len(repeats) - 1} more such" if len(repeats) > 1 else ""
        raise ValueError(
            f"puzzle {text} has contradicting clues: {group} has more than one {digit}, at {places}{more}; correct them"
        )
    if (puzzle != 0).all():
        raise ValueError(f"puzzle {text} is a finished, legal board: there is no empty cell (. or 0) to fill")


def find_repeats(cells: np.ndarray, size: int) -> list[tuple[str, int, list[int]]]:
    """Digits that a row, column or box has more than once: the group's name, the digit, and its cells.

    Args:
        cells: [C]; 0 and other values that are no digit are skipped.
    """
    height, width = BOX_SHAPE[size]
    place = np.arange(size * size)
    row, column = place // size, place % size
    members = {"row": row, "column": column, "box": row // height * (size // width) + column // width}
    found = []
    for name, number in members.items():
        for index in range(size):
            group = place[number == index]
            for digit in range(1, size + 1):
                same = [int(cell) for cell in group if cells[cell] == digit]
                if len(same) > 1:
                    found.append((f"{name} {index + 1}", digit, same))
    return found


@dataclass(frozen=True)
class Faults:
    """What is wrong with a board: the reason by cell, and what is known of the puzzle. All empty: it is solved."""

    changed: dict[int, str]  # clues that were not kept
    repeated: dict[int, str]  # cells that contradict others, or hold no digit
    different: dict[int, str]  # other cells than the only solution has
    n_solutions: int | None = None  # up to 2, of a puzzle that was not solved

    @property
    def all(self) -> dict[int, str]:
        """One reason for each cell."""
        return self.different | self.repeated | self.changed


def find_faults(grid: np.ndarray, puzzle: np.ndarray, size: int) -> Faults:
    """The faults of a filled board; `grid` and `puzzle` are [C]. Solves the puzzle only if the board does not."""
    changed = {int(i): f"clue {puzzle[i]} changed" for i in np.flatnonzero((puzzle != 0) & (grid != puzzle))}
    repeated = {int(i): "no digit" for i in np.flatnonzero((grid < 1) | (grid > size))}
    for group, digit, cells in find_repeats(grid, size):
        repeated |= {cell: f"another {digit} in {group}" for cell in cells if cell not in repeated}
    if not changed and not repeated:
        return Faults({}, {}, {})
    from data.sudoku_solver import solve  # imports numba, which is slow

    solutions, counts = solve(puzzle[None].astype(np.uint8), size)
    different: dict[int, str] = {}
    if counts[0] == 1:
        other = np.flatnonzero((puzzle == 0) & (grid != solutions[0]))
        different = {int(i): f"the only solution has {solutions[0, i]}" for i in other}
    return Faults(changed, repeated, different, int(counts[0]))


def describe_board(grid: np.ndarray, puzzle: np.ndarray, size: int, first: int) -> AnswerVerdict:
    """Judge a filled board.

    Args:
        grid, puzzle: [C]; 0 for empty cells of the puzzle.
        first: position of the board's first cell in its row.
    """
    faults = find_faults(grid, puzzle, size)
    n_clues = int((puzzle != 0).sum())
    parts = []
    n_blank = int(((grid < 1) | (grid > size)).sum())
    if n_blank:
        parts.append(f"{n_blank} cells have no digit")
    if len(faults.repeated) > n_blank:
        parts.append(f"{len(faults.repeated) - n_blank} cells contradict each other")
    if faults.changed:
        parts.append(f"{len(faults.changed)} of {n_clues} clues changed")
    if faults.n_solutions == 0:
        parts.append("the puzzle has no solution")
    elif faults.n_solutions == 1:
        n_empty = len(puzzle) - n_clues
        parts.append(f"{len(faults.different)} of {n_empty} empty cells differ from the only solution")
    facts = {
        "legal": not faults.repeated,
        "clues_kept": not faults.changed,
        "n_wrong": len(faults.different) if faults.n_solutions in (None, 1) else None,
    }
    reason = "not solved: " + ", ".join(parts) if parts else f"solved: legal, and all {n_clues} clues kept"
    return AnswerVerdict(
        format_cells(grid), not parts, reason, facts, {first + cell: why for cell, why in faults.all.items()}
    )


EARLY, LATE = (222, 235, 247), (8, 69, 148)  # colours of cells by the order in which they were filled
LEGEND = {
    "5>3": "clue changed",
    "3!": "contradicts another cell or is no digit",
    "3?": "differs from the only solution",
}


def format_boards(puzzle: np.ndarray, grid: np.ndarray, order: np.ndarray, faults: Faults) -> Text:
    """The filled board beside the order in which its cells were filled; arrays are [C].

    Clues are in brackets, and faults are marked, so that nothing depends on the colours.
    """
    from rich.text import Text

    size = math.isqrt(len(grid))
    height, width = BOX_SHAPE[size]
    board_width = 3 * size + 2 * (size // width - 1)
    text, last = Text(f"{'filled board':<{board_width}}    filled at step\n"), max(1, int(order.max()))
    for row in range(size):
        if row and row % height == 0:
            rule = "-+-".join(["---" * width] * (size // width))
            text.append(f"{rule}    {rule}\n", style="dim")
        for side in ("board", "order"):
            for column in range(size):
                cell = row * size + column
                if column and column % width == 0:
                    text.append(" | ", style="dim")
                style = _cell_style(cell, puzzle, order, last, faults)
                content = _mark(cell, puzzle, grid, faults) if side == "board" else f"{int(order[cell]) or '.':>2} "
                text.append(content, style=style)
            text.append("    " if side == "board" else "\n")
    marks = [
        (mark, meaning)
        for (mark, meaning), cells in zip(
            LEGEND.items(),
            (faults.changed, faults.repeated, faults.different.keys() - faults.repeated.keys()),
            strict=True,
        )
        if cells
    ]
    text.append(", ".join(f"{mark} {meaning}" for mark, meaning in [("[5]", "clue"), *marks]), style="dim")
    return text


def _mark(cell: int, puzzle: np.ndarray, grid: np.ndarray, faults: Faults) -> str:
    """Three characters for a cell of a filled board."""
    if cell in faults.changed:
        return f"{puzzle[cell]}>{grid[cell]}"
    if cell in faults.repeated:
        return f"[{grid[cell]}!" if puzzle[cell] else f" {grid[cell]}!"
    if cell in faults.different:
        return f" {grid[cell]}?"
    return f"[{grid[cell]}]" if puzzle[cell] else f" {grid[cell]} "


def _cell_style(cell: int, puzzle: np.ndarray, order: np.ndarray, last: int, faults: Faults) -> str:
    """The style of a cell as `rich` writes it."""
    if cell in faults.changed or cell in faults.repeated:
        return "bold white on rgb(176,0,32)"
    if cell in faults.different:
        return "black on rgb(255,176,64)"
    if puzzle[cell]:
        return "bold"
    share = (int(order[cell]) - 1) / max(1, last - 1)
    red, green, blue = (round(early + share * (late - early)) for early, late in zip(EARLY, LATE, strict=True))
    return f"{'black' if share < 0.45 else 'white'} on rgb({red},{green},{blue})"


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
