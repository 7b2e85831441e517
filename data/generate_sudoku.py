"""Generate random Sudoku puzzles with one solution each.

    python -m data.generate_sudoku --size 9 --count 100000 --min-clues 30 --max-clues 40 --seed 0 --out puzzles.csv

Puzzle i depends only on the seed and i, so the result is the same on any number of cores. Clues are removed from a
random full grid in random order, each only if the solver proves that the solution stays unique, until a number of clues
drawn uniformly from the range is reached. If no further clue can be removed, the puzzle is kept if its number of clues
is in the range; otherwise a new grid is drawn.

Shapes: N boards, S size, C = S * S cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from base.commands import CommandParser, ends_with_message, whole_number
from base.cores import count_cores
from base.files import check_out, make_once, write_text
from base.memory import check_memory
from data.sudoku_boards import BOX_SHAPE, Split, SudokuData, check_request, make_data, puzzle_keys, save_array

CHUNK_ROWS = 500
# Grids tried for puzzle i before it is skipped.
N_TRIES = 200
# The search stops after so many consecutive chunks with less than 1% new puzzles.
MAX_STALE_CHUNKS = 50


def generate_sudoku(
    size: int,
    n: int,
    min_clues: int,
    max_clues: int,
    seed: int,
    *,
    n_before: int = 0,
    n_workers: int | None = None,
    show_progress: bool = True,
) -> SudokuData:
    """Generate `n` puzzles, all distinct.

    Args:
        n_before: puzzles of this seed to leave out at the beginning, such as those of the test.
        n_workers: threads (the compiled code releases the GIL); by default one per core.

    Raises:
        ValueError: such puzzles do not exist, or fewer distinct ones were found than requested.
    """
    check_request(size, min_clues, max_clues)
    n_wanted = n_before + n
    # A board, the key by which it is known, and its place in the set of keys.
    check_memory(n_wanted * (2 * size * size + 250), f"a set of {n_wanted:,} boards")
    boards = np.empty((n_wanted, 2 * size * size), dtype=np.uint8)
    seen: set[bytes] = set()
    n_stale = 0
    hidden = None if show_progress else True  # None: where standard error is no terminal
    with tqdm(total=n_wanted, desc=f"generating {size}x{size} puzzles", unit="puzzle", disable=hidden) as bar:
        for chunk in _chunks(size, min_clues, max_clues, seed, n_workers or count_cores()):
            n_known = len(seen)
            for board, key in zip(chunk, puzzle_keys(chunk[:, : size * size]), strict=True):
                if key not in seen and len(seen) < n_wanted:
                    boards[len(seen)] = board
                    seen.add(key)
            bar.update(len(seen) - n_known)
            if len(seen) == n_wanted:
                break
            n_stale = n_stale + 1 if len(seen) - n_known < CHUNK_ROWS // 100 else 0
            if n_stale == MAX_STALE_CHUNKS or len(chunk) == 0:  # or hundreds of grids for each puzzle, and none worked
                raise ValueError(
                    f"found only {len(seen)} distinct {size}x{size} puzzles with {min_clues} to {max_clues} clues, "
                    f"but {n_wanted} are requested: request fewer or widen the range of clues"
                )
    return make_data(boards[n_before:], size, "generated boards")


def cached_generated(
    data_dir: str | Path, size: int, n_train: int, n_test: int, min_clues: int, max_clues: int, seed: int, split: Split
) -> Path:
    """File of the training or of the test puzzles in `data_dir`, generated on first use; see `generate_sudoku`."""
    name = f"sudoku_{size}x{size}_{n_train}_{n_test}_clues{min_clues}to{max_clues}_seed{seed}"
    path = Path(data_dir) / f"{name}_{split}.npy"

    def make() -> None:
        # Those of the test come first, so that an evaluation elsewhere need not make those of the training.
        n, n_before = (n_train, n_test) if split == "train" else (n_test, 0)
        save_array(path, generate_sudoku(size, n, min_clues, max_clues, seed, n_before=n_before).boards)

    make_once(path, path.exists, make, "data.data_dir")
    return path


def _chunks(size: int, min_clues: int, max_clues: int, seed: int, n_workers: int) -> Iterator[np.ndarray]:
    """Boards (uint8 [n, 2 * C]) in the order of their numbers, computed a few chunks ahead."""
    from data.sudoku_solver import fill_boards  # imports numba, which is slow

    def work(number: int) -> np.ndarray:
        boards = np.zeros((CHUNK_ROWS, 2, size * size), dtype=np.uint8)
        first, (height, width) = number * CHUNK_ROWS, BOX_SHAPE[size]
        made = fill_boards(boards, seed, first, size, height, width, min_clues, max_clues, N_TRIES)
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
    """Write `puzzle,solution` rows atomically; raises WriteError."""
    cells, n = (data.boards + ord("0")).tobytes().decode("ascii"), data.n_cells
    lines = [
        f"{cells[start : start + n]},{cells[start + n : start + 2 * n]}\n" for start in range(0, len(cells), 2 * n)
    ]
    write_text(path, "puzzle,solution\n" + "".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Generate Sudoku puzzles with one solution each.")
    parser.add_argument("--size", type=int, default=9, choices=sorted(BOX_SHAPE))
    parser.add_argument("--count", type=whole_number(1), required=True, help="number of puzzles, all distinct")
    parser.add_argument("--min-clues", type=whole_number(0, 81), default=30)
    parser.add_argument("--max-clues", type=whole_number(0, 81), default=40)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0)
    parser.add_argument("--workers", type=whole_number(1, 1024), help="threads; by default one per core")
    parser.add_argument("--out", type=Path, required=True, help="csv file")
    options = parser.parse_args(arguments)
    with ends_with_message():
        check_out(options.out, "--out")
        data = generate_sudoku(
            options.size,
            options.count,
            options.min_clues,
            options.max_clues,
            options.seed,
            n_workers=options.workers,
        )
        write_csv(options.out, data)
        print(f"wrote {len(data)} puzzles to {options.out}")


if __name__ == "__main__":
    main()
