"""Base class of objectives: an objective turns sequences into microbatches of (xt, x0, weight).

All objectives have the same loss: the sum over positions of weight * -log p(x0 | xt). An objective only chooses which
positions are masked and the weight of each. Weights average over the rows of a rank; data-parallel training averages
over ranks, which gives the mean over the whole batch.

Shapes: B rows of this rank, b of them in one pass, L positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config import ModelConfidence
from data.row_queue import RowQueue
from model.token_scores import TokenScores


@dataclass(frozen=True)
class Microbatch:
    """Rows for one forward pass."""

    xt: Tensor  # int64 [b, L], partly masked
    x0: Tensor  # int64 [b, L], clean
    weight: Tensor  # float32 [b, L], 0 at positions without loss
    rows: slice  # which of the rank's B rows these are
    columns: slice  # positions that may have a weight


def split_rows(
    xt: Tensor, x0: Tensor, weight: Tensor, n_rows: int, columns: slice = slice(None)
) -> Iterator[Microbatch]:
    """Split a batch into microbatches of `n_rows` rows (the last may be smaller)."""
    for start in range(0, len(xt), n_rows):
        rows = slice(start, min(start + n_rows, len(xt)))
        yield Microbatch(xt[rows], x0[rows], weight[rows], rows, columns)


class Objective(ABC):
    """Base of all objectives, with all methods that the training loop calls.

    A subclass implements `draw`, which chooses the masks. In each update the loop takes `microbatches`, passes the
    scores of each to `observe`, and calls `end_step` after the optimizer step. These methods need no host sync
    and may be captured in a CUDA graph; `prefetch` runs on the host.

    Args:
        queue: fresh sequences.
        n_rows: B.
        micro_rows: rows of a microbatch.
        generator: source of all random numbers, on the device; None if the objective is deterministic.
    """

    confidence: ModelConfidence = "top_prob"  # the rule of the confidence that `observe` receives

    def __init__(
        self, queue: RowQueue, *, n_rows: int, micro_rows: int, generator: torch.Generator | None = None
    ) -> None:
        self.queue, self.n_rows, self.micro_rows, self.generator = queue, n_rows, micro_rows, generator

    @abstractmethod
    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of one update: xt int64 [B, L], x0 int64 [B, L] and weight float32 [B, L]."""

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """The forward passes of one update; their number and shapes are the same on all ranks."""
        return split_rows(*self.draw(step), self.micro_rows)

    def observe(self, microbatch: Microbatch, scores: TokenScores) -> None:
        """Receive the scores of a forward pass, valid where `weight` is not 0; their loss has no graph any more."""

    def end_step(self) -> None:
        """Called after the optimizer step: retire finished rows and admit fresh ones."""

    def prefetch(self) -> None:
        """Called after each update: copy rows for later updates to the device."""
        self.queue.top_up()

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of this rank. Those named `sequences_...` are summed over ranks, all others averaged."""
        return {"sequences_drawn": self.queue.sequences_drawn}

    def state_dict(self) -> dict[str, Any]:
        """State of this rank for a restart."""
        state = {"queue": self.queue.state_dict()}
        return state if self.generator is None else state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.queue.load_state_dict(state["queue"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
