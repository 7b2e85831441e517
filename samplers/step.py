"""Shared by all samplers: the result, random numbers, and a step that fills the best masked positions.

Shapes: B rows, b rows in a pass, L positions, N masked positions in all rows of a pass, k candidates.
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
    # Recorded where asked for (`record=k`), else None; on the CPU.
    confidence: Tensor | None = None  # float32 [B, L], see `Pass`
    passes: list[Pass] | None = None  # in the order in which they were computed

    def history(self, row: int) -> list[Pass]:
        """The recorded passes of one row, in order; each holds this row alone. Entry i is pass i + 1 in `order`."""
        assert self.passes is not None
        return [each.only(row) for each in self.passes if row in each.rows]


@dataclass(frozen=True)
class Pass:
    """One forward pass, recorded to show how an answer came about; on the CPU."""

    rows: Tensor  # int64 [b], the rows of the batch that were in this pass
    tokens: Tensor  # int64 [b, L], after the pass, with the mask token where a position is (again) masked; the EOS
    # tokens that follow the first one of an answer without a prediction are in no pass, only in `Samples.tokens`
    # float32 [b, L]: probability that the model gave to the token now at a position, at the pass that wrote it; nan
    # where the model wrote nothing: given and masked positions, and EOS after the end.
    confidence: Tensor
    # The most probable tokens, best first, at the positions that this pass predicted; elsewhere -1 and probability 0.
    candidates: Tensor  # int64 [b, L, k]
    probabilities: Tensor  # float32 [b, L, k]

    def only(self, row: int) -> Pass:
        """The pass of one of its rows: b = 1."""
        mine = self.rows == row
        return Pass(
            *(part[mine] for part in (self.rows, self.tokens, self.confidence, self.candidates, self.probabilities))
        )


class Recorder:
    """Collects confidences and passes while the batch xt is sampled; does nothing where nothing is recorded.

    Args:
        record: k, the number of candidates to record; None: record nothing.
    """

    def __init__(self, xt: Tensor, mask_id: int, record: int | None) -> None:
        self.mask_id, self.n_candidates = mask_id, record or 0
        self.passes: list[Pass] | None = None if record is None else []
        self.confidence = None if record is None else torch.full(xt.shape, torch.nan)

    def add(
        self, rows: Tensor, tokens: Tensor, begin: int, masked: Tensor, written: Tensor, predicted: TokenPredictions
    ) -> None:
        """Record a pass over `width` positions from `begin` on.

        Args:
            rows: int64 [b].
            tokens: int64 [B, L], after the pass.
            masked: bool [b, width], the N positions that were predicted.
            written: bool [b, width], those of them that got the predicted token.
            predicted: at the N positions.
        """
        if self.passes is None or self.confidence is None:
            return
        rows, masked, written, now = rows.cpu(), masked.cpu(), written.cpu(), tokens[rows].cpu()
        span = slice(begin, begin + masked.shape[1])
        confidence = self.confidence[rows]  # [b, L]
        confidence[:, span][written] = predicted.log_prob.exp().cpu()[written[masked]]
        confidence[now == self.mask_id] = torch.nan
        self.confidence[rows] = confidence
        candidates = torch.full((*now.shape, predicted.candidates.shape[1]), -1)  # [b, L, k]
        probabilities = torch.zeros(candidates.shape)
        candidates[:, span][masked] = predicted.candidates.cpu()
        probabilities[:, span][masked] = predicted.candidate_log_probs.exp().cpu()
        self.passes.append(Pass(rows, now, confidence, candidates, probabilities))

    def samples(self, tokens: Tensor, order: Tensor, nfe: Tensor) -> Samples:
        """The result, with what was recorded."""
        return Samples(tokens, order, nfe, self.confidence, self.passes)


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
