"""Shared by all samplers: the result, random numbers, and a step that fills the best masked positions.

Shapes: B rows, L positions, N masked positions in all rows.
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
    """Result of a sampler."""

    tokens: Tensor  # int64 [B, L], without mask tokens
    order: Tensor  # int64 [B, L], step at which a position was filled, from 1; 0 for given positions
    nfe: Tensor  # int64 [B], forward passes of the row


def nothing() -> None:
    """What samplers do before a forward pass by default."""


def row_keys(xt: Tensor, seed: int, row_ids: Tensor | None) -> Tensor:
    """A random key (int64 [B]) for each row of xt ([B, L]), from the seed and the row's id (by default 0..B-1)."""
    ids = torch.arange(len(xt), device=xt.device) if row_ids is None else row_ids.to(xt.device)
    return mix_keys(ids, seed)


def noise_keys(row_keys: Tensor, step: Tensor, positions: Tensor) -> Tensor:
    """Random keys (int64 [B, L]) from the keys and steps of the rows (int64 [B] each) and `positions` (int64 [L])."""
    return mix_keys(mix_keys(row_keys, step)[:, None], positions)


def fill(tokens: Tensor, masked: Tensor, predicted: TokenPredictions, keys: Tensor, rule: SamplingRule) -> Tensor:
    """Fill the best `tokens_per_step` masked positions of each row, and all above `threshold`.

    Which token a position gets is decided in `model.token_predictions.predict_tokens`.

    Args:
        tokens: int64 [B, L], updated in place.
        masked: bool [B, L].
        predicted: predictions at the N masked positions.
        keys: int64 [B, L], random; see `noise_keys`.

    Returns:
        bool [B, L], positions that were filled.
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
    """Confidence of each masked position, float32 [N]; higher is filled first."""
    if name == "top_prob":  # of the chosen token
        return predicted.log_prob
    if name == "top_prob_margin":  # difference to the second most probable token (Kim et al. 2025)
        return predicted.margin
    if name == "neg_entropy":
        return predicted.neg_entropy
    return hash_uniform(mix_keys(keys, -1)).float()  # random
