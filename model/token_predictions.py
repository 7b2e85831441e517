"""Predictions for samplers: the token to write at each position, and the model's confidence in it.

Shapes: N positions, n of a chunk, D width, V vocabulary, v tokens of a tile, M tiles of the vocabulary, k candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.logits import combine_tiles, compute_dtype, product_matrix, tile_shape, write_logits

# Logit of the banned token: its probability is 0, and being finite it gives 0 * logit = 0.
BANNED_LOGIT = -1e30


class TokenPredictions(NamedTuple):
    """Predictions at N positions; `log_prob` is that of `token`, margin and entropy those of the distribution."""

    token: Tensor  # int64 [N]
    log_prob: Tensor  # float32 [N]
    margin: Tensor  # float32 [N], largest minus second largest probability
    neg_entropy: Tensor  # float32 [N], sum of p log p
    candidates: Tensor  # int64 [N, k], the most probable tokens, best first
    candidate_log_probs: Tensor  # float32 [N, k]


@torch.no_grad()
def predict_tokens(
    hidden: Tensor,
    head: Tensor,
    banned: int,
    *,
    temperature: float = 0.0,
    noise_key: Tensor | None = None,
    n_candidates: int = 0,
) -> TokenPredictions:
    """The most probable token at each position, or with a temperature a sampled one (Gumbel-max).

    Args:
        hidden: [N, D].
        head: [V, D].
        banned: the mask token, which gets probability 0.
        temperature: 0 takes the most probable token; otherwise logits are divided by it to choose the token.
        noise_key: int64 [N], one random key per position; required with a temperature.
        n_candidates: k; at most as many as there are tokens besides the banned one are returned.
    """
    matrix = head.to(compute_dtype(head))
    n_candidates = min(n_candidates, len(head) - 1)
    n_rows, n_tokens = tile_shape(head)
    buffer = torch.empty(min(n_rows, len(hidden)), n_tokens, device=hidden.device)
    chunks = []
    for start in range(0, len(hidden), n_rows):
        part = slice(start, start + n_rows)
        keys = noise_key[part] if noise_key is not None else None
        chunks.append(
            _predict_chunk(hidden[part].to(matrix.dtype), matrix, buffer, banned, temperature, keys, n_candidates)
        )
    if not chunks:
        empty = torch.empty(0, device=hidden.device)
        none = torch.empty(0, n_candidates, device=hidden.device)
        return TokenPredictions(empty.long(), empty, empty, empty, none.long(), none)
    return TokenPredictions(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


class _TileSummary(NamedTuple):
    """Statistics of one tile of the vocabulary at n positions; float32 except `token` and `score`."""

    token: Tensor  # int64 [n], the tile's candidate
    logit: Tensor  # [n], its logit
    score: Tensor  # [n], compared between tiles: the logit, or with a temperature the noisy logit in float64
    largest: Tensor  # [n]
    second: Tensor  # [n], second largest logit
    total: Tensor  # [n], sum of exp(logit - largest)
    moment: Tensor  # [n], sum of exp(logit - largest) * (logit - largest)


def _predict_chunk(
    states: Tensor,
    matrix: Tensor,
    buffer: Tensor,
    banned: int,
    temperature: float,
    noise_key: Tensor | None,
    n_candidates: int,
) -> TokenPredictions:
    """See `predict_tokens`; for states [n, D] and the matrix of `product_matrix`, both in the dtype to compute in.

    Args:
        vocab_size: V; rows of the matrix from there on are padding, which gets probability 0.
        buffer: float32 [at least n, v], overwritten by the logits of each tile.
    """
    n_tokens = buffer.shape[1]
    tiles, top_tokens, top_logits = [], [], []
    for start, rows in zip(range(0, len(matrix), n_tokens), matrix.split(n_tokens), strict=True):
        logits = buffer[: len(states), : len(rows)]  # [n, v]
        write_logits(states, rows, logits)
        if start <= banned < start + len(rows):
            logits[:, banned - start] = BANNED_LOGIT
        summary, top = _summarize_tile(logits, start, temperature, noise_key, n_candidates)
        tiles.append(summary)
        if n_candidates:
            top_tokens.append(top.indices + start)
            top_logits.append(top.values)
    every = _TileSummary(*(torch.stack(part) for part in zip(*tiles, strict=True)))  # [M, n]
    largest, total, scale = combine_tiles(every.largest, every.total)
    log_total = total.log()
    winner = every.score.argmax(dim=0, keepdim=True)  # [1, n], index of the tile
    token, logit = every.token.gather(0, winner)[0], every.logit.gather(0, winner)[0]
    best = every.largest.argmax(dim=0, keepdim=True)
    second = every.largest.scatter(0, best, every.second.gather(0, best)).amax(dim=0)
    candidates = torch.empty(len(token), 0, dtype=torch.long, device=token.device)  # [n, k]
    candidate_log_probs = torch.empty(len(token), 0, device=token.device)
    if n_candidates:
        candidate_logits, places = torch.cat(top_logits, dim=1).topk(n_candidates, dim=1)
        candidates = torch.cat(top_tokens, dim=1).gather(1, places)
        candidate_log_probs = candidate_logits - (largest + log_total)[:, None]
    moment = (scale * (every.moment + every.total * (every.largest - largest))).sum(dim=0)
    return TokenPredictions(
        token=token,
        log_prob=logit - largest - log_total,
        margin=(1 - (second - largest).exp()) / total,
        neg_entropy=moment / total - log_total,
        candidates=candidates,
        candidate_log_probs=candidate_log_probs,
    )


def _summarize_tile(
    logits: Tensor, first: int, temperature: float, noise_key: Tensor | None, n_candidates: int
) -> tuple[_TileSummary, torch.return_types.topk]:
    """Statistics of the logits [n, v] of v tokens from `first` on, and the largest; overwrites the logits."""
    top = logits.topk(min(max(2, n_candidates), logits.shape[1]), dim=1)
    largest, column = top.values[:, 0], top.indices[:, 0]
    second = top.values[:, 1] if logits.shape[1] > 1 else torch.full_like(largest, BANNED_LOGIT)
    logit = score = largest
    if temperature > 0:
        assert noise_key is not None
        noisy = logits.double() / temperature + gumbel_noise(noise_key, logits.shape[1], first)
        score, column = noisy.max(dim=1)
        logit = logits.gather(1, column[:, None]).squeeze(1)
    logits.sub_(largest[:, None])
    exponentials = logits.exp()
    moment = torch.linalg.vecdot(exponentials, logits)
    return _TileSummary(column + first, logit, score, largest, second, exponentials.sum(dim=1), moment), top


def hash_uniform(key: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, from int64 keys of any shape (the finalizer of SplitMix64).

    They depend on the key alone, so the sample of a row does not depend on the other rows of the batch.
    """
    key = key * -7046029254386353131  # odd, 2^64 / golden ratio; products wrap around
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * factor
    key = key ^ ((key >> 31) & ((1 << 33) - 1))
    return (((key >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def mix_keys(key: Tensor, other: Tensor | int) -> Tensor:
    """One int64 key from two (broadcast); a change in either changes all bits of the hashed key."""
    return (hash_uniform(key) * 2.0**53).long() * 1_000_003 + other


def gumbel_noise(key: Tensor, n: int, first: int = 0) -> Tensor:
    """Gumbel noise for N keys (int64 [N]) and n tokens from `first` on, float64 [N, n].

    In float64: float32 uniforms are at most 1 - 2^-24, so their noise is at most 16.6, which makes rare tokens too rare
    and sampling colder than the temperature.
    """
    tokens = torch.arange(first, first + n, device=key.device)
    return -(-hash_uniform(mix_keys(key[:, None], tokens)).log()).log()
