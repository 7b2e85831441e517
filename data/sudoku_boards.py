"""Arrays of Sudoku boards: read from files and data sets, checked, and converted to token sequences.

0 is an empty cell, the mask token is size + 1. A sequence has one of two layouts; in both, the last C tokens are the
solution:

- `two_halves`: the cells of the puzzle, then those of the solution. The puzzle is the prompt.
- `in_place`: only the cells of the solution. The clues are the prompt; token 0 does not occur.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

import csv
import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from base.files import WriteError, replacing, reported
from base.memory import check_memory
from base.reading import check_archive, check_columns, check_file, may_be_on_hub, reading
from data.hashes import hash_arrays

SudokuLayout = Literal["two_halves", "in_place"]
Split = Literal["train", "test"]

# Rows and columns of a box.
BOX_SHAPE = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
# Puzzles with fewer clues have several solutions.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
FORMATS = "give a .csv, .npz or .npy file of boards"
CHUNK_ROWS = 50_000
N_BAD_ROW_BYTES = 200  # what a bad row takes in a list of them
MAX_COMPRESSION = 200  # digits of boards, in 64 bits each, compress to a sixtieth
N_SHOWN = 10
# The published set (Shah et al. 2024): each row is k and 81 quadruples (row, column, value, strategy); the first k are
# clues.
RAW_FILES = {"train": "sudoku-train-data.npy", "test": "sudoku-test-data.npy"}
CONVERTED_FILES = {"train": "train_mdm.npy", "test": "test_mdm.npy"}
RAW_WIDTH = 1 + 81 * 4


@dataclass(frozen=True)
class SudokuData:
    """Boards in memory; a `data.dataset.SequenceData`. Use `make_data`, which checks the boards, to build it."""

    boards: np.ndarray  # uint8 [N, 2 * C], puzzles and solutions
    size: int
    layout: SudokuLayout = "two_halves"
    ratings: np.ndarray | None = None  # float32 [N], difficulty of the puzzles; NaN if unknown
    source: str = "its rows"  # for messages

    @property
    def n_cells(self) -> int:
        """Number of cells of a board."""
        return self.size * self.size

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return sequence_length(self.size, self.layout)

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return mask_token(self.size)

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

    def hashes(self) -> dict[str, str]:
        """See `data.dataset.SequenceData`: of the boards as read, so the format of the file does not matter."""
        return {self.source: hash_arrays(self.boards)}


def mask_token(size: int) -> int:
    """The mask token, after empty (0) and the digits."""
    return size + 1


def sequence_length(size: int, layout: SudokuLayout) -> int:
    """Tokens per sequence."""
    return size * size if layout == "in_place" else 2 * size * size


def check_request(size: int, min_clues: int, max_clues: int) -> None:
    """Raise ValueError if no puzzle with one solution has this size and number of clues."""
    if size not in BOX_SHAPE:
        raise ValueError(f"size {size} is not supported: choose one of {', '.join(map(str, BOX_SHAPE))}")
    if min_clues > max_clues:
        raise ValueError(f"min_clues {min_clues} is above max_clues {max_clues}")
    if min_clues < FEWEST_CLUES[size] or max_clues > size * size:
        raise ValueError(
            f"min_clues {min_clues}, max_clues {max_clues}: a {size}x{size} puzzle with one solution has "
            f"{FEWEST_CLUES[size]} to {size * size} clues"
        )


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
        source: origin of the boards, for messages.
        ratings: float32 [N], difficulty of the puzzles, NaN if unknown.

    Raises:
        ValueError: there are no boards, the shape is wrong or a board is bad; the message names the first bad rows.
    """
    check_shape(boards, size, source)
    bad = check_boards(boards, size)
    if not bad and layout == "in_place":
        full_rows = np.flatnonzero((boards[:, : size * size] != 0).all(1))
        reason = "the puzzle has no empty cell, so layout in_place has nothing to predict"
        bad = [(int(row), reason) for row in full_rows]
    if bad:
        raise ValueError(f"{source}: {format_bad_rows(bad, len(boards))}")
    if ratings is not None:
        if ratings.shape != (len(boards),):
            raise ValueError(f"{source}: ratings must be one number per board, [{len(boards)}], got {ratings.shape}")
        if np.isinf(ratings).any():
            row = int(np.isinf(ratings).argmax())
            raise ValueError(f"{source}: the rating of row {row} (from 0) is infinite, or too large for float32")
        if np.isnan(ratings).all():
            raise ValueError(f"{source}: ratings must not be all NaN")
    return SudokuData(np.ascontiguousarray(boards, dtype=np.uint8), size, layout, ratings, source)


