"""The PUMA pool: stages, transitions against the oracle, and the invariants of docs/algorithm.md."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from helpers import NumberedRows, assert_distribution, numbered_rows, random_generator, random_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import PumaSettings
from data.row_queue import RowQueue
from data.stream import SequenceStream
from progressive import PumaPool, Rows, draw_target, reveal_next_stage, stage_of
from progressive_block import BlockLayout

SEEDS = st.integers(0, 2**32)
STAGES = st.integers(1, 12)
SEGMENTS = st.sampled_from([1, 2, 3])  # of the 12 positions of a row; some hold prompts alone
THRESHOLDS = st.sampled_from([None, 0.1, 0.5, 0.9, 1.0])
BATCHES = st.integers(1, 3)  # in the pool
ORDERS = st.sampled_from(["top_prob", "another rule", "random"])  # the pool does not know rules apart


def make_pool(
    n_rows: int = 8,
    n_stages: int = 4,
    collapse_threshold: float | None = None,
    seed: int = 0,
    data: NumberedRows | None = None,
    n_segments: int = 1,
    n_batches: int = 1,
) -> PumaPool:
    """A pool over numbered rows."""
    queue = RowQueue(SequenceStream(data or numbered_rows(23, 12, seed), seed), n_rows, torch.device("cpu"))
    settings = PumaSettings(
        name="puma", n_stages=n_stages, collapse_threshold=collapse_threshold, pool_batches=n_batches
    )
    length = queue.stream.data.length
    layout = BlockLayout(length, length // n_segments, "prefix")
    return PumaPool(settings, queue, layout, n_rows=n_rows, generator=random_generator(seed + 1))


def random_confidences(masked: Tensor, seed: int, order: str) -> tuple[Tensor | None, Tensor]:
    """Random confidences and max log-probabilities ([B, L]); -inf where nothing is masked, as in training."""
    max_log_prob = random_log_probs(tuple(masked.shape), seed).masked_fill(~masked, -torch.inf)
    if order == "random":
        return None, max_log_prob
    if order == "top_prob":
        return max_log_prob, max_log_prob
    other = torch.rand(masked.shape, generator=random_generator(seed + 1))  # of another range, as a margin
    return other.masked_fill(~masked, -torch.inf), max_log_prob


def step(pool: PumaPool, seed: int, order: str = "top_prob") -> tuple[Tensor | None, Tensor]:
    """One training step with `random_confidences`, which it returns."""
    _, _, masked = pool.batch()
    confidence, max_log_prob = random_confidences(masked, seed, order)
    pool.advance(confidence, max_log_prob)
    pool.queue.top_up()
    return confidence, max_log_prob


def row_numbers(x0: Tensor) -> list[int]:
    """Which rows of the data these are."""
    return x0[:, 0].tolist()


def places(mask: Tensor) -> set[int]:
    """Positions where a row's mask [L] is True."""
    return set(mask.nonzero().flatten().tolist())


# Targets and stages


@given(SEEDS, STAGES, st.integers(1, 40))
@settings(max_examples=60)
def test_targets_are_those_of_the_stage_and_leave_one_position_masked(seed: int, n_stages: int, n: int) -> None:
    stage = torch.arange(n_stages).repeat(20)
    target = draw_target(stage, n_stages, torch.full_like(stage, n), random_generator(seed))
    assert target.dtype == torch.int64
    for j, count in zip(stage.tolist(), target.tolist(), strict=True):
        assert count in oracle.possible_targets(j, n_stages, n)
        assert 0 <= count <= n - 1


@pytest.mark.parametrize(
    ("stage", "n_stages", "n_maskable"), [(0, 4, 10), (2, 4, 10), (3, 4, 10), (7, 8, 81), (0, 1, 6)]
)
def test_targets_have_the_distribution_of_a_uniform_ratio(stage: int, n_stages: int, n_maskable: int) -> None:
    n_draws = 20_000
    full = torch.full((n_draws,), stage)
    counts = draw_target(full, n_stages, torch.full_like(full, n_maskable), random_generator(2)).bincount(
        minlength=n_maskable
    )
    expected = [oracle.target_probability(target, stage, n_stages, n_maskable) for target in range(n_maskable)]
    assert math.isclose(sum(expected), 1)
    assert_distribution(counts, torch.tensor(expected))


