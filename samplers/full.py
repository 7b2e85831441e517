"""Fill masked tokens anywhere in a row, most confident positions first.

Shapes: B rows, b unfinished rows in a pass, L positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from config import DEFAULT_RULE, SamplingRule
from model.transformer import Transformer
from samplers.step import Filling, Samples, no_op


@torch.no_grad()
def sample_full(
    model: Transformer,
    xt: Tensor,
    mask_id: int,
    rule: SamplingRule = DEFAULT_RULE,
    *,
    seed: int = 0,
    row_ids: Tensor | None = None,
    before_pass: Callable[[], None] = no_op,
    record: int | None = None,
) -> Samples:
    """Fill all masked positions; `rule` says which in each pass, and whether filled ones may be masked again.

    Rows are independent: the result of a row does not depend on other rows or the batch size. Finished rows leave the
    batch.

    Args:
        xt: int64 [B, L], `mask_id` at the positions to fill.
        rule: which positions are filled first, how many per pass, and the temperature: 0 takes the most probable token,
            otherwise Gumbel noise is added, see `model.token_predictions.gumbel_noise`.
        seed, row_ids: random numbers depend only on these (row_ids: int64 [B], by default 0..B-1).
        before_pass: called before each forward pass; an exception that it raises ends the sampling.
        record: None records nothing; k records every pass with the k most probable tokens at its masked positions (0:
            none): `Samples.passes`.
    """
    filling = Filling(xt, mask_id, rule, seed=seed, row_ids=row_ids, record=record)
    number = 0
    while len(rows := filling.unfinished(0, xt.shape[1])):
        before_pass()
        number += 1
        filling.make_pass(model, rows, 0, xt.shape[1], number=number)
    return filling.samples()