def check_shape(boards: np.ndarray, size: int, source: str) -> None:
    """Raise ValueError unless `boards` is a numeric array [N, 2 * C] with N at least 1."""
    expected = 2 * size * size
    if boards.ndim != 2 or boards.shape[1] != expected or boards.dtype.kind not in "uif":
        raise ValueError(
            f"{source}: rows must have {expected} numbers for {size}x{size} boards, got shape {boards.shape} of type "
            f"{boards.dtype}"
        )
    if len(boards) == 0:
        raise ValueError(f"{source} has no boards")


def check_boards(boards: np.ndarray, size: int) -> list[tuple[int, str]]:
    """Bad rows of `boards` ([N, 2 * C], any number type) and the reason for each, in order."""
    bad: list[tuple[int, str]] = []
    for start in range(0, len(boards), CHUNK_ROWS):
        chunk = boards[start : start + CHUNK_ROWS]
        puzzles, solutions = chunk[:, : size * size], chunk[:, size * size :]
        # The first reason that applies to a row is reported.
        reasons = {
            f"the puzzle has a cell that is not 0 to {size}": ~_are_digits(puzzles, 0, size),
            f"the solution has a cell that is not 1 to {size}": ~_are_digits(solutions, 1, size),
            "the solution repeats a digit in a row, column or box": ~legal_solutions(solutions, size),
            "the solution changes a clue": ((puzzles != 0) & (puzzles != solutions)).any(1),
        }
        has_reason = np.zeros(len(chunk), dtype=bool)
        found: list[tuple[int, str]] = []
        for reason, is_bad in reasons.items():
            found += [(start + int(row), reason) for row in np.flatnonzero(is_bad & ~has_reason)]
            has_reason |= is_bad
        bad += sorted(found)
    return bad


