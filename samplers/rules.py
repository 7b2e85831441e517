"""Which positions a pass writes and which it masks again: one function for each kind of `SamplingRule`.

To add a rule, write its function here and name it in `choose`.

Shapes: b rows in a pass, W positions that a pass may fill, k candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from config import SamplingRule
from model.token_predictions import TokenPredictions, hash_uniform, mix_keys
from unmasking import reveal_bounded, reveal_top

# KLASS: so many passes in a row must have moved a position's distribution by less than the bound.
STABLE_PASSES = 2


@dataclass(frozen=True)
class RuleInput:
    """What a rule sees of one pass."""

    masked: Tensor  # bool [b, W]
    maskable: Tensor  # bool [b, W], masked or filled by an earlier pass
    predicted: TokenPredictions  # of shape [b, W] instead of [N]; floats are -inf where nothing was predicted
    keys: Tensor | None  # int64 [b, W], random; None if `draws_numbers` is False
    memory: Tensor  # float32 [b, W], what the rule keeps from pass to pass; -inf before the first
    number: int  # of the pass among those over these positions, from 1


class Choice(NamedTuple):
    """What a pass changes. `model.token_predictions.predict_tokens` decides which token a written position gets."""

    written: Tensor  # bool [b, W], of the masked positions
    remasked: Tensor | None = None  # bool [b, W], of the filled positions; None: none
    memory: Tensor | None = None  # float32 [b, W], for the next pass; None: as it was


def choose(rule: SamplingRule, seen: RuleInput) -> Choice:
    """The choice of the rule."""
    if rule.revise == "remask":
        return remask(rule, seen)
    if rule.revise == "plan":
        return plan(rule, seen)
    if rule.revise == "running_confidence":
        return running_confidence(rule, seen)
    if rule.entropy_bound is not None:
        return bounded_entropy(rule, seen)
    return most_confident(rule, seen)


def most_confident(rule: SamplingRule, seen: RuleInput) -> Choice:
    """The best `tokens_per_step` positions, and all above `threshold` (Fast-dLLM, arXiv 2505.22618).

    With `kl_bound` a position above the threshold must also have come to rest (KLASS, Kim et al. 2025). Its memory is
    the number of passes for which a position has been at rest.
    """
    n_fill = torch.full((len(seen.masked),), rule.tokens_per_step, device=seen.masked.device)
    written = reveal_top(confidence_of(rule, seen), seen.masked, n_fill)
    if rule.threshold is None:
        return Choice(written)
    sure = seen.masked & (seen.predicted.log_prob > math.log(rule.threshold))
    if rule.kl_bound is None:
        return Choice(written | sure)
    assert seen.predicted.kl is not None
    at_rest = (seen.memory >= 0) & (seen.predicted.kl < rule.kl_bound)  # a first pass has nothing to compare with
    n_passes = torch.where(at_rest, seen.memory + 1, 0)
    return Choice(written | (sure & (n_passes >= STABLE_PASSES)), memory=n_passes)


def bounded_entropy(rule: SamplingRule, seen: RuleInput) -> Choice:
    """As many of the best positions as `entropy_bound` allows (EB-Sampler, arXiv 2505.24857)."""
    assert rule.entropy_bound is not None
    entropy = -seen.predicted.neg_entropy
    return Choice(reveal_bounded(confidence_of(rule, seen), entropy, seen.masked, rule.entropy_bound))


def remask(rule: SamplingRule, seen: RuleInput) -> Choice:
    """Mask the filled positions whose tokens were least probable when they were written (ReMDM, arXiv 2503.00307).

    Its memory is the log-probability of each token when it was written.
    """
    filled, target = seen.maskable & ~seen.masked, filled_after(rule, seen)
    n_filled = filled.sum(1)  # [b]
    share = (rule.remask_share * n_filled.double() - 1e-9).ceil().long()  # 0.07 * 100 is 7.000000000000001
    n_remasked = torch.minimum(share, seen.maskable.sum(1) - target)  # [b]
    written = reveal_top(seen.predicted.log_prob, seen.masked, target - n_filled + n_remasked)
    remasked = reveal_top(-seen.memory, filled, n_remasked)
    return Choice(written, remasked, torch.where(written, seen.predicted.log_prob, seen.memory))


def plan(rule: SamplingRule, seen: RuleInput) -> Choice:
    """Keep the positions of the most probable tokens, filled or predicted (self-planning P2, arXiv 2502.03540)."""
    assert seen.predicted.current_log_prob is not None
    log_prob = torch.where(seen.masked, seen.predicted.log_prob, seen.predicted.current_log_prob)
    return keep_best(rule, seen, log_prob)


def running_confidence(rule: SamplingRule, seen: RuleInput) -> Choice:
    """Keep the positions of the largest log-probability in any pass so far, its memory (MDPO, arXiv 2508.13148)."""
    largest = torch.maximum(seen.memory, seen.predicted.log_prob)
    return keep_best(rule, seen, largest)._replace(memory=largest)


def keep_best(rule: SamplingRule, seen: RuleInput, score: Tensor) -> Choice:
    """Leave the maskable positions of the highest scores (float32 [b, W]) filled, and all others masked."""
    kept = reveal_top(score, seen.maskable, filled_after(rule, seen))
    return Choice(kept & seen.masked, seen.maskable & ~seen.masked & ~kept)


def filled_after(rule: SamplingRule, seen: RuleInput) -> Tensor:
    """Number of maskable positions that a rule that revises leaves filled after this pass, int64 [b]."""
    assert rule.n_passes is not None
    return -(-seen.number * seen.maskable.sum(1) // rule.n_passes)  # rounded up


def confidence_of(rule: SamplingRule, seen: RuleInput) -> Tensor:
    """Confidence of each masked position, float32 [b, W]; higher is filled first."""
    if rule.confidence == "random":
        assert seen.keys is not None
        return hash_uniform(mix_keys(seen.keys, -1)).float()
    return seen.predicted.confidence(rule.confidence)


def draws_numbers(rule: SamplingRule) -> bool:
    """Whether a pass by this rule needs random keys."""
    return rule.temperature > 0 or rule.confidence == "random"
