"""Fill in masked tokens anywhere in a row, most confident positions first.

Shapes: B rows, b of them in a pass, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Confidence
from model.transformer import Transformer
from samplers.step import Samples, fill, noise_keys, row_keys


@torch.no_grad()
def sample_full(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    *,
    confidence: Confidence = "top_prob",
    tokens_per_step: int = 1,
    threshold: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
) -> Samples:
    """Fill every masked position; at each step the best `tokens_per_step` of each row, and all above `threshold`.

    Rows are independent: what a row becomes depends neither on its neighbours nor on the batch size. Finished rows
    leave the batch.

    Args:
        xt: int64 [B, L], `mask_id` where a token is wanted.
        confidence: which positions come first; higher is always sooner. `top_prob`: probability of the chosen token.
            `top_prob_margin`: its lead over the second (Kim et al. 2025). `neg_entropy`: least uncertain. `random`.
        threshold: probability of the chosen token above which a position is filled at once.
        temperature: 0 takes the most probable token; otherwise Gumbel noise, see `gumbel_noise`.
        seed, row_ids: random numbers depend on these alone (row_ids: int64 [B], by default 0..B-1).
    """
    tokens, order = xt.clone(), torch.zeros_like(xt)
    nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
    keys = row_keys(xt, seed, row_ids)  # [B]
    positions = torch.arange(xt.shape[1], device=xt.device)
    active = (tokens == mask_id).any(1).nonzero().squeeze(1)  # [b], rows that still have masks
    while len(active):
        nfe[active] += 1
        part = tokens[active]  # [b, L]
        masked = part == mask_id
        places = noise_keys(keys[active], nfe[active], positions)
        predicted = model.predict(part, masked, mask_id, temperature=temperature, noise_key=places[masked])
        filled = fill(part, masked, predicted, places, confidence, tokens_per_step, threshold)
        tokens[active] = part
        order[active] += filled * nfe[active, None]
        active = active[(part == mask_id).any(1)]
    return Samples(tokens, order, nfe)
