"""What objectives and the training loop say to each other: microbatches one way, confidences the other.

Shapes: B rows of this rank, b of them in one pass, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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


class FreshRows:
    """Base of objectives that draw new sequences for each step: confidences teach them nothing, no row goes on."""

    def observe(self, microbatch: Microbatch, confidence: Tensor) -> None:
        """Nothing is learnt from confidences."""

    def end_step(self) -> None:
        """Each step draws its own rows."""


class Objective(Protocol):
    """Everything the training loop knows about an objective."""

    @property
    def generator(self) -> torch.Generator | None:
        """Source of all random numbers, if there are any."""
        ...

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """Batches of one update; as many and of the same shapes on every rank."""
        ...

    def observe(self, microbatch: Microbatch, confidence: Tensor) -> None:
        """Take the max log-probabilities (float32 [b, L]) that the forward pass found where weight is not 0."""
        ...

    def end_step(self) -> None:
        """The update is done: retire and admit rows."""
        ...

    def stage_rows(self) -> None:
        """The host's part after each update: send rows to the device that later updates may need."""
        ...

    def metrics(self) -> dict[str, Tensor]:
        """Figures of this rank. Those named `sequences_...` add up over ranks, all others are averaged."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs on this rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        ...
