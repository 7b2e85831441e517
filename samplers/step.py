"""Shared by all samplers: the result, random numbers, and a pass that fills positions by a rule.

Shapes: B rows, b rows in a pass, L positions, W positions that a pass may fill, N positions that it predicts in all
rows, D width, k candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Confidence, SamplingRule
from model.attention import KeyValueCache
from model.token_predictions import TokenPredictions, hash_uniform, mix_keys
from model.transformer import Transformer
from unmasking import reveal_bounded, reveal_top

# KLASS: so many passes in a row must have moved a position's distribution by less than the bound.
STABLE_PASSES = 2


@dataclass(frozen=True)
class Samples:
    """Result of a sampler."""

    tokens: Tensor  # int64 [B, L], without mask tokens
    order: Tensor  # int64 [B, L], pass at which a position was (last) filled, from 1; 0 for given positions
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


class Filling:
    """A batch while it is filled: tokens, order and passes so far, and what the rule remembers from pass to pass.

    Args:
        xt: int64 [B, L], `mask_id` at the positions to fill.
        seed, row_ids: see `row_keys`.
        record: k, the number of candidates to record; None: record nothing.
    """

    def __init__(
        self, xt: Tensor, mask_id: int, rule: SamplingRule, *, seed: int, row_ids: Tensor | None, record: int | None
    ) -> None:
        self.mask_id, self.rule = mask_id, rule
        self.tokens, self.maskable = xt.clone(), xt == mask_id  # [B, L]
        self.order = torch.zeros_like(xt)
        self.nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        self.n_candidates = record or 0
        self.keys = row_keys(xt, seed, row_ids)  # [B]
        self._passes: list[Pass] | None = None if record is None else []
        self._confidence = None if record is None else torch.full(xt.shape, torch.nan)
        # For rules that revise: log-probability of the written token, or the largest so far.
        self._kept_log_prob: Tensor | None = None
        if rule.revise is not None:
            self._kept_log_prob = torch.full(xt.shape, -torch.inf, device=xt.device)
        # For a rule with a KL bound: states of the last pass [B, L, D], and for how many passes each position has been
        # stable; -1 before its first pass.
        self._last_states: Tensor | None = None
        self._n_stable = torch.full_like(xt, -1) if rule.kl_bound is not None else None

    def unfinished(self, start: int, end: int) -> Tensor:
        """Rows (int64 [b]) that have masked positions in start..end-1."""
        return (self.tokens[:, start:end] == self.mask_id).any(1).nonzero()[:, 0]

    def make_pass(
        self,
        model: Transformer,
        rows: Tensor,
        begin: int,
        start: int,
        end: int,
        *,
        number: int,
        cache: KeyValueCache | None = None,
    ) -> None:
        """One forward pass of rows (int64 [b]) over positions begin..end-1, which fills some of start..end-1.

        Args:
            begin: 0, or with a cache the first position that is not in it.
            number: of the pass among those over these positions, from 1.
        """
        rule, span = self.rule, slice(start, end)
        self.nfe[rows] += 1
        tokens, maskable = self.tokens[rows, span], self.maskable[rows, span]  # [b, W]
        masked = tokens == self.mask_id
        wanted = maskable if rule.revise == "plan" else masked  # N positions
        inside = F.pad(wanted, (start - begin, 0))
        positions = torch.arange(start, end, device=tokens.device)
        noise = noise_keys(self.keys[rows], self.nfe[rows], positions)  # [b, W]
        last_states = None
        if rule.kl_bound is not None:
            if self._last_states is None:
                width = model.lm_head.weight.shape[1]
                self._last_states = torch.zeros(*self.tokens.shape, width, device=tokens.device)
            last_states = self._last_states[rows, span][wanted]  # [N, D]
        predicted = model.predict(
            self.tokens[rows, begin:end],
            inside,
            self.mask_id,
            temperature=rule.temperature,
            noise_key=noise[wanted],
            n_candidates=self.n_candidates,
            current=tokens[wanted] if rule.revise == "plan" else None,
            previous=last_states,
            cache=cache,
        )
        if rule.revise is None:
            written = choose(masked, predicted, noise, rule, self._stable(rows, span, masked, predicted))
            remasked = None
        else:
            written, remasked = self._revise(rows, span, masked, maskable, predicted, number)
            tokens[remasked] = self.mask_id
        tokens[written] = predicted.token[written[wanted]]
        self.tokens[rows, span] = tokens
        if remasked is not None:
            self.order[rows, span] *= ~remasked
        self.order[rows, span] += written * self.nfe[rows, None]
        self.record(rows, start, wanted, written, predicted)

    def _stable(self, rows: Tensor, span: slice, masked: Tensor, predicted: TokenPredictions) -> Tensor | None:
        """Which of the N masked positions have come to rest (bool [N]); None if the rule does not ask."""
        if self._n_stable is None:
            return None
        assert self._last_states is not None
        assert predicted.hidden is not None
        assert predicted.kl is not None
        assert self.rule.kl_bound is not None
        before = self._n_stable[rows, span]  # [b, W]
        small = torch.zeros_like(masked)
        small[masked] = predicted.kl < self.rule.kl_bound
        n_stable = torch.where((before >= 0) & small, before + 1, 0)
        self._n_stable[rows, span] = torch.where(masked, n_stable, before)
        states = self._last_states[rows, span]
        states[masked] = predicted.hidden.to(states.dtype)
        self._last_states[rows, span] = states
        return n_stable[masked] >= STABLE_PASSES

    def _revise(
        self, rows: Tensor, span: slice, masked: Tensor, maskable: Tensor, predicted: TokenPredictions, number: int
    ) -> tuple[Tensor, Tensor]:
        """Positions to write the predictions at and positions to mask again, both bool [b, W]; see `SamplingRule`."""
        rule = self.rule
        assert self._kept_log_prob is not None
        assert rule.n_passes is not None
        n_maskable = maskable.sum(1)  # [b]
        target = -(-number * n_maskable // rule.n_passes)  # [b], rounded up
        kept_log_prob = self._kept_log_prob[rows, span]  # [b, W]
        if rule.revise == "plan":
            assert predicted.current_log_prob is not None
            score = kept_log_prob
            score[maskable] = torch.where(masked[maskable], predicted.log_prob, predicted.current_log_prob)
        elif rule.revise == "running_confidence":
            score = kept_log_prob
            score[masked] = torch.maximum(score[masked], predicted.log_prob)
        else:
            score = kept_log_prob.clone()
            score[masked] = predicted.log_prob
            n_filled = n_maskable - masked.sum(1)
            share = (rule.remask_share * n_filled.double()).ceil().long()
            n_remask = torch.minimum(share, n_maskable - target)  # [b]
            remasked = reveal_top(-score, maskable & ~masked, n_remask)
            written = reveal_top(score, masked, target - n_filled + n_remask)
            self._kept_log_prob[rows, span] = torch.where(written, score, kept_log_prob)
            return written, remasked
        self._kept_log_prob[rows, span] = score
        kept = reveal_top(score, maskable, target)
        return kept & masked, ~kept & maskable & ~masked

    def record(self, rows: Tensor, start: int, wanted: Tensor, written: Tensor, predicted: TokenPredictions) -> None:
        """Record a pass over W positions from `start` on, if passes are recorded.

        Args:
            rows: int64 [b].
            wanted: bool [b, W], the N positions that were predicted.
            written: bool [b, W], those of them that got the predicted token.
            predicted: at the N positions.
        """
        if self._passes is None or self._confidence is None:
            return
        rows, wanted, written, now = rows.cpu(), wanted.cpu(), written.cpu(), self.tokens[rows].cpu()
        span = slice(start, start + wanted.shape[1])
        confidence = self._confidence[rows]  # [b, L]
        confidence[:, span][written] = predicted.log_prob.exp().cpu()[written[wanted]]
        confidence[now == self.mask_id] = torch.nan
        self._confidence[rows] = confidence
        n_candidates = 0 if predicted.candidates is None else predicted.candidates.shape[1]
        candidates = torch.full((*now.shape, n_candidates), -1)  # [b, L, k]
        probabilities = torch.zeros(candidates.shape)
        if predicted.candidates is not None and predicted.candidate_log_probs is not None:
            candidates[:, span][wanted] = predicted.candidates.cpu()
            probabilities[:, span][wanted] = predicted.candidate_log_probs.exp().cpu()
        self._passes.append(Pass(rows, now, confidence, candidates, probabilities))

    def samples(self) -> Samples:
        """The result, with what was recorded."""
        return Samples(self.tokens, self.order, self.nfe, self._confidence, self._passes)


def nothing() -> None:
    """What samplers do before a forward pass by default."""


def row_keys(xt: Tensor, seed: int, row_ids: Tensor | None) -> Tensor:
    """A random key (int64 [B]) for each row of xt ([B, L]), from the seed and the row's id (by default 0..B-1)."""
    ids = torch.arange(len(xt), device=xt.device) if row_ids is None else row_ids.to(xt.device)
    return mix_keys(ids, seed)