def legal_solutions(boards: np.ndarray, size: int) -> np.ndarray:
    """Which boards ([N, C]) have every digit once in each row, column and box; bool [N]."""
    height, width = BOX_SHAPE[size]
    in_range = _are_digits(boards, 1, size)
    digits = np.where(in_range[:, None], boards, 1).astype(np.uint16)
    bits = (np.uint16(1) << digits).reshape(-1, size, size)
    boxes = bits.reshape(-1, size // height, height, size // width, width).transpose(0, 1, 3, 2, 4)
    all_digits = (1 << (size + 1)) - 2
    legal = in_range
    for groups in (bits, bits.transpose(0, 2, 1), boxes.reshape(-1, size, size)):
        legal = legal & (np.bitwise_or.reduce(groups, axis=2) == all_digits).all(1)
    return legal


def count_shared_puzzles(first: SudokuData, second: SudokuData) -> int:
    """Number of puzzles of `second` that are also in `first`."""
    return len(set(puzzle_keys(second.puzzles)).intersection(puzzle_keys(first.puzzles)))


def puzzle_keys(puzzles: np.ndarray) -> list[bytes]:
    """A hashable key for each puzzle (uint8 [N, C])."""
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
    """Which boards have only whole numbers from `lowest` to `highest`; bool [N]."""
    inside = (boards >= lowest) & (boards <= highest)
    if not np.issubdtype(boards.dtype, np.integer):
        inside &= boards == np.floor(boards)
    return np.asarray(inside.all(1))


def load_sudoku_file(
    path: str | Path, size: int, layout: SudokuLayout = "two_halves", rating_column: str | None = None
) -> SudokuData:
    """Read and check the boards of a file, see `read_boards`; ValueError names the file and the bad rows."""
    boards, ratings = read_boards(path, size, rating_column)
    return make_data(boards, size, str(path), layout, ratings)


def read_boards(path: str | Path, size: int, rating_column: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read boards ([N, 2 * C], unchecked) and ratings (float32 [N], NaN if missing) from a file.

    .csv: columns `puzzle` and `solution` of C characters, `.` or `0` for empty cells; .npz: arrays `puzzle` and
    `solution` [N, C]; .npy: [N, 2 * C].

    Args:
        rating_column: column of a .csv file or array of a .npz file with the difficulty of puzzles; None: no ratings.

    Raises:
        ValueError: the file is missing or does not have this format.
    """
    path, source = Path(path), f"Sudoku file {path}"
    columns = ["puzzle", "solution", *([rating_column] if rating_column else [])]
    with reading(source, FORMATS):
        check_file(path)
        if path.suffix.lower() == ".csv":
            # Measured with a rating column: 7 bytes per character for 9x9 boards, 15 for 4x4, whose lines are shorter.
            check_memory((10 if size == 9 else 20) * path.stat().st_size, "its text")
            found: dict[str, Any] = _read_csv(path, columns)
            if rating_column:
                found[rating_column] = [value or "nan" for value in found[rating_column]]
            puzzles, solutions = (_cells(found[name], size, f"{source}, column {name!r}") for name in columns[:2])
        elif zipfile.is_zipfile(path):
            found = _read_npz(path, columns)
            puzzles, solutions = found["puzzle"], found["solution"]
        else:
            if rating_column:
                raise ValueError(f"a .npy file has no column {rating_column!r}: use .csv or .npz")
            return _open_npy(path), None
        if puzzles.shape != solutions.shape or puzzles.ndim != 2:
            raise ValueError(f"puzzle {puzzles.shape} and solution {solutions.shape} must both be [N, {size**2}]")
        ratings = _ratings(found[rating_column], f"{source}, column {rating_column!r}") if rating_column else None
        return np.concatenate([puzzles, solutions], axis=1), ratings


def published_available(data_dir: str | Path) -> bool:
    """Whether `data_dir` has both splits of the published set, converted or not."""
    folder = Path(data_dir)
    return all(
        (folder / CONVERTED_FILES[split]).exists() or (folder / RAW_FILES[split]).exists() for split in RAW_FILES
    )


def load_published(data_dir: str | Path, split: str, layout: SudokuLayout = "two_halves") -> SudokuData:
    """The `train` or `test` split of the published set; converted on first use, and the result cached if possible.

    Raises:
        ValueError: the file is missing or a row is bad.
    """
    raw, converted = Path(data_dir) / RAW_FILES[split], Path(data_dir) / CONVERTED_FILES[split]
    if not converted.exists():
        if not raw.exists():
            raise ValueError(f"{data_dir} has neither {converted.name} nor {raw.name}: set data.source: generated")
        data = make_data(convert_published(raw), 9, str(raw), layout)
        try:
            save_array(converted, data.boards)
        except WriteError as error:  # of a folder that cannot be written, or a full disk
            warnings.warn(f"{error}: the boards are converted again at every start", RuntimeWarning, stacklevel=2)
        return data
    return load_sudoku_file(converted, 9, layout)


def convert_published(path: Path) -> np.ndarray:
    """Convert rows of 325 integers to boards, uint8 [N, 162]; row and column indices start at 0 or 1.

    Raises:
        ValueError: the shape is wrong, or the quadruples of a row do not list each cell once.
    """
    with reading(f"Sudoku file {path}", FORMATS):
        raw = _open_npy(path)
    if raw.ndim != 2 or raw.shape[1] != RAW_WIDTH or len(raw) == 0 or raw.dtype.kind not in "uif":
        raise ValueError(f"{path}: rows must have {RAW_WIDTH} integers, got shape {raw.shape}")
    check_memory(len(raw) * 162, f"{path}")
    boards = np.zeros((len(raw), 2, 81), dtype=np.uint8)
    # Every row lists all cells, so the smallest index of the first row is 0 or 1, the base of the file.
    base = int(raw[0, 1::4].min())
    for start in tqdm(
        range(0, len(raw), CHUNK_ROWS),
        desc=f"converting {path.name}",
        unit_scale=CHUNK_ROWS,
        unit="row",
        disable=None,
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
                f"{path}: row {first} (from 0) must have 0 to 81 clues and list each of the 81 cells once, with a value"
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
    """Load a split of a Hugging Face data set (name or local folder) with boards as text or lists of integers.

    Raises:
        ValueError: it cannot be loaded, a column is missing or a row is bad.
    """
    from datasets import config, load_dataset, load_dataset_builder  # slow to import, and only used for this source
    from datasets.packaged_modules.csv.csv import Csv

    source = f"data set {name!r}, split {split!r}"
    with reading(source, "name a folder or a data set of the Hugging Face hub, and one of its splits"):
        if not Path(name).is_dir() and not may_be_on_hub(name):  # other names are file formats of the library
            raise ValueError("it is neither a folder nor OWNER/NAME")
        cache = Path(config.HF_DATASETS_CACHE)
        with reading(f"the cache of data sets {cache}", "set HF_HOME to a folder that can be written", "is missing"):
            cache.mkdir(parents=True, exist_ok=True)
        # Otherwise puzzles in a csv file are read as numbers and lose leading zeros.
        as_text = {"converters": {puzzle_column: str, solution_column: str}}
        options: dict[str, Any] = as_text if isinstance(load_dataset_builder(name), Csv) else {}
        table = load_dataset(name, split=split, trust_remote_code=False, **options)
        wanted = [puzzle_column, solution_column, *([rating_column] if rating_column else [])]
        check_columns(wanted, table.column_names)
        columns = [_cells(table[column][:], size, f"{source}, column {column!r}") for column in wanted[:2]]
        ratings = _ratings(table[rating_column][:], f"{source}, column {rating_column!r}") if rating_column else None
    return make_data(np.concatenate(columns, axis=1), size, source, layout, ratings)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically. Raises WriteError."""
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, open(scratch, "wb") as file:
        np.save(file, array)


def _open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped: a file shorter than its header says is refused, not allocated."""
    check_file(path)
    with open(path, "rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it is no .npz or .npy file")
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    check_memory(array.size * N_BAD_ROW_BYTES // max(1, array.shape[-1] if array.ndim else 1) + array.size, "its rows")
    return array


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a .npz file by name; none is allocated that is larger than what the archive holds of it."""
    check_memory(check_archive(path, MAX_COMPRESSION), "its content")
    with zipfile.ZipFile(path) as archive:
        present = {name.removesuffix(".npy") for name in archive.namelist()}
        if missing := set(names) - present:
            raise ValueError(f"it has no array {sorted(missing)}; its arrays are {sorted(present)}")
        for name in names:
            with archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"array {name!r} has Python objects instead of numbers")
            if math.prod(shape) * dtype.itemsize > archive.getinfo(f"{name}.npy").file_size:
                raise ValueError(f"array {name!r} is shorter than its header says")
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in names}


