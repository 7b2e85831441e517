"""The PUMA pool: sequences revealed in the order of the model's confidence (arXiv 2602.10314, section 3).

Each row of the pool is a sequence between nearly all masked (stage 0) and nearly all revealed (stage K - 1). An update
trains one batch of the pool. The forward pass that gives the loss also gives the confidences that choose which
positions each row reveals next, so the pool needs no extra pass. Revealed positions get the true tokens, not the
model's predictions.

A row advances as one segment; for block diffusion each of its blocks is a segment (`progressive_block.py`). There is no
host sync: finished rows are given by a mask, and all shapes are fixed.

Shapes: M batches of B rows in the pool, n rows, L positions, L / S segments of S positions per row. Functions take any
rows [B, L]; the pool calls them with segments [N, S].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from config import ProgressiveSettings
from data.row_queue import RowQueue
from model.token_scores import TokenScores
from objective import Microbatch
from progressive_block import BlockLayout, MaskedObjective
from runtime.distributed import rank_slice
from unmasking import reveal_random, reveal_top


def draw_target(stage: Tensor, n_stages: int, n_maskable: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the number of positions that a row at `stage` should have revealed.

    The ratio is uniform in [stage / K, (stage + 1) / K). At least one position stays masked, so that every row has a
    loss.

    Args:
        stage: int64 [B].
        n_maskable: int64 [B].

    Returns:
        int64 [B].
    """
    draw = torch.rand(stage.shape, generator=generator, device=stage.device, dtype=torch.float64)
    target = ((stage + draw) / n_stages * n_maskable).round().long()
    return torch.minimum(target, n_maskable - 1)  # -1 if no position is maskable: reveals none


