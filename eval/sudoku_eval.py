"""What counts as a solved Sudoku puzzle."""

from __future__ import annotations

import torch
from torch import Tensor

from data.sudoku import legal_solutions


def judge_boards(grid: Tensor, puzzle: Tensor, solution: Tensor, size: int) -> dict[str, Tensor]:
    """Judge filled boards, whatever the layout of the sequences that they come from.

    A puzzle is solved if the grid is legal and keeps every clue; a grid that differs from the recorded solution counts
    too, should a puzzle have several. (The published code accepts a grid that keeps any of the clues.)

    Args:
        grid: int64 [B, size^2], sampled.
        puzzle: int64 [B, size^2], 0 where empty.
        solution: int64 [B, size^2], as recorded.

    Returns:
        `accuracy` float32 [B], 1 if solved; `cell_accuracy` float32 [B], share of the puzzle's empty cells that equal
        the recorded solution (1 where it has none).
    """
    empty = puzzle == 0
    keeps_clues = (empty | (grid == puzzle)).all(1)
    legal = torch.from_numpy(legal_solutions(grid.cpu().numpy(), size)).to(grid.device)
    n_right = ((grid == solution) & empty).sum(1)
    n_empty = empty.sum(1)
    return {
        "accuracy": (legal & keeps_clues).float(),
        "cell_accuracy": torch.where(n_empty > 0, n_right / n_empty.clamp(min=1), 1.0),
    }
