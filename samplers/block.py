"""Fill masked tokens block by block, as in block diffusion training: a block sees the finished blocks before it.

Shapes: B rows, b unfinished rows in a pass, L positions, S block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from config import DEFAULT_RULE, SamplingRule
from model.attention import KeyValueCache
from model.transformer import Transformer
from samplers.step import Filling, Samples, no_op


@torch.no_grad()
def sample_blocks(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    rule: SamplingRule = DEFAULT_RULE,
    *,
    block_size: int,
    eos_id: int | None = None,
    cached: bool = True,
    seed: int = 0,
    row_ids: Tensor | None = None,
    before_pass: Callable[[], None] = no_op,
    record: int | None = None,
) -> Samples:
    """Fill all masked positions, one block after another; otherwise as `samplers.full.sample_full`.

    A pass covers the rows with masked positions in the block, from the first position that is not cached to the end of
    the block. The first pass of a block also computes the keys and values of the finished tokens before it, so caching
    needs no extra pass and does not change the number of passes of a row.

    Args:
        xt: int64 [B, L], `mask_id` at the positions to fill; prompts may be anywhere, but prompts after the current
            block are not visible.
        eos_id: a row stops after a block in which this token was filled in; its remaining masked positions become
            `eos_id`, at the row's last step. None: rows never stop early.
        cached: cache keys and values of finished blocks if the model is block-causal. Same tokens, fewer operations.

    Raises:
        ValueError: `block_size` does not divide L.
    """
    n_rows, length = xt.shape
    if length % block_size:
        raise ValueError(f"block_size {block_size} does not divide the {length} tokens of a sequence")
    filling = Filling(xt, mask_id, rule, seed=seed, row_ids=row_ids, record=record)
    tokens = filling.tokens
    finished = _FinishedBlocks(model, n_rows, length) if cached and model.block_size == block_size else None
    for start in range(0, length, block_size):
        end, number = start + block_size, 0
        active = filling.unfinished(start, end)  # [b], rows with masks in this block
        cache = finished.open(active, end) if finished is not None else None
        while len(active):
            before_pass()
            number += 1
            filling.make_pass(model, active, start, end, number=number, cache=cache)
            if finished is not None and cache is not None and cache.length < start:
                finished.close(active, cache, start)
            unfinished = (tokens[active, start:end] == mask_id).any(1)
            if cache is not None and not unfinished.all():
                cache.keep_rows(unfinished.nonzero()[:, 0])
            active = active[unfinished]
        if eos_id is not None:
            block = slice(start, end)
            stopped = ((tokens[:, block] == eos_id) & filling.maskable[:, block]).any(1)
            filling.end_rows(stopped, eos_id)
    return filling.samples()


class _FinishedBlocks:
    """Keys and values of the finished blocks of all rows; the number of computed positions may differ between rows."""

    def __init__(self, model: Transformer, n_rows: int, length: int) -> None:
        self.store = model.model.empty_cache(n_rows, length)
        self.n_computed = torch.zeros(n_rows, dtype=torch.long, device=self.store.keys.device)  # [B], positions

    def open(self, rows: Tensor, end: int) -> KeyValueCache:
        """A cache for passes over `rows` (int64 [b]) up to position `end`, with what is computed for all of them."""
        n_common = int(self.n_computed[rows].min()) if len(rows) else 0
        keys, values = (stored[:, rows, :, :end] for stored in (self.store.keys, self.store.values))
        return KeyValueCache(keys, values, n_common)

    def close(self, rows: Tensor, cache: KeyValueCache, start: int) -> None:
        """Store what a pass computed before position `start`, where tokens are final; the next passes start there."""
        fresh = slice(cache.length, start)
        for stored, computed in ((self.store.keys, cache.keys), (self.store.values, cache.values)):
            stored[:, rows, :, fresh] = computed[:, :, :, fresh]
        self.n_computed[rows] = cache.length = start
