"""The output head in chunks: loss, NLL and confidence per position without a [B, L, V] tensor.

With a large vocabulary only positions with nonzero weight are scored; with a small one all are, which keeps shapes
fixed. Logits exist for one chunk at a time and the gradient is computed in the forward pass, so nothing of size
[N, V] is kept for the backward pass.

Shapes: B rows, L positions, N scored positions, D width, V vocabulary, V' vocabulary with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from config import ModelConfidence
from model.logits import SMALL_VOCABULARY, chunk_rows, chunk_scorer, compute_dtype, plain_matmul, product_matrix
from model.token_predictions import predict_tokens


class TokenScores(NamedTuple):
    """The true tokens' scores, and how sure the model is of its predictions, at positions of nonzero weight.

    The mask token counts as any other here. It is never a true token and soon has little probability.
    """

    loss: Tensor  # float32 scalar, sum of weight * nll; the only entry with a gradient
    nll: Tensor  # float32 [B, L], -log p(x0 | xt); 0 where weight is 0
    max_log_prob: Tensor  # float32 [B, L], that of the most probable token; -inf where weight is 0
    confidence: Tensor  # float32 [B, L], by the rule asked for, higher is surer; -inf where weight is 0


def scored_positions(weights: Sequence[Tensor], n_tokens: int) -> list[Callable[[], Tensor | None]]:
    """Find the positions of nonzero weight of all passes of an update; call this before the first backbone runs.

    On a GPU the host needs their numbers to launch the heads. They are copied to the host while the first backbone
    computes; the returned functions wait for that one copy, so the host waits once per update and may then run ahead.

    Args:
        weights: float32 [B, L], one per pass.
        n_tokens: size of the vocabulary.

    Returns:
        For each pass a function that gives the positions to score as indices into [B * L], int64 [N]; None: all.
    """
    if n_tokens <= SMALL_VOCABULARY:
        return [lambda: None] * len(weights)
    flat = [weight.flatten() for weight in weights]
    if not weights[0].is_cuda:
        return [partial(torch.squeeze, each.nonzero(), 1) for each in flat]
    orders = [(each == 0).to(torch.uint8).argsort(stable=True) for each in flat]
    counts = torch.empty(len(flat), dtype=torch.long, pin_memory=True)
    counts.copy_(torch.stack([(each != 0).sum() for each in flat]), non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait(number: int) -> Tensor:
        event.synchronize()
        return orders[number][: int(counts[number])]

    return [partial(wait, number) for number in range(len(flat))]


def score_tokens(
    hidden: Tensor,
    head: Tensor,
    x0: Tensor,
    weight: Tensor,
    scored: Callable[[], Tensor | None] | None = None,
    compiled: bool = False,
    confidence: ModelConfidence = "top_prob",
) -> TokenScores:
    """Score the true tokens where `weight` is not 0.

    Args:
        hidden: [B, L, D], aligned to token positions.
        head: [V, D], the output matrix.
        x0: int64 [B, L].
        weight: float32 [B, L].
        scored: that of `weight` from `scored_positions`, which was called before the backbone ran.
        compiled: compile the softmax over a large vocabulary.
        confidence: the rule of `TokenScores.confidence`. All but `top_prob` compute the logits of the scored positions
            once more, without gradient: the kernels of the loss keep no more than its own statistics.
    """
    indices = (scored or scored_positions([weight], head.shape[0])[0])()
    states, target, own_weight = hidden.flatten(0, 1), x0.flatten(), weight.flatten()
    if indices is not None:
        # Not `states[indices]`, whose backward pass sorts, since indices could repeat.
        states, target, own_weight = (each.index_select(0, indices) for each in (states, target, own_weight))
    loss, nll, max_log_prob = _ScoreChunks.apply(
        states, head, target, own_weight, compute_dtype(head), compiled, torch.is_grad_enabled()
    )

    def place(values: Tensor, elsewhere: float) -> Tensor:
        if indices is None:  # positions of weight 0 were scored too
            return values.view_as(weight).masked_fill(weight == 0, elsewhere)
        return torch.full_like(weight, elsewhere).flatten().index_copy(0, indices, values).view_as(weight)

    top = place(max_log_prob, -torch.inf)
    sure = top
    if confidence != "top_prob":
        sure = place(predict_tokens(states, head, banned=None).confidence(confidence), -torch.inf)
    return TokenScores(loss, place(nll, 0.0), top, sure)


@cache
def unit_gradient(device: torch.device) -> Tensor:
    """1, for `loss.backward`: a backward pass that is given this very tensor need not multiply by it."""
    return torch.ones((), device=device)


class _ScoreChunks(torch.autograd.Function):
    """Loss, NLL and max log-probability of N positions; computes the gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        compiled: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = product_matrix(head, dtype)  # [V', D]
        grad_hidden = grad_head = None
        # Under no_grad too, `needs_input_grad` is true of a parameter; and here gradients are always disabled.
        with_gradient = grad_enabled and any(ctx.needs_input_grad)
        if with_gradient:
            grad_hidden = torch.empty_like(hidden)
            new = torch.empty if len(hidden) else torch.zeros
            grad_head = new(matrix.shape, dtype=torch.promote_types(dtype, torch.float32), device=head.device)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        confidence = torch.empty_like(nll)
        n_rows = chunk_rows(head)
        score = chunk_scorer(matrix, len(head), min(n_rows, len(hidden)), compiled, with_gradient)
        for start in range(0, len(hidden), n_rows):
            part = slice(start, start + n_rows)
            states = hidden[part].to(dtype)  # [n, D]
            nll[part], confidence[part], gradient = score(states, target[part], weight[part])
            if gradient is not None and grad_hidden is not None and grad_head is not None:
                grad_hidden[part] = plain_matmul(gradient, matrix).to(hidden.dtype)
                if grad_head.dtype == gradient.dtype:
                    grad_head.addmm_(gradient.t(), states, beta=min(start, 1))  # without a temporary of its size
                elif start == 0:
                    grad_head.copy_(plain_matmul(gradient.t(), states))
                else:
                    grad_head += plain_matmul(gradient.t(), states)
        if grad_hidden is not None and grad_head is not None:
            # Not a slice: autograd would add the embedding's gradient of a tied head to a copy of it.
            ctx.save_for_backward(grad_hidden, grad_head.resize_(head.shape))
        ctx.mark_non_differentiable(nll, confidence)
        return (weight * nll).sum(), nll, confidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grads[0] is unit_gradient(grads[0].device):
            return grad_hidden, grad_head, None, None, None, None, None
        # In place, to save memory of the head's size. Autograd calls this at most once per forward pass.
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None, None, None
