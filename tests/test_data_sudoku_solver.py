"""Counts of solutions, and what naked and hidden singles solve, against slow solvers and the real boards."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from conftest import SHARED
from helpers import solved_grid
from numba.core.caching import CompileResultCacheImpl
from test_data_generate_sudoku import generate, solutions
from test_data_sudoku_boards import groups_of

from data.sudoku_boards import legal_solutions, read_boards
from data.sudoku_solver import _compiled, solve, solve_singles

RATED = SHARED / "sudoku" / "sepb_rated.npz"
EASY = SHARED / "sudoku" / "easy_medium_1000.csv"
MEDIUM = SHARED / "sudoku" / "medium_5000.csv"
SIZES = (4, 6, 9)
# Fewest and most clues, few enough that singles do not solve all.
CLUES = {4: (4, 7), 6: (8, 14), 9: (22, 27)}


def thinned(size: int, n: int) -> np.ndarray:
    """Puzzles uint8 [n, C] with one solution, of which three in four lose up to three clues or get a wrong one."""
    generator = np.random.default_rng(size)
    puzzles = generate(size, n, *CLUES[size]).puzzles.copy()
    for number, puzzle in enumerate(puzzles):
        if number % 4 in (1, 2):
            puzzle[generator.choice(np.flatnonzero(puzzle), generator.integers(1, 4), replace=False)] = 0
        elif number % 4 == 3:
            puzzle[generator.choice(np.flatnonzero(puzzle == 0))] = generator.integers(1, size + 1)
    return puzzles


def has_repeats(puzzle: np.ndarray, size: int) -> bool:
    clues = [[int(puzzle[cell]) for cell in group if puzzle[cell]] for group in groups_of(size)]
    return any(len(set(digits)) < len(digits) for digits in clues)


def test_functions_are_compiled_where_no_cache_can_be_written(monkeypatch):
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert _compiled(lambda n: n + 1)(2) == 3


@pytest.mark.parametrize("size", SIZES)
def test_solutions_are_counted_as_a_slow_solver_does(size):
    puzzles = thinned(size, {4: 300, 6: 200, 9: 80}[size])
    before = puzzles.copy()
    expected = [0 if has_repeats(puzzle, size) else len(solutions(puzzle.tolist(), size)) for puzzle in puzzles]
    assert min(expected.count(n) for n in (0, 1, 2)) >= len(puzzles) // 20
    counts = solve(puzzles, size)[1]
    assert counts.dtype == np.uint8
    assert counts.tolist() == expected
    assert np.array_equal(puzzles, before)


@pytest.mark.parametrize("size", SIZES)
def test_empty_full_and_impossible_boards(size):
    full = solved_grid(size)
    repeated = full.copy()
    repeated[[0, 1]] = repeated[[1, 0]]  # full, and wrong in two columns
    # Clues without repeats that leave the first cell no digit.
    stuck = np.zeros(size * size, dtype=np.int64)
    stuck[1:size] = np.arange(1, size)
    stuck[(size - 1) * size] = size
    boards = np.stack([np.zeros_like(full), full, repeated, stuck]).astype(np.uint8)
    assert solve(boards, size)[1].tolist() == [2, 1, 0, 0]
    solutions, counts = solve(boards, size)
    assert counts.tolist() == [2, 1, 0, 0]
    assert legal_solutions(solutions, size).tolist()[:2] == [True, True]
    assert ((boards == 0) | (boards == solutions))[:2].all(), "clues are kept"


def slow_singles(puzzle: list[int], size: int) -> list[int]:
    """Fill in one single after the other, found by sets."""
    groups, grid = groups_of(size), list(puzzle)

    def candidates(cell: int) -> set[int]:
        taken = {grid[peer] for group in groups if cell in group for peer in group}
        return set() if grid[cell] else set(range(1, size + 1)) - taken

    def single() -> tuple[int, int] | None:
        options = [candidates(cell) for cell in range(size * size)]
        for cell, digits in enumerate(options):
            if len(digits) == 1:
                return cell, digits.pop()
        for group in groups:
            for digit in range(1, size + 1):
                places = [cell for cell in group if digit in options[cell]]
                if len(places) == 1:
                    return places[0], digit
        return None

    while (found := single()) is not None:
        grid[found[0]] = found[1]
    return grid


@pytest.mark.parametrize("size", SIZES)
def test_singles_fill_what_a_slow_loop_fills(size):
    """Also where there are several solutions. What can be filled in does not depend on the order."""
    n_rows = {4: 200, 6: 150, 9: 60}[size]
    puzzles = thinned(size, n_rows)
    puzzles = puzzles[np.arange(n_rows) % 4 != 3]  # without contradictions
    before = puzzles.copy()
    filled = solve_singles(puzzles, size)
    assert filled.dtype == np.uint8
    assert np.array_equal(puzzles, before)
    assert filled.tolist() == [slow_singles(puzzle, size) for puzzle in puzzles.tolist()]
    n_stuck = (filled == 0).any(1).sum()
    assert 0 < n_stuck < len(puzzles), "some are solved and some are not"


@pytest.mark.skipif(not EASY.exists(), reason=f"{EASY} is absent")
def test_singles_solve_exactly_the_real_boards_that_are_said_to_need_no_more():
    """Level 1 says that naked and hidden singles solve a puzzle."""
    with open(EASY, newline="", encoding="utf-8") as file:
        level = np.array([int(row["level"]) for row in csv.DictReader(file)])
    boards, _ = read_boards(EASY, 9)
    filled = solve_singles(boards[:, :81].astype(np.uint8), 9)
    assert np.bincount(level).tolist() == [0, 854, 146]
    assert np.array_equal((filled != 0).all(1), level == 1)
    assert np.array_equal(filled[level == 1], boards[level == 1, 81:])


@pytest.mark.skipif(not RATED.exists(), reason=f"{RATED} is absent")
def test_singles_solve_no_real_board_that_is_said_to_need_more():
    with np.load(RATED) as file:
        puzzles, answers, level = (file[name][:20_000] for name in ("puzzle", "solution", "level"))
    filled = solve_singles(puzzles, 9)
    assert (level > 1).all()
    assert (filled == 0).any(1).all()
    assert np.array_equal(np.where(filled == 0, answers, filled), answers), "a single is in every solution"
    assert ((filled != 0) & (puzzles == 0)).sum(1).mean() > 5, "most boards have some"


@pytest.mark.skipif(not MEDIUM.exists(), reason=f"{MEDIUM} is absent")
def test_5000_real_boards_have_one_solution_each():
    puzzles = read_boards(MEDIUM, 9)[0][:, :81].astype(np.uint8)
    assert (solve(puzzles, 9)[1] == 1).all()
    generator = np.random.default_rng(0)
    for puzzle in puzzles:  # clues are hardly ever superfluous
        puzzle[generator.choice(np.flatnonzero(puzzle), 3, replace=False)] = 0
    assert (solve(puzzles, 9)[1] == 2).mean() > 0.9
