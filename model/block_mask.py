"""Attention masks of block diffusion with `block_attention: block_causal`.

A block, noisy or clean, attends to itself and to earlier clean blocks. No other block attends to a noisy block, so one
pass over [noisy ; clean] gives each block the same result as a pass of its own after its clean prefix. In decoding, the
keys and values of a finished block never change.

Shapes: B rows, L positions, S block size, Q queries, K keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# FlexAttention's kernels need heads of at least this width.
MIN_FLEX_HEAD_WIDTH = 16
FLEX_TILE = 128  # queries or keys; a pass within one tile has nothing to skip, and takes another kernel


def noisy_and_clean(xt: Tensor, x0: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The input of a training pass: xt, then x0 without its last block, to which no noisy block attends.

    Args:
        xt, x0: int64 [B, L].

    Returns:
        tokens int64 [B, 2 L - S] and their positions int64 [2 L - S].
    """
    length = xt.shape[1]
    positions = torch.arange(length, device=xt.device)
    n_clean = length - block_size
    return torch.cat([xt, x0[:, :n_clean]], dim=1), torch.cat([positions, positions[:n_clean]])


def training_mask(length: int, block_size: int, device: torch.device, head_width: int) -> Tensor | BlockMask | None:
    """The mask of a pass over `noisy_and_clean`, Q = K = 2 L - S.

    Returns:
        None if a row is one block, which needs no mask. On a GPU a BlockMask for FlexAttention, which skips fully
        masked tiles; on a CPU, for heads too narrow for FlexAttention, and for rows of one tile, bool [Q, K].
    """
    if length == block_size:
        return None
    has_tiles = 2 * length - block_size > FLEX_TILE
    flex = device.type == "cuda" and head_width >= MIN_FLEX_HEAD_WIDTH and has_tiles
    return flex_mask(length, block_size, device) if flex else dense_mask(length, block_size, device)


@lru_cache(maxsize=8)
def dense_mask(length: int, block_size: int, device: torch.device) -> Tensor:
    """`training_mask` as bool [Q, K]."""
    index = torch.arange(2 * length - block_size, device=device)
    return _attends(index[:, None], index[None, :], length, block_size)


@lru_cache(maxsize=8)
def flex_mask(length: int, block_size: int, device: torch.device) -> BlockMask:
    """`training_mask` for FlexAttention."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _attends(query, key, length, block_size)

    n_tokens = 2 * length - block_size
    return create_block_mask(mask_mod, None, None, n_tokens, n_tokens, device=device)


def decoding_mask(n_past: int, n_keys: int, block_size: int, device: torch.device) -> Tensor | None:
    """The mask of a pass over positions n_past to n_keys of a row; earlier positions are cached.

    Each position attends to its own block and to earlier blocks.

    Returns:
        bool [Q, K], Q = n_keys - n_past and K = n_keys; None if all queries are in the last block.
    """
    if n_past // block_size == (n_keys - 1) // block_size:
        return None
    block = torch.arange(n_keys, device=device) // block_size  # [K]
    return block[n_past:, None] >= block


def _attends(query: Tensor, key: Tensor, length: int, block_size: int) -> Tensor:
    """Whether a query attends to a key, both given by index in [noisy ; clean] (int64, broadcast); bool."""
    noisy_query, noisy_key = query < length, key < length
    query_block, key_block = query % length // block_size, key % length // block_size
    own = (noisy_query == noisy_key) & (query_block == key_block)
    return own | (~noisy_key & (key_block < query_block))
