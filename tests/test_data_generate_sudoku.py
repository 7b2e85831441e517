"""Generated puzzles: one solution each, proved by a second solver; seeded; the same on any number of cores."""

from __future__ import annotations

import csv
import hashlib
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
from conftest import run_python
from test_data_sudoku_boards import groups_of

from data import generate_sudoku as generator
from data.generate_sudoku import cached_generated, generate_sudoku
from data.sudoku import SudokuSettings
from data.sudoku_boards import SudokuData, count_shared_puzzles, load_sudoku_file, puzzle_keys

SPLITS = ("train", "test")
# Board size, fewest and most clues.
RANGES = [(4, 4, 8), (4, 16, 16), (6, 14, 22), (6, 36, 36), (9, 30, 40), (9, 24, 25), (9, 81, 81)]


def generate(size: int, n: int, min_clues: int, max_clues: int, seed: int = 0, **options: int) -> SudokuData:
    return generate_sudoku(size, n, min_clues, max_clues, seed, show_progress=False, **options)


def solutions(puzzle: list[int], size: int, limit: int = 2) -> list[list[int]]:
    """Up to `limit` solutions, by plain backtracking over sets: nothing in common with the generator's solver."""
    groups = groups_of(size)
    peers = [set().union(*(group for group in groups if cell in group)) - {cell} for cell in range(size * size)]
    grid, found = list(puzzle), []

    def search() -> None:
        options = {
            cell: set(range(1, size + 1)) - {grid[peer] for peer in peers[cell]}
            for cell, digit in enumerate(grid)
            if digit == 0
        }
        if not options:
            found.append(list(grid))
            return
        cell = min(options, key=lambda cell: len(options[cell]))
        for digit in sorted(options[cell]):
            grid[cell] = digit
            search()
            grid[cell] = 0
            if len(found) == limit:
                return

    search()
    return found


def test_the_second_solver_counts_right():
    assert len(solutions([0] * 16, 4, limit=1000)) == 288
    assert len(solutions([1, 1] + [0] * 14, 4)) == 0
    assert len(solutions([1, 2, 3, 4] + [0] * 12, 4, limit=1000)) == 12


@pytest.mark.parametrize(("size", "min_clues", "max_clues"), RANGES)
def test_puzzles_have_one_solution_and_clues_in_range(size, min_clues, max_clues):
    n = {4: 30, 6: 30, 9: 15}[size]
    data = generate(size, n, min_clues, max_clues)
    assert len(data) == n
    n_clues = (data.puzzles > 0).sum(1)
    assert n_clues.min() >= min_clues
    assert n_clues.max() <= max_clues
    for puzzle, solution in zip(data.puzzles.tolist(), data.solutions.tolist(), strict=True):
        assert solutions(puzzle, size) == [solution]


def test_all_clue_counts_of_the_range_occur():
    n_clues = (generate(9, 1100, 30, 40).puzzles > 0).sum(1)
    counts = np.bincount(n_clues, minlength=41)[30:]
    assert len(counts) == 11
    assert counts.min() > 50, "uniform would be 100 each"
    assert counts.max() < 150


def test_grids_are_varied():
    data = generate(9, 500, 30, 40)
    assert len(set(puzzle_keys(data.solutions))) == 500
    counts = np.stack([(data.solutions == digit).sum(0) for digit in range(1, 10)])  # [9, 81]
    assert counts.min() > 20, "uniform would be 56 each"
    assert counts.max() < 110


def test_all_puzzles_are_distinct_and_train_and_test_share_none():
    train, test = generate(4, 4000, 4, 8, n_before=1000), generate(4, 1000, 4, 8)
    assert (len(train), len(test)) == (4000, 1000)
    assert len(set(puzzle_keys(train.puzzles))) == 4000
    assert len(set(puzzle_keys(test.puzzles))) == 1000
    assert count_shared_puzzles(train, test) == 0


