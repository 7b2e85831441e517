"""Sudoku boards: what is legal, which rows are bad and why, and how a board becomes a sequence."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SHARED, run_python
from helpers import solved_grid

from data.sudoku import main
from data.sudoku_boards import (
    BOX_SHAPE,
    SudokuData,
    check_boards,
    count_shared_puzzles,
    format_bad_rows,
    legal_solutions,
    make_data,
)
from data.sudoku_solver import check_uniqueness

RATED = SHARED / "sudoku" / "sepb_rated.npz"
SIZES = (4, 6, 9)


def groups_of(size: int) -> list[set[int]]:
    """Cells of every row, column and box."""
    height, width = BOX_SHAPE[size]
    cells = [(row, column) for row in range(size) for column in range(size)]
    groups: dict[tuple[str, int], set[int]] = {}
    for number, (row, column) in enumerate(cells):
        box = row // height * (size // width) + column // width
        for group in (("row", row), ("column", column), ("box", box)):
            groups.setdefault(group, set()).add(number)
    assert len(groups) == 3 * size
    return list(groups.values())


def boards(size: int, n: int = 1, n_clues: int | None = None) -> np.ndarray:
    """`n` copies of a puzzle and its solution, int64 [n, 2 * C], whatever number of solutions it has."""
    solution = solved_grid(size)
    puzzle = np.where(np.arange(size * size) < (size if n_clues is None else n_clues), solution, 0)
    return np.tile(np.concatenate([puzzle, solution]), (n, 1))


def is_legal(grid: np.ndarray, size: int) -> bool:
    return all({int(grid[cell]) for cell in group} == set(range(1, size + 1)) for group in groups_of(size))


@pytest.mark.parametrize("size", SIZES)
def test_legal_grids_are_what_the_rules_say(size):
    """Against a slow check, on a legal grid and on thousands of grids that break it a little."""
    generator = np.random.default_rng(0)
    grids = np.tile(solved_grid(size), (2000, 1))
    assert is_legal(grids[0], size)
    for grid in grids[1:]:
        first, second = generator.integers(size * size, size=2)
        match generator.integers(3):
            case 0:  # one cell is another digit, or none
                grid[first] = generator.integers(0, size + 2)
            case 1:  # two cells change places
                grid[[first, second]] = grid[[second, first]]
            case 2:  # digits change names: still legal
                grid[:] = generator.permutation(size)[grid - 1] + 1
    expected = np.array([is_legal(grid, size) for grid in grids])
    assert 0.3 < expected.mean() < 0.8
    assert np.array_equal(legal_solutions(grids, size), expected)
    assert np.array_equal(legal_solutions(grids.astype(np.uint8), size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_rows_columns_and_boxes_are_each_checked(size):
    """Grids in which two of the three kinds of group are in order and the third is not."""
    cell = np.arange(size * size)
    row, column = cell // size, cell % size
    height, width = BOX_SHAPE[size]
    latin = (row + column) % size + 1  # boxes repeat digits
    assert not legal_solutions(latin[None], size)[0]
    same_rows = column + 1  # every column repeats one digit
    assert not legal_solutions(same_rows[None], size)[0]
    assert not legal_solutions((row + 1)[None], size)[0]
    in_boxes = row % height * width + column % width + 1  # boxes are right, rows and columns repeat
    assert not legal_solutions(in_boxes[None], size)[0]


def test_six_by_six_has_boxes_two_high_and_three_wide():
    assert BOX_SHAPE[6] == (2, 3)


@pytest.mark.parametrize("size", SIZES)
def test_good_boards_are_good_in_every_number_type(size):
    for dtype in (np.uint8, np.int8, np.int64, np.float32, np.float64):
        assert check_boards(boards(size, 3).astype(dtype), size) == []
    assert check_boards(boards(size, n_clues=0), size) == []
    assert check_boards(boards(size, n_clues=size * size), size) == []


def damaged(size: int, changes: dict[int, tuple[int, float]], n: int = 6, n_clues: int | None = None) -> np.ndarray:
    """Good rows, but for {row: (column, value)}."""
    tokens = boards(size, n, n_clues).astype(np.float64)
    for row, (column, value) in changes.items():
        tokens[row, column] = value
    return tokens


@pytest.mark.parametrize("size", SIZES)
def test_bad_rows_are_named_with_number_and_reason(size):
    n_cells = size * size
    solution = solved_grid(size)
    changes = {
        0: (n_cells - 1, size + 1),  # the puzzle's last cell is empty otherwise
        1: (n_cells - 1, -1),
        2: (n_cells, 0),
        3: (n_cells, size + 1),
        4: (n_cells, solution[1]),  # repeats, and with it changes a clue: the first reason is given
        5: (0, solution[1]),
        7: (0, 0.5),
        8: (n_cells, 1.5),
        9: (n_cells, np.nan),
        10: (0, np.inf),
    }  # fmt: skip
    tokens = damaged(size, changes, n=12)
    digits, filled = (
        f"the puzzle has a cell that is not 0 to {size}",
        f"the solution has a cell that is not 1 to {size}",
    )
    assert check_boards(tokens, size) == [
        (0, digits),
        (1, digits),
        (2, filled),
        (3, filled),
        (4, "the solution repeats a digit in a row, column or box"),
        (5, "the solution changes a clue"),
        (7, digits),
        (8, filled),
        (9, filled),
        (10, digits),
    ]


def test_rows_are_numbered_across_chunks(monkeypatch):
    monkeypatch.setattr("data.sudoku_boards.CHUNK_ROWS", 4)
    bad = check_boards(damaged(4, {3: (16, 0), 4: (0, 9), 10: (16, 0)}, n=11), 4)
    assert [row for row, _ in bad] == [3, 4, 10]


def test_make_data_refuses_bad_boards_by_name():
    with pytest.raises(ValueError, match=r"boards\.x: 2 of 6 rows are bad") as error:
        make_data(damaged(4, {2: (0, 9), 5: (20, 0)}), 4, "boards.x")
    assert str(error.value).splitlines()[1:] == [
        "  row 2: the puzzle has a cell that is not 0 to 4",
        "  row 5: the solution has a cell that is not 1 to 4",
    ]
    for shape in ((3, 162), (3, 31), (32,), (3, 2, 16)):
        with pytest.raises(ValueError, match="rows must have 32 numbers for 4x4 boards"):
            make_data(np.zeros(shape), 4, "boards.x")
    with pytest.raises(ValueError, match=r"boards\.x has no boards"):
        make_data(np.zeros((0, 32)), 4, "boards.x")
    for content in (np.full((1, 32), "1"), np.full((1, 32), None), np.zeros((1, 32), dtype=complex)):
        with pytest.raises(ValueError, match=r"boards\.x.* numbers"):
            make_data(content, 4, "boards.x")


def test_a_long_list_of_bad_rows_is_cut():
    lines = format_bad_rows([(row, "reason") for row in range(25)], 100).splitlines()
    assert lines[0] == "25 of 100 rows are bad (rows count from 0)"
    assert lines[1] == "  row 0: reason"
    assert lines[-1] == "  and 15 more"
    assert len(lines) == 12


@pytest.mark.parametrize("size", SIZES)
def test_a_board_becomes_puzzle_then_solution_with_the_puzzle_as_prompt(size):
    tokens = boards(size, 5)
    data = make_data(tokens, size, "test")
    n_cells = size * size
    assert (len(data), data.n_cells, data.length, data.mask_id) == (5, n_cells, 2 * n_cells, size + 1)
    assert np.array_equal(data.puzzles, tokens[:, :n_cells])
    assert np.array_equal(data.solutions, tokens[:, n_cells:])
    assert data.boards.dtype == np.uint8
    rows, prompt_mask = data.rows(np.array([4, 0, 4]))
    assert rows.dtype == np.int64
    assert np.array_equal(rows, tokens[[4, 0, 4]])
    assert prompt_mask.dtype == bool
    assert prompt_mask[:, :n_cells].all()
    assert not prompt_mask[:, n_cells:].any()
    assert rows.max() < data.mask_id


@pytest.mark.parametrize("size", SIZES)
def test_in_place_a_row_is_the_solution_with_the_clues_as_prompt(size):
    tokens = boards(size, 5)
    n_cells = size * size
    data, halves = (make_data(tokens, size, "test", layout) for layout in ("in_place", "two_halves"))
    assert (len(data), data.n_cells, data.length, data.mask_id) == (5, n_cells, n_cells, size + 1)
    rows, prompt_mask = data.rows(np.array([4, 0, 4]))
    assert rows.dtype == np.int64
    assert np.array_equal(rows, tokens[[4, 0, 4], n_cells:])
    assert np.array_equal(prompt_mask, tokens[[4, 0, 4], :n_cells] != 0)
    assert np.array_equal(data.puzzles, halves.puzzles)
    assert np.array_equal(data.solutions, halves.solutions)


def test_in_place_a_finished_board_is_refused_by_row_number():
    """It would leave nothing to predict; in two halves its solution is still masked."""
    tokens = boards(4, 5)
    tokens[[1, 3], :16] = tokens[[1, 3], 16:]
    make_data(tokens, 4, "a file")
    with pytest.raises(
        ValueError, match=r"a file: 2 of 5 rows are bad(.|\n)*row 1: the puzzle has no empty cell"
    ) as error:
        make_data(tokens, 4, "a file", "in_place")
    assert "row 3" in str(error.value)


def test_shared_puzzles_are_counted_by_puzzle_alone():
    def data(*n_clues: int) -> SudokuData:
        return make_data(np.concatenate([boards(4, n_clues=n) for n in n_clues]), 4, "test")

    assert count_shared_puzzles(data(3, 4, 5), data(5, 6, 3)) == 2
    assert count_shared_puzzles(data(3), data(4)) == 0


# Real boards


@pytest.mark.skipif(not RATED.exists(), reason=f"{RATED} is absent")
def test_426971_real_boards_are_good():
    with np.load(RATED) as file:
        tokens = np.concatenate([file["puzzle"], file["solution"]], axis=1)
    assert tokens.shape == (426_971, 162)
    assert check_boards(tokens, 9) == []


# The command


def test_puzzles_with_several_solutions_are_named_across_chunks(monkeypatch):
    monkeypatch.setattr("data.sudoku_solver.SEARCH_ROWS", 4)
    puzzles = boards(6, 11, n_clues=30)[:, :36].astype(np.uint8)
    assert check_uniqueness(puzzles, 6) == []
    puzzles[[0, 4, 9], 6:] = 0
    bad = check_uniqueness(puzzles, 6)
    assert bad == [(row, "the puzzle has several solutions") for row in (0, 4, 9)]


def test_training_takes_puzzles_with_several_solutions():
    assert len(make_data(boards(9, 3, n_clues=0), 9, "a file")) == 3


def test_the_command_counts_good_rows(tmp_path):
    path = tmp_path / "good.npy"
    np.save(path, boards(6, 7, n_clues=30))
    result = run_python("-m", "data.sudoku", "check", path, "--size", 6)
    assert result.returncode == 0
    assert result.stdout == "7 good rows, one solution each\n"
    assert result.stderr == "", "no bar where there is no terminal"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            damaged(9, {1: (0, 11), 3: (100, 0)}, n_clues=72),
            ["2 of 6 rows", "row 1: the puzzle", "row 3: the solution"],
        ),
        (boards(9, 2, n_clues=0), ["2 of 2 rows", "row 0: the puzzle has several solutions", "row 1: the puzzle has"]),
        (
            np.concatenate([damaged(9, {0: (81, 0)}, n=2, n_clues=72), boards(9, 1), boards(9, 1, n_clues=80)]),
            ["2 of 4 rows", "row 0: the solution has a cell", "row 2: the puzzle has several solutions"],
        ),
        (boards(4, 2), ["rows must have 162 numbers"]),
        (np.zeros((0, 162)), ["has no boards"]),
        (None, ["No such file"]),
    ],
)
def test_the_command_names_what_is_bad(content, expected, tmp_path, capsys):
    path = tmp_path / "bad.npy"
    if content is not None:
        np.save(path, content)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(path)])
    assert stop.value.code == 2
    printed = "".join(capsys.readouterr())
    assert str(path) in printed
    assert all(text in printed for text in expected)
