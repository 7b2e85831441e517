"""What all samplers share: their result, their random numbers, and one step that fills the best masked positions.

Shapes: B rows, L positions, N masked positions of all rows together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Confidence, SamplingRule
from model.token_predictions import TokenPredictions, hash_uniform, mix_keys
from unmasking import reveal_top


@dataclass(frozen=True)
class Samples:
    """What a sampler returns."""

    tokens: Tensor  # int64 [B, L], nothing masked
    order: Tensor  # int64 [B, L], the step (from 1) at which a position was filled; 0 where it was given
    nfe: Tensor  # int64 [B], forward passes that the row took part in


def row_keys(xt: Tensor, seed: int, row_ids: Tensor | None) -> Tensor:
    """One random key (int64 [B]) for each row of xt ([B, L]), from the seed and its id (by default 0..B-1) alone."""
    ids = torch.arange(len(xt), device=xt.device) if row_ids is None else row_ids.to(xt.device)
    return mix_keys(ids, seed)


def noise_keys(row_keys: Tensor, step: Tensor, positions: Tensor) -> Tensor:
    """Random keys int64 [B, L], different for each row (keys int64 [B]), step ([B]) and position (int64 [L])."""
    return mix_keys(mix_keys(row_keys, step)[:, None], positions)


def fill(tokens: Tensor, masked: Tensor, predicted: TokenPredictions, keys: Tensor, rule: SamplingRule) -> Tensor:
    """Fill the best `tokens_per_step` masked positions of each row, and all above `threshold`.

    Args:
        tokens: int64 [B, L], written to.
        masked: bool [B, L].
        predicted: of the N masked positions.
        keys: int64 [B, L], random; see `noise_keys`.

    Returns:
        bool [B, L], what was filled.
    """
    score = torch.full(tokens.shape, -torch.inf, device=tokens.device)
    score[masked] = _confidence(rule.confidence, predicted, keys[masked])
    n_fill = torch.full_like(tokens[:, 0], rule.tokens_per_step)
    filled = reveal_top(score, masked, n_fill)  # [B, L]
    if rule.threshold is not None:
        filled[masked] |= predicted.log_prob > math.log(rule.threshold)
    tokens[filled] = predicted.token[filled[masked]]
    return filled


def _confidence(name: Confidence, predicted: TokenPredictions, keys: Tensor) -> Tensor:
    """Confidence of each masked position, float32 [N]; a higher one is filled sooner."""
    if name == "top_prob":  # of the chosen token
        return predicted.log_prob
    if name == "top_prob_margin":  # its lead over the second most probable (Kim et al. 2025)
        return predicted.margin
    if name == "neg_entropy":
        return predicted.neg_entropy
    return hash_uniform(mix_keys(keys, -1)).float()  # random
