"""Objectives: what they mask and weigh, the loss that follows, and the rows of the data that they use."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import NumberedRows, assert_distribution, numbered_rows, random_generator, random_log_probs, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines import UniformObjective
from config import ModelSettings, PumaSettings, TrainingSettings, UniformSettings
from data.stream import SequenceStream
from model.transformer import Transformer
from objective import Microbatch, Objective
from progressive import PumaObjective
from training.run import build_objective

SEEDS = st.integers(0, 2**32)
UNIFORM: dict[str, Any] = {"name": "uniform"}
PUMA: dict[str, Any] = {"name": "puma", "n_stages": 4}
OBJECTIVES = {
    "uniform": UNIFORM,
    "puma": PUMA,
    "puma_with_collapse": PUMA | {"collapse_threshold": 0.7},
    "puma_with_uniform_rows": PUMA | {"uniform_fraction": 0.3},
    "puma_with_a_deep_pool": PUMA | {"uniform_fraction": 0.3, "pool_batches": 3},
    "puma_in_random_order": PUMA | {"reveal_order": "random", "pool_batches": 2},
    "puma_with_redrawn_masks": PUMA | {"reveal_order": "redrawn", "pool_batches": 2},
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def make_objective(
    objective: dict[str, Any],
    data: NumberedRows,
    batch_size: int = 10,
    micro_batch_size: int | None = None,
    seed: int = 0,
    rank: int = 0,
    n_ranks: int = 1,
    device: str = "cpu",
) -> Any:
    """As the training command builds it."""
    chosen = UniformSettings(**objective) if objective["name"] == "uniform" else PumaSettings(**objective)
    training = TrainingSettings(
        batch_size=batch_size, micro_batch_size=micro_batch_size, learning_rate=1e-3, max_steps=1, seed=seed
    )
    stream = SequenceStream(data, seed, rank, n_ranks)
    return build_objective(chosen, training, stream, torch.device(device))


def run_step(objective: Objective, step: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One update with random confidences; the whole batch's xt, x0 and weight."""
    microbatches = list(objective.microbatches(step))
    for number, microbatch in enumerate(microbatches):
        confidence = random_log_probs(tuple(microbatch.xt.shape), 1000 * seed + 10 * step + number)
        objective.observe(microbatch, scores_of(confidence.masked_fill(microbatch.weight == 0, -torch.inf)))
    objective.end_step()
    objective.prefetch()
    return join(microbatches)


def join(microbatches: list[Microbatch]) -> tuple[Tensor, Tensor, Tensor]:
    """Xt, x0 and weight of all rows."""
    return (
        torch.cat([part.xt for part in microbatches]),
        torch.cat([part.x0 for part in microbatches]),
        torch.cat([part.weight for part in microbatches]),
    )


# Every objective


@every_objective
@given(seed=SEEDS, n_rows=st.integers(2, 9))
@settings(max_examples=15)
def test_invariants_of_every_batch(objective: dict[str, Any], seed: int, n_rows: int) -> None:
    """x0 is from the data; xt is x0 with at least one position hidden, never a prompt; weights are the oracle's."""
    data = numbered_rows(23, 12, seed % 1000)
    built = make_objective(objective, data, n_rows, seed=seed % 1000)
    for step in range(8):
        xt, x0, weight = run_step(built, step, seed)
        tokens, prompt_mask = data.rows(x0[:, 0].numpy())
        masked = xt == data.mask_id
        assert xt.shape == x0.shape == weight.shape == (n_rows, data.length)
        assert (xt.dtype, x0.dtype, weight.dtype) == (torch.int64, torch.int64, torch.float32)
        assert np.array_equal(x0.numpy(), tokens)
        assert torch.equal(xt[~masked], x0[~masked])
        assert not masked[torch.from_numpy(prompt_mask)].any()
        assert masked.any(1).all()
        torch.testing.assert_close(weight.double(), oracle.weights_of(masked, n_rows), rtol=1e-6, atol=0)
        assert float(weight.double().sum()) == pytest.approx(1, rel=1e-5)