def test_stages_of_all_counts_equal_the_oracle() -> None:
    for n_stages in range(1, 14):
        for n in range(1, 30):
            revealed = torch.arange(n + 1)
            expected = [oracle.stage_of_ratio(count, n, n_stages) for count in range(n + 1)]
            assert stage_of(revealed, torch.full_like(revealed, n), n_stages).tolist() == expected


# One transition


@given(SEEDS, st.integers(1, 6), st.integers(1, 20), STAGES, THRESHOLDS, ORDERS)
@settings(max_examples=200)
def test_advance_equals_the_oracle(
    seed: int, n_rows: int, length: int, n_stages: int, collapse_threshold: float | None, order: str
) -> None:
    generator = random_generator(seed)
    maskable = torch.rand(n_rows, length, generator=generator) < 0.7
    maskable[:, 0] = True
    masked = maskable & (torch.rand(n_rows, length, generator=generator) < 0.7)
    masked[:, 0] = True
    stage = torch.randint(n_stages, (n_rows,), generator=generator)
    confidence, max_log_prob = random_confidences(masked, seed + 1, order)
    after, new_stage, finished = reveal_next_stage(
        masked.clone(),
        stage.clone(),
        maskable,
        confidence,
        max_log_prob,
        n_stages=n_stages,
        collapse_threshold=collapse_threshold,
        generator=generator,
    )
    confidence = outcome(masked & ~after, max_log_prob, collapse_threshold) if confidence is None else confidence
    for row in range(n_rows):
        n, j = int(maskable[row].sum()), int(stage[row])
        if j + 1 == n_stages:
            assert finished[row]
            continue
        possible = [
            oracle.advance_row(
                places(masked[row]), n, j, confidence[row], max_log_prob[row], target, n_stages, collapse_threshold
            )
            for target in oracle.possible_targets(j + 1, n_stages, n)
        ]
        found = oracle.Transition(frozenset(places(after[row])), int(new_stage[row]), bool(finished[row]))
        assert found in possible


def outcome(revealed: Tensor, max_log_prob: Tensor, collapse_threshold: float | None) -> Tensor:
    """Confidences with which the oracle reveals what a random order has revealed ([B, L]), if any order can.

    What is above the threshold is revealed in any order, so the target has chosen what is not first of all.
    """
    sure = max_log_prob.exp() > (2 if collapse_threshold is None else collapse_threshold)
    return revealed + (revealed & ~sure).float()


def test_without_a_threshold_only_the_target_is_revealed() -> None:
    """However sure the model is."""
    masked = torch.ones(1, 100, dtype=torch.bool)
    after, stage, finished = reveal_next_stage(
        masked,
        torch.tensor([0]),
        masked,
        torch.zeros(1, 100),
        torch.zeros(1, 100),
        n_stages=10,
        collapse_threshold=None,
        generator=random_generator(0),
    )
    assert 10 <= 100 - int(after.sum()) <= 20
    assert (stage.item(), finished.item()) == (1, False)


@pytest.mark.parametrize("order", ["top_prob", "another rule"])
def test_a_threshold_reveals_all_above_it_and_sets_the_stage_from_the_ratio(order: str) -> None:
    """70 of 100 positions are above tau, which is stage 7 of 10 though the row came from stage 0.

    Tau is compared with the largest probability, whatever the rule that chooses the 10 to 20 of the target.
    """
    masked = torch.ones(1, 100, dtype=torch.bool)
    max_log_prob = torch.where(torch.arange(100) < 70, 0.91, 0.89).log()[None]
    confidence = max_log_prob if order == "top_prob" else -4.0 * torch.arange(100)[None]
    after, stage, finished = reveal_next_stage(
        masked,
        torch.tensor([0]),
        masked,
        confidence,
        max_log_prob,
        n_stages=10,
        collapse_threshold=0.9,
        generator=random_generator(0),
    )
    assert places(after[0]) == set(range(70, 100))
    assert (stage.item(), finished.item()) == (7, False)


