"""The output head in chunks: loss, NLL and confidence per position, never a [B, L, V] tensor.

Only positions that carry weight are scored, unless the vocabulary is so small that fixed shapes are worth more. Logits
exist a chunk at a time, and the gradient is computed in the same sweep: nothing of size V waits for the backward pass.

Shapes: B rows, L positions, N scored positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of logits holds at most this many numbers, however large the vocabulary: 64 MiB in float32, 512 MiB on a GPU,
# where smaller matrix products would leave most of the machine idle.
CHUNK_ELEMENTS = 1 << 24
CHUNK_ELEMENTS_GPU = 1 << 27
# Up to this vocabulary the head costs nothing, so it stays in float32 (bfloat16 logits tie where the model is sure) and
# scores every position: all shapes are fixed then.
SMALL_VOCABULARY = 4096


class TokenScores(NamedTuple):
    """Scores of the true tokens."""

    loss: Tensor  # float32 scalar, sum of weight * nll; the only entry with a gradient
    nll: Tensor  # float32 [B, L], -log p(x0 | xt); 0 where weight is 0
    confidence: Tensor  # float32 [B, L], max log-probability; -inf where weight is 0


class ScoredPositions:
    """Which positions carry weight; made before the backbone runs, so that their number is known when the head starts.

    On a GPU the host must know the number to launch the head. It travels there while the backbone computes; `indices`
    waits for it, but not for the backbone, so the device never runs dry.
    """

    def __init__(self, weight: Tensor, n_tokens: int) -> None:
        """For `weight` (float32 [B, L]) and a vocabulary of `n_tokens`."""
        flat = weight.flatten()
        self._event: torch.cuda.Event | None = None
        self._indices = self._count = None
        self._all = n_tokens <= SMALL_VOCABULARY
        if self._all:
            return
        if not weight.is_cuda:
            self._indices = flat.nonzero().squeeze(1)
        else:
            self._order = (flat == 0).to(torch.uint8).argsort(stable=True)
            self._count = torch.empty((), dtype=torch.long, pin_memory=True)
            self._count.copy_((flat != 0).sum(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def indices(self) -> Tensor | None:
        """Flat positions to score, int64 [N]; None: all."""
        if self._all or self._indices is not None:
            return self._indices
        assert self._event is not None
        assert self._count is not None
        self._event.synchronize()
        return self._order[: int(self._count)]


def score_tokens(
    hidden: Tensor,
    head: Tensor,
    x0: Tensor,
    weight: Tensor,
    scored: ScoredPositions | None = None,
    compiled: bool = False,
) -> TokenScores:
    """Score the true tokens where `weight` is not 0.

    Args:
        hidden: [B, L, D], aligned to token positions.
        head: [V, D], the output matrix.
        x0: int64 [B, L].
        weight: float32 [B, L].
        scored: what is known of `weight` already.
        compiled: fuse the sweeps over a large vocabulary's logits.
    """
    indices = (scored or ScoredPositions(weight, head.shape[0])).indices()
    states, target, own_weight = hidden.flatten(0, 1), x0.flatten(), weight.flatten()
    if indices is not None:
        states, target, own_weight = states[indices], target[indices], own_weight[indices]  # [N, D], [N], [N]
    loss, nll, confidence = _ScoreChunks.apply(states, head, target, own_weight, compute_dtype(head), compiled)
    if indices is None:  # positions without weight have been scored too
        nll, confidence = nll.view_as(weight), confidence.view_as(weight)
        return TokenScores(loss, nll.masked_fill(weight == 0, 0.0), confidence.masked_fill(weight == 0, -torch.inf))
    return TokenScores(
        loss,
        torch.zeros_like(weight).flatten().index_copy(0, indices, nll).view_as(weight),
        torch.full_like(weight, -torch.inf).flatten().index_copy(0, indices, confidence).view_as(weight),
    )


def compute_dtype(head: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's for a large vocabulary, else the parameters'."""
    device = head.device.type
    if torch.is_autocast_enabled(device) and head.shape[0] > SMALL_VOCABULARY:
        return torch.get_autocast_dtype(device)
    return head.dtype


def chunk_rows(head: Tensor) -> int:
    """Positions whose logits make one chunk."""
    return max(1, (CHUNK_ELEMENTS_GPU if head.is_cuda else CHUNK_ELEMENTS) // head.shape[0])


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product in the type of its arguments, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _score_chunk(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and confidence (float32 [n]), and d (weight * nll) / d logits, of logits [n, V] in any float type.

    float32 logits are overwritten; in as few sweeps over them as can be, since memory is what limits this.
    """
    wide = logits.float()
    largest, own = wide.amax(dim=1), wide.gather(1, target[:, None]).squeeze(1)
    exponentials = wide.sub_(largest[:, None]).exp_()
    total = exponentials.sum(dim=1)
    # weight * (softmax - one hot), from the exponentials in one sweep.
    gradient = exponentials.mul_((weight / total)[:, None])
    gradient.scatter_add_(1, target[:, None], -weight[:, None])
    log_total = total.log()
    return largest + log_total - own, -log_total, gradient.to(logits.dtype)


@cache
def _compiled_score_chunk() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_score_chunk, dynamic=True)


class _ScoreChunks(torch.autograd.Function):
    """Loss, NLL and confidence of N positions; gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = head.to(dtype)  # [V, D]
        grad_hidden = grad_head = None
        if any(ctx.needs_input_grad):
            grad_hidden = torch.empty_like(hidden)
            grad_head = torch.zeros(head.shape, dtype=torch.promote_types(dtype, torch.float32), device=head.device)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        confidence = torch.empty_like(nll)
        n_rows = chunk_rows(head)
        score = _compiled_score_chunk() if compiled and head.shape[0] > SMALL_VOCABULARY else _score_chunk
        for start in range(0, len(hidden), n_rows):
            part = slice(start, start + n_rows)
            states = hidden[part].to(dtype)  # [n, D]
            logits = plain_matmul(states, matrix.t())  # [n, V]
            nll[part], confidence[part], gradient = score(logits, target[part], weight[part])
            if grad_hidden is not None and grad_head is not None:
                grad_hidden[part] = plain_matmul(gradient, matrix).to(hidden.dtype)
                if grad_head.dtype == gradient.dtype:
                    grad_head.addmm_(gradient.t(), states)  # without a matrix of its size in between
                else:
                    grad_head += plain_matmul(gradient.t(), states)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(nll, confidence)
        return (weight * nll).sum(), nll, confidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        # In place, since a head's worth of memory counts; autograd calls this once, as loss.backward() does.
        return grad_hidden.mul_(grads[0]), grad_head.mul_(grads[0]), None, None, None, None
