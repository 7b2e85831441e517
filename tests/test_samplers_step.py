"""What samplers record of their passes, and when they draw random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_same_samples, random_generator, random_model
from torch import Tensor

from config import SamplingRule
from model.token_predictions import TokenPredictions
from samplers import step
from samplers.block import sample_blocks
from samplers.causal import sample_causal
from samplers.full import sample_full
from samplers.rules import RuleInput, choose
from samplers.step import Samples

MASK_ID, EOS = 22, 3
LENGTH, BLOCK, N_CANDIDATES = 12, 4, 5
GPU = torch.device("cuda")
TWO_PER_PASS = SamplingRule(tokens_per_step=2)


def prompts(seed: int = 0) -> Tensor:
    """Rows with a prompt at the start and a few given tokens elsewhere; the last row has nothing to fill."""
    generator = random_generator(seed)
    xt = torch.randint(MASK_ID, (5, LENGTH), generator=generator)
    masked = torch.rand(xt.shape, generator=generator) < 0.8
    masked[:, 0] = masked[-1] = False
    return xt.masked_fill(masked, MASK_ID)


SAMPLERS: dict[str, tuple[Callable[..., Samples], bool, SamplingRule]] = {
    "full": (sample_full, False, TWO_PER_PASS),
    "block": (partial(sample_blocks, block_size=BLOCK, eos_id=EOS), False, TWO_PER_PASS),
    "causal": (partial(sample_causal, eos_id=EOS), True, SamplingRule()),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def log_probs(name: str, model: Any, tokens: Tensor, position: int) -> Tensor:
    """Log-probabilities (float64 [V]) at a position of a row (int64 [L]) that a pass of the sampler sees in part."""
    with torch.no_grad():
        if name == "causal":
            logits = model.logits(tokens[None, :position])[0, -1]
        elif name == "block":
            logits = model.logits(tokens[None, : (position // BLOCK + 1) * BLOCK])[0, position]
        else:
            logits = model.logits(tokens[None])[0, position]
    logits[MASK_ID] = -torch.inf
    return oracle.log_softmax(logits)


@every_sampler
def test_a_record_tells_every_token_its_probability_and_the_candidates(name: str) -> None:
    sampler, causal, rule = SAMPLERS[name]
    model, xt = random_model(causal=causal), prompts()
    found = sampler(model, xt, MASK_ID, rule, record=N_CANDIDATES)
    n_after_the_end = 0
    for row in range(len(xt)):
        history, before = found.history(row), xt[row]
        assert len(history) == int(found.nfe[row])
        expected = torch.full((LENGTH,), torch.nan)
        for number, each in enumerate(history, 1):
            now = each.tokens[0]
            written = (now != before).nonzero().flatten().tolist()
            assert written
            assert all(int(found.order[row, position]) == number for position in written)
            for position in written:
                expected[position] = log_probs(name, model, before, position)[now[position]].exp()
            torch.testing.assert_close(each.confidence[0], expected, atol=1e-5, rtol=0, equal_nan=True)
            predicted = (each.candidates[0] >= 0).all(1)
            assert predicted[written].all()
            assert (before[predicted] == MASK_ID).all()
            assert (each.probabilities[0, ~predicted] == 0).all()
            for position in predicted.nonzero().flatten().tolist():
                log_p = log_probs(name, model, before, position)
                best = log_p.argsort(descending=True)[:N_CANDIDATES]
                assert each.candidates[0, position].tolist() == best.tolist()
                assert each.probabilities[0, position].tolist() == pytest.approx(log_p[best].exp().tolist(), abs=1e-5)
            before = now
        torch.testing.assert_close(found.confidence[row], expected, atol=1e-5, rtol=0, equal_nan=True)
        rest = found.tokens[row] != before
        assert (found.tokens[row, rest] == EOS).all()
        n_after_the_end += int(rest.sum())
    assert name == "full" or n_after_the_end > 0, "or EOS after the end is not tested"


@every_sampler
def test_recording_changes_nothing_and_nothing_is_recorded_unasked(name: str) -> None:
    sampler, causal, rule = SAMPLERS[name]
    model, xt = random_model(causal=causal), prompts()
    plain, recorded = sampler(model, xt, MASK_ID, rule), sampler(model, xt, MASK_ID, rule, record=0)
    assert plain.passes is None
    assert_same_samples(plain, recorded)
    assert recorded.passes
    assert all(each.candidates.shape[2] == 0 for each in recorded.passes)


RULES = {
    "margin": SamplingRule(confidence="top_prob_margin", tokens_per_step=2),
    "entropy": SamplingRule(confidence="neg_entropy"),
    "random": SamplingRule(confidence="random", tokens_per_step=2),
    "threshold": SamplingRule(threshold=0.3),
    "kl_bound": SamplingRule(threshold=0.2, kl_bound=0.5),
    "entropy_bound": SamplingRule(entropy_bound=2.0),
    "remask": SamplingRule(revise="remask", n_passes=6, remask_share=0.3),
    "plan": SamplingRule(revise="plan", n_passes=6),
    "running_confidence": SamplingRule(revise="running_confidence", n_passes=6),
    "temperature": SamplingRule(temperature=0.7),
}
ON_A_GPU = [(name, rule) for name in ("full", "block") for rule in RULES] + [("causal", "temperature")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "rule"), ON_A_GPU)
def test_a_gpu_samples_what_a_cpu_samples(name: str, rule: str) -> None:
    """Random numbers are a function of seed, row and position, on every device."""
    sampler, causal, _ = SAMPLERS[name]
    model, xt = random_model(causal=causal), prompts()
    expected = sampler(model, xt, MASK_ID, RULES[rule])
    found = sampler(model.to(GPU), xt.to(GPU), MASK_ID, RULES[rule])
    for part in ("tokens", "order", "nfe"):
        assert torch.equal(getattr(found, part).cpu(), getattr(expected, part)), part


def test_the_share_that_is_masked_again_is_not_rounded_up_by_an_error_of_its_product() -> None:
    """0.07 * 100 is 7.000000000000001."""
    rule = SamplingRule(revise="remask", n_passes=100, remask_share=0.07)
    masked = torch.arange(200)[None] >= 100
    log_prob = torch.zeros(1, 200)
    predicted = TokenPredictions(log_prob.long(), log_prob, log_prob, log_prob)
    seen = RuleInput(masked, torch.ones_like(masked), predicted, None, memory=log_prob, number=50)
    remasked = choose(rule, seen).remasked
    assert remasked is not None
    assert int(remasked.sum()) == 7


@pytest.mark.parametrize(
    ("rule", "draws"),
    [
        (SamplingRule(), False),
        (SamplingRule(temperature=0.5), True),
        (SamplingRule(confidence="random"), True),
        (SamplingRule(revise="remask", n_passes=4), False),
        (SamplingRule(revise="plan", n_passes=4, temperature=0.5), True),
    ],
)
def test_a_pass_makes_random_keys_only_for_a_rule_that_draws_numbers(
    rule: SamplingRule, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make_keys = step.noise_keys

    def counted(*arguments: Tensor) -> Tensor:
        made.append(make_keys(*arguments))
        return made[-1]

    monkeypatch.setattr(step, "noise_keys", counted)
    found = sample_full(random_model(), prompts(), MASK_ID, rule)
    assert len(made) == (int(found.nfe.max()) if draws else 0)
