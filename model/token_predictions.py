"""What a sampler asks of the output head: the token to write at a position, and how sure the model is of it.

Shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.token_scores import chunk_rows, compute_dtype, plain_matmul


class TokenPredictions(NamedTuple):
    """What a sampler needs at N positions; `log_prob` is of `token`, the others of the whole distribution."""

    token: Tensor  # int64 [N]
    log_prob: Tensor  # float32 [N]
    margin: Tensor  # float32 [N], largest minus second largest probability
    neg_entropy: Tensor  # float32 [N], sum of p log p


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
    n_rows = chunk_rows(head)
    for start in range(0, len(hidden), n_rows):
        part = slice(start, start + n_rows)
        logits = plain_matmul(hidden[part].to(dtype), matrix).float()  # [n, V]
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
