"""What a training step learns from: an objective turns drawn sequences into (xt, x0, weight).

One loss serves every objective: the sum over positions of weight * -log p(x0 | xt). An objective only chooses what is
masked and how much each position weighs. Weights are for the mean over the rank's rows; data-parallel training averages
over ranks, which makes it the mean over the whole batch.

Shapes: B rows of this rank, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autoregressive import AutoregressiveObjective
from config import AutoregressiveSettings, ObjectiveSettings, ProgressiveSettings, TrainingSettings
from data.row_queue import RowQueue
from data.stream import SequenceStream
from microbatch import FreshRows, Microbatch, Objective
from progressive import PumaPool, rows_in_flight
from progressive_block import Blocks, build_blocks


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


class PumaObjective:
    """The pool of `progressive.py`, with a share of ordinary uniformly masked rows behind it if asked for."""

    def __init__(
        self,
        settings: ProgressiveSettings,
        blocks: Blocks,
        queue: RowQueue,
        mask_id: int,
        n_rows: int,
        micro_rows: int,
        generator: torch.Generator,
    ) -> None:
        self.settings, self.blocks, self.queue = settings, blocks, queue
        self.mask_id, self.generator = mask_id, generator
        self.n_rows, self.micro_rows = n_rows, micro_rows
        n_pool = rows_in_flight(settings.uniform_fraction, n_rows, queue.stream.rank, queue.stream.n_ranks)
        self.n_uniform = n_rows - n_pool
        self.pool = PumaPool(
            queue,
            n_pool,
            settings.n_stages_at(0),
            settings.collapse_threshold,
            generator,
            n_segments=blocks.n_blocks,
            n_batches=settings.pool_batches,
        )
        self._confidence = torch.empty(n_rows, blocks.length, device=generator.device)

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """See `Objective`."""
        pool = self.pool
        pool.set_n_stages(self.settings.n_stages_at(step))
        x0, masked = pool.batch()
        if self.n_uniform:
            fresh, maskable = self.queue.take_next(self.n_uniform)
            x0 = torch.cat([x0, fresh])  # [B, L]
            masked = torch.cat([masked, self.blocks.mask_uniformly(maskable, self.generator)])
        xt = x0.masked_fill(masked, self.mask_id)
        return self.blocks.microbatches(xt, x0, self.blocks.weights(masked, over_ranks=True), self.micro_rows)

    def observe(self, microbatch: Microbatch, confidence: Tensor) -> None:
        """See `Objective`."""
        self._confidence[microbatch.rows, microbatch.columns] = confidence[:, microbatch.columns]

    def end_step(self) -> None:
        """See `Objective`."""
        self.pool.advance(self._confidence[: self.n_rows - self.n_uniform])

    def stage_rows(self) -> None:
        """See `Objective`."""
        self.queue.top_up()

    def metrics(self) -> dict[str, Tensor]:
        """See `Objective`."""
        return self.pool.metrics() | {"sequences_drawn": self.queue.sequences_drawn}

    def state_dict(self) -> dict[str, Any]:
        """See `Objective`."""
        return {
            "queue": self.queue.state_dict(),
            "generator": self.generator.get_state(),
            "pool": self.pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Objective`."""
        self.queue.load_state_dict(state["queue"])
        self.generator.set_state(state["generator"])
        self.pool.load_state_dict(state["pool"])


def build_objective(
    settings: ObjectiveSettings,
    training: TrainingSettings,
    stream: SequenceStream,
    mask_id: int,
    device: torch.device,
) -> Objective:
    """The objective that the settings name, on the rank that `stream` belongs to.

    Raises:
        ValueError: the batch does not divide over the ranks or into microbatches, or the rows into blocks.
    """
    n_rows, rest = divmod(training.batch_size, stream.n_ranks)
    if rest:
        raise ValueError(f"training.batch_size {training.batch_size} does not divide over {stream.n_ranks} processes")
    micro_rows = min(training.micro_batch_size or n_rows, n_rows)
    if n_rows % micro_rows:
        raise ValueError(
            f"training.micro_batch_size {micro_rows} does not divide the {n_rows} rows that each process has"
        )
    queue = RowQueue(stream, n_rows, device)
    if isinstance(settings, AutoregressiveSettings):
        return AutoregressiveObjective(queue, stream.data.eos_id, n_rows, micro_rows)
    # Masks differ between ranks, and from the weights' seed.
    generator = torch.Generator(device).manual_seed(training.seed * 1_000_003 + stream.rank + 1)
    blocks = build_blocks(settings, stream.data.length)
    if isinstance(settings, ProgressiveSettings):
        return PumaObjective(settings, blocks, queue, mask_id, n_rows, micro_rows, generator)
    return UniformObjective(blocks, queue, mask_id, n_rows, micro_rows, generator)