def _read_csv(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a .csv file by name."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        lines = csv.reader(file)
        header = next(lines, [])
        check_columns(columns, header)
        if repeated := [name for name in columns if header.count(name) > 1]:
            raise ValueError(f"it has several columns {repeated}; its columns are {header}")
        indices = {name: header.index(name) for name in columns}
        rows = [line for line in lines if line]
    short = next((number for number, line in enumerate(rows) if len(line) <= max(indices.values())), None)
    if short is not None:
        raise ValueError(f"row {short} (from 0) has too few columns: {rows[short]}")
    return {name: [line[i] for line in rows] for name, i in indices.items()}


def _ratings(values: Any, source: str) -> np.ndarray:
    """Convert ratings, None if missing, to float32 [N]; BadInput if one is not a number."""
    with reading(source, "ratings must be numbers"), np.errstate(over="ignore"):  # infinite ones are refused later
        if isinstance(values, np.ndarray) and values.dtype.kind in "cmM":  # which NumPy converts nevertheless
            raise ValueError(f"it is an array of {values.dtype}")
        return np.array(values, dtype=np.float32)


def _cells(rows: Sequence[Any], size: int, source: str) -> np.ndarray:
    """Convert boards given as text or as lists of integers to [N, C]; BadInput names the first bad row."""
    n_cells = size * size
    kind = str if rows and isinstance(rows[0], str) else list
    with reading(source, f"a {size}x{size} board is {n_cells} cells, as text or as a list of integers"):
        for number, row in enumerate(rows):
            if not isinstance(row, kind):
                raise ValueError(f"row {number} (from 0) is {row!r}, not {'text' if kind is str else 'a list'}")
            if len(row) != n_cells:
                raise ValueError(f"row {number} (from 0) has {len(row)} cells")
        if kind is list:
            # None becomes NaN, which the check of digits rejects.
            return np.array(rows, dtype=np.float64).reshape(-1, n_cells)
    # Characters outside ASCII become `?`, which the check of digits rejects with the row number.
    codes = np.frombuffer("".join(rows).encode("ascii", errors="replace"), dtype=np.uint8).reshape(-1, n_cells)
    return np.where(codes == ord("."), 0, codes.astype(np.int16) - ord("0"))
