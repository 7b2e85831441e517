"""The PUMA pool: sequences revealed in the order of the model's own confidence (arXiv 2602.10314, section 3).

Each row of the pool is one sequence on its way from nearly all masked (stage 0) to nearly all revealed (stage K - 1).
Training reads the pool as a batch; the forward pass that gives the loss also gives the confidences that choose what
each row reveals next, so the pool costs no extra pass. The true tokens are filled in, whatever the model predicted.

A row advances as one segment, or, for block diffusion, each of its blocks does (`progressive_block.py`). Nothing here
waits for the device: rows finish by a mask, and every shape is fixed.

Shapes: B rows of the pool, L positions, S segments of a row; functions take any rows, the pool gives them segments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data.row_queue import RowQueue
from runtime.distributed import own_share
from unmasking import reveal_random, reveal_top


def draw_target(stage: Tensor, n_stages: int, n_maskable: Tensor, generator: torch.Generator) -> Tensor:
    """How many positions a row at `stage` should have revealed.

    The ratio is uniform in [stage / K, (stage + 1) / K); at least one position stays masked, so that the row gives a
    loss.

    Args:
        stage: int64 [B].
        n_maskable: int64 [B].

    Returns:
        int64 [B].
    """
    draw = torch.rand(stage.shape, generator=generator, device=stage.device, dtype=torch.float64)
    target = ((stage + draw) / n_stages * n_maskable).round().long()
    return torch.minimum(target, n_maskable - 1)  # -1 where nothing is maskable: reveals nothing


def stage_of(n_revealed: Tensor, n_maskable: Tensor, n_stages: int) -> Tensor:
    """The stage whose interval holds the revealed ratio; int64 [B], at most K - 1. Exact, since all is in integers."""
    return (n_revealed * n_stages // n_maskable.clamp(min=1)).clamp(max=n_stages - 1)


def advance(
    masked: Tensor,
    stage: Tensor,
    maskable: Tensor,
    confidence: Tensor,
    *,
    n_stages: int,
    collapse_threshold: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move every row one stage on.

    Args:
        masked: bool [B, L], what is still hidden.
        stage: int64 [B].
        maskable: bool [B, L], what is no prompt.
        confidence: float32 [B, L], max log-probability at each masked position.
        collapse_threshold: tau; also reveal every masked position whose max probability exceeds it.

    Returns:
        masked (bool [B, L]), stage (int64 [B]) and finished (bool [B]). What a finished row's mask holds has no
        meaning.
    """
    n_maskable = maskable.sum(1)
    n_revealed = n_maskable - masked.sum(1)
    stage = stage + 1
    target = draw_target(stage, n_stages, n_maskable, generator)
    reveal = reveal_top(confidence, masked, target - n_revealed)  # [B, L]
    if collapse_threshold is not None:
        reveal |= masked & (confidence > math.log(collapse_threshold))
    masked = masked & ~reveal
    n_masked = masked.sum(1)
    finished = (stage >= n_stages) | (n_masked == 0)
    if collapse_threshold is not None:
        # Never back: where a short row's counts round down, its ratio alone would hold it at one stage for ever.
        stage = torch.maximum(stage, stage_of(n_maskable - n_masked, n_maskable, n_stages))
    return masked, stage, finished


def rows_in_flight(uniform_fraction: float, n_rows: int, rank: int, n_ranks: int) -> int:
    """How many of a rank's `n_rows` rows are the pool's; together as many whatever the number of ranks.

    Raises:
        ValueError: there are fewer than ranks.
    """
    batch_size, n_uniform = n_rows * n_ranks, 0
    if uniform_fraction:  # at least one row each way: a share that is asked for is never rounded away, nor is the pool
        n_uniform = max(1, min(round(uniform_fraction * batch_size), batch_size - 1))
    n_pool = batch_size - n_uniform
    if n_pool < n_ranks:
        raise ValueError(
            f"objective.uniform_fraction {uniform_fraction} of {batch_size} rows leaves {n_pool} to the pool, fewer "
            f"than there are processes ({n_ranks})"
        )
    own = own_share(n_pool, rank, n_ranks)
    return own.stop - own.start


