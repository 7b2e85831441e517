"""Write tokens from left to right with a causal model, keeping keys and values of what has been read.

Shapes: B rows, L positions, b rows that are still being written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Confidence
from model.token_predictions import mix_keys, predict_tokens
from model.transformer import Transformer
from samplers.step import Samples, row_keys

# Finished rows leave the batch once they are this share of it: leaving copies the whole cache.
LEAVING_SHARE = 1 / 8


@torch.no_grad()
def sample_left_to_right(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    *,
    eos_id: int | None = None,
    confidence: Confidence = "top_prob",
    tokens_per_step: int = 1,
    threshold: float | None = None,
    temperature: float = 0.0,
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
        confidence, tokens_per_step, threshold: as for the other samplers; there is no choice here.
        temperature: 0 takes the most probable token; otherwise Gumbel noise, see `gumbel_noise`.
        seed, row_ids: random numbers depend on these alone (row_ids: int64 [B], by default 0..B-1).

    Raises:
        ValueError: another order than left to right is asked for, or a row begins with a masked position, which there
            is nothing to predict from.
    """
    if (confidence, tokens_per_step, threshold) != ("top_prob", 1, None):
        raise ValueError(
            "a causal model writes one token after the other: it takes no confidence, tokens_per_step, threshold"
        )
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
        place = int(masked.any(0).int().argmax())  # the first position that any row wants
        hidden = model.model(tokens[active, cache.length : place], cache=cache)[:, -1]  # [b, D]
        cache.length = place
        wanting = masked[:, place]
        writing = active[wanting]
        predicted = predict_tokens(
            hidden[wanting],
            model.lm_head.weight,
            mask_id,
            temperature=temperature,
            noise_key=mix_keys(keys[writing], place),
        )
        nfe[writing] += 1
        tokens[writing, place], order[writing, place] = predicted.token, nfe[writing]
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
