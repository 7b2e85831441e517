"""Where Sudoku boards come from: csv, npz and npy files, the published set, Hugging Face data sets.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from config import SudokuLayout
from data.sudoku import SudokuData, make_data

# The published set (Shah et al. 2024): rows of k and 81 quadruples (row, column, value, strategy), k of them clues.
RAW_FILES = {"train": "sudoku-train-data.npy", "test": "sudoku-test-data.npy"}
CONVERTED_FILES = {"train": "train_mdm.npy", "test": "test_mdm.npy"}
RAW_WIDTH = 1 + 81 * 4
CHUNK_ROWS = 50_000


def load_sudoku_file(
    path: str | Path, size: int, layout: SudokuLayout = "two_halves", rating_column: str | None = None
) -> SudokuData:
    """Boards of a .csv, .npz or .npy file, checked; raises ValueError naming the file and the bad rows.

    Args:
        rating_column: column or array of the puzzles' difficulty; see `read_ratings`.
    """
    ratings = read_ratings(path, rating_column) if rating_column else None
    return make_data(read_boards(path, size), size, str(path), layout, ratings)


def read_ratings(path: str | Path, column: str) -> np.ndarray:
    """A column of a .csv file or an array of a .npz file as float32 [N], NaN where a row has no rating.

    Raises:
        ValueError: the file has none of that name, or it holds anything but numbers.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = csv.DictReader(file)
                if column not in (lines.fieldnames or ()):
                    raise ValueError(f"it has {lines.fieldnames}")
                values = np.array([float(line[column] or "nan") for line in lines])
        else:
            content = np.load(path)
            if isinstance(content, np.ndarray) or column not in content.files:
                raise ValueError(f"it has {getattr(content, 'files', 'boards alone')}")
            values = content[column].astype(np.float64)
    except (ValueError, TypeError, OSError, EOFError, BadZipFile, csv.Error) as error:
        raise ValueError(f"Sudoku file {path}: no ratings can be read from column {column!r}: {error}") from None
    return values.astype(np.float32)


