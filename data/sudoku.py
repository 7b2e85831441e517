"""Sudoku boards as token sequences, checked in bulk.

A sequence is the puzzle's cells, then the solution's: 0 is an empty cell, the mask token is size + 1. The puzzle half
is the prompt. `data/sudoku_files.py` reads the sources; `python -m data.sudoku check FILE` checks one.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

# Rows and columns of a box.
BOX_SHAPE = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
CHUNK_ROWS = 50_000
N_SHOWN = 10


@dataclass(frozen=True)
class SudokuData:
    """Boards in memory; see `data.stream.SequenceData`. Build it with `make_data`, which checks them."""

    tokens: np.ndarray  # uint8 [N, 2 * C]
    size: int

    @property
    def n_cells(self) -> int:
        """Cells of a board."""
        return self.size * self.size

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return 2 * self.n_cells

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
        return self.tokens[:, : self.n_cells]

    @property
    def solutions(self) -> np.ndarray:
        """uint8 [N, C]."""
        return self.tokens[:, self.n_cells :]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, 2 * C]) and prompt mask (bool [n, 2 * C]) of these rows."""
        prompt_mask = np.zeros((len(indices), self.length), dtype=bool)
        prompt_mask[:, : self.n_cells] = True
        return self.tokens[indices].astype(np.int64), prompt_mask


def make_data(tokens: np.ndarray, size: int, source: str) -> SudokuData:
    """Check boards and wrap them.

    Args:
        tokens: [N, 2 * C] of any number type.
        source: where they come from, for the message.

    Raises:
        ValueError: there are none, the shape is wrong or a board is bad; the message names the first bad rows.
    """
    check_shape(tokens, size, source)
    bad = check_boards(tokens, size)
    if bad:
        raise ValueError(f"{source}: {format_bad_rows(bad, len(tokens))}")
    return SudokuData(np.ascontiguousarray(tokens, dtype=np.uint8), size)


def check_shape(tokens: np.ndarray, size: int, source: str) -> None:
    """Raise ValueError unless `tokens` are numbers [N, 2 * C], N at least 1."""
    expected = 2 * size * size
    if tokens.ndim != 2 or tokens.shape[1] != expected or tokens.dtype.kind not in "uif":
        raise ValueError(
            f"{source}: rows must have {expected} numbers for {size}x{size} boards, got shape {tokens.shape} of type "
            f"{tokens.dtype}"
        )
    if len(tokens) == 0:
        raise ValueError(f"{source} holds no boards")


def check_boards(tokens: np.ndarray, size: int) -> list[tuple[int, str]]:
    """Bad rows of [N, 2 * C] boards (any number type) with the reason for each, in order; empty if all are good."""
    bad: list[tuple[int, str]] = []
    for start in range(0, len(tokens), CHUNK_ROWS):
        chunk = tokens[start : start + CHUNK_ROWS]
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
    if bad:
        print(f"{options.file}: {format_bad_rows(bad, len(tokens))}")
        sys.exit(2)
    print(f"{len(tokens)} good rows")


if __name__ == "__main__":
    main()