@every_objective
def test_microbatches_are_the_batch_in_order_and_of_equal_shape(objective: dict[str, Any]) -> None:
    whole = make_objective(objective, numbered_rows(40, 12), 12)
    parts = make_objective(objective, numbered_rows(40, 12), 12, micro_batch_size=3)
    for step in range(5):
        microbatches = list(parts.microbatches(step))
        assert [microbatch.rows for microbatch in microbatches] == [slice(i, i + 3) for i in (0, 3, 6, 9)]
        assert all(microbatch.xt.shape == (3, 12) for microbatch in microbatches)
        (batch,) = whole.microbatches(step)
        for cut, full in zip(join(microbatches), (batch.xt, batch.x0, batch.weight), strict=True):
            assert torch.equal(cut, full)
        confidence = random_log_probs((12, 12), step)
        for microbatch in microbatches:
            parts.observe(microbatch, scores_of(confidence[microbatch.rows]))
        whole.observe(batch, scores_of(confidence))
        parts.end_step()
        parts.prefetch()
        whole.end_step()
        whole.prefetch()


@every_objective
def test_loss_and_gradient_of_a_batch_equal_the_oracle(objective: dict[str, Any]) -> None:
    """Summed over microbatches, through the model, against dense logits in float64."""
    data = numbered_rows(23, 12)
    shape = ModelSettings(
        vocab_size=data.mask_id + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = Transformer(shape)
    model.reset_parameters(random_generator(1))
    built = make_objective(objective, data, 6, micro_batch_size=2)
    microbatches = list(built.microbatches(0))
    loss = torch.zeros(())
    for microbatch in microbatches:
        part = model(microbatch.xt, microbatch.x0, microbatch.weight).loss
        part.backward()
        loss += part.detach()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    xt, x0, weight = join(microbatches)
    logits = model.logits(xt)
    expected = oracle.score_batch(logits.detach(), x0, weight)
    logits.backward(expected.grad_logits.float())
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("order", ["top_prob", "top_prob_margin", "neg_entropy", "random", "redrawn"])
def test_every_order_of_the_model_reveals_the_most_confident(order: str) -> None:
    """By the confidence that the objective asks the model for, not by the largest probability."""
    built = make_objective(PUMA | {"reveal_order": order}, numbered_rows(60, 25, n_maskable=24), 20)
    before, confidence = built.pool.rows.masked.clone(), random_log_probs((20, 25), 0)
    (batch,) = built.microbatches(0)
    assert built.confidence == ("top_prob" if order in ("random", "redrawn") else order)
    built.observe(batch, scores_of(confidence, max_log_prob=random_log_probs((20, 25), 1)))
    built.end_step()
    most_confident = []
    for row in built.pool.rows.age.nonzero()[:, 0].tolist():  # those that have not retired
        masked = built.pool.rows.masked[row]
        revealed = before[row] & ~masked
        if revealed.any():
            most_confident.append(bool(confidence[row, revealed].min() > confidence[row, masked].max()))
    assert len(most_confident) > 5
    assert all(most_confident) == (order not in ("random", "redrawn"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@every_objective
def test_every_drawn_row_is_used_and_none_twice_in_an_epoch(objective: dict[str, Any], device: str) -> None:
    """Rows in the batches are the first ones of the shuffled data without a gap, whoever takes them.

    On a GPU the host learns two steps later how many rows were taken, so the queue prefetches more of them.
    """
    data, n_steps = numbered_rows(60, 12), 400
    built = make_objective(objective, data, 10, device=device)
    used: Counter[int] = Counter()
    in_order = SequenceStream(data, 0).draw(10 * (n_steps + 3))[0][:, 0].tolist()  # as many as fit all batches
    for step in range(n_steps):
        (batch,) = built.microbatches(step)
        used.update(fresh_rows(built, batch))
        built.observe(batch, scores_of(random_log_probs((10, 12), step).to(device)))
        built.end_step()
        built.prefetch()
        drawn = used + waiting_rows(built)
        assert n_drawn(built) == drawn.total()
        assert drawn == Counter(in_order[: drawn.total()])
    assert used.total() > 10 * len(data)


def n_drawn(objective: Objective) -> int:
    """Rows that the objective says it has taken from the data."""
    return int(objective.metrics()["sequences_drawn"])


def fresh_rows(objective: Objective, batch: Microbatch) -> list[int]:
    """Numbers of the rows that are trained for the first time: those new in the pool and all that are outside it."""
    numbers = batch.x0[:, 0].tolist()
    if isinstance(objective, UniformObjective):
        return numbers
    assert isinstance(objective, PumaObjective)
    pool = objective.pool
    age = pool.rows.age.view(pool.n_batches, -1)[pool.turn].tolist()
    entered = [number for number, steps in zip(numbers, age, strict=False) if steps == 0]
    return entered + numbers[len(age) :]


def waiting_rows(objective: Objective) -> Counter[int]:
    """Numbers of the rows in the pool that have not been trained yet."""
    if isinstance(objective, UniformObjective):
        return Counter()
    assert isinstance(objective, PumaObjective)
    return Counter(objective.pool.rows.x0[objective.pool.rows.age == 0, 0].tolist())


@every_objective
def test_ranks_share_the_epoch_and_mask_differently(objective: dict[str, Any]) -> None:
    data = numbered_rows(200, 12, n_maskable=11)
    batches = []
    for rank in range(2):
        built = make_objective(objective, data, 20, rank=rank, n_ranks=2)
        batches.append(run_step(built, 0))
    (xt, x0, _), (other_xt, other_x0, _) = batches
    assert len(x0) == len(other_x0) == 10  # batch_size is over all ranks
    assert not set(x0[:, 0].tolist()) & set(other_x0[:, 0].tolist())
    assert not torch.equal(xt == data.mask_id, other_xt == data.mask_id)


@every_objective
def test_a_restored_objective_goes_on_exactly(objective: dict[str, Any]) -> None:
    data = numbered_rows(23, 12)
    first = make_objective(objective, data)
    for step in range(7):
        run_step(first, step)
    state = copy.deepcopy(first.state_dict())
    second = make_objective(objective, data)
    second.load_state_dict(state)
    for step in range(7, 30):
        for ours, theirs in zip(run_step(first, step), run_step(second, step), strict=True):
            assert torch.equal(ours, theirs)
    assert float(first.metrics()["sequences_drawn"]) == float(second.metrics()["sequences_drawn"]) > len(data)
    for name, value in first.metrics().items():
        torch.testing.assert_close(value, second.metrics()[name], rtol=0, atol=0, equal_nan=True, msg=name)


@every_objective
def test_figures_of_every_objective(objective: dict[str, Any]) -> None:
    data = numbered_rows(23, 12)
    built = make_objective(objective, data)
    place = built.metrics()["masked_fraction"].data_ptr()
    for step in range(3):
        xt, x0, _ = run_step(built, step)
    figures = built.metrics()
    assert figures["masked_fraction"].data_ptr() == place, "a CUDA graph writes to the same memory at every step"
    maskable = ~torch.from_numpy(data.rows(x0[:, 0].numpy())[1])
    shares = (xt == data.mask_id).sum(1) / maskable.sum(1)
    assert float(figures["masked_fraction"]) == pytest.approx(float(shares.mean()))
    assert int(figures["sequences_drawn"]) >= 10


def test_a_batch_that_does_not_divide_is_refused() -> None:
    data = numbered_rows(23, 12)
    for batch_size, n_ranks, remedy in ((10, 3, "2 or 5"), (256, 24, "16 or 32"), (7, 2, "1 or 7"), (8, 12, "8")):
        message = f"batch_size {batch_size} does not divide over {n_ranks} processes: start {remedy}$"
        with pytest.raises(ValueError, match=message):
            make_objective(PUMA, data, batch_size, n_ranks=n_ranks)
    with pytest.raises(ValueError, match=r"micro_batch_size 4 does not divide the 6 rows of each process: .* 3 or 6$"):
        make_objective(UNIFORM, data, 12, micro_batch_size=4, n_ranks=2)


# Uniform


def test_uniform_draws_a_fresh_batch_at_every_step_and_wastes_none() -> None:
    data = numbered_rows(23, 12)
    built = make_objective(UNIFORM, data, 7)
    numbers = [number for step in range(10) for number in run_step(built, step)[1][:, 0].tolist()]
    assert numbers == SequenceStream(data, 0).draw(70)[0][:, 0].tolist()


def test_masks_of_low_discrepancy_are_spread_over_each_batch() -> None:
    data = numbered_rows(23, 13, n_maskable=12)
    built = make_objective(UNIFORM | {"low_discrepancy": True}, data, 12)
    for step in range(5):
        n_masked = (run_step(built, step)[0] == data.mask_id).sum(1)
        assert sorted(n_masked.tolist()) == list(range(1, 13))


# PUMA


def test_one_pass_serves_the_loss_and_the_pool() -> None:
    """What the step's own confidences rank first is what the next batch has revealed."""
    data = numbered_rows(40, 41, n_maskable=40)
    built = make_objective(PUMA | {"n_stages": 8}, data, 6, micro_batch_size=2)
    n_revealed = 0
    for step in range(20):
        microbatches = list(built.microbatches(step))
        masked = join(microbatches)[0] == data.mask_id
        confidence = random_log_probs((6, 41), step)
        for microbatch in microbatches:
            built.observe(microbatch, scores_of(confidence[microbatch.rows]))
        built.end_step()
        built.prefetch()
        for row in (built.pool.rows.age > 0).nonzero().flatten().tolist():
            revealed = masked[row] & ~built.pool.rows.masked[row]
            n_revealed += int(revealed.sum())
            if revealed.any():  # a target may equal the one before
                assert confidence[row][revealed].min() > confidence[row][masked[row] & ~revealed].max()
    assert n_revealed > 300


def test_the_k_schedule_takes_effect_at_its_step() -> None:
    data = numbered_rows(23, 12)
    built = make_objective({"name": "puma", "k_schedule": ((3, 0), (5, 4), (2, 6))}, data)
    found = []
    for step in range(9):
        list(built.microbatches(step))
        assert built.pool.rows.stage.max() < built.pool.n_stages
        found.append(int(built.metrics()["n_stages"]))
        run_step(built, step)
    assert found == [3, 3, 3, 3, 5, 5, 2, 2, 2]


def test_a_k_switch_keeps_the_rows_in_flight() -> None:
    """The published code restarts its data and its pool."""
    data = numbered_rows(60, 12)
    built = make_objective({"name": "puma", "k_schedule": ((4, 0), (9, 3))}, data)
    for step in range(3):
        run_step(built, step)
    before, masked, n_before = built.pool.rows.x0.clone(), built.pool.rows.masked.clone(), n_drawn(built)
    (batch,) = built.microbatches(3)
    assert int(built.metrics()["n_stages"]) == 9
    assert torch.equal(batch.x0, before)
    assert torch.equal(batch.xt == data.mask_id, masked)
    assert n_drawn(built) == n_before


@pytest.mark.parametrize(
    ("fraction", "n_rows", "n_uniform"), [(0.0, 10, 0), (0.3, 10, 3), (0.01, 10, 1), (0.99, 10, 9), (0.5, 2, 1)]
)
def test_uniform_fraction_is_the_share_of_fresh_uniformly_masked_rows(
    fraction: float, n_rows: int, n_uniform: int
) -> None:
    """A share asked for is never rounded away, nor is the pool."""
    data = numbered_rows(400, 12)
    built = make_objective(PUMA | {"uniform_fraction": fraction}, data, n_rows)
    assert len(built.pool.rows.age) == n_rows - n_uniform
    previous: set[int] = set()
    for step in range(10):
        _, x0, _ = run_step(built, step)
        fresh = x0[n_rows - n_uniform :, 0].tolist()
        assert len(fresh) == n_uniform
        assert not previous & set(fresh)
        previous |= set(x0[:, 0].tolist())


def test_rows_behind_the_pool_are_masked_uniformly() -> None:
    """Every number of masked positions equally often, whatever the confidences."""
    n_maskable = 5
    data = numbered_rows(50, 8, n_maskable=n_maskable)
    built = make_objective(PUMA | {"uniform_fraction": 0.5, "collapse_threshold": 0.1}, data, 40)
    counts = torch.zeros(n_maskable + 1, dtype=torch.long)
    for step in range(100):
        xt, _, _ = run_step(built, step)
        counts += (xt[20:] == data.mask_id).sum(1).bincount(minlength=n_maskable + 1)
    assert_distribution(counts, torch.tensor([0.0] + [1 / n_maskable] * n_maskable))


def test_a_share_of_a_single_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 of 1 rows leaves 0 rows for the pool, fewer than the 1 processes"):
        make_objective(PUMA | {"uniform_fraction": 0.5}, numbered_rows(23, 12), 1)