class PumaPool:
    """The rows in flight on one rank.

    Attributes:
        x0: int64 [B, L], the clean sequences.
        maskable: bool [B, L], False on prompts.
        masked: bool [B, L], True where hidden; at least one in each row, always.
        stage: int64 [B * S]; K where the segment has finished before its row.
        age: int64 [B], steps that each row has served so far.
        n_finished, n_finished_steps: int64 scalars, sequences retired and the sum of their trajectory lengths.
    """

    def __init__(
        self,
        queue: RowQueue,
        n_rows: int,
        n_stages: int,
        collapse_threshold: float | None,
        generator: torch.Generator,
        n_segments: int = 1,
    ) -> None:
        """Fill the pool from `queue`; `n_segments` must divide the length."""
        self.queue, self.generator, self.n_segments = queue, generator, n_segments
        self.n_stages, self.collapse_threshold = n_stages, collapse_threshold
        device = generator.device
        self.x0, self.maskable = queue.take_next(n_rows)
        n = n_rows * n_segments
        spread = torch.arange(n, device=device) * n_stages // n
        self.stage, self.masked = self._enter(spread[torch.randperm(n, generator=generator, device=device)])
        self.age, self.n_finished, self.n_finished_steps = (
            torch.zeros(shape, dtype=torch.long, device=device) for shape in (n_rows, (), ())
        )

    def set_n_stages(self, n_stages: int) -> None:
        """Change K. Rows in flight stay, each at the stage that its revealed ratio has under the new K."""
        if n_stages == self.n_stages:
            return
        self.n_stages = n_stages
        n_maskable, n_masked = self._segments(self.maskable).sum(1), self._segments(self.masked).sum(1)
        self.stage.copy_(torch.where(n_masked > 0, stage_of(n_maskable - n_masked, n_maskable, n_stages), n_stages))

    def advance(self, confidence: Tensor) -> None:
        """Reveal by confidence (float32 [B, L]), retire finished rows, admit fresh sequences in their place."""
        masked, stage, finished = advance(
            self._segments(self.masked),
            self.stage,
            self._segments(self.maskable),
            self._segments(confidence),
            n_stages=self.n_stages,
            collapse_threshold=self.collapse_threshold,
            generator=self.generator,
        )
        masked = (masked & ~finished[:, None]).view_as(self.masked)
        stage = stage.masked_fill(finished, self.n_stages)
        retired = finished.view(len(self.x0), -1).all(1)  # [B]
        self.age += 1
        self.n_finished += retired.sum()
        self.n_finished_steps += (self.age * retired).sum()
        self.age *= ~retired
        x0, maskable = self.queue.take(retired)
        # In place, so that a captured step finds the pool where it left it.
        self.x0.copy_(torch.where(retired[:, None], x0, self.x0))
        self.maskable.copy_(torch.where(retired[:, None], maskable, self.maskable))
        fresh_stage, fresh_masked = self._enter(torch.zeros_like(stage))
        self.masked.copy_(torch.where(retired[:, None], fresh_masked, masked))
        self.stage.copy_(torch.where(retired.repeat_interleave(self.n_segments), fresh_stage, stage))

    def metrics(self) -> dict[str, Tensor]:
        """State of the pool for the records; the stage histogram [K] holds shares of the segments in flight."""
        counts = self.stage.bincount(minlength=self.n_stages)[: self.n_stages]
        return {
            "n_stages": torch.tensor(self.n_stages),
            "stage_histogram": counts / counts.sum(),
            "masked_fraction": (self.masked.sum(1) / self.maskable.sum(1)).mean(),
            "trajectory_length": self.n_finished_steps / self.n_finished,  # NaN until a sequence has finished
            "sequences_finished": self.n_finished,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs besides the generator and the queue."""
        state = {key: getattr(self, key) for key in ("x0", "maskable", "masked", "stage", "age")}
        return state | {
            "n_stages": self.n_stages,
            "n_finished": self.n_finished,
            "n_finished_steps": self.n_finished_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        for key, value in state.items():
            setattr(self, key, value.to(self.generator.device) if isinstance(value, Tensor) else value)

    def _segments(self, values: Tensor) -> Tensor:
        """[B, L] as one row per segment, [B * S, L / S]."""
        return values.reshape(len(self.x0) * self.n_segments, -1)

    def _enter(self, stage: Tensor) -> tuple[Tensor, Tensor]:
        """Stage (int64 [B * S]) and masks (bool [B, L]) of the pool's sequences, all entering at `stage`.

        Random positions are revealed to the stage's target. Segments with nothing to reveal have finished.
        """
        maskable = self._segments(self.maskable)  # [B * S, L / S]
        n_maskable = maskable.sum(1)
        target = draw_target(stage, self.n_stages, n_maskable, self.generator)
        masked = maskable & ~reveal_random(maskable, target, self.generator)
        return torch.where(n_maskable > 0, stage, self.n_stages), masked.view_as(self.maskable)
