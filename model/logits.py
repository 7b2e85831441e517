"""Logits of one chunk of positions at a time: size of a chunk, dtype of its matrix products, and its softmax.

Shapes: n positions of a chunk, D width, V vocabulary, V' vocabulary with padding, v tokens of a tile, M tiles of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# A chunk of logits holds at most this many elements for any vocabulary: 128 MiB in float32, and on a GPU 512 MiB in
# bfloat16. Smaller matrix products would not fill a GPU, and each chunk adds to the whole gradient of the head.
CHUNK_ELEMENTS = 1 << 25
CHUNK_ELEMENTS_GPU = 1 << 28
ROWS_OF_KERNEL = 128
# A CPU takes the vocabulary of a chunk in tiles of this many tokens, which stay in its caches between matrix product
# and sums. (A product with a whole large matrix also runs at half the speed of products with its tiles.)
TILE_TOKENS = 1024
TILE_ELEMENTS = 1 << 18  # logits of a tile in sampling: 1 MiB
TILE_ELEMENTS_GPU = 1 << 27  # there sampling takes the whole vocabulary, for few large kernels
# Up to this vocabulary the head is cheap: it stays in float32 (bfloat16 logits tie where the model is confident) and
# scores every position, so that all shapes are fixed.
SMALL_VOCABULARY = 4096
# On a GPU large vocabularies are padded to a multiple of this: where a row of logits is no multiple of 16 bytes, cuBLAS
# takes kernels for unaligned memory, which are several times slower (vocabulary 151,645 on an H200).
PADDED_MULTIPLE = 64

# From hidden states [n, D], target tokens (int64 [n]) and weights (float32 [n]): NLL and confidence (float32 [n]), and
# d (weight * nll) / d logits ([n, V'] in the dtype of the matrix, valid until the next call), or None if not asked for.
ChunkScorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def compute_dtype(head: Tensor) -> torch.dtype:
    """Dtype of the matrix products: autocast's for a large vocabulary, else the head's."""
    device = head.device.type
    if torch.is_autocast_enabled(device) and head.shape[0] > SMALL_VOCABULARY:
        return torch.get_autocast_dtype(device)
    return head.dtype


def chunk_rows(head: Tensor) -> int:
    """Number of positions of a chunk; on a GPU a multiple of what a kernel takes at once, if there are so many."""
    if not head.is_cuda:
        return max(1, CHUNK_ELEMENTS // head.shape[0])
    n_rows = max(1, CHUNK_ELEMENTS_GPU // head.shape[0])
    return n_rows - n_rows % ROWS_OF_KERNEL if n_rows > ROWS_OF_KERNEL else n_rows


def tile_shape(head: Tensor) -> tuple[int, int]:
    """Number of positions and of tokens of a tile in sampling.

    Args:
        head: of `product_matrix`.
    """
    if head.is_cuda:
        return max(1, TILE_ELEMENTS_GPU // head.shape[0]), head.shape[0]
    n_tokens = min(TILE_TOKENS, head.shape[0])
    return max(1, TILE_ELEMENTS // n_tokens), n_tokens


def is_padded(head: Tensor) -> bool:
    """Whether the vocabulary is padded for the matrix products with the head [V, D]."""
    return head.is_cuda and head.shape[0] > SMALL_VOCABULARY


def product_matrix(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head [V, D] in the dtype of the matrix products, with rows of zeros up to V' where `is_padded`, [V', D]."""
    n_tokens = head.shape[0]
    n_padded = -n_tokens % PADDED_MULTIPLE if is_padded(head) else 0
    if not n_padded:
        return head.to(dtype)
    matrix = head.new_empty(n_tokens + n_padded, head.shape[1], dtype=dtype)
    matrix[:n_tokens] = head
    matrix[n_tokens:] = 0
    return matrix


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the dtype of its arguments, without autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def chunk_scorer(matrix: Tensor, n_tokens: int, n_rows: int, compiled: bool, with_gradient: bool = True) -> ChunkScorer:
    """The function that scores chunks of up to n_rows positions with a matrix of `product_matrix`.

    Args:
        n_tokens: V; the columns of padding get probability 0 and gradient 0.
        compiled: on a GPU with a large vocabulary, compile the softmax into fused kernels.
        with_gradient: NLL and confidence are the same with and without.
    """
    if not matrix.is_cuda and len(matrix) == n_tokens:
        # Allocated once: page faults on new memory cost more than the computation.
        buffer = torch.empty(n_rows, matrix.shape[0], dtype=torch.float32)
        gradient_buffer = None
        if with_gradient:
            gradient_buffer = buffer if matrix.dtype == buffer.dtype else torch.empty_like(buffer, dtype=matrix.dtype)
        return lambda states, target, weight: _score_in_tiles(matrix, buffer, gradient_buffer, states, target, weight)
    score = _compiled_softmax() if compiled and matrix.shape[0] > SMALL_VOCABULARY else _score_logits

    def score_states(states: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = plain_matmul(states, matrix.t())
        logits[:, n_tokens:] = -torch.inf
        return score(logits, target, weight, with_gradient)

    return score_states


def _score_logits(
    logits: Tensor, target: Tensor, weight: Tensor, with_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ChunkScorer`; from logits [n, V] in any float dtype.

    Overwrites float32 logits, and passes over them as few times as possible: this is bound by memory bandwidth.
    """
    wide = logits.float()
    largest, own = wide.amax(dim=1), wide.gather(1, target[:, None]).squeeze(1)
    exponentials = wide.sub_(largest[:, None]).exp_()
    total = exponentials.sum(dim=1)
    log_total = total.log()
    nll, confidence = (largest - own) + log_total, -log_total
    if not with_gradient:
        return nll, confidence, None
    # weight * (softmax - one-hot), from the exponentials in one pass.
    gradient = exponentials.mul_((weight / total)[:, None])
    gradient.scatter_add_(1, target[:, None], -weight[:, None])
    return nll, confidence, gradient.to(logits.dtype)


def _score_by_expressions(
    logits: Tensor, target: Tensor, weight: Tensor, with_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_score_logits` for the compiler, which fuses this to two reads of the logits and one write.

    Overwrites the logits with the gradient. A scatter would have the float32 gradient written to memory and read again,
    and only sums that keep their dimension are taken together with the maximum.
    """
    wide = logits.float()
    largest = wide.amax(dim=1, keepdim=True)
    exponentials = (wide - largest).exp()
    total = exponentials.sum(dim=1, keepdim=True)
    log_total = total.log()
    nll = (largest - wide.gather(1, target[:, None]) + log_total).squeeze(1)
    confidence = -log_total.squeeze(1)
    if not with_gradient:
        return nll, confidence, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == target[:, None]  # [n, V]
    gradient = exponentials * (weight[:, None] / total) - torch.where(is_target, weight[:, None], 0.0)
    return nll, confidence, logits.copy_(gradient)


@cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]:
    # For a number of rows, and again for any number, with the size of the vocabulary known.
    return torch.compile(_score_by_expressions)


def _score_in_tiles(
    matrix: Tensor, buffer: Tensor, gradient_buffer: Tensor | None, states: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ChunkScorer`; exponentials of each tile are relative to its own largest logit until all tiles are known.

    Args:
        buffer: float32 [at least n, V], overwritten.
        gradient_buffer: of that shape in the dtype of the matrix, may be `buffer` itself; receives the gradient. None:
            no gradient.
    """
    buffer = buffer[: len(states)]
    own = torch.empty(len(states), dtype=torch.float32)
    maxima, sums = [], []
    for start, rows in zip(range(0, len(matrix), TILE_TOKENS), matrix.split(TILE_TOKENS), strict=True):
        tile = buffer[:, start : start + TILE_TOKENS]  # [n, v]
        write_logits(states, rows, tile)
        own = take_own(tile, start, target, own)
        maxima.append(tile.amax(dim=1))
        sums.append(tile.sub_(maxima[-1][:, None]).exp_().sum(dim=1))
    largest, total, scale = combine_tiles(torch.stack(maxima), torch.stack(sums))
    log_total = total.log()
    nll, confidence = (largest - own) + log_total, -log_total
    if gradient_buffer is None:
        return nll, confidence, None
    gradient_buffer = gradient_buffer[: len(states)]
    factor = scale * (weight / total)  # [M, n]
    # Before it is rounded to the dtype of the matrix: near probability 1 the difference would cancel.
    own_factor = factor.gather(0, target[None] // TILE_TOKENS).squeeze(0)  # [n]
    own_gradient = buffer.gather(1, target[:, None]).squeeze(1) * own_factor - weight
    parts = zip(buffer.split(TILE_TOKENS, 1), gradient_buffer.split(TILE_TOKENS, 1), factor, strict=True)
    for exponentials, gradient, tile_factor in parts:
        torch.mul(exponentials, tile_factor[:, None], out=gradient)
    gradient_buffer.scatter_(1, target[:, None], own_gradient[:, None].to(gradient_buffer.dtype))
    return nll, confidence, gradient_buffer


def write_logits(states: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write the logits of states [n, D] for some rows [v, D] of the matrix to `out`, float32 [n, v]."""
    if rows.dtype == out.dtype:
        torch.mm(states, rows.t(), out=out)
    else:
        out.copy_(plain_matmul(states, rows.t()))


def take_own(tile: Tensor, start: int, tokens: Tensor, before: Tensor) -> Tensor:
    """`before` [n], with the logits of those of `tokens` that are in a tile.

    Args:
        tile: [n, v], logits of the tokens from `start` on.
        tokens: int64 [n], one for each position.
    """
    column = tokens - start
    inside = (column >= 0) & (column < tile.shape[1])
    own = tile.gather(1, column.clamp(0, tile.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(inside, own, before)


def combine_tiles(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit [n], sum of exp(logit - largest) [n], and the factor that rescales each tile's sum to it [M, n].

    Args:
        maxima: [M, n], largest logit of each tile.
        sums: [M, n], sum of exp(logit - largest logit of the tile).
    """
    largest = maxima.amax(dim=0)
    scale = (maxima - largest).exp()
    return largest, (sums * scale).sum(dim=0), scale
