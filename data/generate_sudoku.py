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
from tqdm import tqdm

from data.sudoku_boards import BOX_SHAPE, SudokuData, make_data, puzzle_keys, save_array
from data.sudoku_solver import POPCOUNT, fill_boards

# No puzzle with fewer clues has one solution.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
CHUNK_ROWS = 500
# Grids tried for one puzzle before its number is passed over.
N_TRIES = 200
# Consecutive chunks with hardly anything new after which the range is held to be used up.
MAX_STALE_CHUNKS = 50


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
            save_array(path, data.boards)
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
        made = fill_boards(boards, seed, first, size, height, width, min_clues, max_clues, POPCOUNT, N_TRIES)
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


def write_csv(path: Path, data: SudokuData) -> None:
    """Write `puzzle,solution` rows, so that the file is there whole or not at all."""
    text = (data.boards + ord("0")).tobytes().decode("ascii")
    scratch = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(scratch, "w", encoding="ascii") as file:
        file.write("puzzle,solution\n")
        for start in range(0, len(text), 2 * data.n_cells):
            middle, end = start + data.n_cells, start + 2 * data.n_cells
            file.write(f"{text[start:middle]},{text[middle:end]}\n")
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