def test_the_seed_decides_and_neighbouring_seeds_have_nothing_in_common():
    data = [generate(6, 300, 14, 22, seed=seed) for seed in (0, 0, 1, 2**32 - 1)]
    assert np.array_equal(data[0].boards, data[1].boards)
    for other in data[2:]:
        assert count_shared_puzzles(data[0], other) == 0


@pytest.fixture(scope="module")
def alone():
    return generate(6, 1700, 14, 22)


@pytest.mark.parametrize("n_workers", [2, 3, 8])
def test_the_number_of_workers_changes_nothing(n_workers, alone):
    assert np.array_equal(generate(6, 1700, 14, 22, n_workers=n_workers).boards, alone.boards)


@pytest.mark.parametrize(
    ("request_", "n_before", "digest"),
    [
        ((4, 50, 4, 8, 3), 10, "402906fe8a3e9fdc"),
        ((6, 300, 14, 22, 0), 0, "a51ce45832f671c9"),
        ((9, 300, 30, 40, 0), 0, "14ed5d185648662e"),
        ((9, 20, 24, 25, 1), 0, "9a38fe0c2635c74f"),
    ],
)
def test_the_boards_of_a_seed_stay_what_they_were(request_, n_before, digest):
    """Runs with generated boards are compared by their seed, also with runs of older versions."""
    assert hashlib.sha256(generate(*request_, n_before=n_before).boards.tobytes()).hexdigest()[:16] == digest


def test_more_puzzles_begin_with_the_same_ones():
    assert np.array_equal(generate(9, 100, 30, 40).boards, generate(9, 700, 30, 40).boards[:100])


def test_an_exhausted_range_says_so():
    """There are 288 grids of 4x4, so 4,608 puzzles with one empty cell."""
    assert len(set(puzzle_keys(generate(4, 288, 16, 16).puzzles))) == 288
    with pytest.raises(ValueError, match=r"only 288 distinct 4x4 puzzles with 16 to 16 clues.* 289 are requested"):
        generate(4, 280, 16, 16, n_before=9)


def test_clues_too_few_to_be_found_say_so_instead_of_searching_for_hours(monkeypatch):
    monkeypatch.setattr(generator, "CHUNK_ROWS", 3)
    monkeypatch.setattr(generator, "N_TRIES", 2)
    with pytest.raises(ValueError, match="only 0 distinct 9x9 puzzles with 17 to 18 clues"):
        generate(9, 10, 17, 18)


@pytest.mark.parametrize(
    ("size", "min_clues", "max_clues"), [(5, 4, 8), (9, 16, 20), (9, 30, 82), (9, 40, 30), (4, 3, 8), (6, 7, 8)]
)
def test_impossible_requests_are_refused(size, min_clues, max_clues):
    with pytest.raises(ValueError, match=r"size 5 is not supported|min_clues .* (is above|has \d+ to \d+ clues)"):
        generate(size, 10, min_clues, max_clues)


def test_generated_boards_are_kept_and_read_again(tmp_path, monkeypatch):
    request = (tmp_path / "new" / "folder", 4, 50, 10, 4, 8, 3)
    paths = [cached_generated(*request, split) for split in SPLITS]
    train, test = (load_sudoku_file(path, 4).boards for path in paths)
    assert np.array_equal(train, generate(4, 50, 4, 8, 3, n_before=10).boards)
    assert np.array_equal(test, generate(4, 10, 4, 8, 3).boards)
    monkeypatch.setattr(generator, "generate_sudoku", None)  # a second call would fail
    assert [cached_generated(*request, split) for split in SPLITS] == paths
    assert not list((tmp_path / "new" / "folder").glob("*.incomplete"))


def test_runs_that_start_together_generate_the_boards_once(tmp_path, monkeypatch):
    request = (tmp_path, 4, 50, 10, 4, 8, 3)

    @contextmanager
    def wait(path, remedy):
        """Stands for `alone`, which returns when another process has written the file."""
        np.save(path, generate(4, 10 if path.stem.endswith("test") else 50, 4, 8).boards)
        yield

    monkeypatch.setattr("base.files.alone", wait)
    monkeypatch.setattr(generator, "generate_sudoku", None)
    assert [len(load_sudoku_file(cached_generated(*request, split), 4)) for split in SPLITS] == [50, 10]


