"""Which positions to reveal or mask: pure functions shared by training and sampling.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reveal_top(confidence: Tensor, candidates: Tensor, n_reveal: Tensor) -> Tensor:
    """Mark the `n_reveal` most confident candidates of each row.

    Args:
        confidence: float [B, L], higher is revealed first; ties: the earlier position first.
        candidates: bool [B, L], positions that may be revealed.
        n_reveal: int64 [B]; zero or less marks none, more than the number of candidates marks all.

    Returns:
        bool [B, L].
    """
    order = _by_confidence(confidence, candidates)  # [B, L]
    chosen_ranks = torch.arange(order.shape[1], device=order.device) < n_reveal.unsqueeze(1)  # [B, L], in order of rank
    return torch.zeros_like(candidates).scatter(1, order, chosen_ranks) & candidates


def reveal_bounded(confidence: Tensor, entropy: Tensor, candidates: Tensor, bound: float) -> Tensor:
    """Mark the longest run of most confident candidates whose total entropy less the largest is at most a bound.

    The error of filling positions independently of each other is at most this sum (Ben-Hamu et al., arXiv 2505.24857,
    EB-Sampler). One position has a sum of 0, so every row with a candidate gets at least one.

    Args:
        confidence: float [B, L], higher is revealed first; ties: the earlier position first.
        entropy: float [B, L], in nats.
        candidates: bool [B, L], positions that may be revealed.
        bound: gamma of the paper, in nats.

    Returns:
        bool [B, L].
    """
    order = _by_confidence(confidence, candidates)  # [B, L]
    # Rounding can make the entropy of a sure position negative.
    ranked = entropy.double().clamp(min=0).masked_fill(~candidates, 0).gather(1, order)  # [B, L]
    fits = ranked.cumsum(1) - ranked.cummax(1).values <= bound + 1e-9
    return torch.zeros_like(candidates).scatter(1, order, fits) & candidates


def _by_confidence(confidence: Tensor, candidates: Tensor) -> Tensor:
    """The positions of each row, int64 [B, L]: the candidates, most confident first, then all others."""
    # Clamped above -inf, so that a candidate of confidence -inf still comes before all other positions.
    finite = confidence.clamp(min=torch.finfo(confidence.dtype).min)
    return finite.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)


def reveal_random(candidates: Tensor, n_reveal: Tensor, generator: torch.Generator) -> Tensor:
    """Mark `n_reveal` (int64 [B]) random candidates (bool [B, L]) of each row, without replacement; bool [B, L]."""
    draw = torch.rand(candidates.shape, generator=generator, device=candidates.device)  # [B, L]
    return reveal_top(draw, candidates, n_reveal)


def mask_uniformly(maskable: Tensor, generator: torch.Generator, *, low_discrepancy: bool = False) -> Tensor:
    """Draw the baseline's masks: per row n uniform in 1..n_maskable, then n random maskable positions.

    Args:
        maskable: bool [B, L]; a row that is all False gets no masks.
        low_discrepancy: spread the n over the rows as evenly as possible, by one shift for all of them (Kingma et al.,
            arXiv 2107.00630, appendix I); the n of any one row is as uniform as without.

    Returns:
        bool [B, L], True where masked.
    """
    n_maskable = maskable.sum(1)  # [B]
    n_rows, device = len(maskable), maskable.device
    draw = torch.rand(n_rows, generator=generator, device=device, dtype=torch.float64)  # [B]
    if low_discrepancy:
        start = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
        # In random order, since neighbours may be the blocks of a row, which would have nearly the same share masked.
        draw = (start + draw.argsort().double() / n_rows) % 1  # [B]
    n_masked = 1 + (draw * n_maskable).floor().long()  # draw < 1, so at most n_maskable
    return reveal_random(maskable, n_masked, generator)


def row_weights(masked: Tensor, n_rows: int | Tensor) -> Tensor:
    """Loss weight of each position: 1 / (number masked in its row * n_rows) where masked, else 0.

    Args:
        masked: bool [B, L].
        n_rows: number of rows to average over, an int or int64 scalar; `masked` may hold only some of these rows.

    Returns:
        float32 [B, L].
    """
    n_masked = masked.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return masked / (n_masked.float() * n_rows)
