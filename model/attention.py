"""Grouped-query attention with rotary positions, and the key-value cache for decoding.

Shapes: B rows, L positions, D width, H query heads, G key and value heads, E head width, K keys, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from config import ModelSettings


@dataclass
class KeyValueCache:
    """Keys and values of earlier positions.

    A forward pass writes its own keys and values after the first `length` positions and attends to both. The caller
    increases `length` once the tokens are final; until then the next pass overwrites them.
    """

    keys: Tensor  # [N, B, G, L, E]
    values: Tensor  # [N, B, G, L, E]
    length: int = 0

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (int64 [b])."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def rotary_tables(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding at `positions` (int64 [L]), float32 [L, E].

    Both halves of E are equal.
    """
    steps = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-steps / head_width)
    angles = positions.float()[:, None] * frequencies  # [L, E / 2]
    angles = torch.cat([angles, angles], dim=1)  # [L, E]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, H, L, E]; position i and i + E/2 of a head are one pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, causal: bool = False) -> Tensor:
    """Softmax attention of q [B, H, L, E] over k and v [B, G, K, E]; [B, H, L, E].

    Args:
        mask: bool [L, K], True where a query attends to a key, or a BlockMask, for which FlexAttention is used.
        causal: without a mask, a query does not attend to later keys.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        # Uncompiled FlexAttention computes all scores, so outside of a compiled graph it is compiled separately.
        alone = q.device.type == "cuda" and not torch.compiler.is_compiling()
        flex = _compiled_flex() if alone else cast(Callable[..., Tensor], flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=grouped)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)  # compiled at its first call, once per shape


def project(x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear maps with biases of x [..., D]; [..., each width].

    Compiled code computes them by one matrix product, whose matrix is put together where it is cast to the dtype of
    autocast anyway; eager code would copy the matrices for that.
    """
    if not torch.compiler.is_compiling():
        return tuple(projection(x) for projection in projections)
    weight, bias = (torch.cat([getattr(each, name) for each in projections]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([len(projection.weight) for projection in projections], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, settings: ModelSettings, causal: bool) -> None:
        super().__init__()
        width, n_heads, n_key_heads = settings.hidden_size, settings.num_attention_heads, settings.n_key_value_heads
        self.head_width, self.causal = width // n_heads, causal
        self.q_proj = nn.Linear(width, n_heads * self.head_width)
        self.k_proj = nn.Linear(width, n_key_heads * self.head_width)
        self.v_proj = nn.Linear(width, n_key_heads * self.head_width)
        self.o_proj = nn.Linear(n_heads * self.head_width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of x [B, L, D]; [B, L, D].

        Args:
            cos, sin: [L, E].
            mask: as in `attend`; None: attend to all positions, or up to the query's own if causal.
            past: buffers for keys and values [B, G, K, E]; this pass writes their last L positions.
        """
        split = (*x.shape[:2], -1, self.head_width)
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.view(split).transpose(1, 2) for each in projected)
        # On a CPU the backward pass of attention is several times slower in bfloat16 than in float32.
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        q, k, v = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v.to(dtype)  # [B, H or G, L, E]
        if past is not None:
            for own, buffer in zip((k, v), past, strict=True):
                buffer[:, :, -x.shape[1] :] = own
            k, v = past  # [B, G, K, E]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(q, k, v, mask, self.causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))
