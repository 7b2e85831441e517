"""The PUMA pool: sequences revealed in the order of the model's own confidence (arXiv 2602.10314, section 3).

Each row of the pool is one sequence on its way from nearly all masked (stage 0) to nearly all revealed (stage K - 1).
Training reads the pool as a batch; the forward pass that gives the loss also gives the confidences that choose what
each row reveals next, so the pool costs no extra pass. The true tokens are filled in, whatever the model predicted.

Shapes: B rows of the pool, L positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data.stream import SequenceStream
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
    return torch.minimum(target, n_maskable - 1)


def stage_of(n_revealed: Tensor, n_maskable: Tensor, n_stages: int) -> Tensor:
    """The stage whose interval holds the revealed ratio; int64 [B], at most K - 1. Exact, since all is in integers."""
    return (n_revealed * n_stages // n_maskable).clamp(max=n_stages - 1)


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


class PumaPool:
    """The rows in flight on one rank.

    Attributes:
        x0: int64 [B, L], the clean sequences.
        maskable: bool [B, L], False on prompts.
        masked: bool [B, L], True where hidden; at least one in each row, always.
        stage: int64 [B].
        age: int64 [B], steps that each row has served so far.
        n_finished, n_finished_steps: int64 scalars, sequences retired and the sum of their trajectory lengths.
    """

    def __init__(
        self,
        stream: SequenceStream,
        n_rows: int,
        n_stages: int,
        collapse_threshold: float | None,
        generator: torch.Generator,
    ) -> None:
        self.stream, self.generator = stream, generator
        self.n_stages, self.collapse_threshold = n_stages, collapse_threshold
        device = generator.device
        x0, prompt_mask = stream.draw(n_rows)
        self.x0, self.maskable = x0.to(device), ~prompt_mask.to(device)
        spread = torch.arange(n_rows, device=device) * n_stages // n_rows
        self.stage = spread[torch.randperm(n_rows, generator=generator, device=device)]
        self.masked = self._reveal_to_stage(self.maskable, self.stage)
        self.age = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.n_finished = torch.zeros((), dtype=torch.long, device=device)
        self.n_finished_steps = torch.zeros((), dtype=torch.long, device=device)

    def set_n_stages(self, n_stages: int) -> None:
        """Change K. Rows in flight stay, each at the stage that its revealed ratio has under the new K."""
        if n_stages != self.n_stages:
            self.n_stages = n_stages
            n_maskable = self.maskable.sum(1)
            self.stage = stage_of(n_maskable - self.masked.sum(1), n_maskable, n_stages)

    def advance(self, confidence: Tensor) -> None:
        """Reveal by confidence (float32 [B, L]), retire finished rows, admit fresh sequences in their place."""
        self.masked, self.stage, finished = advance(
            self.masked,
            self.stage,
            self.maskable,
            confidence,
            n_stages=self.n_stages,
            collapse_threshold=self.collapse_threshold,
            generator=self.generator,
        )
        self.age += 1
        self.n_finished += finished.sum()
        self.n_finished_steps += (self.age * finished).sum()
        self._admit(finished.nonzero().squeeze(1))

    def metrics(self) -> dict[str, Tensor]:
        """State of the pool for the records; the stage histogram [K] holds shares of rows."""
        return {
            "n_stages": torch.tensor(self.n_stages),
            "stage_histogram": self.stage.bincount(minlength=self.n_stages) / len(self.stage),
            "masked_fraction": (self.masked.sum(1) / self.maskable.sum(1)).mean(),
            "trajectory_length": self.n_finished_steps / self.n_finished,  # NaN until a sequence has finished
            "sequences_finished": self.n_finished,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs besides the generator and the stream."""
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

    def _admit(self, rows: Tensor) -> None:
        """Replace the rows with these indices (int64 [n]) by fresh sequences at stage 0."""
        x0, prompt_mask = self.stream.draw(len(rows))
        maskable = ~prompt_mask.to(rows.device)
        self.x0[rows] = x0.to(rows.device)
        self.maskable[rows] = maskable
        self.stage[rows] = 0
        self.masked[rows] = self._reveal_to_stage(maskable, torch.zeros_like(rows))
        self.age[rows] = 0

    def _reveal_to_stage(self, maskable: Tensor, stage: Tensor) -> Tensor:
        """Masks of rows that enter at `stage`: random positions revealed to its target; bool [n, L]."""
        target = draw_target(stage, self.n_stages, maskable.sum(1), self.generator)
        return maskable & ~reveal_random(maskable, target, self.generator)
