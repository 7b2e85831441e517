"""Random Sudoku puzzles with one solution each, as many as a training run wants.

    python -m data.generate_sudoku --size 9 --count 100000 --min-clues 30 --max-clues 40 --seed 0 --out puzzles.csv

Puzzle number i depends on the seed and i alone, so the result is the same on any number of cores. A random full grid
loses clues in random order, each only if the solver proves that the solution stays unique, until a clue count drawn
uniformly from the range is reached. Where no further clue can go, the puzzle is kept if its count lies in the range,
otherwise a new grid is drawn.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from numba import njit, uint64
from tqdm import tqdm

from data.sudoku import BOX_SHAPE, SudokuData, make_data, puzzle_keys
from data.sudoku_files import save_array

# No puzzle with fewer clues has one solution.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
CHUNK_ROWS = 500
# Grids tried for one puzzle before its number is passed over.
N_TRIES = 200
# Consecutive chunks with hardly anything new after which the range is held to be used up.
MAX_STALE_CHUNKS = 50

POPCOUNT = np.array([bin(mask).count("1") for mask in range(1 << 10)], dtype=np.uint8)


def generate_sudoku(
    size: int,
    n_train: int,
    n_test: int,
    min_clues: int,
    max_clues: int,
    seed: int,
    *,
    n_workers: int | None = None,
    show_progress: bool = True,
) -> tuple[SudokuData | None, SudokuData | None]:
    """Make training and test puzzles, all distinct.

    Args:
        n_train, n_test: puzzles of each kind; where 0, that entry of the result is None.
        n_workers: threads (the compiled code holds no lock); all cores by default.

    Raises:
        ValueError: no such puzzles exist, or fewer distinct ones than were asked for can be found.
    """
    check_request(size, min_clues, max_clues)
    n_wanted = n_train + n_test
    boards = np.empty((n_wanted, 2 * size * size), dtype=np.uint8)
    seen: set[bytes] = set()
    n_stale = 0
    with tqdm(
        total=n_wanted, desc=f"generating {size}x{size} puzzles", unit="puzzle", disable=not show_progress
    ) as bar:
        for chunk in _chunks(size, min_clues, max_clues, seed, n_workers or os.cpu_count() or 1):
            n_before = len(seen)
            for board, key in zip(chunk, puzzle_keys(chunk[:, : size * size]), strict=True):
                if key not in seen and len(seen) < n_wanted:
                    boards[len(seen)] = board
                    seen.add(key)
            bar.update(len(seen) - n_before)
            if len(seen) == n_wanted:
                break
            n_stale = n_stale + 1 if len(seen) - n_before < CHUNK_ROWS // 100 else 0
            if n_stale == MAX_STALE_CHUNKS or len(chunk) == 0:  # hundreds of grids per number, and no puzzle at all
                raise ValueError(
                    f"only {len(seen)} distinct {size}x{size} puzzles with {min_clues} to {max_clues} clues could be "
                    f"found, {n_wanted} are wanted: ask for fewer, or widen the range of clues"
                )
    source = "generated boards"
    parts = [boards[n_test:], boards[:n_test]]
    train, test = (make_data(part, size, source) if len(part) else None for part in parts)
    return train, test


def cached_generated(
    data_dir: str | Path, size: int, n_train: int, n_test: int, min_clues: int, max_clues: int, seed: int
) -> tuple[Path, Path]:
    """Files of training and test puzzles in `data_dir`, made there on first use; see `generate_sudoku`."""
    name = f"sudoku_{size}x{size}_{n_train}_{n_test}_clues{min_clues}to{max_clues}_seed{seed}"
    paths = Path(data_dir) / f"{name}_train.npy", Path(data_dir) / f"{name}_test.npy"
    if not all(path.exists() for path in paths):
        for data, path in zip(generate_sudoku(size, n_train, n_test, min_clues, max_clues, seed), paths, strict=True):
            assert data is not None  # the settings ask for at least one of each
            save_array(path, data.tokens)
    return paths


def check_request(size: int, min_clues: int, max_clues: int) -> None:
    """Raise ValueError if no puzzle can have such a number of clues."""
    if size not in BOX_SHAPE:
        raise ValueError(f"size {size} is not supported: choose from {', '.join(map(str, BOX_SHAPE))}")
    if not FEWEST_CLUES[size] <= min_clues <= max_clues <= size * size:
        raise ValueError(
            f"clues from {min_clues} to {max_clues}: a {size}x{size} puzzle with one solution has between "
            f"{FEWEST_CLUES[size]} and {size * size} clues"
        )


def _chunks(size: int, min_clues: int, max_clues: int, seed: int, n_workers: int) -> Iterator[np.ndarray]:
    """Boards uint8 [n, 2 * C] in the order of their numbers, a few chunks ahead of the reader."""

    def work(number: int) -> np.ndarray:
        boards = np.zeros((CHUNK_ROWS, 2, size * size), dtype=np.uint8)
        first, (height, width) = number * CHUNK_ROWS, BOX_SHAPE[size]
        made = _fill_boards(boards, seed, first, size, height, width, min_clues, max_clues, POPCOUNT, N_TRIES)
        return boards[made].reshape(-1, 2 * size * size)

    with ThreadPoolExecutor(n_workers) as pool:
        ahead = [pool.submit(work, number) for number in range(2 * n_workers)]
        try:
            for number in count(2 * n_workers):
                yield ahead.pop(0).result()
                ahead.append(pool.submit(work, number))
        finally:
            for future in ahead:
                future.cancel()


@njit(cache=True, nogil=True)
def _next_random(state: np.ndarray) -> np.int64:
    """The next 32 random bits of SplitMix64; `state` is uint64 [1]."""
    state[0] += uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> uint64(31))) >> uint64(32))


@njit(cache=True, nogil=True)
def _place(grid: np.ndarray, used: np.ndarray, groups: np.ndarray, cell: int, digit: int) -> None:
    """Write a digit, or with digit 0 take the cell's digit away; `used` [3, S] are masks of rows, columns, boxes."""
    bit = 1 << (grid[cell] if digit == 0 else digit)
    for kind in range(3):
        used[kind, groups[kind, cell]] ^= bit
    grid[cell] = digit


