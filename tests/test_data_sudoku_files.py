"""The four sources of boards, what each refuses, and the real files."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from test_data_sudoku_boards import boards

from data.sudoku import SudokuSettings, load_split
from data.sudoku_boards import (
    CONVERTED_FILES,
    RAW_FILES,
    convert_published,
    load_hub,
    load_published,
    load_sudoku_file,
    published_available,
)

REAL = SHARED / "sudoku"


def text(cells: np.ndarray, empty: str = "0") -> str:
    return "".join(str(cell) if cell else empty for cell in cells)


def write_csv(
    path: Path, tokens: np.ndarray, empty: str = "0", columns: tuple[str, str] = ("puzzle", "solution")
) -> Path:
    middle = tokens.shape[1] // 2
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "rating"])
        writer.writerows([text(row[:middle], empty), text(row[middle:]), 2.5] for row in tokens)
    return path


def varied_boards(size: int, n: int) -> np.ndarray:
    """Boards that differ in their clues."""
    tokens = boards(size, n, n_clues=size * size)
    tokens[:, : size * size] *= np.random.default_rng(0).random((n, size * size)) < 0.4
    return tokens


# csv, npz, npy


@pytest.mark.parametrize("size", [4, 6, 9])
@pytest.mark.parametrize("empty", ["0", "."])
def test_csv(size, empty, tmp_path):
    tokens = varied_boards(size, 20)
    path = write_csv(tmp_path / ("boards.csv" if empty == "." else "BOARDS.CSV"), tokens, empty)
    assert np.array_equal(load_sudoku_file(path, size).boards, tokens)


def test_the_memory_that_a_csv_file_needs_is_ten_bytes_per_character(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "boards.csv", varied_boards(9, 20))
    n_bytes = 10 * path.stat().st_size
    monkeypatch.setattr("base.memory.free_memory", lambda: n_bytes)
    assert len(load_sudoku_file(path, 9)) == 20
    monkeypatch.setattr("base.memory.free_memory", lambda: n_bytes - 1)
    with pytest.raises(ValueError, match="its text: needs"):
        load_sudoku_file(path, 9)


def test_csv_columns_may_stand_in_any_order_and_lines_be_empty(tmp_path):
    tokens = varied_boards(4, 2)
    lines = ["id,solution,puzzle", *(f"7,{text(row[16:])},{text(row[:16])}" for row in tokens), ""]
    path = tmp_path / "boards.csv"
    path.write_text("\r\n".join(lines))
    assert np.array_equal(load_sudoku_file(path, 4).boards, tokens)


def test_csv_with_a_byte_order_mark(tmp_path):
    tokens = varied_boards(4, 2)
    path = write_csv(tmp_path / "boards.csv", tokens)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert np.array_equal(load_sudoku_file(path, 4).boards, tokens)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_npz_and_npy(dtype, tmp_path):
    tokens = varied_boards(9, 20)
    np.save(tmp_path / "boards.npy", tokens.astype(dtype))
    np.savez(tmp_path / "boards.npz", puzzle=tokens[:, :81].astype(dtype), solution=tokens[:, 81:], extra=np.ones(3))
    np.savez_compressed(tmp_path / "packed.npz", puzzle=tokens[:, :81].astype(dtype), solution=tokens[:, 81:])
    for name in ("boards.npy", "boards.npz", "packed.npz"):
        data = load_sudoku_file(tmp_path / name, 9)
        assert np.array_equal(data.boards, tokens)
        assert data.boards.dtype == np.uint8


GOOD = text(boards(4)[0, :16]), text(boards(4)[0, 16:])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"puzzle\n{GOOD[0]}", r"no column \['solution'\]"),
        ("", r"no column"),
        (f"puzzle,solution,puzzle\n{GOOD[0]},{GOOD[1]},{GOOD[0]}", r"several columns \['puzzle'\]; its columns are"),
        ("puzzle,solution\n", "has no boards"),
        (f"puzzle,solution\n{GOOD[0]},{GOOD[1]}\n{GOOD[0]}", r"row 1 \(from 0\) has too few columns"),
        (f"puzzle,solution\n{GOOD[0]},{GOOD[1]}\n{GOOD[0]}0,{GOOD[1]}", r"'puzzle'.*row 1 \(from 0\) has 17 cells"),
        (
            f"puzzle,solution\n{GOOD[0]},{GOOD[1]}\n{GOOD[0]},{GOOD[1][:-1]}x",
            r"1 of 2 rows.*\n  row 1: the solution has",
        ),
        (f"puzzle,solution\n{GOOD[0][:-1]}é,{GOOD[1]}", "row 0: the puzzle has"),
        (f"puzzle,solution\n{GOOD[0][:-1]}5,{GOOD[1]}", "row 0: the puzzle has a cell that is not 0 to 4"),
        (f"puzzle,solution\n{GOOD[0]},{GOOD[1][::-1][1:] + GOOD[1][-1]}", "row 0: the solution repeats"),
        (f"puzzle,solution\n{GOOD[1][1] + GOOD[0][1:]},{GOOD[1]}", "row 0: the solution changes a clue"),
        ("puzzle,solution\n" + '"' + "1" * 200_000, "field larger"),
    ],
)
def test_bad_csv_files_are_named_with_row_and_reason(content, expected, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(?s)bad\.csv.*{expected}"):
        load_sudoku_file(path, 4)


def test_files_that_are_no_boards_are_refused(tmp_path):
    tokens = boards(9, 3)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", puzzle=np.array([None], dtype=object), solution=tokens[:, 81:])
    np.savez(tmp_path / "lacking.npz", puzzle=tokens[:, :81])
    np.savez(tmp_path / "uneven.npz", puzzle=tokens[:, :81], solution=tokens[:2, 81:])
    np.save(tmp_path / "width.npy", tokens[:, :81])
    np.save(tmp_path / "words.npy", tokens.astype(str))
    np.save(tmp_path / "whole.npy", tokens)
    np.savez(tmp_path / "whole.npz", puzzle=tokens[:, :81], solution=tokens[:, 81:])
    for name in ("whole.npy", "whole.npz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"short_{name}").write_bytes(content[: len(content) // 2])
    (tmp_path / "latin.csv").write_bytes(b"puzzle,solution\n\xff\xfe,1")
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npy").mkdir()
    expected = {
        "pickled.npy": "cannot be read",
        "pickled.npz": "array 'puzzle' has Python objects instead of numbers",
        "lacking.npz": r"no array \['solution'\]",
        "uneven.npz": r"puzzle \(3, 81\) and solution \(2, 81\)",
        "width.npy": "162 numbers",
        "words.npy": "162 numbers",
        "short_whole.npy": "cannot be read",
        "short_whole.npz": "cannot be read",
        "latin.csv": "cannot be read",
        "text.npy": r"it is no \.npz or \.npy file",
        "empty.npz": r"it is no \.npz or \.npy file",
        "folder.npy": "it is a folder",
        "none.csv": "No such file",
    }
    for name, reason in expected.items():
        with pytest.raises(ValueError, match=rf"(?s){name}.*{reason}"):
            load_sudoku_file(tmp_path / name, 9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        (np.array([1.0, 1e300, 2.0]), r"the rating of row 1 \(from 0\) is infinite, or too large for float32"),
        (np.full(3, np.nan), "ratings must not be all NaN"),
        (np.full(3, 1j), "'rating' cannot be read.*array of complex128.*ratings must be numbers"),
        (np.full(3, "2020", dtype="M8[D]"), r"'rating' cannot be read.*array of datetime64\[D\]"),
    ],
)
def test_ratings_that_are_no_numbers_are_refused(ratings, expected, tmp_path):
    tokens = boards(9, 3)
    np.savez(tmp_path / "rated.npz", puzzle=tokens[:, :81], solution=tokens[:, 81:], rating=ratings)
    with pytest.raises(ValueError, match=expected):
        load_sudoku_file(tmp_path / "rated.npz", 9, rating_column="rating")


# The published set


def published_rows(tokens: np.ndarray, base: int, seed: int = 0) -> np.ndarray:
    """Boards as the published rows of 325 integers: k, then (row, column, value, strategy), clues first."""
    generator = np.random.default_rng(seed)
    rows = np.zeros((len(tokens), 325), dtype=np.int64)
    for out, board in zip(rows, tokens, strict=True):
        cells = generator.permutation(81)
        cells = np.concatenate([cells[board[cells] > 0], cells[board[cells] == 0]])
        out[0] = (board[:81] > 0).sum()
        strategy = generator.integers(0, 8, 81)
        out[1:] = np.stack([cells // 9 + base, cells % 9 + base, board[81 + cells], strategy], axis=1).ravel()
    return rows


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float64])
def test_published_rows_are_converted(base, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sudoku_boards.CHUNK_ROWS", 7)
    tokens = varied_boards(9, 20)
    np.save(tmp_path / "raw.npy", published_rows(tokens, base).astype(dtype))
    converted = convert_published(tmp_path / "raw.npy")
    assert converted.dtype == np.uint8
    assert np.array_equal(converted, tokens)


def test_the_published_set_is_converted_once(tmp_path, capsys):
    tokens = {"train": varied_boards(9, 20), "test": varied_boards(9, 8)}
    assert not published_available(tmp_path)
    for split, content in tokens.items():
        assert not published_available(tmp_path), "both splits are needed"
        np.save(tmp_path / RAW_FILES[split], published_rows(content, base=1))
    assert published_available(tmp_path)
    for split, content in tokens.items():
        assert np.array_equal(load_published(tmp_path, split).boards, content)
        stored = np.load(tmp_path / CONVERTED_FILES[split])
        assert stored.dtype == np.uint8
        assert stored.shape == content.shape
        (tmp_path / RAW_FILES[split]).unlink()
        assert np.array_equal(load_published(tmp_path, split).boards, content), "read from the converted file"
    assert published_available(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CONVERTED_FILES.values())


def test_the_published_set_loads_where_nothing_can_be_written(tmp_path, monkeypatch):
    tokens = varied_boards(9, 8)
    np.save(tmp_path / RAW_FILES["test"], published_rows(tokens, base=1))
    monkeypatch.setitem(CONVERTED_FILES, "test", "/proc/test.npy")
    with pytest.warns(RuntimeWarning, match=r"^/proc/test\.npy cannot be written .*: the boards are converted again"):
        assert np.array_equal(load_published(tmp_path, "test").boards, tokens)


def test_the_float64_file_of_the_published_code_loads(tmp_path):
    tokens = varied_boards(9, 5)
    for split in ("train", "test"):
        np.save(tmp_path / CONVERTED_FILES[split], tokens.astype(np.float64))
    assert np.array_equal(load_published(tmp_path, "test").boards, tokens)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        (0, 82, r"row 3 \(from 0\) must have 0 to 81 clues"),
        (0, -1, r"row 3 \(from 0\) must have 0 to 81 clues"),
        (1, 9, r"row 3 \(from 0\) must have .* list each of the 81 cells once"),
        (2, -1, r"row 3 \(from 0\) must have .* list each of the 81 cells once"),
        (3, 0, "row 3: the puzzle|row 3: the solution"),
        (3, 12, "row 3: the puzzle|row 3: the solution"),
        (3, 1000, r"row 3 \(from 0\) must have"),
    ],
)
def test_bad_published_rows_are_named(column, value, expected, tmp_path):
    rows = published_rows(varied_boards(9, 6), base=0)
    rows[3, column] = value
    np.save(tmp_path / RAW_FILES["train"], rows)
    with pytest.raises(ValueError, match=rf"(?s)sudoku-train-data\.npy.*({expected})"):
        load_published(tmp_path, "train")
    assert not (tmp_path / CONVERTED_FILES["train"]).exists()


def test_a_row_that_names_a_cell_twice_is_refused(tmp_path):
    rows = published_rows(varied_boards(9, 6), base=1)
    rows[2, 5:7] = rows[2, 1:3]
    np.save(tmp_path / RAW_FILES["train"], rows)
    with pytest.raises(ValueError, match=r"row 2 \(from 0\).*each of the 81 cells once"):
        load_published(tmp_path, "train")


def test_published_files_of_another_shape_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has neither .* set data\.source: generated"):
        load_published(tmp_path, "train")
    np.save(tmp_path / RAW_FILES["train"], np.zeros((3, 324)))
    with pytest.raises(ValueError, match="325 integers"):
        load_published(tmp_path, "train")
    (tmp_path / RAW_FILES["train"]).write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"sudoku-train-data\.npy cannot be read"):
        load_published(tmp_path, "train")


# Hugging Face data sets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a local data set of two splits with columns `question` and `answer`; returns its folder's name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()

    def write(kind: str, **splits: dict[str, list]) -> str:
        for split, columns in splits.items():
            table = datasets.Dataset.from_dict(columns)
            if kind == "parquet":
                table.to_parquet(folder / f"{split}.parquet")
            else:
                table.to_csv(folder / f"{split}.csv")
        return str(folder)

    return write


def hub_columns(tokens: np.ndarray, empty: str = "0", as_lists: bool = False) -> dict[str, list]:
    middle = tokens.shape[1] // 2
    if as_lists:
        return {"question": tokens[:, :middle].tolist(), "answer": tokens[:, middle:].tolist()}
    return {"question": [text(row[:middle], empty) for row in tokens], "answer": [text(row[middle:]) for row in tokens]}


@pytest.mark.parametrize(
    ("kind", "empty", "size"),
    [*itertools.product(("parquet", "csv"), "0.", (9,)), ("parquet", ".", 4), ("csv", "0", 6)],
)
def test_hub_text_columns(size, kind, empty, hub):
    """In csv, digits alone look like a number: leading zeros must not be lost."""
    train, test = varied_boards(size, 9), varied_boards(size, 4)
    train[0, 0] = 0
    name = hub(kind, train=hub_columns(train, empty), test=hub_columns(test, empty))
    assert np.array_equal(load_hub(name, "train", "question", "answer", size).boards, train)
    assert np.array_equal(load_hub(name, "test", "question", "answer", size).boards, test)


def test_hub_columns_of_integers(hub):
    tokens = varied_boards(9, 7)
    name = hub("parquet", train=hub_columns(tokens, as_lists=True))
    assert np.array_equal(load_hub(name, "train", "question", "answer", 9).boards, tokens)


def test_hub_sets_that_do_not_fit_are_refused(hub, tmp_path):
    columns = hub_columns(varied_boards(4, 5))
    columns["question"][2] += "0"
    columns["empty"] = [*columns["answer"][:3], None, columns["answer"][4]]
    columns["wrong"] = [*columns["answer"][:4], "5" + columns["answer"][4][1:]]
    columns["number"] = [1.5] * 5
    columns["words"] = [["a"] * 16] * 5
    columns["holes"] = [[1, None] * 8] * 5
    name = hub("parquet", train=columns)
    for split, puzzle, solution, expected in (
        ("train", "question", "answer", r"column 'question' cannot be read \(row 2 \(from 0\) has 17 cells"),
        ("train", "answer", "empty", r"column 'empty' cannot be read \(row 3 \(from 0\) is None, not text"),
        ("train", "answer", "wrong", r"row 4: the solution has a cell that is not 1 to 4"),
        ("train", "number", "answer", r"column 'number' cannot be read \(row 0 \(from 0\) is 1.5"),
        ("train", "words", "answer", r"column 'words'.*a list of integers"),
        ("train", "holes", "answer", "row 0: the puzzle has a cell"),
        ("train", "puzzle", "answer", r"no column \['puzzle'\]; its columns are \['que"),
        ("dev", "question", "answer", r"split 'dev' cannot be read"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)data set '{name}'.*{expected}"):
            load_hub(name, split, puzzle, solution, 4)
    with pytest.raises(ValueError, match="cannot be read"):
        load_hub(str(tmp_path / "nothing"), "train", "question", "answer", 4)


def test_a_cache_of_data_sets_that_cannot_be_written_is_named_with_a_remedy(hub, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/none")
    name = hub("csv", train=hub_columns(varied_boards(4, 5)))
    with pytest.raises(
        ValueError, match=r"/proc/none is missing \(No such file or directory\): set HF_HOME to a folder"
    ):
        load_hub(name, "train", "question", "answer", 4)


# The source that the settings name


def settings(tmp_path: Path, **values: object) -> SudokuSettings:
    return SudokuSettings.model_validate({"dataset": "sudoku", "data_dir": str(tmp_path)} | values)


def test_each_source_is_chosen_by_the_settings(tmp_path, hub):
    train, test = varied_boards(4, 9), varied_boards(4, 4)
    files = {name: str(write_csv(tmp_path / f"{name}.csv", rows)) for name, rows in (("a", train), ("b", test))}
    name = hub("parquet", train=hub_columns(train), validation=hub_columns(test))
    sources = {
        "files": {"train_file": files["a"], "test_file": files["b"]},
        "hub": {"hub_name": name, "test_split": "validation", "puzzle_column": "question", "solution_column": "answer"},
    }
    for source, keys in sources.items():
        chosen = settings(tmp_path, source=source, size=4, **keys)
        assert np.array_equal(load_split(chosen, "train").boards, train)
        assert np.array_equal(load_split(chosen, "test").boards, test)
        assert next(iter(keys.values())) in chosen.describe()


def test_every_source_feeds_both_layouts(tmp_path, hub):
    """The published set, csv, npz, npy, a data set of the hub and generated boards."""
    boards = varied_boards(9, 12)
    np.savez(tmp_path / "a.npz", puzzle=boards[:, :81], solution=boards[:, 81:])
    np.save(tmp_path / "a.npy", boards)
    write_csv(tmp_path / "a.csv", boards)
    for split in ("train", "test"):
        np.save(tmp_path / RAW_FILES[split], published_rows(boards, base=0))
    name = hub("parquet", train=hub_columns(boards), test=hub_columns(boards))
    columns = {"hub_name": name, "puzzle_column": "question", "solution_column": "answer"}
    sources: list[dict[str, str]] = [{"source": "published"}, {"source": "hub", **columns}]
    for suffix in ("csv", "npz", "npy"):
        file = str(tmp_path / f"a.{suffix}")
        sources.append({"source": "files", "train_file": file, "test_file": file})
    for source in sources:
        halves, in_place = (
            load_split(settings(tmp_path, layout=layout, **source), "test") for layout in ("two_halves", "in_place")
        )
        assert (halves.length, in_place.length) == (162, 81)
        tokens, prompt_mask = in_place.rows(np.arange(12))
        assert np.array_equal(tokens, boards[:, 81:]), source
        assert np.array_equal(prompt_mask, boards[:, :81] != 0), source
        assert np.array_equal(halves.rows(np.arange(12))[0], boards), source
    generated = load_split(settings(tmp_path, source="generated", n_train=3, n_test=2, layout="in_place"), "train")
    assert generated.length == 81


def test_without_the_published_set_boards_are_generated_and_the_user_is_told(tmp_path):
    chosen = settings(tmp_path, n_train=30, n_test=10)
    assert chosen.source == "published_or_generated"
    assert "does not have the published Sudoku set" in chosen.describe()
    assert (len(load_split(chosen, "train")), len(load_split(chosen, "test"))) == (30, 10)
    assert chosen.resolved() == settings(tmp_path, n_train=30, n_test=10, source="generated")
    for split in ("train", "test"):
        np.save(tmp_path / RAW_FILES[split], published_rows(varied_boards(9, 6), base=0))
    assert chosen.describe() == f"the published Sudoku set in {tmp_path}"
    assert chosen.resolved().source == "published"
    assert len(load_split(chosen, "train")) == 6


# Real files


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is absent")
    return REAL / name


@pytest.mark.parametrize(
    ("name", "n_rows"), [("easy_medium_1000.csv", 1000), ("medium_5000.csv", 5000), ("sepb_rated.npz", 426_971)]
)
def test_real_files_load(name, n_rows):
    data = load_sudoku_file(real(name), 9)
    assert len(data) == n_rows
    assert (data.puzzles > 0).sum(1).min() >= 17
