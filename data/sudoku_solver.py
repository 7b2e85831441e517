"""Compiled Sudoku functions: generate puzzles with one solution, count solutions, solve by simple rules.

`data/generate_sudoku.py` describes how puzzles are drawn.

Shapes: n boards, S size, C = S * S cells.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit, uint64
from tqdm import tqdm

from base.cores import count_cores
from data.sudoku_boards import BOX_SHAPE

SEARCH_ROWS = 500  # puzzles per task of a thread when counting solutions
# Number of digits in a bit mask of candidates; a constant of the compiled functions.
POPCOUNT = np.array([bin(mask).count("1") for mask in range(1 << 10)], dtype=np.uint8)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Numba compiles on first use; the result is kept on disk if a folder for it can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor a cache in the home folder, as in a container of a read-only image
        return njit(nogil=True)(function)


@_compiled
def _next_random(state: np.ndarray) -> np.int64:
    """The next 32 random bits of SplitMix64; updates `state` (uint64 [1])."""
    state[0] += uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> uint64(31))) >> uint64(32))


@_compiled
def _place(grid: np.ndarray, used: np.ndarray, groups: np.ndarray, cell: int, digit: int) -> None:
    """Write `digit`, or clear the cell if it is 0; `used` ([3, S]) are bit masks of the rows, columns and boxes."""
    bit = 1 << (grid[cell] if digit == 0 else digit)
    for kind in range(3):
        used[kind, groups[kind, cell]] ^= bit
    grid[cell] = digit


@_compiled
def _candidates(used: np.ndarray, groups: np.ndarray, size: int, cell: int) -> int:
    """Bit mask of the digits that are in no group of a cell."""
    all_digits = (1 << (size + 1)) - 2
    return all_digits & ~(used[0, groups[0, cell]] | used[1, groups[1, cell]] | used[2, groups[2, cell]])


@_compiled
def _digit_of(bit: int) -> int:
    """The digit of a bit mask with one digit."""
    digit = 0
    while (1 << digit) != bit:
        digit += 1
    return digit


@_compiled
def _complete(grid: np.ndarray, used: np.ndarray, groups: np.ndarray, size: int, state: np.ndarray) -> bool:
    """Fill the empty cells (0) of `grid` ([C]) in place; returns False, with `grid` unchanged, if that is impossible.

    Depth-first search: at each level the cell with the fewest candidates, its digits in random order.
    """
    cells = np.empty(size * size, dtype=np.int64)
    untried = np.empty(size * size, dtype=np.int64)  # bit mask of candidates not yet tried at each depth
    depth = 0
    while True:
        best, best_candidates, n_best = -1, 0, 100
        for cell in range(size * size):
            if grid[cell] == 0:
                candidates = _candidates(used, groups, size, cell)
                n_candidates = POPCOUNT[candidates]
                if n_candidates < n_best:
                    best, best_candidates, n_best = cell, candidates, n_candidates
                    if n_candidates <= 1:
                        break
        if best < 0:
            return True
        cells[depth], untried[depth] = best, best_candidates
        while untried[depth] == 0:
            depth -= 1
            if depth < 0:
                return False
            _place(grid, used, groups, cells[depth], 0)
        n_skipped = _next_random(state) % POPCOUNT[untried[depth]]
        rest = untried[depth]
        for _ in range(n_skipped):
            rest &= rest - 1
        bit = rest & -rest
        untried[depth] ^= bit
        _place(grid, used, groups, cells[depth], _digit_of(bit))
        depth += 1


@_compiled
def _is_needed(grid: np.ndarray, used: np.ndarray, groups: np.ndarray, size: int, cell: int) -> bool:
    """Whether removing a clue allows a second solution, with another digit in its cell. Leaves `grid` unchanged."""
    digit = grid[cell]
    _place(grid, used, groups, cell, 0)
    candidates = _candidates(used, groups, size, cell)
    state = np.zeros(1, dtype=np.uint64)
    found = False
    for other in range(1, size + 1):
        if other != digit and candidates & (1 << other):
            trial, trial_used = grid.copy(), used.copy()
            _place(trial, trial_used, groups, cell, other)
            if _complete(trial, trial_used, groups, size, state):
                found = True
                break
    _place(grid, used, groups, cell, digit)
    return found


@_compiled
def _make_puzzle(
    board: np.ndarray, state: np.ndarray, groups: np.ndarray, size: int, min_clues: int, max_clues: int
) -> bool:
    """Draw a grid and a puzzle once and write them to `board` ([2, C]); False if more than max_clues are needed."""
    n_cells = size * size
    grid = np.zeros(n_cells, dtype=np.int64)
    used = np.zeros((3, size), dtype=np.int64)
    _complete(grid, used, groups, size, state)
    board[1] = grid
    n_wanted = min_clues + _next_random(state) % (max_clues - min_clues + 1)
    order = np.arange(n_cells)
    n_clues = n_cells
    for i in range(n_cells):
        if n_clues == n_wanted:
            break
        j = i + _next_random(state) % (n_cells - i)
        order[i], order[j] = order[j], order[i]
        if not _is_needed(grid, used, groups, size, order[i]):
            _place(grid, used, groups, order[i], 0)
            n_clues -= 1
    board[0] = grid
    return n_clues <= max_clues


@_compiled
def _groups(size: int, height: int, width: int) -> np.ndarray:
    """Row, column and box of each cell, int64 [3, C]."""
    groups = np.empty((3, size * size), dtype=np.int64)
    for cell in range(size * size):
        row, column = cell // size, cell % size
        groups[0, cell], groups[1, cell] = row, column
        groups[2, cell] = row // height * (size // width) + column // width
    return groups


@_compiled
def fill_boards(
    boards: np.ndarray,
    seed: int,
    first: int,
    size: int,
    height: int,
    width: int,
    min_clues: int,
    max_clues: int,
    n_tries: int,
) -> np.ndarray:
    """Write puzzles `first`, `first` + 1, ... to `boards` ([n, 2, C]); returns which of them were found, bool [n]."""
    groups = _groups(size, height, width)
    made = np.zeros(len(boards), dtype=np.bool_)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(boards)):
        # Two rounds of mixing, so that neighbouring seeds and puzzles are independent.
        state[0] = uint64(seed)
        state[0] = uint64(_next_random(state)) << uint64(32) | uint64(_next_random(state))
        state[0] ^= uint64(first + i) * uint64(0xD1342543DE82EF95)
        state[0] = uint64(_next_random(state)) << uint64(32) | uint64(_next_random(state))
        for _ in range(n_tries):
            if _make_puzzle(boards[i], state, groups, size, min_clues, max_clues):
                made[i] = True
                break
    return made


def solve_singles(puzzles: np.ndarray, size: int) -> np.ndarray:
    """Fill in naked singles (cells with one candidate) and hidden singles (digits with one cell in a group) repeatedly.

    Args:
        puzzles: uint8 [N, C], 0 for empty cells, without contradictions.

    Returns:
        uint8 [N, C], 0 for cells that these rules do not fill.
    """
    boards = puzzles.astype(np.int64)  # a copy
    _fill_singles(boards, _groups(size, *BOX_SHAPE[size]), size)
    return boards.astype(np.uint8)


@_compiled
def _fill_singles(boards: np.ndarray, groups: np.ndarray, size: int) -> None:
    """`solve_singles` in place, for int64 [N, C]."""
    used = np.empty((3, size), dtype=np.int64)
    for grid in boards:
        _find_used(grid, used, groups, size)
        progress = True
        while progress:
            progress = False
            # Digits with at least one and at least two possible cells in each group.
            once, twice = np.zeros((3, size), dtype=np.int64), np.zeros((3, size), dtype=np.int64)
            for cell in range(size * size):
                if grid[cell] == 0:
                    candidates = _candidates(used, groups, size, cell)
                    for kind in range(3):
                        twice[kind, groups[kind, cell]] |= once[kind, groups[kind, cell]] & candidates
                        once[kind, groups[kind, cell]] |= candidates
            for cell in range(size * size):
                if grid[cell] != 0:
                    continue
                candidates = _candidates(used, groups, size, cell)
                found = candidates if POPCOUNT[candidates] == 1 else 0
                for kind in range(3):
                    if found == 0:
                        # Cells of the group filled since the count only remove candidates.
                        hidden = candidates & once[kind, groups[kind, cell]] & ~twice[kind, groups[kind, cell]]
                        found = hidden & -hidden
                if found != 0:
                    _place(grid, used, groups, cell, _digit_of(found))
                    progress = True


def check_uniqueness(puzzles: np.ndarray, size: int) -> list[tuple[int, str]]:
    """Rows whose puzzle has several solutions, with that reason, in order. Uses all cores.

    Args:
        puzzles: uint8 [N, C], each with at least one solution, as checked by `check_boards`.
    """
    bad: list[tuple[int, str]] = []
    starts = range(0, len(puzzles), SEARCH_ROWS)
    pool = ThreadPoolExecutor(count_cores())  # the compiled code releases the GIL
    try:
        counts = pool.map(lambda start: solve(puzzles[start : start + SEARCH_ROWS], size)[1], starts)
        with tqdm(total=len(puzzles), desc="counting solutions", unit="puzzle", disable=None) as bar:
            for start, counted in zip(starts, counts, strict=True):
                bad += [(start + int(row), "the puzzle has several solutions") for row in np.flatnonzero(counted > 1)]
                bar.update(len(counted))
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def solve(puzzles: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Solve puzzles by search, and count their solutions up to two.

    Args:
        puzzles: uint8 [N, C], 0 for empty cells, digits up to `size`.

    Returns:
        One solution of each puzzle that has any, uint8 [N, C]; and uint8 [N]: 0, 1, or 2 for two or more.
    """
    boards = puzzles.astype(np.int64)  # a copy
    counts = _solve(boards, _groups(size, *BOX_SHAPE[size]), size)
    return boards.astype(np.uint8), counts