@njit(cache=True, nogil=True)
def _complete(
    grid: np.ndarray, used: np.ndarray, groups: np.ndarray, size: int, popcount: np.ndarray, state: np.ndarray
) -> bool:
    """Fill the empty cells (0) of `grid` [C] in place, digits in random order; False, and grid as it was, if none fits.

    Depth-first, at each level the cell with the fewest candidates.
    """
    full = (1 << (size + 1)) - 2
    cells = np.empty(size * size, dtype=np.int64)
    left = np.empty(size * size, dtype=np.int64)  # candidates not yet tried at each depth
    depth = 0
    while True:
        best, best_left, best_count = -1, 0, 100
        for cell in range(size * size):
            if grid[cell] == 0:
                candidates = full & ~(used[0, groups[0, cell]] | used[1, groups[1, cell]] | used[2, groups[2, cell]])
                n_candidates = popcount[candidates]
                if n_candidates < best_count:
                    best, best_left, best_count = cell, candidates, n_candidates
                    if n_candidates <= 1:
                        break
        if best < 0:
            return True
        cells[depth], left[depth] = best, best_left
        while left[depth] == 0:
            depth -= 1
            if depth < 0:
                return False
            _place(grid, used, groups, cells[depth], 0)
        skip = _next_random(state) % popcount[left[depth]]
        rest = left[depth]
        for _ in range(skip):
            rest &= rest - 1
        bit = rest & -rest
        left[depth] ^= bit
        digit = 0
        while (1 << digit) != bit:
            digit += 1
        _place(grid, used, groups, cells[depth], digit)
        depth += 1


@njit(cache=True, nogil=True)
def _is_needed(
    grid: np.ndarray, used: np.ndarray, groups: np.ndarray, size: int, popcount: np.ndarray, cell: int
) -> bool:
    """Whether taking a clue away leaves a second solution, one with another digit in its cell. Changes nothing."""
    digit = grid[cell]
    _place(grid, used, groups, cell, 0)
    taken = used[0, groups[0, cell]] | used[1, groups[1, cell]] | used[2, groups[2, cell]]
    state = np.zeros(1, dtype=np.uint64)
    found = False
    for other in range(1, size + 1):
        if other != digit and not taken & (1 << other):
            trial, trial_used = grid.copy(), used.copy()
            _place(trial, trial_used, groups, cell, other)
            if _complete(trial, trial_used, groups, size, popcount, state):
                found = True
                break
    _place(grid, used, groups, cell, digit)
    return found


