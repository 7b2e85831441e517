"""What counts as a solved puzzle."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import solved_grid

from data.sudoku import Faults, SudokuSettings, describe_board, find_faults, format_boards, judge_boards


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


# The puzzle has one solution.
PUZZLE, SOLUTION = (np.array([int(digit) for digit in text]) for text in ("1030040020000301", "1234341221434321"))


def faulty(changes: dict[int, int]) -> tuple[np.ndarray, Faults]:
    """The solution with other digits in some cells, and its faults."""
    grid = SOLUTION.copy()
    grid[list(changes)] = list(changes.values())
    return grid, find_faults(grid, PUZZLE, 4)


def test_faults_of_a_board_are_found_and_named():
    """A digit that differs, one that also contradicts, and a changed clue; the solution has none."""
    assert faulty({})[1] == Faults({}, {}, {})
    _, faults = faulty({1: 4})
    assert faults.changed == {}
    assert faults.repeated.keys() == {1, 3, 5}, "a 4 in the row, and one in column and box"
    assert faults.different == {1: "the only solution has 2"}
    _, faults = faulty({0: 2})
    assert faults.changed == {0: "clue 1 changed"}
    assert faults.repeated.keys() == {0, 1, 8}
    assert faults.different == {}


def test_verdicts_of_boards():
    grid, _ = faulty({})
    solved = describe_board(grid, PUZZLE, 4, 16)
    assert (solved.right, solved.reason) == (True, "solved: legal, and all 6 clues kept")
    assert solved.facts == {"legal": True, "clues_kept": True, "n_wrong": 0}
    grid, faults = faulty({1: 4})
    wrong = describe_board(grid, PUZZLE, 4, 16)
    assert wrong.right is False
    assert wrong.answer == "14" + "34341221434321"
    assert wrong.wrong.keys() == {16 + cell for cell in faults.all}
    n_repeated = len(faults.repeated)
    expected = (
        f"not solved: {n_repeated} cells contradict each other, 1 of 10 empty cells differ from the only solution"
    )
    assert wrong.reason == expected
    grid, _ = faulty({1: 0})  # a token that is not a digit
    reason = "not solved: 1 cells have no digit, 1 of 10 empty cells differ from the only solution"
    assert describe_board(grid, PUZZLE, 4, 16).reason == reason
    impossible = describe_board(SOLUTION, np.array([0, 1, 2, 3, 4] + [0] * 11), 4, 0)
    assert "the puzzle has no solution" in impossible.reason


def test_a_changed_clue_is_shown_as_such():
    """Brackets hold the clue, not what the model wrote; faults are marked without colours too."""
    grid, faults = faulty({0: 2, 1: 4})
    lines = format_boards(PUZZLE, grid, np.arange(16), faults).plain.splitlines()
    assert lines[1].startswith("1>2 4! | [3]")
    assert lines[-1] == "[5] clue, 5>3 clue changed, 3! contradicts another cell or is no digit"
    assert lines[3] == "-------+-------    -------+-------"
    grid, faults = faulty({})
    lines = format_boards(PUZZLE, grid, np.arange(16), faults).plain.splitlines()
    assert lines[1].split() == ["[1]", "2", "|", "[3]", "4", ".", "1", "|", "2", "3"]
    assert lines[-1] == "[5] clue"


def test_samples_say_what_is_wrong_with_a_board(tmp_path):
    sizes = {"n_train": 4, "n_test": 3, "min_clues": 8, "max_clues": 8}
    settings = SudokuSettings(dataset="sudoku", data_dir=str(tmp_path), source="generated", size=4, **sizes)
    data = settings.open(6)
    grids = data.validation.solutions[:3].astype(np.int64)
    empty = int(np.flatnonzero(data.validation.puzzles[1] == 0)[0])
    grids[1, empty] = 5  # the mask token is never sampled, but a larger vocabulary has other tokens
    grids[2] = swap_digits(grids[2], 1, 2)
    judged = data.judge(np.concatenate([grids, grids], axis=1), np.arange(3))
    assert [sample["verdict"] for sample in judged.samples] == ["solved", "is not legal", "changes a clue"]
    assert judged.samples[0]["answer"] == "".join(map(str, grids[0]))
    assert judged.samples[1]["puzzle"] == "".join(str(d) if d else "." for d in data.validation.puzzles[1])
    assert all(len(sample[key]) == 16 for sample in judged.samples for key in ("puzzle", "answer"))
