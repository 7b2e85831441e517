"""The output head in chunks: loss, NLL and confidence per position, never a [B, L, V] tensor.

Only positions that carry weight are scored. Their logits exist a chunk at a time; the gradient is computed in the same
sweep, so that nothing of size V is kept for the backward pass.

Shapes: B rows, L positions, N scored positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of logits holds at most this many float32 numbers (64 MiB), however large the vocabulary.
CHUNK_ELEMENTS = 1 << 24
# Below this vocabulary the head costs nothing, so it stays in float32: bfloat16 logits tie where the model is sure.
SMALL_VOCABULARY = 4096


class TokenScores(NamedTuple):
    """Scores of the true tokens."""

    loss: Tensor  # float32 scalar, sum of weight * nll; the only entry with a gradient
    nll: Tensor  # float32 [B, L], -log p(x0 | xt); 0 where weight is 0
    confidence: Tensor  # float32 [B, L], max log-probability; -inf where weight is 0


class TokenPredictions(NamedTuple):
    """What a sampler needs at N positions; `log_prob` is of `token`, the others of the whole distribution."""

    token: Tensor  # int64 [N]
    log_prob: Tensor  # float32 [N]
    margin: Tensor  # float32 [N], largest minus second largest probability
    neg_entropy: Tensor  # float32 [N], sum of p log p


def score_tokens(hidden: Tensor, head: Tensor, x0: Tensor, weight: Tensor) -> TokenScores:
    """Score the true tokens where `weight` is not 0.

    Args:
        hidden: [B, L, D], aligned to token positions.
        head: [V, D], the output matrix.
        x0: int64 [B, L].
        weight: float32 [B, L].
    """
    scored = weight.flatten().nonzero().squeeze(1)  # [N]
    loss, nll, confidence = _ScoreChunks.apply(
        hidden.flatten(0, 1)[scored], head, x0.flatten()[scored], weight.flatten()[scored], compute_dtype(head)
    )
    return TokenScores(
        loss,
        torch.zeros_like(weight).flatten().index_copy(0, scored, nll).view_as(weight),
        torch.full_like(weight, -torch.inf).flatten().index_copy(0, scored, confidence).view_as(weight),
    )


@torch.no_grad()
def predict_tokens(
    hidden: Tensor,
    head: Tensor,
    banned: int,
    *,
    temperature: float = 0.0,
    noise_key: Tensor | None = None,
) -> TokenPredictions:
    """The most probable token at each position, or with a temperature a random one by the Gumbel-max rule.

    Args:
        hidden: [N, D].
        head: [V, D].
        banned: the mask token, which is never produced and takes no probability.
        temperature: 0 for the most probable token; log-probabilities are divided by it otherwise.
        noise_key: int64 [N], one random key per position; needed with a temperature.
    """
    dtype = compute_dtype(head)
    matrix = head.to(dtype).t()
    chunks = []
    n_rows = _chunk_rows(head)
    for start in range(0, len(hidden), n_rows):
        part = slice(start, start + n_rows)
        logits = _matmul(hidden[part].to(dtype), matrix).float()  # [n, V]
        logits[:, banned] = -torch.inf
        log_prob = logits.log_softmax(dim=1)
        prob = log_prob.exp()
        best = prob.topk(2, dim=1)
        token = best.indices[:, 0]
        if temperature > 0:
            assert noise_key is not None
            token = (log_prob.double() / temperature + gumbel_noise(noise_key[part], head.shape[0])).argmax(dim=1)
        neg_entropy = (prob * log_prob).nan_to_num(0.0).sum(dim=1)  # the banned token gives 0 * -inf
        chosen = log_prob.gather(1, token[:, None]).squeeze(1)
        chunks.append(TokenPredictions(token, chosen, best.values[:, 0] - best.values[:, 1], neg_entropy))
    if not chunks:
        empty = torch.empty(0, device=hidden.device)
        return TokenPredictions(empty.long(), empty, empty, empty)
    return TokenPredictions(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def hash_uniform(key: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, from int64 keys of any shape (the finalizer of SplitMix64).

    Random numbers that depend on nothing but a key make a row's sample independent of its neighbours in the batch.
    """
    key = key * -7046029254386353131  # odd, 2^64 / golden ratio; products wrap
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * factor
    key = key ^ ((key >> 31) & ((1 << 33) - 1))
    return (((key >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def mix_keys(key: Tensor, other: Tensor | int) -> Tensor:
    """One int64 key from two (broadcast together); a change in either changes it throughout."""
    return (hash_uniform(key) * 2.0**53).long() * 1_000_003 + other


def gumbel_noise(key: Tensor, n: int) -> Tensor:
    """Gumbel noise for N keys (int64 [N]) and n tokens, float64 [N, n].

    In float64, since float32 uniforms end at 1 - 2^-24: their noise never exceeds 16.6, which starves rare tokens and
    makes sampling colder than its temperature says.
    """
    tokens = torch.arange(n, device=key.device)
    return -(-hash_uniform(mix_keys(key[:, None], tokens)).log()).log()


def compute_dtype(head: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's for a large vocabulary, else the parameters'."""
    device = head.device.type
    if torch.is_autocast_enabled(device) and head.shape[0] > SMALL_VOCABULARY:
        return torch.get_autocast_dtype(device)
    return head.dtype


def _chunk_rows(head: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // head.shape[0])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product in the type of its arguments, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _ScoreChunks(torch.autograd.Function):
    """Loss, NLL and confidence of N positions; gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = any(ctx.needs_input_grad)
        matrix = head.to(dtype)  # [V, D]
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if with_gradient else None
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        confidence = torch.empty_like(nll)
        n_rows = _chunk_rows(head)
        for start in range(0, len(hidden), n_rows):
            part = slice(start, start + n_rows)
            states = hidden[part].to(dtype)  # [n, D]
            logits = _matmul(states, matrix.t()).float()  # [n, V]
            log_total = logits.logsumexp(dim=1)
            nll[part] = log_total - logits.gather(1, target[part, None]).squeeze(1)
            confidence[part] = logits.amax(dim=1) - log_total
            if grad_hidden is not None and grad_head is not None:
                # d loss / d logits = weight * (softmax - one hot), written over the logits.
                gradient = logits.sub_(log_total[:, None]).exp_()
                gradient.scatter_add_(1, target[part, None], torch.full_like(nll[part, None], -1.0))
                gradient = gradient.mul_(weight[part, None]).to(dtype)
                grad_hidden[part] = _matmul(gradient, matrix).to(hidden.dtype)
                grad_head += _matmul(gradient.t(), states)
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(nll, confidence)
        return (weight * nll).sum(), nll, confidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None, None, None
