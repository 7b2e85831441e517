"""Write tokens from left to right with a causal model, keeping keys and values of what has been read.

Shapes: B rows, L positions, b rows that are still being written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import DEFAULT_RULE, SamplingRule
from model.token_predictions import mix_keys, predict_tokens
from model.transformer import Transformer
from samplers.step import Samples, row_keys

# Finished rows leave the batch once they are this share of it: leaving copies the whole cache.
LEAVING_SHARE = 1 / 8


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
) -> Samples:
    """Fill every masked position, each from all tokens before it, until the row's end.

    The batch walks over the positions together. Given tokens are read as they are, wherever they stand, so prompts may
    differ in length. A row that writes EOS is done: its other masked positions become EOS too, at the same step. Rows
    are independent, as in `sample`; a row's `nfe` is the number of tokens that the model wrote.

    Args:
        xt: int64 [B, L], `mask_id` where a token is wanted.
        eos_id: None if rows are written to their full length.
        rule: only the temperature can be chosen.
        seed, row_ids: random numbers depend on these alone (row_ids: int64 [B], by default 0..B-1).

    Raises:
        ValueError: the rule asks for another order than left to right, or a row begins with a masked position, which
            there is nothing to predict from.
    """
    rule.check(causal=True)
    if (xt[:, 0] == mask_id).any():
        row = int((xt[:, 0] == mask_id).nonzero()[0])
        raise ValueError(f"row {row} has no prompt: a causal model needs at least one given token to start from")
    tokens, order = xt.clone(), torch.zeros_like(xt)
    nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
    keys = row_keys(xt, seed, row_ids)  # [B]
    active = (tokens == mask_id).any(1).nonzero().squeeze(1)  # [b]
    cache = model.model.empty_cache(len(active), xt.shape[1])
    while len(active):
        masked = tokens[active] == mask_id  # [b, L]
        position = int(masked.any(0).int().argmax())  # the first that any row wants
        hidden = model.model(tokens[active, cache.length : position], cache=cache)[:, -1]  # [b, D]
        cache.length = position
        wanting = masked[:, position]
        writing = active[wanting]
        predicted = predict_tokens(
            hidden[wanting],
            model.lm_head.weight,
            mask_id,
            temperature=rule.temperature,
            noise_key=mix_keys(keys[writing], position),
        )
        nfe[writing] += 1
        tokens[writing, position], order[writing, position] = predicted.token, nfe[writing]
        if eos_id is not None:
            ended = writing[predicted.token == eos_id]
            rest = tokens[ended] == mask_id  # [n, L]
            tokens[ended] = tokens[ended].masked_fill(rest, eos_id)
            order[ended] += rest * nfe[ended, None]
        running = (tokens[active] == mask_id).any(1)
        if int(running.sum()) <= (1 - LEAVING_SHARE) * len(active):
            cache.keep_rows(running.nonzero().squeeze(1))
            active = active[running]
    return Samples(tokens, order, nfe)