@_compiled
def _solve(boards: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """`solve` for int64 [N, C], which it overwrites with the solutions.

    A second solution differs from the first in some empty cell. So for each empty cell in turn, search for a solution
    with another digit in it and the digits of the first solution in the empty cells before it.
    """
    counts = np.zeros(len(boards), dtype=np.uint8)
    used = np.empty((3, size), dtype=np.int64)
    state = np.zeros(1, dtype=np.uint64)
    for i in range(len(boards)):
        if not _find_used(boards[i], used, groups, size):
            continue
        # Singles are in every solution, so they do not change the count; they complete most puzzles.
        _fill_singles(boards[i : i + 1], groups, size)
        grid = boards[i]
        _find_used(grid, used, groups, size)
        solution, solution_used = grid.copy(), used.copy()
        if not _complete(solution, solution_used, groups, size, state):
            continue
        counts[i] = 1
        for cell in range(size * size):
            if grid[cell] == 0:
                _place(grid, used, groups, cell, solution[cell])
                if _is_needed(grid, used, groups, size, cell):
                    counts[i] = 2
                    break
        grid[:] = solution
    return counts


@_compiled
def _find_used(grid: np.ndarray, used: np.ndarray, groups: np.ndarray, size: int) -> bool:
    """Compute the bit masks of `grid`, see `_place`; False if a row, column or box has a digit twice."""
    used[:] = 0
    for cell in range(size * size):
        if grid[cell] != 0:
            bit = 1 << grid[cell]
            for kind in range(3):
                if used[kind, groups[kind, cell]] & bit:
                    return False
                used[kind, groups[kind, cell]] |= bit
    return True
