"""Sample tokens from left to right with a causal model, with cached keys and values.

Shapes: B rows, L positions, b unfinished rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import DEFAULT_RULE, SamplingRule
from model.token_predictions import TokenPredictions, mix_keys, predict_tokens
from model.transformer import Transformer
from samplers.step import Filling, Samples, no_op

# Finished rows are removed once they are this share of the batch: removing rows copies the whole cache.
REMOVED_SHARE = 1 / 8


@torch.no_grad()
def sample_causal(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    rule: SamplingRule = DEFAULT_RULE,
    *,
    eos_id: int | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    before_pass: Callable[[], None] = no_op,
    record: int | None = None,
) -> Samples:
    """Fill all masked positions, each from all tokens before it.

    All rows of the batch are at the same position. Given tokens are kept at any position, so prompts may differ in
    length. A row ends when EOS is sampled: its other masked positions become EOS at the same step. Rows are
    independent, as in `sample_full`; `nfe` of a row is the number of tokens sampled.

    Args:
        xt: int64 [B, L], `mask_id` at the positions to fill.
        eos_id: None: rows have no end token.
        rule: only its temperature may be set.
        seed, row_ids: random numbers depend only on these (row_ids: int64 [B], by default 0..B-1).
        before_pass, record: as in `sample_full`.

    Raises:
        ValueError: the rule sets another order than left to right, or the first position of a row is masked, so there
            is no token to predict it from.
    """
    rule.check(causal=True)
    if (xt[:, 0] == mask_id).any():
        row = int((xt[:, 0] == mask_id).nonzero()[0])
        raise ValueError(f"row {row} has no prompt: a causal model needs at least one given token at the start")
    filling = Filling(xt, mask_id, rule, seed=seed, row_ids=row_ids, record=record)
    tokens, order, nfe, keys = filling.tokens, filling.order, filling.nfe, filling.keys
    active = filling.unfinished(0, xt.shape[1])  # [b]
    cache = model.model.empty_cache(len(active), xt.shape[1])
    while len(active):
        before_pass()
        masked = tokens[active] == mask_id  # [b, L]
        position = int(masked.any(0).int().argmax())  # first masked position of any row
        hidden = model.model(tokens[active, cache.length : position], cache=cache)[:, -1]  # [b, D]
        cache.length = position
        is_masked = masked[:, position]
        sampled = active[is_masked]
        predicted = predict_tokens(
            hidden[is_masked],
            model.lm_head.weight,
            mask_id,
            temperature=rule.temperature,
            noise_key=mix_keys(keys[sampled], position),
            n_candidates=filling.n_candidates,
        )
        nfe[sampled] += 1
        tokens[sampled, position], order[sampled, position] = predicted.token, nfe[sampled]
        filling.confidence[sampled, position] = predicted.log_prob.exp()
        if record is not None:
            columns: list[Any] = [None if each is None else each[:, None] for each in predicted]  # [b, 1], ...
            filling.record(sampled, position, TokenPredictions(*columns))
        if eos_id is not None:
            filling.end_rows(sampled[predicted.token == eos_id], eos_id)
        running = (tokens[active] == mask_id).any(1)
        if int(running.sum()) <= (1 - REMOVED_SHARE) * len(active):
            cache.keep_rows(running.nonzero().squeeze(1))
            active = active[running]
    return filling.samples()