def test_a_threshold_of_1_reveals_nothing_more() -> None:
    """No probability exceeds 1, not even that of a model which is sure."""
    masked = torch.ones(1, 100, dtype=torch.bool)
    after, _, finished = reveal_next_stage(
        masked,
        torch.tensor([0]),
        masked,
        torch.zeros(1, 100),
        torch.zeros(1, 100),
        n_stages=10,
        collapse_threshold=1.0,
        generator=random_generator(0),
    )
    assert int(after.sum()) >= 80
    assert not finished.item()


def test_a_random_order_reveals_every_position_equally_often() -> None:
    """In one stage of rows of 20 positions. A threshold still reveals by the largest probability."""
    n_rows, length = 4000, 20
    masked = torch.ones(n_rows, length, dtype=torch.bool)
    for collapse_threshold, n_sure in ((None, 0), (0.9, 5)):
        sure = torch.arange(length) < n_sure
        max_log_prob = torch.where(sure, 0.0, -1.0 - torch.arange(length)).expand(n_rows, -1)
        after, _, _ = reveal_next_stage(
            masked,
            torch.zeros(n_rows, dtype=torch.long),
            masked,
            None,
            max_log_prob,
            n_stages=4,
            collapse_threshold=collapse_threshold,
            generator=random_generator(0),
        )
        n_masked = after.sum(0)[n_sure:]
        assert not after[:, :n_sure].any()
        assert_distribution(n_masked, torch.full((len(n_masked),), 1 / len(n_masked)))
        n_revealed = length - after[:, n_sure:].sum(1) - n_sure
        assert n_revealed.float().mean().item() == pytest.approx(7.5 * (length - n_sure) / length, abs=0.2)


def test_redrawn_masks_do_not_depend_on_the_masks_before() -> None:
    """Rows of 20 maskable positions and 4 of the prompt, of which the first 10 have been revealed, at stage 2 of 4."""
    n_rows, length = 4000, 24
    maskable = (torch.arange(length) < 20).expand(n_rows, -1)
    after, stage, finished = reveal_next_stage(
        maskable & (torch.arange(length) >= 10),
        torch.ones(n_rows, dtype=torch.long),
        maskable,
        None,
        torch.zeros(n_rows, length),
        n_stages=4,
        collapse_threshold=None,
        generator=random_generator(0),
        redraw=True,
    )
    assert not after[:, 20:].any()
    assert_distribution(after[:, :20].sum(0), torch.full((20,), 1 / 20))
    n_revealed = 20 - after.sum(1)
    assert (n_revealed.min(), n_revealed.max()) == (10, 15)  # ratios from 2/4 to 3/4
    assert n_revealed.float().mean().item() == pytest.approx(12.5, abs=0.1)
    assert (stage == 2).all()
    assert not finished.any()


def test_a_short_row_is_never_sent_back_by_its_ratio() -> None:
    """One maskable position stays masked at every stage, so its ratio is always 0: it must retire after K steps."""
    masked, stage = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0])
    for expected in range(1, 5):
        masked, stage, finished = reveal_next_stage(
            masked,
            stage,
            torch.ones(1, 1, dtype=torch.bool),
            torch.full((1, 1), -9.0),
            torch.full((1, 1), -9.0),
            n_stages=4,
            collapse_threshold=0.9,
            generator=random_generator(0),
        )
        assert finished.item() == (expected == 4)


# The pool


@given(SEEDS, st.integers(1, 9), STAGES, THRESHOLDS, SEGMENTS, BATCHES, ORDERS)
@settings(max_examples=60)
def test_prompts_never_change_and_every_row_has_a_masked_position(
    seed: int, n_rows: int, n_stages: int, collapse_threshold: float | None, n_segments: int, n_batches: int, order: str
) -> None:
    """`x0` is at every moment a row of the data, and what is masked lies off its prompt."""
    data = numbered_rows(23, 12, seed % 1000)
    pool = make_pool(n_rows, n_stages, collapse_threshold, seed, data, n_segments, n_batches)
    for number in range(3 * n_stages):
        tokens, prompt_mask = data.rows(np.array(row_numbers(pool.rows.x0)))
        assert np.array_equal(pool.rows.x0.numpy(), tokens)
        assert np.array_equal(pool.rows.maskable.numpy(), ~prompt_mask)
        assert not (pool.rows.masked & ~pool.rows.maskable).any()
        assert pool.rows.masked.any(1).all()
        stage = pool.rows.stage.flatten()
        in_flight = pool.rows.masked.view(n_batches * n_rows * n_segments, -1).any(1)
        assert ((stage >= 0) & (stage < n_stages))[in_flight].all()
        assert (stage == n_stages)[~in_flight].all()
        step(pool, seed + number, order)