@njit(cache=True, nogil=True)
def _make_puzzle(
    board: np.ndarray,
    state: np.ndarray,
    groups: np.ndarray,
    size: int,
    popcount: np.ndarray,
    min_clues: int,
    max_clues: int,
) -> bool:
    """One try: a grid and a puzzle into `board` [2, C]; False if too many clues had to stay."""
    n_cells = size * size
    grid = np.zeros(n_cells, dtype=np.int64)
    used = np.zeros((3, size), dtype=np.int64)
    _complete(grid, used, groups, size, popcount, state)
    board[1] = grid
    wanted = min_clues + _next_random(state) % (max_clues - min_clues + 1)
    order = np.arange(n_cells)
    n_clues = n_cells
    for i in range(n_cells):
        if n_clues == wanted:
            break
        j = i + _next_random(state) % (n_cells - i)
        order[i], order[j] = order[j], order[i]
        if not _is_needed(grid, used, groups, size, popcount, order[i]):
            _place(grid, used, groups, order[i], 0)
            n_clues -= 1
    board[0] = grid
    return n_clues <= max_clues


@njit(cache=True, nogil=True)
def _fill_boards(
    boards: np.ndarray,
    seed: int,
    first: int,
    size: int,
    height: int,
    width: int,
    min_clues: int,
    max_clues: int,
    popcount: np.ndarray,
    n_tries: int,
) -> np.ndarray:
    """Puzzles number first, first + 1, ... into `boards` [n, 2, C]; which of them succeeded, bool [n]."""
    groups = np.empty((3, size * size), dtype=np.int64)
    for cell in range(size * size):
        row, column = cell // size, cell % size
        groups[0, cell], groups[1, cell] = row, column
        groups[2, cell] = row // height * (size // width) + column // width
    made = np.zeros(len(boards), dtype=np.bool_)
    state = np.empty(1, dtype=np.uint64)
    for i in range(len(boards)):
        # Two rounds of mixing, so that neighbouring seeds and numbers have nothing in common.
        state[0] = uint64(seed)
        state[0] = uint64(_next_random(state)) << uint64(32) | uint64(_next_random(state))
        state[0] ^= uint64(first + i) * uint64(0xD1342543DE82EF95)
        state[0] = uint64(_next_random(state)) << uint64(32) | uint64(_next_random(state))
        for _ in range(n_tries):
            if _make_puzzle(boards[i], state, groups, size, popcount, min_clues, max_clues):
                made[i] = True
                break
    return made


def write_csv(path: Path, data: SudokuData) -> None:
    """Write `puzzle,solution` rows, so that the file is there whole or not at all."""
    text = (data.tokens + ord("0")).tobytes().decode("ascii")
    scratch = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(scratch, "w", encoding="ascii") as file:
        file.write("puzzle,solution\n")
        for start in range(0, len(text), data.length):
            middle = start + data.n_cells
            file.write(f"{text[start:middle]},{text[middle : start + data.length]}\n")
    scratch.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description="Generate Sudoku puzzles with one solution each.")
    parser.add_argument("--size", type=int, default=9, choices=sorted(BOX_SHAPE))
    parser.add_argument("--count", type=int, required=True, help="puzzles, all distinct")
    parser.add_argument("--min-clues", type=int, default=30)
    parser.add_argument("--max-clues", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="threads; all cores by default")
    parser.add_argument("--out", type=Path, required=True, help="csv file")
    options = parser.parse_args(arguments)
    for name in ("count", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, got {options.seed}")
    try:
        data, _ = generate_sudoku(
            options.size,
            options.count,
            0,
            options.min_clues,
            options.max_clues,
            options.seed,
            n_workers=options.workers,
        )
        assert data is not None
        write_csv(options.out, data)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {len(data)} puzzles to {options.out}")


if __name__ == "__main__":
    main()
