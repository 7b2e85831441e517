"""Block diffusion: a row is divided into blocks, and each is predicted from the clean tokens before it.

A block is a segment of a row, and objectives treat segments as they treat rows: the baseline draws masks for each
segment, the PUMA pool advances each by its own stage, and all blocks with masked positions have the same weight in the
loss. So `block_uniform` and `block_puma` are `uniform` and `puma` with another `BlockLayout`. Without block diffusion a
row is one block, with the same losses, pool and random numbers bit for bit. `MaskedObjective` is the base of all four.

There are two attention layouts (arXiv 2602.10314 trains with the first):

- `prefix`: a block sees itself and the clean tokens before it, all bidirectionally. The hidden states of the prefix
  depend on the block, so each block needs its own forward pass, over the row up to the end of the block.
- `block_causal`: a block sees itself and the clean blocks before it, which see no later block. One pass over noisy and
  clean copies trains all blocks (`model/block_mask.py`), and sampling caches keys and values of finished blocks.

Shapes: B rows, L positions, S block size, N = B * L / S segments.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from config import BlockAttention, BlockSettings, ObjectiveSettings
from data.row_queue import RowQueue
from objective import Microbatch, Objective, split_rows
from runtime.distributed import mean_over_ranks
from unmasking import mask_uniformly, row_weights


@dataclass(frozen=True)
class BlockLayout:
    """How rows are divided into blocks, and the forward passes that train them."""

    length: int  # L
    size: int  # S, divides L
    attention: BlockAttention

    @property
    def n_blocks(self) -> int:
        """Number of blocks per row."""
        return self.length // self.size

    def segments(self, rows: Tensor) -> Tensor:
        """Reshape [B, L] to [N, S]: the blocks of the first row, then of the second, and so on."""
        return rows.reshape(-1, self.size)

    def mask_uniformly(self, maskable: Tensor, generator: torch.Generator, *, low_discrepancy: bool = False) -> Tensor:
        """Draw the baseline's masks separately in each block; both bool [B, L]. See `unmasking.mask_uniformly`."""
        segments = self.segments(maskable)
        return mask_uniformly(segments, generator, low_discrepancy=low_discrepancy).view_as(maskable)

    def weights(self, masked: Tensor, *, over_ranks: bool = False) -> Tensor:
        """Loss weight of each position, float32 [B, L], given `masked`, bool [B, L].

        1 / (number masked in the block * number of blocks of this batch that have masked positions) where masked,
        else 0: the loss is the mean over those blocks of the mean over their masked positions, and the weights of a
        batch add up to 1. Blocks without masked positions (all prompt, or finished) do not count.

        Args:
            over_ranks: `masked` is this rank's part of a batch, and losses are averaged over ranks later: divide by
                the mean number of blocks over ranks, so that every block has the same weight on all ranks.
        """
        segments = self.segments(masked)
        n_counted = segments.any(1).sum()
        if over_ranks and self.n_blocks > 1:  # the number of rows is equal on all ranks
            n_counted = mean_over_ranks(n_counted)
        return row_weights(segments, n_counted).view_as(masked)

    def microbatches(self, xt: Tensor, x0: Tensor, weight: Tensor, n_rows: int) -> Iterator[Microbatch]:
        """The passes that train a batch, each over at most `n_rows` rows; number and shapes do not depend on the data.

        Args:
            xt: int64 [B, L], with masks in all blocks.
            x0: int64 [B, L].
            weight: float32 [B, L].
        """
        if self.attention == "block_causal" or self.n_blocks == 1:
            yield from split_rows(xt, x0, weight, n_rows)
            return
        for start in range(0, self.length, self.size):
            block = slice(start, start + self.size)
            block_xt = torch.cat([x0[:, :start], xt[:, block]], dim=1)  # [B, start + S]
            block_weight = torch.cat([torch.zeros_like(weight[:, :start]), weight[:, block]], dim=1)
            yield from split_rows(block_xt, x0[:, : block.stop], block_weight, n_rows, block)


def block_layout(settings: ObjectiveSettings, length: int) -> BlockLayout:
    """The layout of rows of `length` tokens; one block per row if the objective has no blocks."""
    if not isinstance(settings, BlockSettings):
        return BlockLayout(length, length, "prefix")
    return BlockLayout(length, settings.block_size, settings.block_attention)


class MaskedObjective(Objective):
    """Base of the objectives that mask rows: the mean loss over the blocks of `layout` that have masked positions.

    A subclass implements `draw_masks`, and overrides `weights` for another loss.

    Args:
        settings: of the objective.
        layout: the blocks of a row.
        queue, n_rows, micro_rows, generator: as in `Objective`; the masks are random.
    """

    generator: torch.Generator

    def __init__(
        self,
        settings: ObjectiveSettings,
        queue: RowQueue,
        layout: BlockLayout,
        *,
        n_rows: int,
        micro_rows: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(queue, n_rows=n_rows, micro_rows=micro_rows, generator=generator)
        self.settings, self.layout = settings, layout
        # Of the last batch. Changed in place, since a CUDA graph uses the same memory at every step.
        self.masked_fraction = torch.zeros((), device=generator.device)

    @abstractmethod
    def draw_masks(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of one update, x0 int64 [B, L], and which positions are maskable and masked, both bool [B, L]."""

    @override
    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x0, maskable, masked = self.draw_masks(step)
        self.masked_fraction.copy_((masked.sum(1) / maskable.sum(1)).mean())
        return x0.masked_fill(masked, self.queue.stream.data.mask_id), x0, self.weights(maskable, masked)

    def weights(self, maskable: Tensor, masked: Tensor) -> Tensor:
        """The loss weight of each position, float32 [B, L], from what `draw_masks` returns: `BlockLayout.weights`."""
        return self.layout.weights(masked, over_ranks=True)

    @override
    def microbatches(self, step: int) -> Iterator[Microbatch]:
        return self.layout.microbatches(*self.draw(step), self.micro_rows)

    @override
    def metrics(self) -> dict[str, Tensor]:
        return {"masked_fraction": self.masked_fraction} | super().metrics()