@given(SEEDS, STAGES, THRESHOLDS, SEGMENTS, BATCHES, ORDERS)
@settings(max_examples=60)
def test_every_transition_of_the_pool_is_one_of_the_oracles(
    seed: int, n_stages: int, collapse_threshold: float | None, n_segments: int, n_batches: int, order: str
) -> None:
    """Segments of rows that stay follow the oracle; a row leaves if and only if the oracle lets all of them finish."""
    pool = make_pool(6, n_stages, collapse_threshold, seed, n_segments=n_segments, n_batches=n_batches)
    for number in range(2 * n_stages * n_batches):
        batch = slice(number % n_batches * 6, (number % n_batches + 1) * 6)
        before = rows_at(pool, batch)
        confidence, max_log_prob = step(pool, seed + number, order)
        assert_transitions_of_the_oracle(pool, before, rows_at(pool, batch), confidence, max_log_prob)


def rows_at(pool: PumaPool, where: slice) -> Rows:
    """Copies of some rows of a pool."""
    return pool.rows.take(torch.arange(len(pool.rows.age))[where])


def assert_transitions_of_the_oracle(
    pool: PumaPool, before: Rows, after: Rows, confidence: Tensor | None, max_log_prob: Tensor
) -> None:
    """What an update may make of a batch of the pool, given what it observed ([B, L]) at its masked positions."""
    n_segments, n_stages = pool.layout.n_blocks, pool.n_stages
    if confidence is None:
        left = after.masked & (after.age > 0)[:, None]
        confidence = outcome(before.masked & ~left, max_log_prob, pool.settings.collapse_threshold)
    for row, stayed in enumerate((after.age > 0).tolist()):
        possible = possible_transitions(
            before.masked[row].view(n_segments, -1),
            before.stage[row].tolist(),
            before.maskable[row].view(n_segments, -1),
            confidence[row].view(n_segments, -1),
            max_log_prob[row].view(n_segments, -1),
            n_stages,
            pool.settings.collapse_threshold,
        )
        if not stayed:
            assert all(any(transition.finished for transition in segment) for segment in possible)
            continue
        assert torch.equal(after.x0[row], before.x0[row])
        assert after.masked[row].any()
        segments = zip(possible, after.masked[row].view(n_segments, -1), after.stage[row], strict=True)
        for transitions, left, new_stage in segments:
            if left.any():
                assert oracle.Transition(frozenset(places(left)), int(new_stage), finished=False) in transitions
            else:
                assert new_stage == n_stages
                assert any(transition.finished for transition in transitions)


def possible_transitions(
    masked: Tensor,
    stage: list[int],
    maskable: Tensor,
    confidence: Tensor,
    max_log_prob: Tensor,
    n_stages: int,
    collapse_threshold: float | None,
) -> list[list[oracle.Transition]]:
    """What each segment of a row ([S, L / S]) may become; a segment that has finished stays so."""
    found = []
    for segment, j in enumerate(stage):
        n = int(maskable[segment].sum())
        if j == n_stages:
            found.append([oracle.Transition(frozenset(), j, finished=True)])
            continue
        found.append(
            [
                oracle.advance_row(
                    places(masked[segment]),
                    n,
                    j,
                    confidence[segment],
                    max_log_prob[segment],
                    target,
                    n_stages,
                    collapse_threshold,
                )
                for target in oracle.possible_targets(min(j + 1, n_stages - 1), n_stages, n)
            ]
        )
    return found


@given(SEEDS, THRESHOLDS, ORDERS)
@settings(max_examples=40)
def test_what_is_revealed_stays_revealed(seed: int, collapse_threshold: float | None, order: str) -> None:
    pool = make_pool(6, 5, collapse_threshold, seed)
    for number in range(12):
        if number == 7:
            pool.set_n_stages(9)
        masked = pool.rows.masked.clone()
        step(pool, seed + number, order)
        stayed = pool.rows.age > 0
        assert not (pool.rows.masked & ~masked)[stayed].any()


