"""Shared by all samplers: the result, random numbers, and a pass that fills positions by a rule.

Shapes: B rows, b rows in a pass, L positions, W positions that a pass may fill, N positions that it predicts in all
rows, D width, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import SamplingRule
from model.attention import KeyValueCache
from model.token_predictions import TokenPredictions, mix_keys, predict_tokens
from model.transformer import Transformer
from samplers.rules import RuleInput, choose, draws_numbers


@dataclass(frozen=True)
class Samples:
    """Result of a sampler."""

    tokens: Tensor  # int64 [B, L], without mask tokens
    order: Tensor  # int64 [B, L], pass at which a position was (last) filled, from 1; 0 for given positions
    nfe: Tensor  # int64 [B], forward passes of the row
    # float32 [B, L]: probability that the model gave to the token at a position, at the pass that wrote it, before any
    # temperature; nan where the model wrote nothing: given positions, and EOS after the end.
    confidence: Tensor
    # In the order in which they were computed, on the CPU; None unless asked for (`record=k`).
    passes: list[Pass] | None = None

    def history(self, row: int) -> list[Pass]:
        """The recorded passes of one row, in order; each holds this row alone. Entry i is pass i + 1 in `order`."""
        assert self.passes is not None
        return [each.only(row) for each in self.passes if row in each.rows]


@dataclass(frozen=True)
class Pass:
    """One forward pass, recorded to show how an answer came about; on the CPU."""

    rows: Tensor  # int64 [b], the rows of the batch that were in this pass
    # int64 [b, L], after the pass, with the mask token where a position is (again) masked. EOS tokens after the first
    # one of an answer are written without a prediction: they are in no pass, only in `Samples.tokens`.
    tokens: Tensor
    confidence: Tensor  # float32 [b, L], of `tokens` as in `Samples`; nan at masked positions too
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
        self.confidence = torch.full(xt.shape, torch.nan, device=xt.device)  # [B, L], see `Samples`
        self.nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
        self.n_candidates = record or 0
        self.keys = row_keys(xt, seed, row_ids)  # [B]
        self._passes: list[Pass] | None = None if record is None else []
        self._memory = torch.full(xt.shape, -torch.inf, device=xt.device)  # of the rule, see `samplers.rules.RuleInput`
        self._states: Tensor | None = None  # [B, L, D], of the last pass at each position, for a rule with a KL bound

    def unfinished(self, start: int, end: int) -> Tensor:
        """Rows (int64 [b]) that have masked positions in start..end-1."""
        return (self.tokens[:, start:end] == self.mask_id).any(1).nonzero()[:, 0]

    def end_rows(self, rows: Tensor, eos_id: int) -> None:
        """Fill the masked positions of rows (bool [B] or int64 [n]) with `eos_id`, at the last pass of each row."""
        rest = self.tokens[rows] == self.mask_id  # [n, L]
        self.tokens[rows] = self.tokens[rows].masked_fill(rest, eos_id)
        self.order[rows] += rest * self.nfe[rows, None]

    def make_pass(
        self,
        model: Transformer,
        rows: Tensor,
        start: int,
        end: int,
        *,
        number: int,
        cache: KeyValueCache | None = None,
    ) -> None:
        """One forward pass of rows (int64 [b]), which fills some of the positions start..end-1.

        Args:
            number: of the pass among those over these positions, from 1.
            cache: holds the first positions; the pass is over those from there to `end`.
        """
        rule, span, begin = self.rule, slice(start, end), cache.length if cache is not None else 0
        self.nfe[rows] += 1
        tokens, order, maskable = (each[rows, span] for each in (self.tokens, self.order, self.maskable))  # [b, W]
        masked = tokens == self.mask_id
        wanted = maskable if rule.revise == "plan" else masked  # N positions
        where = wanted.nonzero(as_tuple=True)  # row of b and column of W, int64 [N] each; all indexing uses it
        keys = None
        if draws_numbers(rule):
            columns = torch.arange(start, end, device=tokens.device)
            keys = noise_keys(self.keys[rows], self.nfe[rows], columns)  # [b, W]
        if rule.kl_bound is not None and self._states is None:
            self._states = torch.zeros(*self.tokens.shape, model.lm_head.weight.shape[1], device=tokens.device)
        states, positions = self._states, (rows[where[0]], start + where[1])
        hidden = model.hidden_states(self.tokens[rows, begin:end], cache)[F.pad(wanted, (start - begin, 0))]  # [N, D]
        predicted = predict_tokens(
            hidden,
            model.lm_head.weight,
            self.mask_id,
            temperature=rule.temperature,
            noise_key=keys[where] if keys is not None else None,
            n_candidates=self.n_candidates,
            current=tokens[where] if rule.revise == "plan" else None,
            previous=states[positions] if states is not None else None,  # [N, D]
        )
        if states is not None:
            states[positions] = hidden.to(states.dtype)
        predicted = scatter_predictions(predicted, where, masked.shape)  # [b, W]
        written, remasked, memory = choose(
            rule, RuleInput(masked, maskable, predicted, keys, memory=self._memory[rows, span], number=number)
        )
        tokens = torch.where(written, predicted.token, tokens)
        order = torch.where(written, self.nfe[rows, None], order)
        confidence = torch.where(written, predicted.log_prob.exp(), self.confidence[rows, span])
        if remasked is not None:
            tokens, order = tokens.masked_fill(remasked, self.mask_id), order.masked_fill(remasked, 0)
            confidence = confidence.masked_fill(remasked, torch.nan)
        self.tokens[rows, span], self.order[rows, span], self.confidence[rows, span] = tokens, order, confidence
        if memory is not None:
            self._memory[rows, span] = memory
        self.record(rows, start, predicted)

    def record(self, rows: Tensor, start: int, predicted: TokenPredictions) -> None:
        """Record a pass over W positions from `start` on, if passes are recorded.

        Args:
            rows: int64 [b].
            predicted: see `scatter_predictions`.
        """
        if self._passes is None:
            return
        now, confidence = self.tokens[rows].cpu(), self.confidence[rows].cpu()  # [b, L]
        span = slice(start, start + predicted.token.shape[1])
        n_candidates = 0 if predicted.candidates is None else predicted.candidates.shape[2]
        candidates = torch.full((*now.shape, n_candidates), -1)  # [b, L, k]
        probabilities = torch.zeros(candidates.shape)
        if predicted.candidates is not None and predicted.candidate_log_probs is not None:
            candidates[:, span] = predicted.candidates.cpu()
            probabilities[:, span] = predicted.candidate_log_probs.exp().cpu()
        self._passes.append(Pass(rows.cpu(), now, confidence, candidates, probabilities))

    def samples(self) -> Samples:
        """The result, with what was recorded."""
        return Samples(self.tokens, self.order, self.nfe, self.confidence, self._passes)


def no_op() -> None:
    """What samplers do before a forward pass by default."""


def row_keys(xt: Tensor, seed: int, row_ids: Tensor | None) -> Tensor:
    """A random key (int64 [B]) for each row of xt ([B, L]), from the seed and the row's id (by default 0..B-1)."""
    ids = torch.arange(len(xt), device=xt.device) if row_ids is None else row_ids.to(xt.device)
    return mix_keys(ids, seed)


def noise_keys(row_keys: Tensor, step: Tensor, positions: Tensor) -> Tensor:
    """Random keys (int64 [B, L]) from the keys and steps of the rows (int64 [B] each) and `positions` (int64 [L])."""
    return mix_keys(mix_keys(row_keys, step)[:, None], positions)


def scatter_predictions(
    predicted: TokenPredictions, where: tuple[Tensor, ...], shape: Sequence[int]
) -> TokenPredictions:
    """Predictions at N positions as tensors [b, W], and candidates [b, W, k]: -1 and -inf where nothing is predicted.

    Args:
        predicted: at N positions.
        where: the rows and columns of these positions, int64 [N] each, as `nonzero` gives them.
        shape: (b, W).
    """

    def scatter(values: Tensor) -> Tensor:
        empty = -torch.inf if values.is_floating_point() else -1
        return values.new_full((*shape, *values.shape[1:]), empty).index_put_(where, values)

    columns: list[Any] = [None if each is None else scatter(each) for each in predicted]
    return TokenPredictions(*columns)
