"""What the fast code must compute, as plain loops over rows and positions in float64.

Written from docs/algorithm.md: slow, and meant to be read beside it. Nothing here imports the code under test.

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, float64."""
    return logits.double() - logits.double().logsumexp(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Scores:
    """Loss of a batch with everything that the fast head reports beside it."""

    loss: float
    nll: Tensor  # float64 [B, L], 0 where weight is 0
    max_log_prob: Tensor  # float64 [B, L], -inf where weight is 0
    confidence: Tensor  # float64 [B, L], by the rule, -inf where weight is 0
    grad_logits: Tensor  # float64 [B, L, V], d loss / d logits


def score_batch(logits: Tensor, x0: Tensor, weight: Tensor, rule: str = "top_prob") -> Scores:
    """Loss = sum over positions of weight * -log p(x0), from dense logits [B, L, V].

    The confidence is that of the sampler's rule, but the mask token counts as any other. The derivative of -log p(x0)
    by the logits is (softmax - one hot of x0).
    """
    log_p = log_softmax(logits)
    loss = 0.0
    nll = torch.zeros(x0.shape, dtype=torch.float64)
    max_log_prob, confidence = torch.full((2, *x0.shape), -torch.inf, dtype=torch.float64)
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    for row in range(x0.shape[0]):
        for position in range(x0.shape[1]):
            w, token = float(weight[row, position]), int(x0[row, position])
            if w == 0:
                continue
            nll[row, position] = -log_p[row, position, token]
            max_log_prob[row, position] = log_p[row, position].max()
            confidence[row, position] = prediction(logits[row, position], None)[1][rule]
            loss += w * float(nll[row, position])
            gradient[row, position] = w * log_p[row, position].exp()
            gradient[row, position, token] -= w
    return Scores(loss, nll, max_log_prob, confidence, gradient)


def weights_of(masked: Tensor, n_rows: int) -> Tensor:
    """1 / (number masked in the row * B) on masked positions, else 0; float64 [B, L]."""
    weight = torch.zeros(masked.shape, dtype=torch.float64)
    for row in range(masked.shape[0]):
        places = [position for position in range(masked.shape[1]) if masked[row, position]]
        for position in places:
            weight[row, position] = 1.0 / (len(places) * n_rows)
    return weight


def possible_targets(stage: int, n_stages: int, n_maskable: int) -> list[int]:
    """Every count that round(ratio * n_maskable), ratio in [stage / K, (stage + 1) / K), can give; at most
    n_maskable - 1."""
    lowest = round(Fraction(stage, n_stages) * n_maskable)
    highest = math.ceil(Fraction(stage + 1, n_stages) * n_maskable - Fraction(1, 2))  # the end is not in the interval
    return sorted({min(target, n_maskable - 1) for target in range(lowest, highest + 1)})


def target_probability(target: int, stage: int, n_stages: int, n_maskable: int) -> float:
    """Chance that a row at `stage` is given this target."""
    start, end = Fraction(stage, n_stages) * n_maskable, Fraction(stage + 1, n_stages) * n_maskable
    low, high = target - Fraction(1, 2), target + Fraction(1, 2)
    if target == n_maskable - 1:
        high = max(high, end)  # what would be more is cut to n_maskable - 1
    overlap = max(Fraction(0), min(end, high) - max(start, low))
    return float(overlap / (end - start))


def stage_of_ratio(n_revealed: int, n_maskable: int, n_stages: int) -> int:
    """The stage j with revealed ratio in [j / K, (j + 1) / K)."""
    ratio = Fraction(n_revealed, n_maskable)
    for stage in range(n_stages):
        if Fraction(stage, n_stages) <= ratio < Fraction(stage + 1, n_stages):
            return stage
    return n_stages - 1  # all revealed


def most_confident(confidence: Tensor, candidates: set[int], n: int) -> set[int]:
    """The n candidates of highest confidence in one row ([L]); ties go to the earlier position."""
    ranked = sorted(candidates, key=lambda position: (-float(confidence[position]), position))
    return set(ranked[: max(n, 0)])


@dataclass(frozen=True)
class Transition:
    """Where one row of the pool stands after a step."""

    masked: frozenset[int]
    stage: int
    finished: bool


def advance_row(
    masked: set[int],
    n_maskable: int,
    stage: int,
    confidence: Tensor,
    max_log_prob: Tensor,
    target: int,
    n_stages: int,
    collapse_threshold: float | None,
) -> Transition:
    """Steps 3 and 4 for one row whose new stage draws `target`.

    The confidence ([L], by any rule) chooses up to the target, the largest probability is compared with the threshold.

    Where the threshold reveals more than the target does, the stage is that of the row's revealed ratio, but never
    below stage + 1: where n_maskable is small the rounded counts fall short of the stage's interval, and a row sent
    back by them might never retire.
    """
    stage += 1
    if stage == n_stages:
        return Transition(frozenset(masked), stage, finished=True)
    reveal = most_confident(confidence, masked, target - (n_maskable - len(masked)))
    collapsed = set()
    if collapse_threshold is not None:
        sure = {position for position in masked if math.exp(float(max_log_prob[position])) > collapse_threshold}
        collapsed = sure - reveal
    left = frozenset(masked - reveal - collapsed)
    if collapsed:
        stage = max(stage, stage_of_ratio(n_maskable - len(left), n_maskable, n_stages))
    return Transition(left, stage, finished=not left)


def prediction(logits: Tensor, mask_id: int | None) -> tuple[int, dict[str, float]]:
    """The most probable token at one position (logits [V]) and its confidence by each rule.

    The mask token, if one is given, is struck out before probabilities are taken.
    """
    allowed = [token for token in range(len(logits)) if token != mask_id]
    log_p = dict(zip(allowed, log_softmax(logits[allowed]).tolist(), strict=True))
    ranked = sorted(allowed, key=lambda token: -log_p[token])
    best, second = math.exp(log_p[ranked[0]]), math.exp(log_p[ranked[1]])
    return ranked[0], {
        "top_prob": log_p[ranked[0]],
        "top_prob_margin": best - second,
        "neg_entropy": sum(math.exp(value) * value for value in log_p.values()),
    }


@dataclass(frozen=True)
class SampledRow:
    """What sampling makes of one row."""

    tokens: list[int]
    order: list[int]  # step at which a position was filled, from 1; 0 where it was given
    nfe: int


def sample_row(
    logits_of: Callable[[Tensor], Tensor],
    xt: Tensor,
    mask_id: int,
    rule: str,
    tokens_per_step: int = 1,
    threshold: float | None = None,
    *,
    kl_bound: float | None = None,
    entropy_bound: float | None = None,
) -> SampledRow:
    """Fill one row (int64 [L]) at temperature 0; `logits_of` maps [1, L] to [1, L, V]."""
    tokens, order, nfe = xt.tolist(), [0] * len(xt), 0
    last: dict[int, Tensor] = {}  # log-probabilities of the last pass
    moved: dict[int, list[float]] = {}  # divergence between passes, of all passes so far
    while mask_id in tokens:
        nfe += 1
        logits = logits_of(torch.tensor([tokens]))[0]
        masked = [position for position, token in enumerate(tokens) if token == mask_id]
        found = {position: prediction(logits[position], mask_id) for position in masked}
        for position in masked:
            log_p = log_softmax(allowed(logits[position], mask_id))
            if position in last:
                pairs = zip(log_p.tolist(), last[position].tolist(), strict=True)
                moved.setdefault(position, []).append(sum(math.exp(p) * (p - q) for p, q in pairs if p > -1e9))
            last[position] = log_p
        ranked = sorted(masked, key=lambda position: (-found[position][1][rule], position))
        bounded = True
        for rank, position in enumerate(ranked):
            token, confidence = found[position]
            if entropy_bound is not None:
                entropies = [-found[each][1]["neg_entropy"] for each in ranked[: rank + 1]]
                bounded = bounded and sum(entropies) - max(entropies) <= entropy_bound
                fills = bounded
            else:
                fills = threshold is not None and math.exp(confidence["top_prob"]) > threshold
                if kl_bound is not None:
                    recent = moved.get(position, [])[-2:]
                    fills = fills and len(recent) == 2 and max(recent) < kl_bound
                fills = fills or rank < tokens_per_step
            if fills:
                tokens[position], order[position] = token, nfe
    return SampledRow(tokens, order, nfe)


def sample_row_revising(
    logits_of: Callable[[Tensor], Tensor],
    xt: Tensor,
    mask_id: int,
    revise: str,
    n_passes: int,
    remask_share: float,
) -> SampledRow:
    """The same by a rule that masks filled positions again."""
    tokens, order, nfe = xt.tolist(), [0] * len(xt), 0
    places = [position for position, token in enumerate(tokens) if token == mask_id]
    written: dict[int, float] = {}  # log-probability of each token when it was written
    largest = dict.fromkeys(places, -math.inf)
    while mask_id in tokens:
        nfe += 1
        logits = logits_of(torch.tensor([tokens]))[0]
        masked = [position for position in places if tokens[position] == mask_id]
        filled = [position for position in places if tokens[position] != mask_id]
        found = {position: prediction(logits[position], mask_id) for position in masked}
        score = {position: found[position][1]["top_prob"] for position in masked}
        largest |= {position: max(largest[position], score[position]) for position in masked}
        n_target = math.ceil(nfe * len(places) / n_passes)
        if revise == "remask":
            n_again = min(math.ceil(Fraction(str(remask_share)) * len(filled)), len(places) - n_target)
            again = sorted(filled, key=lambda position: (written[position], position))[:n_again]
            n_new = n_target - len(filled) + len(again)
            new = sorted(masked, key=lambda position: (-score[position], position))[:n_new]
        else:
            if revise == "plan":
                for position in filled:
                    score[position] = float(log_softmax(allowed(logits[position], mask_id))[tokens[position]])
            else:
                score = largest
            kept = sorted(places, key=lambda position: (-score[position], position))[:n_target]
            new = [position for position in masked if position in kept]
            again = [position for position in filled if position not in kept]
        for position in again:
            tokens[position], order[position] = mask_id, 0
        for position in new:
            tokens[position], order[position] = found[position][0], nfe
            written[position] = found[position][1]["top_prob"]
    return SampledRow(tokens, order, nfe)


def allowed(logits: Tensor, mask_id: int) -> Tensor:
    """Logits [V] without the mask token."""
    return logits.index_fill(0, torch.tensor(mask_id), -1e30)