def test_a_fully_revealed_row_retires_at_once() -> None:
    """The published code keeps a finished row for the rest of its stages, though it can give no loss."""
    pool = make_pool(8, n_stages=16, collapse_threshold=0.9)
    before = row_numbers(pool.rows.x0)
    pool.advance(None, torch.zeros(pool.rows.x0.shape))  # sure of everything
    assert (pool.rows.age == 0).all()
    assert int(pool.n_finished) == 8
    assert not set(before) & set(row_numbers(pool.rows.x0))
    assert pool.rows.masked.any(1).all()


@pytest.mark.parametrize(("n_rows", "n_stages"), [(12, 4), (13, 4), (3, 8), (8, 8), (5, 1)])
def test_stages_are_spread_evenly_at_the_start(n_rows: int, n_stages: int) -> None:
    pool = make_pool(n_rows, n_stages, data=numbered_rows(40, 12))
    counts = pool.rows.stage.flatten().bincount(minlength=n_stages)
    assert len(counts) == n_stages
    assert int(counts.max() - counts.min()) <= 1
    n_maskable = pool.rows.maskable.sum(1)
    for j, n, masked in zip(
        pool.rows.stage.flatten().tolist(), n_maskable.tolist(), pool.rows.masked.sum(1).tolist(), strict=True
    ):
        assert n - masked in oracle.possible_targets(j, n_stages, n)


def test_stages_are_shuffled_over_the_rows_at_the_start() -> None:
    """Else the split into microbatches, or the shares of the ranks, would see few stages each."""
    starts = [
        make_pool(32, 8, seed=seed, data=numbered_rows(40, 12)).rows.stage.flatten().tolist() for seed in range(4)
    ]
    assert all(stages != sorted(stages) for stages in starts)
    assert len({tuple(stages) for stages in starts}) == 4


def test_a_fresh_row_enters_at_stage_0_with_random_positions_revealed() -> None:
    n_maskable = 10
    pool = make_pool(64, 2, data=numbered_rows(500, 12, n_maskable=n_maskable))
    pool.set_n_stages(1)  # so that every row retires at every step
    counts = torch.zeros(n_maskable, dtype=torch.long)
    ranks = torch.zeros(n_maskable, dtype=torch.long)
    for number in range(100):
        step(pool, number)
        assert (pool.rows.age == 0).all()
        assert (pool.rows.stage == 0).all()
        revealed = (pool.rows.maskable & ~pool.rows.masked)[pool.rows.maskable].view(64, n_maskable)
        counts += revealed.sum(1).bincount(minlength=n_maskable)
        ranks += revealed.sum(0)
    expected = [oracle.target_probability(target, 0, 1, n_maskable) for target in range(n_maskable)]
    assert_distribution(counts, torch.tensor(expected))
    assert_distribution(ranks, torch.full((n_maskable,), 1 / n_maskable))


def test_a_trajectory_takes_k_steps_without_a_threshold() -> None:
    pool = make_pool(6, 5, data=numbered_rows(60, 12, n_maskable=11))
    for number in range(5):  # the first rows start anywhere
        step(pool, number)
    assert pool.rows.age.max() < 5
    finished_before, steps_before = int(pool.n_finished), int(pool.n_finished_steps)
    for number in range(20):
        step(pool, number)
    n_finished = int(pool.n_finished) - finished_before
    assert n_finished == 6 * 20 // 5
    assert int(pool.n_finished_steps) - steps_before == 5 * n_finished


# A pool of several batches


@given(SEEDS, THRESHOLDS, SEGMENTS, st.integers(2, 4))
@settings(max_examples=30)
def test_batches_take_turns_and_the_others_rest(
    seed: int, collapse_threshold: float | None, n_segments: int, n_batches: int
) -> None:
    """Update t trains and advances batch t mod M; no other row changes in any way."""
    data = numbered_rows(200, 12)  # none comes twice
    pool = make_pool(5, 4, collapse_threshold, seed, data, n_segments, n_batches)
    for number in range(3 * n_batches):
        first = number % n_batches * 5
        own = slice(first, first + 5)
        for tensor, of_pool in zip(pool.batch(), (pool.rows.x0, pool.rows.maskable, pool.rows.masked), strict=True):
            assert torch.equal(tensor, of_pool[own])
        before = everything(pool)
        step(pool, seed + number)
        changed = (everything(pool) != before).any(1)
        assert changed[own].all(), "at least the age of a row that stays, the number of one that is replaced"
        changed[own] = False
        assert not changed.any()


