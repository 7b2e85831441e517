"""Which positions are revealed, and the baseline's masks and weights."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import assert_distribution, random_generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmasking import mask_uniformly, reveal_bounded, reveal_random, reveal_top, row_weights

SEEDS = st.integers(0, 2**32)


def random_candidates(n_rows: int, length: int, seed: int) -> Tensor:
    """Rows of every kind, from no candidate to all."""
    generator = random_generator(seed)
    share = torch.rand(n_rows, 1, generator=generator) * 1.4 - 0.2
    return torch.rand(n_rows, length, generator=generator) < share


def random_maskable(n_rows: int, length: int, seed: int) -> Tensor:
    """The same with at least one position in each row."""
    maskable = random_candidates(n_rows, length, seed)
    maskable[torch.arange(n_rows), torch.randint(length, (n_rows,), generator=random_generator(seed))] = True
    return maskable


@given(SEEDS, st.integers(1, 5), st.integers(1, 20), st.integers(1, 6))
@settings(max_examples=60)
def test_reveal_top_equals_the_oracle(seed: int, n_rows: int, length: int, n_values: int) -> None:
    """Also with many ties (n_values distinct confidences) and with confidences of -inf."""
    generator = random_generator(seed)
    candidates = random_candidates(n_rows, length, seed)
    confidence = -torch.randint(n_values, (n_rows, length), generator=generator).float()
    confidence[confidence == 1 - n_values] = -torch.inf
    n_reveal = torch.randint(-2, length + 3, (n_rows,), generator=generator)
    revealed = reveal_top(confidence, candidates, n_reveal)
    for row in range(n_rows):
        places = set(candidates[row].nonzero().flatten().tolist())
        expected = oracle.most_confident(confidence[row], places, int(n_reveal[row]))
        assert set(revealed[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_candidate_of_confidence_minus_infinity_comes_before_what_is_no_candidate(dtype: torch.dtype) -> None:
    confidence = torch.tensor([[0.0, -torch.inf, -1.0]], dtype=dtype)
    candidates = torch.tensor([[False, True, False]])
    assert reveal_top(confidence, candidates, torch.tensor([1])).tolist() == [[False, True, False]]


@given(SEEDS, st.integers(1, 5), st.integers(1, 20), st.sampled_from([0.0, 0.3, 1.0, 1e9]))
@settings(max_examples=60)
def test_reveal_bounded_takes_as_many_as_the_bound_allows(seed: int, n_rows: int, length: int, bound: float) -> None:
    """Also where the entropies do not rise in the order of the confidences."""
    generator = random_generator(seed)
    candidates = random_candidates(n_rows, length, seed)
    confidence, entropy = torch.randn((2, n_rows, length), generator=generator)
    entropy = entropy.abs()
    revealed = reveal_bounded(confidence, entropy, candidates, bound)
    for row in range(n_rows):
        places = sorted(candidates[row].nonzero().flatten().tolist(), key=lambda place: -float(confidence[row, place]))
        n = 0
        while n < len(places):
            run = [float(entropy[row, place]) for place in places[: n + 1]]
            if sum(run) - max(run) > bound:
                break
            n += 1
        assert set(revealed[row].nonzero().flatten().tolist()) == set(places[:n])
        assert n >= min(1, len(places))


@given(SEEDS, st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=60)
def test_reveal_random_marks_exactly_so_many_candidates(seed: int, n_rows: int, length: int) -> None:
    candidates = random_candidates(n_rows, length, seed)
    n_reveal = torch.randint(-2, length + 3, (n_rows,), generator=random_generator(seed))
    revealed = reveal_random(candidates, n_reveal, random_generator(seed + 1))
    assert not (revealed & ~candidates).any()
    assert torch.equal(revealed.sum(1), torch.minimum(n_reveal.clamp(min=0), candidates.sum(1)))


def test_reveal_random_gives_every_subset_the_same_chance() -> None:
    n_draws = 20_000
    candidates = torch.tensor([True, False, True, True, True, False]).expand(n_draws, -1)
    revealed = reveal_random(candidates, torch.full((n_draws,), 2), random_generator(3))
    _, counts = (revealed.long() @ (2 ** torch.arange(6))).unique(return_counts=True)  # subsets as binary numbers
    assert len(counts) == 6
    assert_distribution(counts, torch.full((6,), 1 / 6))


@given(SEEDS, st.integers(1, 6), st.integers(1, 20), st.booleans())
@settings(max_examples=60)
def test_uniform_masks_hide_at_least_one_position_and_never_a_prompt(
    seed: int, n_rows: int, length: int, low_discrepancy: bool
) -> None:
    maskable = random_maskable(n_rows, length, seed)
    masked = mask_uniformly(maskable, random_generator(seed + 1), low_discrepancy=low_discrepancy)
    assert masked.dtype == torch.bool
    assert masked.any(1).all()
    assert not (masked & ~maskable).any()


@pytest.mark.parametrize("n_maskable", [1, 2, 7, 12])
def test_uniform_masks_hide_every_number_from_1_to_all_equally_often(n_maskable: int) -> None:
    n_draws = 24_000
    maskable = (torch.arange(15) >= 15 - n_maskable).expand(n_draws, -1)
    counts = mask_uniformly(maskable, random_generator(n_maskable)).sum(1).bincount(minlength=n_maskable + 2)
    assert counts[0] == counts[-1] == 0
    if n_maskable > 1:
        assert_distribution(counts[1:-1], torch.full((n_maskable,), 1 / n_maskable))


def test_uniform_masks_hide_every_position_equally_often_whatever_their_number() -> None:
    maskable = torch.tensor([True, False, True, True, True, True]).expand(30_000, -1)
    masked = mask_uniformly(maskable, random_generator(5))
    for n_masked in range(1, 5):
        counts = masked[masked.sum(1) == n_masked].sum(0)
        # Counts of n positions out of m vary less than independent ones, so the bound holds the more.
        assert_distribution(counts, maskable[0].float())


@given(SEEDS, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60)
def test_masks_of_low_discrepancy_hide_each_number_as_often_as_any_other(seed: int, n_rows: int, n: int) -> None:
    """Of B rows with n maskable positions B / n hide each number, rounded up or down."""
    masked = mask_uniformly(torch.ones(n_rows, n, dtype=torch.bool), random_generator(seed), low_discrepancy=True)
    counts = masked.sum(1).bincount(minlength=n + 1)[1:]
    assert counts.sum() == n_rows
    assert ((counts == n_rows // n) | (counts == -(-n_rows // n))).all()


def test_masks_of_low_discrepancy_are_uniform_in_each_row() -> None:
    """In the number that a row hides and, as without, in the positions, whatever the other rows have."""
    maskable = torch.arange(6) < torch.tensor([[6], [4], [3]])
    generator = random_generator(7)
    draws = torch.stack([mask_uniformly(maskable, generator, low_discrepancy=True) for _ in range(12_000)])  # [N, 3, 6]
    for row, n_maskable in enumerate((6, 4, 3)):
        counts = draws[:, row].sum(1).bincount(minlength=7)
        assert_distribution(counts[1 : n_maskable + 1], torch.full((n_maskable,), 1 / n_maskable))
        alone = draws[:, row][draws[:, row].sum(1) == 1]
        assert_distribution(alone.sum(0)[:n_maskable], torch.full((n_maskable,), 1 / n_maskable))


@given(SEEDS, st.integers(1, 6), st.integers(1, 20))
@settings(max_examples=60)
def test_row_weights_equal_the_oracle_and_sum_to_1(seed: int, n_rows: int, length: int) -> None:
    masked = random_maskable(n_rows, length, seed)
    weight = row_weights(masked, n_rows)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), oracle.weights_of(masked, n_rows), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.double().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_row_weights_of_a_part_of_the_batch_are_those_of_the_whole() -> None:
    masked = random_maskable(6, 9, seed=1)
    assert torch.equal(row_weights(masked[2:5], 6), row_weights(masked, 6)[2:5])


def test_a_row_with_nothing_masked_weighs_nothing() -> None:
    masked = torch.tensor([[False, False], [True, True]])
    assert row_weights(masked, 2).tolist() == [[0.0, 0.0], [0.25, 0.25]]


def test_random_numbers_are_those_of_the_generator():
    """Checkpoints save it, and nothing else that draws."""
    maskable = torch.ones(8, 16, dtype=torch.bool)
    n_reveal = torch.full((8,), 5)
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        generator = random_generator(0)
        draws.append((mask_uniformly(maskable, generator), reveal_random(maskable, n_reveal, generator)))
    assert all(torch.equal(one, other) for one, other in zip(*draws, strict=True))
