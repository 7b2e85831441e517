"""The state of a run: what its records say between two of them, and the first pass of several processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_settings
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import ObjectiveSettings, PumaSettings, TrainingSettings, UniformSettings
from progressive import PumaObjective
from runtime.checkpoint import latest_checkpoint
from runtime.config_file import parse_config
from runtime.distributed import World
from training.run import (
    Run,
    build_objective,
    build_run,
    count_steps,
    interval_metrics,
    progress_metrics,
    restore_run,
    save_run,
    settle_gradient_buckets,
    start_interval,
)
from training.update import Updater, apply_update

CPU = torch.device("cpu")


def build(objective: dict[str, Any], data_dir: Path, run_dir: Path, **training: Any) -> Run:
    settings = tiny_settings(objective, data_dir)
    settings["training"] |= training
    config = parse_config(settings, "test")
    return build_run(config, World(0, 1, CPU), run_dir, config.open_data().train)


@pytest.mark.parametrize("n_batches", [1, 2])
def test_the_trajectory_length_is_that_of_the_last_interval(n_batches: int, data_dir: Path, tmp_path: Path) -> None:
    """A mean over all steps would describe the K before for a long time. A resumed run says the same."""
    objective = {"name": "puma", "k_schedule": [[2, 0], [9, 20]], "pool_batches": n_batches}
    run = build(objective, data_dir, tmp_path, max_steps=100)
    assert isinstance(run.objective, PumaObjective)
    updater, ages, found, expected = Updater(run), Ages(run.objective), [], []
    for step in range(1, 81):
        updater.step()
        run.seconds += 1.0
        ages.update()
        if step == 67:  # between two records
            save_run(run, None)
            run = build(objective, data_dir, tmp_path, max_steps=100)
            checkpoint = latest_checkpoint(tmp_path)
            assert checkpoint is not None
            restore_run(run, checkpoint)
            assert isinstance(run.objective, PumaObjective)
            updater, ages.objective = Updater(run), run.objective
        if step % 10 == 0:
            totals = progress_metrics(run)
            interval = interval_metrics(run, totals)
            found.append(interval["train/trajectory_length"])
            expected.append(ages.mean())
            assert interval["train/step_ms"] == pytest.approx(1000)
            start_interval(run, totals)
    assert found == pytest.approx(expected)
    assert max(found[:2]) <= 2, "the K of these steps"
    assert min(found[5:]) > 4, "no longer the mean over all steps"
    assert totals["train/sequences_finished_steps"] >= totals["train/sequences_finished"] > 0
    assert totals["sequences_distinct"] == run.n_train, "each is drawn several times"


class Ages:
    """The trajectory lengths of the rows that leave a pool, from the ages of its rows alone."""

    def __init__(self, objective: PumaObjective) -> None:
        self.objective, self.before = objective, objective.pool.rows.age.clone()
        self.lengths: list[int] = []

    def update(self) -> None:
        """After an update: a row of the batch that was trained has age 0 if it is a fresh one."""
        pool = self.objective.pool
        trained = torch.arange(len(pool.rows.age)) // pool.n_rows == (int(pool.turn) - 1) % pool.n_batches
        self.lengths += (self.before + 1)[trained & (pool.rows.age == 0)].tolist()
        self.before = pool.rows.age.clone()

    def mean(self) -> float:
        """Mean since the last call."""
        lengths, self.lengths = self.lengths, []
        return sum(lengths) / len(lengths)


@pytest.mark.parametrize(
    ("epochs", "n_rows", "batch_size", "n_steps"),
    [(2, 100, 8, 25), (4.35, 100, 5, 87), (0.57, 100, 57, 1), (0.1, 30, 1, 3), (1e-3, 2000, 2, 1)],
)
def test_an_epoch_is_not_rounded_down_by_floats(epochs: float, n_rows: int, batch_size: int, n_steps: int) -> None:
    """4.35 * 100 is less than 435."""
    training = TrainingSettings(num_epochs=epochs, batch_size=batch_size, learning_rate=1e-3)
    assert count_steps(training, n_rows) == n_steps
    with pytest.raises(ValueError, match="make no full batch"):
        count_steps(training, 0)


def test_an_interval_without_finished_sequences_has_no_trajectory_length(data_dir: Path, tmp_path: Path) -> None:
    for objective in ({"name": "puma", "n_stages": 4}, {"name": "uniform"}):
        run = build(objective, data_dir, tmp_path)
        Updater(run).step()
        start_interval(run, progress_metrics(run))
        run.n_summed, run.seconds = 1, 1.0
        assert "train/trajectory_length" not in interval_metrics(run, progress_metrics(run))


def test_settings_that_make_no_batch_are_refused_before_a_model_is_built(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes minutes to load."""
    monkeypatch.setattr("training.run.build_model", lambda config: pytest.fail("it was built"))
    for training in ({"micro_batch_size": 3}, {"max_steps": None, "num_epochs": 1e-6}):
        with pytest.raises(ValueError, match=r"training\."):
            build({"name": "uniform"}, data_dir, tmp_path, **training)