def everything(pool: PumaPool) -> Tensor:
    """All that is known of each row, int64 [M * B, ...]."""
    return torch.cat([tensor.view(len(pool.rows.age), -1) for tensor in pool.rows.tensors().values()], dim=1)


def test_a_deeper_pool_spreads_the_visits_of_a_sequence() -> None:
    """K visits each, as in the paper's pool, but M updates apart, and as many fresh rows per update."""
    n_rows, n_stages, n_batches = 6, 5, 4
    pool = make_pool(n_rows, n_stages, data=numbered_rows(600, 12, n_maskable=11), n_batches=n_batches)
    visits: dict[int, list[int]] = {}
    for number in range(3 * n_stages * n_batches):
        for row in row_numbers(pool.batch()[0]):
            visits.setdefault(row, []).append(number)
        step(pool, number)
    whole = [steps for steps in visits.values() if steps[0] >= n_batches and len(steps) == n_stages]
    assert len(whole) >= n_rows * n_stages
    assert all(later - earlier == n_batches for steps in whole for earlier, later in pairwise(steps))
    assert max(map(len, visits.values())) == n_stages
    assert int(pool.n_finished) == 3 * n_stages * n_batches * n_rows // n_stages


@pytest.mark.parametrize(("n_segments", "n_batches"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_without_a_threshold_as_many_rows_finish_in_each_update(n_segments: int, n_batches: int) -> None:
    """Segments of a row keep in step, so that the share of masked positions does not swing from update to update."""
    n_rows, n_stages = 12, 4
    pool = make_pool(n_rows, n_stages, data=numbered_rows(500, 24, 0), n_segments=n_segments, n_batches=n_batches)
    finished = []
    for update in range(3 * n_stages * n_batches):
        counts = pool.rows.stage.amin(1).bincount(minlength=n_stages)  # segments of a prompt alone have finished
        if update % n_batches == 0:  # each batch has had its turn
            assert counts.tolist() == [n_batches * n_rows // n_stages] * n_stages
        before = int(pool.n_finished)
        step(pool, update)
        finished.append(int(pool.n_finished) - before)
    assert sum(finished) == 3 * n_batches * n_rows
    if n_batches == 1:
        assert set(finished) == {n_rows // n_stages}


@given(SEEDS, STAGES, SEGMENTS)
@settings(max_examples=30)
def test_a_threshold_that_nothing_exceeds_is_none(seed: int, n_stages: int, n_segments: int) -> None:
    """Bit for bit; so every trajectory takes K steps. By its rounded ratio alone, a row would skip stages."""
    pools = [make_pool(5, n_stages, threshold, seed, n_segments=n_segments) for threshold in (None, 1.0)]
    for number in range(2 * n_stages):
        for pool in pools:
            step(pool, seed + number)
        first, second = (pool.state_dict() for pool in pools)
        assert all(torch.equal(first[key], second[key]) for key in ("x0", "masked", "stage", "age", "n_finished_steps"))


# The data


def run_and_count(pool: PumaPool, n_steps: int) -> list[Counter[int]]:
    """How often each row of the data has been in the pool: at the start, then after each step."""
    used = Counter(row_numbers(pool.rows.x0))
    history = [used.copy()]
    for number in range(n_steps):
        step(pool, number)
        used.update(row_numbers(pool.rows.x0[pool.rows.age == 0]))
        history.append(used.copy())
    return history


@pytest.mark.parametrize("collapse_threshold", [None, 0.5])
@pytest.mark.parametrize("n_rows", [5, 16, 40])
def test_no_drawn_sequence_is_discarded_and_none_comes_twice_in_an_epoch(
    n_rows: int, collapse_threshold: float | None
) -> None:
    """The rows that have been in the pool are the first ones of the shuffled data, without a gap, over many epochs.

    The published code drops rows at an epoch's end and where fewer than a batch retire. 40 rows are more than the 23
    of an epoch.
    """
    data = numbered_rows(23, 12)
    pool = make_pool(n_rows, 3, collapse_threshold, data=data)
    history = run_and_count(pool, 60)
    total = history[-1].total()
    assert total == n_rows + int(pool.n_finished) == int(pool.queue.n_taken)
    assert total > 4 * len(data)
    in_order = row_numbers(SequenceStream(data, 0).draw(total)[0])
    for used in history:
        assert used == Counter(in_order[: used.total()])


def test_a_k_switch_neither_restarts_the_data_nor_drops_rows() -> None:
    """The published code builds a new pool and a new loader."""
    data = numbered_rows(40, 12)
    pool = make_pool(8, 4, data=data)
    used = run_and_count(pool, 5)[-1]
    numbers, masked, age = row_numbers(pool.rows.x0), pool.rows.masked.clone(), pool.rows.age.clone()
    pool.set_n_stages(7)
    assert row_numbers(pool.rows.x0) == numbers
    assert torch.equal(pool.rows.masked, masked)
    assert torch.equal(pool.rows.age, age)
    expected = [
        oracle.stage_of_ratio(n - m, n, 7)
        for n, m in zip(pool.rows.maskable.sum(1).tolist(), masked.sum(1).tolist(), strict=True)
    ]
    assert pool.rows.stage.flatten().tolist() == expected
    for number in range(10):
        step(pool, number)
        used.update(row_numbers(pool.rows.x0[pool.rows.age == 0]))
    assert used == Counter(row_numbers(SequenceStream(data, 0).draw(used.total())[0]))


def test_segments_that_have_finished_stay_so_under_another_k() -> None:
    pool = make_pool(8, 4, collapse_threshold=0.6, n_segments=3)
    for number in range(3):
        step(pool, number)
    finished = ~pool.rows.masked.view(24, -1).any(1)
    assert finished.any()
    assert not finished.all()
    pool.set_n_stages(6)
    assert torch.equal(pool.rows.stage.flatten() == 6, finished)


def test_setting_the_same_k_changes_nothing() -> None:
    """The objective sets K at every step."""
    pool = make_pool(8, 5, data=numbered_rows(40, 4))  # short rows, whose ratio lags behind their stage
    for number in range(6):
        step(pool, number)
        stage = pool.rows.stage.clone()
        pool.set_n_stages(5)
        assert torch.equal(pool.rows.stage, stage)


def test_metrics_describe_the_pool() -> None:
    pool = make_pool(8, 4, collapse_threshold=0.8)
    age = pool.rows.age.clone()
    n_finished = n_steps = 0
    for number in range(20):
        step(pool, number)
        gone = pool.rows.age == 0
        n_finished += int(gone.sum())
        n_steps += int((age + 1)[gone].sum())
        age = pool.rows.age.clone()
    metrics = pool.metrics()
    assert int(metrics["n_stages"]) == 4
    assert int(metrics["sequences_finished"]) == n_finished > 0
    assert int(metrics["sequences_finished_steps"]) == n_steps
    shares = [pool.rows.stage.flatten().tolist().count(stage) / 8 for stage in range(4)]
    assert metrics["stage_histogram"].tolist() == pytest.approx(shares)


@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("n_steps", [0, 1, 7])
def test_a_restored_pool_goes_on_exactly(n_steps: int, n_batches: int) -> None:
    """Also after a K change and over an epoch's end."""
    data = numbered_rows(23, 12)
    first = make_pool(8, 4, 0.7, data=data, n_batches=n_batches)
    second = make_pool(8, 4, 0.7, data=data, n_batches=n_batches)
    for number in range(n_steps):
        step(first, number)
    first.set_n_stages(6)
    state = copy.deepcopy(first.state_dict())
    second.queue.load_state_dict(first.queue.state_dict())
    second.generator.set_state(first.generator.get_state())
    second.load_state_dict(state)
    for number in range(30):
        ours, theirs = first.state_dict(), second.state_dict()
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key
        step(first, number)
        step(second, number)
    assert int(first.queue.n_taken) == int(second.queue.n_taken) > len(data)
