"""A run goes on with another number of processes: no sequence is lost, none is drawn twice within an epoch."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import NumberedRows, numbered_rows, random_log_probs, scores_of
from pydantic import TypeAdapter
from torch import Tensor

from base.reading import BadInput
from config import AnyObjectiveSettings, TrainingSettings
from data.stream import SequenceStream
from runtime.checkpoint import Checkpoint, latest_checkpoint, loading_checkpoint
from runtime.config_file import read_config
from runtime.distributed import World
from training.rescale import fresh_generator_state, rescale
from training.run import Run, build_objective, build_run, restore_run, save_run
from training.update import Updater

CPU = torch.device("cpu")
BATCH_SIZE, LENGTH, N_ROWS = 16, 12, 23
PUMA = {"name": "puma", "n_stages": 4, "collapse_threshold": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "puma": PUMA,
    "block_puma": PUMA | {"name": "block_puma", "block_size": 4, "block_attention": "prefix"},
    "puma_with_uniform_rows": PUMA | {"uniform_fraction": 0.3},
    "puma_with_a_deep_pool": PUMA | {"uniform_fraction": 0.3, "pool_batches": 3},
    "uniform": {"name": "uniform"},
    "autoregressive": {"name": "autoregressive"},
}


def ranks_of(settings: dict[str, Any], data: NumberedRows, n_ranks: int) -> list[Any]:
    """One objective for each rank, as the training command builds them."""
    training = TrainingSettings(batch_size=BATCH_SIZE, learning_rate=1.0, max_steps=1)
    parsed = TypeAdapter(AnyObjectiveSettings).validate_python(settings)
    return [build_objective(parsed, training, SequenceStream(data, 0, rank, n_ranks), CPU) for rank in range(n_ranks)]


def run_step(objective: Any, seed: int) -> list[int]:
    """One update with random confidences; the rows that have had their whole turn."""
    pool = getattr(objective, "pool", None)
    before = pool.batch()[0][:, 0].tolist() if pool else []
    turn = int(pool.turn) if pool else 0
    batch = list(objective.microbatches(0))
    for number, microbatch in enumerate(batch):
        objective.observe(microbatch, scores_of(random_log_probs(tuple(microbatch.xt.shape), seed + number)))
    rows = torch.cat([part.x0[:, 0] for part in batch if part.columns in (slice(None), slice(0, 4))]).tolist()
    objective.end_step()
    objective.prefetch()
    if pool is None:
        return rows
    ages = pool.rows.age.view(pool.n_batches, -1)[turn].tolist()
    retired = [row for row, age in zip(before, ages, strict=True) if age == 0]
    return retired + rows[len(before) :]


def states_of(objectives: list[Any]) -> list[dict[str, Any]]:
    """What `save_run` saves for each rank."""
    return [
        {
            "objective": each.state_dict(),
            "loss_sum": torch.tensor(float(rank)),
            "grad_norm_sum": torch.tensor(5.0),
            "n_summed": 3,
        }
        for rank, each in enumerate(objectives)
    ]


def in_flight(objectives: list[Any]) -> Tensor:
    """Everything known of the rows in flight, ranks in order: x0, masks, stages and ages, int64 [M, B, ...]."""
    pools = [each.pool for each in objectives]
    parts = [
        torch.cat([each.view(len(pool.rows.age), -1) for each in pool.rows.tensors().values()], 1) for pool in pools
    ]
    return torch.cat([part.view(pools[0].n_batches, -1, part.shape[1]) for part in parts], dim=1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("chain", [(4, 2, 1, 4, 1), (1, 8, 2, 4, 1)], ids=str)
def test_the_sequences_of_every_epoch_are_those_of_an_undisturbed_run(case, chain):
    data = numbered_rows(N_ROWS, LENGTH)
    finished: Counter[int] = Counter()
    objectives: list[Any] = ranks_of(case, data, chain[0])
    for phase, n_ranks in enumerate(chain):
        if phase:
            states = states_of(objectives)
            before = [each.pool for each in objectives] if hasattr(objectives[0], "pool") else []
            rows, n_finished = in_flight(objectives) if before else None, sum(int(p.n_finished) for p in before)
            n_steps = sum(int(pool.n_finished_steps) for pool in before)
            objectives = ranks_of(case, data, n_ranks)
            for rank, objective in enumerate(objectives):
                objective.load_state_dict(rescale(states, World(rank, n_ranks, CPU), 7, phase)["objective"])
            if before:
                pools = [each.pool for each in objectives]
                assert torch.equal(in_flight(objectives), rows), "all rows in flight, in order"
                assert sum(int(pool.n_finished) for pool in pools) == n_finished
                assert sum(int(pool.n_finished_steps) for pool in pools) == n_steps
                assert all(bool(pool.rows.masked.any(1).all()) for pool in pools)
        for number in range(9):
            for rank, objective in enumerate(objectives):
                finished.update(run_step(objective, 10_000 * phase + 100 * number + 10 * rank))
    (last,) = objectives
    n_drawn = int(last.metrics()["sequences_drawn"])
    flying = last.pool.rows.x0[:, 0].tolist() if hasattr(last, "pool") else []
    assert finished.total() + len(flying) == n_drawn, "the count goes on over all changes"
    assert n_drawn >= 3 * N_ROWS, "the test must cross epochs"
    state = last.state_dict()["queue"]
    assert state["n_drawn"] >= len(state["left_behind"]), "nothing that slower ranks had left is still to be drawn"
    undisturbed = SequenceStream(data, 0).draw(n_drawn)[0][:, 0].tolist()
    assert finished + Counter(flying) == Counter(undisturbed)


def test_state_that_cannot_be_divided_is_refused(tmp_path):
    """It would be lost silently. The checkpoint itself is in order, so the message must not say to delete it."""
    states = states_of(ranks_of(PUMA, numbered_rows(N_ROWS, LENGTH), 4))
    for state in states:
        state["objective"] |= {"visits": torch.zeros(4), "n_masked": 3}
    message = "state 'n_masked', 'visits' cannot be carried over to another number of processes: start 4 again"
    with pytest.raises(BadInput, match=message), loading_checkpoint(tmp_path):
        rescale(states, World(0, 2, CPU), 7, 5)


def test_ranks_go_on_with_random_numbers_of_their_own():
    data = numbered_rows(N_ROWS, LENGTH)
    states = states_of(ranks_of(PUMA, data, 4))
    taken = [rescale(states, World(rank, 2, CPU), 7, step) for rank in (0, 1) for step in (5, 6)]
    generators = [each["objective"]["generator"].numpy().tobytes() for each in taken]
    generators += [state["objective"]["generator"].numpy().tobytes() for state in states]
    assert len(set(generators)) == len(generators)
    again = rescale(states, World(0, 2, CPU), 7, 5)
    assert torch.equal(again["objective"]["generator"], taken[0]["objective"]["generator"])


def test_no_generator_of_a_changed_run_is_one_that_was_used_before():
    """Of other seeds, of the same step with another number of processes, or of another rank."""
    places = itertools.product((7, 8), (5, 6), ((0, 1), (0, 2), (1, 2), (0, 4)))
    states = [fresh_generator_state(World(rank, n_ranks, CPU), seed, step) for seed, step, (rank, n_ranks) in places]
    assert len({state.numpy().tobytes() for state in states}) == len(states) == 16


def test_the_next_record_is_the_mean_over_all_steps():
    """Of 4 processes a step's loss is the mean of theirs; the 2 that go on must add up to the same."""
    states = states_of(ranks_of(PUMA, numbered_rows(N_ROWS, LENGTH), 4))
    taken = [rescale(states, World(rank, 2, CPU), 7, 5) for rank in (0, 1)]
    assert [each["n_summed"] for each in taken] == [3, 3]
    assert sum(float(each["loss_sum"]) for each in taken) / 2 == sum(range(4)) / 4
    assert [float(each["grad_norm_sum"]) for each in taken] == [5.0, 5.0]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.8])