def test_an_evaluation_elsewhere_generates_the_test_alone(tmp_path):
    settings = {"dataset": "sudoku", "source": "generated", "size": 4, "data_dir": str(tmp_path)}
    settings |= {"n_train": 10**9, "n_test": 5, "min_clues": 4, "max_clues": 8}  # there are not so many
    data = SudokuSettings(**settings).open(6).load(train=False)
    assert len(data.validation) == 5
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_kept_boards_are_read_without_the_compiler(tmp_path):
    settings = {"dataset": "sudoku", "source": "generated", "size": 4, "data_dir": str(tmp_path)}
    settings |= {"n_train": 20, "n_test": 5, "min_clues": 4, "max_clues": 8}
    for split in SPLITS:
        cached_generated(tmp_path, 4, 20, 5, 4, 8, 0, split)
    code = f"""
import sys
from data.sudoku import SudokuSettings
data = SudokuSettings(**{settings!r}).open(6).load(train=True)
print(len(data.train), "data.sudoku_solver" in sys.modules)
"""
    result = run_python("-c", code)
    assert result.stdout.split() == ["20", "False"], result.stderr


def test_other_settings_are_other_files(tmp_path):
    for max_clues, seed, split in product((8, 9), (0, 1), SPLITS):
        cached_generated(tmp_path, 4, 20, 5, 4, max_clues, seed, split)
    assert len(list(tmp_path.glob("*.npy"))) == 8


# The command


def command(*arguments: object) -> list[object]:
    return ["-m", "data.generate_sudoku", *arguments]


def test_the_command_writes_puzzles_and_solutions(tmp_path):
    out = tmp_path / "puzzles.csv"
    result = run_python(
        *command("--size", 9, "--count", 25, "--min-clues", 30, "--max-clues", 40, "--seed", 5, "--out", out)
    )
    assert result.returncode == 0, result.stderr
    assert "wrote 25 puzzles" in result.stdout
    with open(out, newline="", encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25
    assert list(rows[0]) == ["puzzle", "solution"]
    for row in rows:
        assert len(row["puzzle"]) == len(row["solution"]) == 81
        assert 30 <= 81 - row["puzzle"].count("0") <= 40
    assert np.array_equal(load_sudoku_file(out, 9).boards, generate(9, 25, 30, 40, seed=5).boards)
    assert "25 good rows" in run_python("-m", "data.sudoku", "check", out).stdout


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--count": 0}, "--count: must be an integer from 1"),
        ({"--count": "many"}, "--count: must be an integer from 1"),
        ({"--workers": 0}, "--workers: must be an integer from 1"),
        ({"--seed": -1}, "--seed: must be an integer from 0"),
        ({"--seed": 10**30}, "--seed: must be an integer from 0"),
        ({"--size": 5}, "--size"),
        ({"--min-clues": 3}, "min_clues 3, max_clues 8: a 4x4 puzzle with one solution has 4 to 16 clues"),
        ({"--min-clues": 9}, "min_clues 9 is above max_clues 8"),
        ({"--count": 300, "--min-clues": 16, "--max-clues": 16}, "only 288 distinct"),
        ({"--out": "/nonexistent/folder/out.csv"}, "/nonexistent/folder"),
    ],
)
def test_the_command_refuses_with_one_message(change, expected, tmp_path, capsys, monkeypatch):
    if "--out" in change:  # known before any work
        monkeypatch.setattr(generator, "generate_sudoku", None)
    options = {"--size": 4, "--count": 5, "--min-clues": 4, "--max-clues": 8, "--out": tmp_path / "out.csv"} | change
    with pytest.raises(SystemExit) as stop:
        generator.main([str(word) for option in options.items() for word in option])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
