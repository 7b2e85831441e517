"""The objectives that PUMA is compared with: uniformly drawn masks, and autoregression.

The autoregressive objective masks nothing (xt = x0): the model is causal and shifted, so the scores at a position are
for the next token. A diffusion model can be initialised from it.

Shapes: B rows of this rank, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from config import BlockUniformSettings, UniformSettings
from data.row_queue import RowQueue
from objective import Objective
from progressive_block import MaskedObjective
from runtime.distributed import sum_over_ranks


class UniformObjective(MaskedObjective):
    """The baseline: fresh sequences in every update, masks drawn uniformly in each block."""

    settings: UniformSettings | BlockUniformSettings

    @override
    def draw_masks(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x0, maskable = self.queue.take_next(self.n_rows)
        masked = self.layout.mask_uniformly(maskable, self.generator, low_discrepancy=self.settings.low_discrepancy)
        return x0, maskable, masked


class AutoregressiveObjective(Objective):
    """Fresh sequences in every update; predict each token from the tokens before it, up to the first EOS.

    The loss is the mean over all targets of the batch, with equal weights. This needs one all-reduce per update, of the
    number of targets.
    """

    def __init__(self, queue: RowQueue, *, n_rows: int, micro_rows: int) -> None:
        super().__init__(queue, n_rows=n_rows, micro_rows=micro_rows)
        self.target_fraction = torch.zeros((), device=queue.device)

    @override
    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x0, maskable = self.queue.take_next(self.n_rows)
        target = next_token_targets(x0, maskable, self.queue.stream.data.eos_id)
        self.target_fraction.copy_((target.sum(1) / maskable.sum(1)).mean())  # in place, for CUDA graphs
        # Gradients are averaged over ranks, not summed, so the weights are multiplied by n_ranks.
        return x0, x0, target_weights(target, sum_over_ranks(target.sum())) * self.queue.stream.n_ranks

    @override
    def metrics(self) -> dict[str, Tensor]:
        return {"target_fraction": self.target_fraction} | super().metrics()


def next_token_targets(x0: Tensor, maskable: Tensor, eos_id: int | None) -> Tensor:
    """The targets of an autoregressive model: all tokens outside the prompt, up to and including the first EOS.

    Position 0 is not a target, since there is no token before it.

    Args:
        x0: int64 [B, L].
        maskable: bool [B, L].
        eos_id: None if sequences have no end token.

    Returns:
        bool [B, L].
    """
    target = maskable.clone()
    target[:, 0] = False
    return up_to_first_eos(x0, target, eos_id)


def up_to_first_eos(x0: Tensor, maskable: Tensor, eos_id: int | None) -> Tensor:
    """The maskable positions up to and including the first EOS among them, bool [B, L]; arguments as above."""
    if eos_id is None:
        return maskable
    ends = maskable & (x0 == eos_id)
    return maskable & (ends.cumsum(1) - ends.long() == 0)  # no EOS before


def target_weights(target: Tensor, n_targets: Tensor) -> Tensor:
    """Loss weights (float32 [B, L]) for a mean over `n_targets` (scalar); `target` (bool [B, L]) may mark only some."""
    return target / n_targets.clamp(min=1).float()
