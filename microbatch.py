"""Rows for one forward pass, as objectives hand them to the training loop.

Shapes: B rows of this rank, b of them in one pass, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """Rows for one forward pass."""

    xt: Tensor  # int64 [b, L], partly masked
    x0: Tensor  # int64 [b, L], clean
    weight: Tensor  # float32 [b, L], 0 where no loss is taken
    rows: slice  # which of the rank's B rows these are
    columns: slice  # which of their positions can carry weight


def split_rows(
    xt: Tensor, x0: Tensor, weight: Tensor, n_rows: int, columns: slice = slice(None)
) -> Iterator[Microbatch]:
    """Cut a batch into microbatches of `n_rows` rows (the last may be smaller)."""
    for start in range(0, len(xt), n_rows):
        rows = slice(start, min(start + n_rows, len(xt)))
        yield Microbatch(xt[rows], x0[rows], weight[rows], rows, columns)
