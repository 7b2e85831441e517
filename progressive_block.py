"""Block diffusion: a row is cut into blocks, and each is filled in behind the clean tokens before it.

A block is a segment of a row, and what the objectives do to rows they do to segments: the baseline draws masks for
each segment, the PUMA pool advances each by its own stage, and the loss counts every block that has masked positions
alike. So `block_uniform` and `block_puma` are `uniform` and `puma` over another `BlockLayout`, and ordinary rows
have one block, with the same losses, pool and random numbers bit for bit.

Two layouts say what a block sees (arXiv 2602.10314 trains with the first):

- `prefix`: itself and the clean tokens before it, all of them bidirectionally. What the prefix's hidden states are
  depends on the block, so each block takes a forward pass, over the row up to the block's end.
- `block_causal`: itself and the clean blocks before it, which see no later block. One pass over noisy and clean copies
  trains all blocks (`model/block_mask.py`), and decoding caches keys and values of finished blocks.

Shapes: B rows, L positions, S block size, N = B * L / S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import BlockAttention, BlockSettings, ObjectiveSettings
from objective import Microbatch, split_rows
from runtime.distributed import mean_over_ranks
from unmasking import mask_uniformly, row_weights


@dataclass(frozen=True)
class BlockLayout:
    """How rows are divided into blocks, and in which passes the blocks are trained."""

    length: int  # L
    size: int  # S, divides L
    attention: BlockAttention

    @property
    def n_blocks(self) -> int:
        """Blocks per row."""
        return self.length // self.size

    def segments(self, rows: Tensor) -> Tensor:
        """[B, L] as [N, S]: the blocks of the first row, of the second, and so on."""
        return rows.reshape(-1, self.size)

    def mask_uniformly(self, maskable: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the baseline's masks in each block on its own; both bool [B, L]. See `unmasking.mask_uniformly`."""
        return mask_uniformly(self.segments(maskable), generator).view_as(maskable)

    def weights(self, masked: Tensor, *, over_ranks: bool = False) -> Tensor:
        """Loss weight of each position, float32 [B, L], given `masked`, bool [B, L].

        1 / (number masked in the block * number of blocks of this batch that have masked positions) where masked,
        else 0: the loss is the mean over those blocks of the mean over their masked positions, and the weights of a
        batch add up to 1. Blocks without masked positions (all prompt, or finished) count nowhere.

        Args:
            over_ranks: `masked` is this rank's share of a batch, and losses are averaged over ranks afterwards: divide
                by the mean number of blocks of all ranks, so that every block weighs the same wherever it is.
        """
        segments = self.segments(masked)
        n_counted = segments.any(1).sum()
        if over_ranks and self.n_blocks > 1:  # whole rows are as many on every rank
            n_counted = mean_over_ranks(n_counted)
        return row_weights(segments, n_counted).view_as(masked)

    def microbatches(self, xt: Tensor, x0: Tensor, weight: Tensor, n_rows: int) -> Iterator[Microbatch]:
        """The passes that train a batch, each over at most `n_rows` rows; as many and of the same shapes for any data.

        Args:
            xt: int64 [B, L], masked in all blocks at once.
            x0: int64 [B, L].
            weight: float32 [B, L].
        """
        if self.attention == "block_causal" or self.n_blocks == 1:
            yield from split_rows(xt, x0, weight, n_rows)
            return
        for start in range(0, self.length, self.size):
            block = slice(start, start + self.size)
            behind_prefix = torch.cat([x0[:, :start], xt[:, block]], dim=1)  # [B, start + S]
            own_weight = torch.cat([torch.zeros_like(weight[:, :start]), weight[:, block]], dim=1)
            yield from split_rows(behind_prefix, x0[:, : block.stop], own_weight, n_rows, block)


def block_layout(settings: ObjectiveSettings, length: int) -> BlockLayout:
    """The layout of an objective's rows of `length` tokens; one block per row where the objective has no blocks."""
    if not isinstance(settings, BlockSettings):
        return BlockLayout(length, length, "prefix")
    return BlockLayout(length, settings.block_size, settings.block_attention)