def stage_of(n_revealed: Tensor, n_maskable: Tensor, n_stages: int) -> Tensor:
    """The stage whose interval contains the revealed ratio; int64 [B], at most K - 1. Exact integer arithmetic."""
    return (n_revealed * n_stages // n_maskable.clamp(min=1)).clamp(max=n_stages - 1)


def reveal_next_stage(
    masked: Tensor,
    stage: Tensor,
    maskable: Tensor,
    confidence: Tensor | None,
    max_log_prob: Tensor,
    *,
    n_stages: int,
    collapse_threshold: float | None,
    generator: torch.Generator,
    redraw: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move every row to its next stage and reveal positions up to its target (docs/algorithm.md, steps 3, 4 and 7).

    Args:
        masked: bool [B, L].
        stage: int64 [B].
        maskable: bool [B, L], False on prompts.
        confidence: float32 [B, L], higher is revealed first; None: random positions are revealed up to the target.
        max_log_prob: float32 [B, L], that of the most probable token at each masked position.
        collapse_threshold: tau; also reveal every masked position whose max probability exceeds it.
        redraw: reveal random positions anew, without regard to those revealed before; without `confidence` and
            threshold.

    Returns:
        masked (bool [B, L]; undefined for finished rows), stage (int64 [B]) and finished (bool [B]).
    """
    n_maskable = maskable.sum(1)
    stage = stage + 1
    if redraw:
        masked = maskable  # all that is revealed now is drawn now
    n_revealed = n_maskable - masked.sum(1)
    n_reveal = draw_target(stage, n_stages, n_maskable, generator) - n_revealed
    if confidence is None:
        reveal = reveal_random(masked, n_reveal, generator)  # [B, L]
    else:
        reveal = reveal_top(confidence, masked, n_reveal)  # [B, L]
    collapsed = torch.zeros_like(masked)
    if collapse_threshold is not None:
        collapsed = masked & ~reveal & (max_log_prob > math.log(collapse_threshold))
    masked = masked & ~(reveal | collapsed)
    n_masked = masked.sum(1)
    finished = (stage >= n_stages) | (n_masked == 0)
    if collapse_threshold is not None:
        # Only for rows that collapse: otherwise a target rounded up to the next stage would end a trajectory early.
        # Never to an earlier stage: in short rows, targets rounded down would keep a row at one stage.
        by_ratio = torch.maximum(stage, stage_of(n_maskable - n_masked, n_maskable, n_stages))
        stage = torch.where(collapsed.any(1), by_ratio, stage)
    return masked, stage, finished


def count_pool_rows(uniform_fraction: float, n_rows: int, rank: int, n_ranks: int) -> int:
    """Number of a rank's `n_rows` rows that are in the pool; the sum does not depend on the number of ranks.

    Raises:
        ValueError: the pool has fewer rows than there are ranks.
    """
    batch_size, n_uniform = n_rows * n_ranks, 0
    if uniform_fraction:  # at least one uniform row and one pool row, whatever the rounding
        n_uniform = max(1, min(round(uniform_fraction * batch_size), batch_size - 1))
    n_pool = batch_size - n_uniform
    if n_pool < n_ranks:
        raise ValueError(
            f"objective.uniform_fraction {uniform_fraction} of {batch_size} rows leaves {n_pool} rows for the pool, "
            f"fewer than the {n_ranks} processes: lower it, raise training.batch_size or start fewer processes"
        )
    rows = rank_slice(n_pool, rank, n_ranks)
    return rows.stop - rows.start


@dataclass
class Rows:
    """Rows in flight."""

    x0: Tensor  # int64 [n, L], the clean sequences
    maskable: Tensor  # bool [n, L], False on prompts
    masked: Tensor  # bool [n, L]
    stage: Tensor  # int64 [n, L / S]; K if the segment has finished
    age: Tensor  # int64 [n], number of updates that have trained the row

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, index: Tensor) -> Rows:
        """Copies of the rows at `index` (int64 [n])."""
        return Rows(**{name: own[index] for name, own in self.tensors().items()})

    def put(self, index: Tensor, rows: Rows) -> None:
        """Overwrite the rows at `index` in place, since a CUDA graph uses the same memory at every step."""
        for name, own in self.tensors().items():
            own.index_copy_(0, index, getattr(rows, name))

    def replace(self, which: Tensor, others: Rows) -> Rows:
        """These rows, but `others` where `which` (bool [n]) is True."""
        return Rows(
            **{
                name: torch.where(which.view(-1, *[1] * (own.ndim - 1)), getattr(others, name), own)
                for name, own in self.tensors().items()
            }
        )


class PumaPool:
    """The rows in flight on one rank: M batches of B rows; updates train and advance one batch each, in turn.

    In the paper the pool is one batch (M = 1): each sequence is trained in K consecutive updates. A larger pool has the
    same forward passes and share of fresh rows per update, but spreads the K visits of a sequence over K * M updates,
    so that neighbouring updates share no sequences.

    Attributes:
        rows: the M * B rows, batch after batch; each has at least one masked position.
        turn: int64 scalar, the batch (of M) that the next update trains.
        n_finished, n_finished_steps: int64 scalars, number of retired sequences and sum of their trajectory lengths.
    """

    def __init__(
        self,
        settings: ProgressiveSettings,
        queue: RowQueue,
        layout: BlockLayout,
        *,
        n_rows: int,
        generator: torch.Generator,
    ) -> None:
        """Fill the batches from `queue`, each with `n_rows` rows.

        Args:
            settings: K at step 0 (later `set_n_stages`), the threshold, the order if it is `redrawn`, and M.
            layout: its blocks are the segments.
            n_rows: B.
        """
        self.settings, self.queue, self.layout, self.n_rows, self.generator = settings, queue, layout, n_rows, generator
        self.n_stages, self.n_batches = settings.n_stages_at(0), settings.pool_batches
        device = generator.device
        batches = []
        for _ in range(self.n_batches):
            batches.append(queue.take_next(n_rows))
            queue.top_up()  # the queue prefetches rows for one batch
        x0, maskable = (torch.cat(parts) for parts in zip(*batches, strict=True))
        n = self.n_batches * n_rows
        spread = torch.arange(n, device=device) * self.n_stages // n
        stage = spread[torch.randperm(n, generator=generator, device=device)]
        # One stage for all segments of a row. A row stays until its last segment has finished: with a stage for each
        # segment almost all rows would finish, and begin again, in the same updates, for good.
        stage = stage[:, None].repeat(1, layout.n_blocks)
        self.rows = self._enter(x0, maskable, stage)
        self.turn, self.n_finished, self.n_finished_steps = (
            torch.zeros((), dtype=torch.long, device=device) for _ in range(3)
        )

    def set_n_stages(self, n_stages: int) -> None:
        """Change K. Rows in flight stay; their stages are recomputed from their revealed ratios."""
        if n_stages == self.n_stages:
            return
        self.n_stages = n_stages
        n_maskable, n_masked = (self.layout.segments(each).sum(1) for each in (self.rows.maskable, self.rows.masked))
        stage = torch.where(n_masked > 0, stage_of(n_maskable - n_masked, n_maskable, n_stages), n_stages)
        self.rows.stage.copy_(stage.view_as(self.rows.stage))

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The batch that the next update trains: x0 int64 [B, L], maskable and masked bool [B, L], copies."""
        index = self._batch_index()
        return self.rows.x0[index], self.rows.maskable[index], self.rows.masked[index]

    def advance(self, confidence: Tensor | None, max_log_prob: Tensor) -> None:
        """Reveal positions of `batch()` and replace finished rows by fresh ones. Then the next batch has its turn.

        Args:
            confidence, max_log_prob: float32 [B, L]; see `reveal_next_stage`.
        """
        index = self._batch_index()
        batch = self.rows.take(index)
        batch.age += 1
        batch.masked, batch.stage = self._reveal(batch, confidence, max_log_prob)
        retired = (batch.stage == self.n_stages).all(1)  # [B]
        self.n_finished += retired.sum()
        self.n_finished_steps += (batch.age * retired).sum()
        fresh = self._enter(*self.queue.take(retired), torch.zeros_like(batch.stage))
        self.rows.put(index, batch.replace(retired, fresh))
        self.turn.add_(1).remainder_(self.n_batches)

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the pool; the stage histogram ([K]) has shares of the segments in flight."""
        counts = self.rows.stage.flatten().bincount(minlength=self.n_stages)[: self.n_stages]
        return {
            "n_stages": torch.tensor(self.n_stages),
            "stage_histogram": counts / counts.sum(),
            "sequences_finished": self.n_finished,
            "sequences_finished_steps": self.n_finished_steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """State for a restart, without the generator and the queue."""
        rows = self.rows.tensors() | {"stage": self.rows.stage.flatten()}
        return rows | {
            "n_stages": self.n_stages,
            "n_batches": self.n_batches,
            "turn": int(self.turn),
            "n_finished": self.n_finished,
            "n_finished_steps": self.n_finished_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for key, own in self.state_dict().items():
            if isinstance(own, Tensor) and (state[key].shape, state[key].dtype) != (own.shape, own.dtype):
                raise ValueError(f"the pool's {key} is {state[key].dtype} {list(state[key].shape)}")
        self.n_stages = state["n_stages"]
        self.turn.fill_(state["turn"])
        for name, own in self.rows.tensors().items():
            own.copy_(state[name].view_as(own))
        self.n_finished.copy_(state["n_finished"])
        self.n_finished_steps.copy_(state["n_finished_steps"])

    def _batch_index(self) -> Tensor:
        """Indices of the rows of the current batch, int64 [B]; on the device, so that a CUDA graph can capture it."""
        return self.turn * self.n_rows + torch.arange(self.n_rows, device=self.turn.device)

    def _reveal(self, rows: Rows, confidence: Tensor | None, max_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (bool [n, L]) and stages (int64 [n, L / S]) of rows one stage later; finished segments: no masks."""
        segments = self.layout.segments
        masked, stage, finished = reveal_next_stage(
            segments(rows.masked),
            rows.stage.flatten(),
            segments(rows.maskable),
            None if confidence is None else segments(confidence),
            segments(max_log_prob),
            n_stages=self.n_stages,
            collapse_threshold=self.settings.collapse_threshold,
            generator=self.generator,
            redraw=self.settings.reveal_order == "redrawn",
        )
        masked, stage = masked & ~finished[:, None], stage.masked_fill(finished, self.n_stages)
        return masked.view_as(rows.masked), stage.view_as(rows.stage)

    def _enter(self, x0: Tensor, maskable: Tensor, stage: Tensor) -> Rows:
        """Rows of sequences (`maskable`, bool [n, L]) that enter at `stage` (int64 [n, L / S]).

        Random positions are revealed up to the stage's target. Segments without maskable positions have finished.
        """
        segments = self.layout.segments(maskable)  # [N, S]
        n_maskable = segments.sum(1)
        target = draw_target(stage.flatten(), self.n_stages, n_maskable, self.generator)
        masked = segments & ~reveal_random(segments, target, self.generator)
        stage = torch.where(n_maskable.view_as(stage) > 0, stage, self.n_stages)
        return Rows(x0, maskable, masked.view_as(maskable), stage, age=torch.zeros_like(stage[:, 0]))


class PumaObjective(MaskedObjective):
    """The PUMA pool and, with `uniform_fraction`, a share of uniformly masked rows."""

    settings: ProgressiveSettings

    def __init__(
        self,
        settings: ProgressiveSettings,
        queue: RowQueue,
        layout: BlockLayout,
        *,
        n_rows: int,
        micro_rows: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(settings, queue, layout, n_rows=n_rows, micro_rows=micro_rows, generator=generator)
        self.n_pool_rows = count_pool_rows(settings.uniform_fraction, n_rows, queue.stream.rank, queue.stream.n_ranks)
        self.pool = PumaPool(settings, queue, layout, n_rows=self.n_pool_rows, generator=generator)
        match settings.reveal_order:
            case "random" | "redrawn":
                self.by_confidence = False
            case order:
                self.by_confidence, self.confidence = True, order
        self._confidence = torch.empty(n_rows, layout.length, device=generator.device)
        # One tensor for both where they are equal, so that an update copies it once.
        self._max_log_prob = self._confidence if self.confidence == "top_prob" else torch.empty_like(self._confidence)

    @override
    def draw_masks(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.pool.set_n_stages(self.settings.n_stages_at(step))
        n_uniform = self.n_rows - self.n_pool_rows
        if not n_uniform:
            return self.pool.batch()
        x0, maskable = self.queue.take_next(n_uniform)
        fresh = x0, maskable, self.layout.mask_uniformly(maskable, self.generator)
        x0, maskable, masked = (torch.cat(parts) for parts in zip(self.pool.batch(), fresh, strict=True))  # [B, L]
        return x0, maskable, masked

    @override
    def observe(self, microbatch: Microbatch, scores: TokenScores) -> None:
        rows, columns = microbatch.rows, microbatch.columns
        self._confidence[rows, columns] = scores.confidence[:, columns]
        if self._max_log_prob is not self._confidence:
            self._max_log_prob[rows, columns] = scores.max_log_prob[:, columns]

    @override
    def end_step(self) -> None:
        confidence = self._confidence[: self.n_pool_rows] if self.by_confidence else None
        self.pool.advance(confidence, self._max_log_prob[: self.n_pool_rows])

    @override
    def metrics(self) -> dict[str, Tensor]:
        return self.pool.metrics() | super().metrics()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pool": self.pool.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pool.load_state_dict(state["pool"])
