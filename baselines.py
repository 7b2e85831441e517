"""The objectives that PUMA is compared with: uniformly drawn masks, and autoregression.

In the autoregressive objective nothing is masked (xt = x0): the model is causal, and shifts its scores so that what is
computed at a position is about the next token. A diffusion model can start from it.

Shapes: B rows of this rank, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.row_queue import RowQueue
from objective import FreshRows, Microbatch, split_rows
from progressive_block import Blocks
from runtime.distributed import sum_over_ranks


class UniformObjective(FreshRows):
    """The baseline: fresh sequences at every step, masks drawn uniformly in each block."""

    def __init__(
        self, blocks: Blocks, queue: RowQueue, mask_id: int, n_rows: int, micro_rows: int, generator: torch.Generator
    ) -> None:
        self.blocks, self.queue, self.mask_id, self.generator = blocks, queue, mask_id, generator
        self.n_rows, self.micro_rows = n_rows, micro_rows
        self.masked_fraction = torch.zeros((), device=generator.device)

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """See `Objective`."""
        x0, maskable = self.queue.take_next(self.n_rows)
        masked = self.blocks.mask_uniformly(maskable, self.generator)
        self.masked_fraction = (masked.sum(1) / maskable.sum(1)).mean()
        xt = x0.masked_fill(masked, self.mask_id)
        return self.blocks.microbatches(xt, x0, self.blocks.weights(masked, over_ranks=True), self.micro_rows)

    def stage_rows(self) -> None:
        """See `Objective`."""
        self.queue.top_up()

    def metrics(self) -> dict[str, Tensor]:
        """See `Objective`."""
        return {
            "masked_fraction": self.masked_fraction,
            "sequences_drawn": self.queue.sequences_drawn,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"queue": self.queue.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Objective`."""
        self.queue.load_state_dict(state["queue"])
        self.generator.set_state(state["generator"])


class AutoregressiveObjective(FreshRows):
    """Fresh sequences at every step, nothing masked: each token from those before it, to the first EOS.

    The loss is the mean over all targets of the batch, each weighing the same. For that the ranks add up their numbers
    of targets, one number per step.
    """

    def __init__(self, queue: RowQueue, eos_id: int | None, n_rows: int, micro_rows: int) -> None:
        self.queue, self.eos_id = queue, eos_id
        self.n_rows, self.micro_rows = n_rows, micro_rows
        self.generator = None  # nothing is random here
        self.target_fraction = torch.zeros((), device=queue.device)

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """See `Objective`."""
        x0, maskable = self.queue.take_next(self.n_rows)
        target = next_token_targets(x0, maskable, self.eos_id)
        self.target_fraction = (target.sum(1) / maskable.sum(1)).mean()
        # Gradients are averaged over ranks, so a rank's weights are n_ranks times those of the sum.
        weight = target_weights(target, sum_over_ranks(target.sum())) * self.queue.stream.n_ranks
        return split_rows(x0, x0, weight, self.micro_rows)

    def stage_rows(self) -> None:
        """See `Objective`."""
        self.queue.top_up()

    def metrics(self) -> dict[str, Tensor]:
        """See `Objective`."""
        return {
            "target_fraction": self.target_fraction,
            "sequences_drawn": self.queue.sequences_drawn,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"queue": self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Objective`."""
        self.queue.load_state_dict(state["queue"])


def next_token_targets(x0: Tensor, maskable: Tensor, eos_id: int | None) -> Tensor:
    """What an autoregressive model learns to predict: what is no prompt, up to and including the first EOS.

    Position 0 is no target, since there is nothing before it.

    Args:
        x0: int64 [B, L].
        maskable: bool [B, L].
        eos_id: None where sequences have no end of their own.

    Returns:
        bool [B, L].
    """
    target = maskable.clone()
    target[:, 0] = False
    if eos_id is not None:
        ends = target & (x0 == eos_id)
        target &= ends.cumsum(1) - ends.long() == 0  # no end before here
    return target


def target_weights(target: Tensor, n_targets: Tensor) -> Tensor:
    """Loss weights (float32 [B, L]) for the mean over `n_targets` (a scalar); `target` (bool [B, L]) marks some."""
    return target / n_targets.clamp(min=1).float()