def read_boards(path: str | Path, size: int) -> np.ndarray:
    """Boards of a file as they stand there, [N, 2 * C].

    .csv: columns `puzzle` and `solution` of C characters, `.` or `0` where empty; .npz: arrays `puzzle` and `solution`
    [N, C]; .npy: [N, 2 * C].

    Raises:
        ValueError: the file is missing or is not of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Sudoku file {path} does not exist")
    try:
        if path.suffix == ".csv":
            return _read_csv(path, size)
        content = np.load(path)  # refuses pickles by default
        if isinstance(content, np.ndarray):
            return content
        missing = {"puzzle", "solution"} - set(content.files)
        if missing:
            raise ValueError(f"it lacks {sorted(missing)} and holds {content.files}")
        puzzles, solutions = content["puzzle"], content["solution"]
    except (ValueError, OSError, EOFError, BadZipFile, csv.Error) as error:
        raise ValueError(f"Sudoku file {path} cannot be read: {error}") from None
    if puzzles.shape != solutions.shape or puzzles.ndim != 2:
        raise ValueError(
            f"Sudoku file {path}: puzzle {puzzles.shape} and solution {solutions.shape} must both be [N, {size**2}]"
        )
    return np.concatenate([puzzles, solutions], axis=1)


def published_available(data_dir: str | Path) -> bool:
    """Whether both splits of the published set lie in `data_dir`, converted or not."""
    folder = Path(data_dir)
    return all(
        (folder / CONVERTED_FILES[split]).exists() or (folder / RAW_FILES[split]).exists() for split in RAW_FILES
    )


def load_published(data_dir: str | Path, split: str, layout: SudokuLayout = "two_halves") -> SudokuData:
    """The published set's `train` or `test` split; converted on first use, which later ones read.

    Raises:
        ValueError: it is not there, or a row is bad.
    """
    raw, converted = Path(data_dir) / RAW_FILES[split], Path(data_dir) / CONVERTED_FILES[split]
    if not converted.exists():
        if not raw.exists():
            raise ValueError(f"{data_dir} holds neither {converted.name} nor {raw.name}; set data.source: generated")
        data = make_data(convert_published(raw), 9, str(raw), layout)
        save_array(converted, data.boards)
        return data
    return load_sudoku_file(converted, 9, layout)


def convert_published(path: Path) -> np.ndarray:
    """Rows of 325 integers as boards uint8 [N, 162]; indices may count from 0 or from 1.

    Raises:
        ValueError: another shape, or quadruples that do not name each cell once.
    """
    try:
        raw = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"Sudoku file {path} cannot be read: {error}") from None
    if raw.ndim != 2 or raw.shape[1] != RAW_WIDTH or len(raw) == 0 or raw.dtype.kind not in "uif":
        raise ValueError(f"{path}: rows must have {RAW_WIDTH} integers, got shape {raw.shape}")
    boards = np.zeros((len(raw), 2, 81), dtype=np.uint8)
    # Every row names all cells, so the smallest index of the first row tells where the file counts from.
    base = int(raw[0, 1::4].min())
    for start in tqdm(
        range(0, len(raw), CHUNK_ROWS), desc=f"converting {path.name}", unit_scale=CHUNK_ROWS, unit="row"
    ):
        chunk = np.asarray(raw[start : start + CHUNK_ROWS]).astype(np.int64)
        n_clues, quadruples = chunk[:, :1], chunk[:, 1:].reshape(-1, 81, 4)
        row, column, value = (quadruples[:, :, i] - (base if i < 2 else 0) for i in range(3))
        cell = row * 9 + column  # [n, 81]
        in_range = (row >= 0) & (row < 9) & (column >= 0) & (column < 9) & (value >= 0) & (value <= 255)
        good = in_range.all(1) & (np.sort(cell, axis=1) == np.arange(81)).all(1)
        good &= (n_clues[:, 0] >= 0) & (n_clues[:, 0] <= 81)
        if not good.all():
            first = start + int(np.flatnonzero(~good)[0])
            raise ValueError(
                f"{path}: row {first} (from 0) must hold 0 to 81 clues and name each of the 81 cells once, with a value"
            )
        out = boards[start : start + len(chunk)]
        np.put_along_axis(out[:, 0], cell, np.where(np.arange(81) < n_clues, value, 0).astype(np.uint8), axis=1)
        np.put_along_axis(out[:, 1], cell, value.astype(np.uint8), axis=1)
    return boards.reshape(-1, 162)


def load_hub(
    name: str,
    split: str,
    puzzle_column: str,
    solution_column: str,
    size: int,
    layout: SudokuLayout = "two_halves",
    rating_column: str | None = None,
) -> SudokuData:
    """A split of a Hugging Face data set (a name or a local folder) whose cells are text or lists of integers.

    Raises:
        ValueError: it cannot be loaded, lacks a column, or a row is bad.
    """
    from datasets import load_dataset, load_dataset_builder  # slow to import, and only this source needs it
    from datasets.packaged_modules.csv.csv import Csv

    source = f"data set {name!r}, split {split!r}"
    try:
        # A csv file's puzzles are read as numbers otherwise, without their leading zeros.
        as_text = {"converters": {puzzle_column: str, solution_column: str}}
        options: dict[str, Any] = as_text if isinstance(load_dataset_builder(name), Csv) else {}
        table = load_dataset(name, split=split, **options)
    except Exception as error:  # the library raises a dozen kinds for what is one problem to the user
        raise ValueError(f"{source} cannot be loaded: {error}") from None
    wanted = [puzzle_column, solution_column, *([rating_column] if rating_column else [])]
    missing = set(wanted) - set(table.column_names)
    if missing:
        raise ValueError(f"{source} has no column {sorted(missing)}; it has {table.column_names}")
    columns = [
        _cells(table[column][:], size, f"{source}, column {column!r}") for column in (puzzle_column, solution_column)
    ]
    try:
        ratings = None if rating_column is None else np.array(table[rating_column][:], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}, column {rating_column!r}: ratings must be numbers ({error})") from None
    return make_data(np.concatenate(columns, axis=1), size, source, layout, ratings)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(scratch, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _read_csv(path: Path, size: int) -> np.ndarray:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        lines = csv.reader(file)
        header = next(lines, [])
        missing = {"puzzle", "solution"} - set(header)
        if missing:
            raise ValueError(f"it lacks the columns {sorted(missing)} and has {header}")
        at = [header.index("puzzle"), header.index("solution")]
        rows = [line for line in lines if line]
    short = next((number for number, line in enumerate(rows) if len(line) <= max(at)), None)
    if short is not None:
        raise ValueError(f"row {short} (from 0) is cut short: {rows[short]}")
    columns = [_cells([line[i] for line in rows], size, f"column {header[i]!r}") for i in at]
    return np.concatenate(columns, axis=1)


def _cells(rows: Sequence[Any], size: int, source: str) -> np.ndarray:
    """Boards given as text or as lists of integers, [N, C]; ValueError naming the first row of another length."""
    n_cells = size * size
    kind = str if rows and isinstance(rows[0], str) else list
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            raise ValueError(f"{source}: row {number} (from 0) is {row!r}, not {'text' if kind is str else 'a list'}")
        if len(row) != n_cells:
            raise ValueError(
                f"{source}: row {number} (from 0) has {len(row)} cells, a {size}x{size} board has {n_cells}"
            )
    if kind is list:
        try:
            return np.array(rows, dtype=np.float64).reshape(-1, n_cells)  # missing cells become NaN
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: cells must be integers ({error})") from None
    # Anything that is no ASCII character becomes `?`, which fails the check of digits with its row number.
    codes = np.frombuffer("".join(rows).encode("ascii", errors="replace"), dtype=np.uint8).reshape(-1, n_cells)
    return np.where(codes == ord("."), 0, codes.astype(np.int16) - ord("0"))