def test_settings_without_an_objective_are_refused(data_dir: Path, tmp_path: Path) -> None:
    """Also those that derive from another objective's: that one would be trained under the new name."""
    built = build({"name": "uniform"}, data_dir, tmp_path)
    stream = built.objective.queue.stream
    for base, own in ((ObjectiveSettings, {}), (UniformSettings, {}), (PumaSettings, {"n_stages": 4})):
        new = type("NewSettings", (base,), {"__annotations__": {"name": Literal["new"]}})
        with pytest.raises(NotImplementedError, match="'new' has no branch in build_objective"):
            build_objective(new(name="new", **own), built.config.training, stream, CPU)


@pytest.mark.parametrize("objective", [{"name": "puma", "n_stages": 4}, {"name": "uniform"}])
def test_the_seed_determines_weights_order_of_the_data_and_masks(
    objective: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    """All maskable positions are those of the solution, so the masks of other rows differ by their draws alone."""
    models, batches = [], []
    for seed in (0, 1):
        run = build(objective, data_dir, tmp_path, seed=seed)
        models.append(run.model)
        batches.append(next(run.objective.microbatches(0)))
    matrices = [[each for each in model.parameters() if each.ndim == 2] for model in models]
    assert not any(torch.equal(*pair) for pair in zip(*matrices, strict=True))
    first, second = batches
    assert not torch.equal(first.x0, second.x0)
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("score", [None, 0.5])
def test_only_an_evaluation_that_is_due_is_repeated(score: float | None, data_dir: Path, tmp_path: Path) -> None:
    """A step is saved before it is evaluated, with the metrics that are recorded with the evaluation."""
    run = build({"name": "uniform"}, data_dir, tmp_path)
    run.pending_metrics = {"step": 0}
    save_run(run, score)
    resumed, checkpoint = build({"name": "uniform"}, data_dir, tmp_path), latest_checkpoint(tmp_path)
    assert checkpoint is not None
    restore_run(resumed, checkpoint)
    assert resumed.pending_metrics == ({"step": 0} if score is None else None)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_first_pass_of_several_processes_compiles_the_graph_of_training(
    dtype: torch.dtype | None, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_of_one: None
) -> None:
    """And no other: with one row it would compile a graph that no step uses, and then one for any number of rows."""
    graphs: list[bool] = []
    compile_with = torch.compile

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(all(isinstance(each, Tensor) for each in inputs))  # sizes are inputs of a graph for any size
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=record))
    torch._dynamo.reset()
    run = build({"name": "puma", "n_stages": 4}, data_dir, tmp_path, micro_batch_size=4, compile=True)
    wrapped = run.wrapped = DistributedDataParallel(run.model)
    settle_gradient_buckets(wrapped, run.objective.micro_rows, run.length, CPU, dtype)
    before = [parameter.clone() for parameter in run.model.parameters()]
    settle_gradient_buckets(wrapped, run.objective.micro_rows, run.length, CPU, dtype)
    assert all(map(torch.equal, before, run.model.parameters()))
    for _ in range(2):
        apply_update(run, dtype)
    assert graphs == [True]
