"""Training data made on the spot, so that a benchmark needs no files: legal boards, or random tokens.

Shapes: N rows, L positions, S size of a board, C = S * S cells.
"""

from __future__ import annotations

import numpy as np

from config import Config, SudokuSettings
from data.stream import SequenceData
from data.sudoku_boards import BOX_SHAPE, make_data

N_ROWS = 1024


class RandomRows:
    """A `SequenceData` of random tokens behind random prompts.

    Prompts take between a sixteenth and a quarter of a row, so that about 42% of all positions are masked in training,
    as in TinyGSM.
    """

    eos_id = None

    def __init__(self, length: int, mask_id: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.length, self.mask_id = length, mask_id
        self.tokens = rng.integers(0, mask_id, size=(N_ROWS, length), dtype=np.int32)
        self.n_prompt = rng.integers(max(1, length // 16), max(2, length // 4 + 1), size=N_ROWS)

    def __len__(self) -> int:
        return N_ROWS

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `SequenceData`."""
        return self.tokens[indices].astype(np.int64), np.arange(self.length) < self.n_prompt[indices, None]


def synthetic_rows(config: Config, length: int | None = None) -> SequenceData:
    """Rows of the shape that the settings describe: boards for Sudoku, unless another length is asked for."""
    if isinstance(config.data, SudokuSettings):
        if length in (None, config.data.length):
            return random_boards(config.data)
        return RandomRows(length, config.mask_id)
    return RandomRows(length or config.data.max_len, config.mask_id)


def random_boards(settings: SudokuSettings, seed: int = 0) -> SequenceData:
    """Legal boards that all come from one by swapping digits, rows and columns; the clues are drawn at random.

    A puzzle may have other solutions, which does not change how fast it is learnt from.
    """
    rng = np.random.default_rng(seed)
    size, (height, width) = settings.size, BOX_SHAPE[settings.size]
    lines = np.arange(size)
    base = (lines[:, None] % height * width + lines[:, None] // height + lines) % size  # [S, S]
    tokens = np.zeros((N_ROWS, 2, size * size), dtype=np.uint8)
    for puzzle, solution in tokens:
        board = base[_shuffled_lines(rng, size, height)][:, _shuffled_lines(rng, size, width)]
        solution[:] = rng.permutation(size)[board].ravel() + 1
        n_clues = rng.integers(settings.min_clues, settings.max_clues + 1)
        clues = rng.permutation(size * size)[:n_clues]
        puzzle[clues] = solution[clues]
    return make_data(tokens.reshape(N_ROWS, -1), size, "synthetic boards", settings.layout)


def _shuffled_lines(rng: np.random.Generator, size: int, n_in_box: int) -> np.ndarray:
    """An order of the rows or columns that keeps those of a box together."""
    boxes = np.arange(size).reshape(-1, n_in_box)[rng.permutation(size // n_in_box)]
    return rng.permuted(boxes, axis=1).ravel()
