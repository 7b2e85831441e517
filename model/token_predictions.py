"""Predictions for samplers: the token to write at each position, and the model's confidence in it.

Shapes: N positions, n of a chunk, D width, V vocabulary, v tokens of a tile, M tiles of the vocabulary, k candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import ModelConfidence
from model.logits import combine_tiles, compute_dtype, product_matrix, take_own, tile_shape, write_logits

# Logit of the banned token: its probability is 0, and being finite it gives 0 * logit = 0.
BANNED_LOGIT = -1e30


class TokenPredictions(NamedTuple):
    """Predictions at N positions; `log_prob` is that of `token`, margin and entropy those of the distribution."""

    token: Tensor  # int64 [N]
    log_prob: Tensor  # float32 [N]
    margin: Tensor  # float32 [N], largest minus second largest probability
    neg_entropy: Tensor  # float32 [N], sum of p log p
    # Where asked for, else None:
    candidates: Tensor | None = None  # int64 [N, k], the most probable tokens, best first
    candidate_log_probs: Tensor | None = None  # float32 [N, k]
    current_log_prob: Tensor | None = None  # float32 [N], of the tokens `current`
    kl: Tensor | None = None  # float32 [N], divergence from the distribution of the states `previous`, in nats

    def confidence(self, rule: ModelConfidence) -> Tensor:
        """The confidence by a rule, float32 [N]; higher is more confident."""
        if rule == "top_prob_margin":  # difference to the second most probable token (Kim et al. 2025)
            return self.margin
        if rule == "neg_entropy":
            return self.neg_entropy
        if rule == "top_prob":  # of the chosen token
            return self.log_prob
        raise NotImplementedError(f"confidence {rule!r} has no branch here")


@torch.no_grad()
def predict_tokens(
    hidden: Tensor,
    head: Tensor,
    banned: int | None,
    *,
    temperature: float = 0.0,
    noise_key: Tensor | None = None,
    n_candidates: int = 0,
    current: Tensor | None = None,
    previous: Tensor | None = None,
) -> TokenPredictions:
    """The most probable token at each position, or with a temperature a sampled one (Gumbel-max).

    Args:
        hidden: [N, D].
        head: [V, D].
        banned: the mask token, which gets probability 0; None: no token.
        temperature: 0 takes the most probable token; otherwise logits are divided by it to choose the token.
        noise_key: int64 [N], one random key per position; required with a temperature.
        n_candidates: k; at most as many as there are tokens besides the banned one are returned.
        current: int64 [N], tokens whose log-probabilities are wanted too.
        previous: [N, D], states of an earlier pass, to tell how far the distributions have moved since.
    """
    matrix = product_matrix(head, compute_dtype(head))
    n_candidates = min(n_candidates, len(head) - 1)
    n_rows, n_tokens = tile_shape(matrix)
    if matrix.is_cuda and temperature > 0:  # noise in float64, and the keys it is made from, take four times the logits
        n_rows = max(1, n_rows // 4)
    buffer = torch.empty(min(n_rows, len(hidden)), n_tokens, device=hidden.device)
    chunks = []
    for start in range(0, max(1, len(hidden)), n_rows):
        part = slice(start, start + n_rows)
        keys, now, before = (None if each is None else each[part] for each in (noise_key, current, previous))
        chunks.append(
            _predict_chunk(
                hidden[part].to(matrix.dtype),
                matrix,
                len(head),
                buffer,
                -1 if banned is None else banned,
                temperature=temperature,
                noise_key=keys,
                n_candidates=n_candidates,
                current=now,
                previous=None if before is None else before.to(matrix.dtype),
            )
        )
    columns: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return TokenPredictions(*columns)


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
    vocab_size: int,
    buffer: Tensor,
    banned: int,
    *,
    temperature: float,
    noise_key: Tensor | None,
    n_candidates: int,
    current: Tensor | None,
    previous: Tensor | None,
) -> TokenPredictions:
    """See `predict_tokens`; for states [n, D] and the matrix of `product_matrix`, both in the dtype to compute in.

    Args:
        vocab_size: V; rows of the matrix from there on are padding, which gets probability 0.
        buffer: float32 [at least n, v], overwritten by the logits of each tile.
    """
    n_tokens = buffer.shape[1]
    tiles, top_tokens, top_logits, cross, other_totals = [], [], [], [], []
    current_logit = torch.zeros(len(states), device=states.device)
    for start, rows in zip(range(0, len(matrix), n_tokens), matrix.split(n_tokens), strict=True):
        logits = buffer[: len(states), : len(rows)]  # [n, v]
        _write_allowed_logits(states, rows, banned - start, vocab_size - start, logits)
        if current is not None:
            current_logit = take_own(logits, start, current, current_logit)
        if n_candidates:
            top = logits.topk(min(n_candidates, len(rows)), dim=1)
            top_tokens.append(top.indices + start)
            top_logits.append(top.values)
        tiles.append(_summarize_tile(logits, start, temperature, noise_key))
        if previous is not None:
            other = torch.empty_like(logits)
            _write_allowed_logits(previous, rows, banned - start, vocab_size - start, other)
            cross.append(_dot(logits.exp(), other))  # logits are relative to the tile's largest now
            other_totals.append(other.logsumexp(dim=1))
    every = _TileSummary(*(torch.stack(part) for part in zip(*tiles, strict=True)))  # [M, n]
    largest, total, scale = combine_tiles(every.largest, every.total)
    log_total = total.log()
    winner = every.score.argmax(dim=0, keepdim=True)  # [1, n], index of the tile
    token, logit = every.token.gather(0, winner)[0], every.logit.gather(0, winner)[0]
    best = every.largest.argmax(dim=0, keepdim=True)
    second = every.largest.scatter(0, best, every.second.gather(0, best)).amax(dim=0)
    moment = (scale * (every.moment + every.total * (every.largest - largest))).sum(dim=0)
    neg_entropy = moment / total - log_total
    candidates = candidate_log_probs = current_log_prob = kl = None
    if n_candidates:
        candidate_logits, places = torch.cat(top_logits, dim=1).topk(n_candidates, dim=1)
        candidates = torch.cat(top_tokens, dim=1).gather(1, places)
        candidate_log_probs = candidate_logits - (largest + log_total)[:, None]
    if current is not None:
        current_log_prob = current_logit - largest - log_total
    if previous is not None:
        mean_other = (scale * torch.stack(cross)).sum(dim=0) / total  # expected logit of the earlier pass
        kl = neg_entropy - mean_other + torch.stack(other_totals).logsumexp(dim=0)
    return TokenPredictions(
        token=token,
        log_prob=logit - largest - log_total,
        margin=(1 - (second - largest).exp()) / total,
        neg_entropy=neg_entropy,
        candidates=candidates,
        candidate_log_probs=candidate_log_probs,
        current_log_prob=current_log_prob,
        kl=kl,
    )


def _write_allowed_logits(states: Tensor, rows: Tensor, banned: int, n_tokens: int, out: Tensor) -> None:
    """`write_logits` [n, v], with the banned token, if it is one of the rows [v, D], set to `BANNED_LOGIT`.

    So are rows from n_tokens on, which are padding.
    """
    write_logits(states, rows, out)
    out[:, max(0, n_tokens) :] = BANNED_LOGIT
    if 0 <= banned < len(rows):
        out[:, banned] = BANNED_LOGIT


def _summarize_tile(logits: Tensor, first: int, temperature: float, noise_key: Tensor | None) -> _TileSummary:
    """Statistics of the logits [n, v] of v tokens from `first` on.

    Makes the logits relative to the largest of each position.
    """
    top = logits.topk(min(2, logits.shape[1]), dim=1)  # not of more: which of equal logits is first depends on it
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
    moment = _dot(exponentials, logits)
    return _TileSummary(column + first, logit, score, largest, second, exponentials.sum(dim=1), moment)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two float32 [n, v]; [n]. Autocast would round them to bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.linalg.vecdot(a, b)


def hash_uniform(key: Tensor) -> Tensor:
    """Uniform numbers, float64, from int64 keys of any shape (the finalizer of SplitMix64).

    They lie between 2^-54 and 1, which the largest of the 2^53 is rounded to.

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