def noise_keys(row_keys: Tensor, step: Tensor, positions: Tensor) -> Tensor:
    """Random keys (int64 [B, L]) from the keys and steps of the rows (int64 [B] each) and `positions` (int64 [L])."""
    return mix_keys(mix_keys(row_keys, step)[:, None], positions)


def choose(
    masked: Tensor, predicted: TokenPredictions, keys: Tensor, rule: SamplingRule, stable: Tensor | None = None
) -> Tensor:
    """Which masked positions to fill in a pass by a rule that does not revise.

    Which token a position gets is decided in `model.token_predictions.predict_tokens`.

    Args:
        masked: bool [b, W].
        predicted: predictions at the N masked positions.
        keys: int64 [b, W], random; see `noise_keys`.
        stable: bool [N], masked positions that may be filled for being above the threshold; None: all.

    Returns:
        bool [b, W].
    """
    score = torch.full(masked.shape, -torch.inf, device=masked.device)
    score[masked] = _confidence(rule.confidence, predicted, keys[masked])
    if rule.entropy_bound is not None:
        entropy = torch.zeros_like(score)
        entropy[masked] = -predicted.neg_entropy
        return reveal_bounded(score, entropy, masked, rule.entropy_bound)
    n_fill = torch.full((len(masked),), rule.tokens_per_step, device=masked.device)
    filled = reveal_top(score, masked, n_fill)  # [b, W]
    if rule.threshold is not None:
        sure = predicted.log_prob > math.log(rule.threshold)
        filled[masked] |= sure if stable is None else sure & stable
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
