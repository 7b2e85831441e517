"""Fill masked tokens anywhere in a row, most confident positions first.

Shapes: B rows, b unfinished rows in a pass, L positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from config import DEFAULT_RULE, SamplingRule
from model.transformer import Transformer
from samplers.step import Recorder, Samples, fill, noise_keys, nothing, row_keys


@torch.no_grad()
def sample_full(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    rule: SamplingRule = DEFAULT_RULE,
    *,
    seed: int = 0,
    row_ids: Tensor | None = None,
    before_pass: Callable[[], None] = nothing,
    record: int | None = None,
) -> Samples:
    """Fill all masked positions; each pass fills the best `tokens_per_step` of each row, and all above `threshold`.

    Rows are independent: the result of a row does not depend on other rows or the batch size. Finished rows leave the
    batch.

    Args:
        xt: int64 [B, L], `mask_id` at the positions to fill.
        rule: which positions are filled first, how many per pass, and the temperature: 0 takes the most probable token,
            otherwise Gumbel noise is added, see `model.token_predictions.gumbel_noise`.
        seed, row_ids: random numbers depend only on these (row_ids: int64 [B], by default 0..B-1).
        before_pass: called before each forward pass; an exception that it raises ends the sampling.
        record: None records nothing; k records the confidence of each written token and every pass with the k most
            probable tokens at its masked positions (0: none): `Samples.confidence` and `Samples.passes`.
    """
    tokens, order = xt.clone(), torch.zeros_like(xt)
    nfe = torch.zeros(len(xt), dtype=torch.long, device=xt.device)
    keys = row_keys(xt, seed, row_ids)  # [B]
    recorder = Recorder(xt, mask_id, record)
    positions = torch.arange(xt.shape[1], device=xt.device)
    active = (tokens == mask_id).any(1).nonzero().squeeze(1)  # [b], rows that still have masks
    while len(active):
        before_pass()
        nfe[active] += 1
        part = tokens[active]  # [b, L]
        masked = part == mask_id
        noise = noise_keys(keys[active], nfe[active], positions)  # [b, L]
        predicted = model.predict(
            part,
            masked,
            mask_id,
            temperature=rule.temperature,
            noise_key=noise[masked],
            n_candidates=recorder.n_candidates,
        )
        filled = fill(part, masked, predicted, noise, rule)
        tokens[active] = part
        order[active] += filled * nfe[active, None]
        recorder.add(active, tokens, 0, masked, filled, predicted)
        active = active[(part == mask_id).any(1)]
    return recorder.samples(tokens, order, nfe)
