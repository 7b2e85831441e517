"""Sudoku boards as token sequences, checked in bulk.

0 is an empty cell, the mask token is size + 1. There are two layouts of a sequence; in both the last C tokens are the
solution:

- `two_halves`: the puzzle's cells, then the solution's. The puzzle half is the prompt.
- `in_place`: the solution's cells alone. The clues are the prompt; no token is an empty cell.

`data/sudoku_files.py` reads the sources. `python -m data.sudoku check FILE` checks one, and also that each puzzle has
exactly one solution, which training does not ask for.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from config import SudokuLayout
from data.sudoku_solver import BOX_SHAPE, count_solutions

CHUNK_ROWS = 50_000
SEARCH_ROWS = 500  # puzzles per task of a thread that counts solutions
N_SHOWN = 10


@dataclass(frozen=True)
class SudokuData:
    """Boards in memory; see `data.stream.SequenceData`. Build it with `make_data`, which checks them."""

    boards: np.ndarray  # uint8 [N, 2 * C], puzzles and solutions
    size: int
    layout: SudokuLayout = "two_halves"
    ratings: np.ndarray | None = None  # float32 [N], difficulty where the source has one; NaN where a puzzle has none

    @property
    def n_cells(self) -> int:
        """Cells of a board."""
        return self.size * self.size

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.n_cells if self.layout == "in_place" else 2 * self.n_cells

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self.size + 1

    @property
    def eos_id(self) -> None:
        """Boards have no end token."""
        return None

    @property
    def puzzles(self) -> np.ndarray:
        """uint8 [N, C]."""
        return self.boards[:, : self.n_cells]

    @property
    def solutions(self) -> np.ndarray:
        """uint8 [N, C]."""
        return self.boards[:, self.n_cells :]

    def __len__(self) -> int:
        return len(self.boards)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of these rows."""
        boards = self.boards[indices]
        if self.layout == "in_place":
            return boards[:, self.n_cells :].astype(np.int64), boards[:, : self.n_cells] != 0
        prompt_mask = np.zeros(boards.shape, dtype=bool)
        prompt_mask[:, : self.n_cells] = True
        return boards.astype(np.int64), prompt_mask


def make_data(
    boards: np.ndarray,
    size: int,
    source: str,
    layout: SudokuLayout = "two_halves",
    ratings: np.ndarray | None = None,
) -> SudokuData:
    """Check boards and wrap them.

    Args:
        boards: [N, 2 * C] of any number type, puzzles and solutions.
        source: where they come from, for the message.
        ratings: float32 [N], the puzzles' difficulty, NaN where it is not known.

    Raises:
        ValueError: there are none, the shape is wrong or a board is bad; the message names the first bad rows.
    """
    check_shape(boards, size, source)
    bad = check_boards(boards, size)
    if not bad and layout == "in_place":
        full = np.flatnonzero((boards[:, : size * size] != 0).all(1))
        bad = [(int(row), "the puzzle has no empty cell, so layout in_place leaves nothing to predict") for row in full]
    if bad:
        raise ValueError(f"{source}: {format_bad_rows(bad, len(boards))}")
    if ratings is not None:
        if ratings.shape != (len(boards),):
            raise ValueError(f"{source}: ratings must be one number per board, [{len(boards)}], got {ratings.shape}")
        if np.isinf(ratings).any() or np.isnan(ratings).all():
            raise ValueError(f"{source}: ratings must be finite numbers, and some board must have one")
    return SudokuData(np.ascontiguousarray(boards, dtype=np.uint8), size, layout, ratings)


def check_shape(boards: np.ndarray, size: int, source: str) -> None:
    """Raise ValueError unless `boards` are numbers [N, 2 * C], N at least 1."""
    expected = 2 * size * size
    if boards.ndim != 2 or boards.shape[1] != expected or boards.dtype.kind not in "uif":
        raise ValueError(
            f"{source}: rows must have {expected} numbers for {size}x{size} boards, got shape {boards.shape} of type "
            f"{boards.dtype}"
        )
    if len(boards) == 0:
        raise ValueError(f"{source} holds no boards")


