"""What counts as a solved puzzle."""

from __future__ import annotations

import numpy as np
import pytest

from data.sudoku import judge_boards
from data.sudoku_boards import BOX_SHAPE


def solved_grid(size: int) -> np.ndarray:
    """A legal grid, int64 [C]."""
    height, width = BOX_SHAPE[size]
    rows = [
        [(width * (row % height) + row // height + column) % size + 1 for column in range(size)] for row in range(size)
    ]
    return np.array(rows).flatten()


def judge(puzzle: np.ndarray, grid: np.ndarray, solution: np.ndarray, size: int) -> tuple[float, float]:
    """Whether `grid` solves `puzzle`, and its cell accuracy."""
    figures = judge_boards(grid[None], puzzle[None], solution[None], size)
    assert all(values.dtype == np.float32 and values.shape == (1,) for values in figures.values())
    return figures["accuracy"].item(), figures["cell_accuracy"].item()


def swap_digits(grid: np.ndarray, first: int, second: int) -> np.ndarray:
    """Another legal grid: two digits change names."""
    return np.where(grid == first, second, np.where(grid == second, first, grid))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_the_recorded_solution_solves(size):
    solution = solved_grid(size)
    puzzle = solution * (np.arange(size * size) % 3 == 0)
    assert judge(puzzle, solution, solution, size) == (1, 1)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_one_wrong_cell_does_not(size):
    solution = solved_grid(size)
    puzzle = solution * (np.arange(size * size) % 2 == 0)
    for cell in range(size * size):
        grid = solution.copy()
        grid[cell] = grid[cell] % size + 1
        accuracy, cell_accuracy = judge(puzzle, grid, solution, size)
        assert accuracy == 0
        n_empty = size * size // 2
        expected = 1 if puzzle[cell] else (n_empty - 1) / n_empty  # only empty cells count
        assert cell_accuracy == pytest.approx(expected)


def test_another_legal_grid_that_keeps_every_clue_solves():
    """A puzzle may have several solutions; which one is recorded does not matter."""
    solution = solved_grid(9)
    grid = swap_digits(solution, 1, 2)
    puzzle = np.where(solution > 2, solution, 0)
    accuracy, cell_accuracy = judge(puzzle, grid, solution, 9)
    assert accuracy == 1
    assert cell_accuracy == 0


@pytest.mark.parametrize("size", [4, 6, 9])
def test_difference_from_the_published_code_every_clue_must_be_kept(size):
    """A legal grid that keeps some clues and changes one is wrong; the published code counts it as solved."""
    solution = solved_grid(size)
    grid = swap_digits(solution, 1, 2)
    puzzle = np.where(solution > 2, solution, 0)
    first_one = int(np.flatnonzero(solution == 1)[0])
    puzzle[first_one] = 1
    assert ((puzzle != 0) & (puzzle == grid)).any(), "some clues are kept"
    assert judge(puzzle, grid, solution, size)[0] == 0
    assert judge(puzzle, solution, solution, size)[0] == 1


@pytest.mark.parametrize("token", [0, 10, 11])
def test_cells_that_are_no_digit_are_wrong(token):
    solution = solved_grid(9)
    grid = solution.copy()
    grid[40] = token
    assert judge(np.zeros_like(solution), grid, solution, 9)[0] == 0


def test_extremes():
    solution = solved_grid(4)
    wrong = solution[::-1].copy()
    empty = np.zeros_like(solution)
    assert judge(empty, wrong, solution, 4)[0] == 1, "any legal grid solves a puzzle without clues"
    assert judge(solution, solution, solution, 4) == (1, 1), "no empty cell: all that are to be filled are right"
    assert judge(solution, wrong, solution, 4) == (0, 1)
    assert judge(empty, np.ones_like(solution), solution, 4) == (0, 0.25)


def test_rows_of_a_batch_are_judged_alone():
    solution = solved_grid(9)
    generator = np.random.default_rng(0)
    right = generator.random(50) < 0.5
    grids = np.where(right[:, None], solution, np.roll(solution, 1))
    puzzles = solution * (generator.random((50, 81)) < 0.4)
    puzzles[:, 0] = solution[0]
    figures = judge_boards(grids, puzzles, np.broadcast_to(solution, (50, 81)), 9)
    assert np.array_equal(figures["accuracy"], right)