def test_the_pool_has_as_many_rows_on_any_number_of_ranks(fraction):
    data = numbered_rows(40, LENGTH)
    sizes = {
        n: [len(each.pool.rows.age) for each in ranks_of(PUMA | {"uniform_fraction": fraction}, data, n)]
        for n in (1, 2)
    }
    assert sum(sizes[1]) == sum(sizes[2]) == BATCH_SIZE - max(1, round(fraction * BATCH_SIZE))
    assert abs(sizes[2][0] - sizes[2][1]) <= 1


def test_a_pool_smaller_than_the_ranks_is_refused():
    with pytest.raises(ValueError, match="leaves 3 rows for the pool, fewer than the 4 processes"):
        ranks_of(PUMA | {"uniform_fraction": 0.8}, numbered_rows(40, LENGTH), 4)


def test_a_run_continues_on_another_kind_of_device(config_file, tmp_path, monkeypatch, capsys):
    """The state of a GPU's generator has 16 bytes, and a generator of a CPU cannot take it."""
    config = read_config(config_file())
    data = config.open_data().train

    def new_run() -> Run:
        return build_run(config, World(0, 1, CPU), tmp_path, data)

    run = new_run()
    Updater(run).step()
    save_run(run, None)
    assert run.objective.generator is not None
    saved_state, drawn = run.objective.generator.get_state(), int(run.objective.queue.sequences_drawn)
    of_this_device = Checkpoint.state

    def of_a_gpu(checkpoint: Checkpoint, name: str, **options: bool) -> dict[str, Any]:
        state = of_this_device(checkpoint, name, **options)
        if name == "rank_0":
            state["objective"]["generator"] = torch.zeros(16, dtype=torch.uint8)
        return state

    monkeypatch.setattr(Checkpoint, "state", of_a_gpu)
    continued = [new_run(), new_run()]
    for each in continued:
        restore_run(each, latest_checkpoint(tmp_path))
        assert int(each.objective.queue.sequences_drawn) == drawn
    assert "saved on another kind of device" in capsys.readouterr().out
    states = [each.objective.generator.get_state() for each in continued]
    assert torch.equal(*states), "the seed decides"
    assert not torch.equal(states[0], saved_state)
    Updater(continued[0]).step()
    assert continued[0].step == 2