def check_boards(boards: np.ndarray, size: int) -> list[tuple[int, str]]:
    """Bad rows of [N, 2 * C] boards (any number type) with the reason for each, in order; empty if all are good."""
    bad: list[tuple[int, str]] = []
    for start in range(0, len(boards), CHUNK_ROWS):
        chunk = boards[start : start + CHUNK_ROWS]
        puzzles, solutions = chunk[:, : size * size], chunk[:, size * size :]
        # In this order: the first that applies to a row is its reason.
        reasons = {
            f"the puzzle has a cell that is not 0 to {size}": ~_are_digits(puzzles, 0, size),
            f"the solution has a cell that is not 1 to {size}": ~_are_digits(solutions, 1, size),
            "the solution repeats a digit in a row, column or box": ~legal_solutions(solutions, size),
            "the solution changes a clue": ((puzzles != 0) & (puzzles != solutions)).any(1),
        }
        named = np.zeros(len(chunk), dtype=bool)
        found: list[tuple[int, str]] = []
        for reason, where in reasons.items():
            found += [(start + int(row), reason) for row in np.flatnonzero(where & ~named)]
            named |= where
        bad += sorted(found)
    return bad


def check_uniqueness(puzzles: np.ndarray, size: int, *, show_progress: bool = True) -> list[tuple[int, str]]:
    """Rows whose puzzle has several solutions, with that reason, in order; the search runs on all cores.

    Args:
        puzzles: uint8 [N, C], each with at least one solution, as `check_boards` finds out.
    """
    bad: list[tuple[int, str]] = []
    starts = range(0, len(puzzles), SEARCH_ROWS)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # the compiled code holds no lock
    try:
        counts = pool.map(lambda start: count_solutions(puzzles[start : start + SEARCH_ROWS], size), starts)
        with tqdm(total=len(puzzles), desc="counting solutions", unit="puzzle", disable=not show_progress) as bar:
            for start, counted in zip(starts, counts, strict=True):
                bad += [(start + int(row), "the puzzle has several solutions") for row in np.flatnonzero(counted > 1)]
                bar.update(len(counted))
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def legal_solutions(boards: np.ndarray, size: int) -> np.ndarray:
    """Which boards [N, C] hold every digit once in each row, column and box; bool [N]."""
    height, width = BOX_SHAPE[size]
    in_range = _are_digits(boards, 1, size)
    digits = np.where(in_range[:, None], boards, 1).astype(np.uint16)
    bits = (np.uint16(1) << digits).reshape(-1, size, size)
    boxes = bits.reshape(-1, size // height, height, size // width, width).transpose(0, 1, 3, 2, 4)
    every_digit = (1 << (size + 1)) - 2
    legal = in_range
    for groups in (bits, bits.transpose(0, 2, 1), boxes.reshape(-1, size, size)):
        legal = legal & (np.bitwise_or.reduce(groups, axis=2) == every_digit).all(1)
    return legal


def count_shared_puzzles(first: SudokuData, second: SudokuData) -> int:
    """How many puzzles of `second` also stand in `first`."""
    return len(set(puzzle_keys(second.puzzles)).intersection(puzzle_keys(first.puzzles)))


def puzzle_keys(puzzles: np.ndarray) -> list[bytes]:
    """One hashable key per puzzle (uint8 [N, C])."""
    cells = np.ascontiguousarray(puzzles)
    keys: list[Any] = cells.view(np.dtype((np.void, cells.shape[1]))).ravel().tolist()
    return keys


def format_bad_rows(bad: list[tuple[int, str]], n_rows: int) -> str:
    """The first bad rows, one per line; rows count from 0."""
    lines = [f"{len(bad)} of {n_rows} rows are bad (rows count from 0)"]
    lines += [f"  row {row}: {reason}" for row, reason in bad[:N_SHOWN]]
    if len(bad) > N_SHOWN:
        lines.append(f"  and {len(bad) - N_SHOWN} more")
    return "\n".join(lines)


def _are_digits(boards: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Which boards hold only whole numbers in a range; bool [N]."""
    inside = (boards >= lowest) & (boards <= highest)
    if not np.issubdtype(boards.dtype, np.integer):
        inside &= boards == np.floor(boards)
    return np.asarray(inside.all(1))


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad rows or files end with exit status 2."""
    from data.sudoku_files import read_boards  # it imports this module

    parser = argparse.ArgumentParser(description="Check a file of Sudoku boards.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", help=".csv, .npz or .npy")
    parser.add_argument("--size", type=int, default=9, choices=sorted(BOX_SHAPE))
    options = parser.parse_args(arguments)
    try:
        tokens = read_boards(options.file, options.size)
        check_shape(tokens, options.size, options.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    bad = check_boards(tokens, options.size)
    good = np.setdiff1d(np.arange(len(tokens)), [row for row, _ in bad])
    several = check_uniqueness(tokens[good, : options.size**2].astype(np.uint8), options.size)
    bad = sorted(bad + [(int(good[row]), reason) for row, reason in several])
    if bad:
        print(f"{options.file}: {format_bad_rows(bad, len(tokens))}")
        sys.exit(2)
    print(f"{len(tokens)} good rows, one solution each")


if __name__ == "__main__":
    main()
