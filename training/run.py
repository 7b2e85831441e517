"""The state of a training run: build it, save it, restore it, and compute its metrics.

`train.py` holds the training loop, `training/update.py` one update.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from base.commands import say
from base.memory import check_memory
from base.reading import BadInput
from baselines import AutoregressiveObjective, UniformObjective
from config import AnyObjectiveSettings, Config, ProgressiveSettings, TrainingSettings
from data.row_queue import RowQueue
from data.stream import SequenceData, SequenceStream, changed_sources, fingerprint
from model.hub import load_initial_weights
from model.transformer import Transformer, build_model
from objective import Microbatch, Objective
from progressive import PumaObjective
from progressive_block import block_layout
from runtime.checkpoint import Checkpoint, save_checkpoint, score_checkpoint
from runtime.distributed import World, autocast, autocast_dtype, on_main, only_on_main, sum_over_ranks
from runtime.history import Session
from runtime.metrics import peak_memory_gib, reduce_metrics
from runtime.optim import build_ema, build_optimizer, learning_rate
from runtime.sharding import copy_full, gather_moments, gather_weights, is_sharded, load_moments, shard, shard_weights
from training.rescale import fresh_generator_state, rescale

GENERATOR_BYTES = {5056, 16}  # of the state of a random generator on a CPU and on a GPU, which cannot be exchanged


@dataclass(kw_only=True)
class Run:
    """Everything that training changes, and what an update needs."""

    config: Config
    world: World
    run_dir: Path
    n_steps: int
    length: int  # tokens per sequence
    n_train: int
    data_fingerprint: dict[str, str]  # see `data.stream.fingerprint`
    model: Transformer
    wrapped: nn.Module  # the model, or DistributedDataParallel around it
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    objective: Objective
    loss_sum: Tensor  # float64 scalar, this rank's losses since the last record
    grad_norm_sum: Tensor  # float64 scalar, gradient norms since the last record
    n_summed: int = 0  # steps since the last record
    step: int = 0
    seconds: float = 0.0  # of training, without evaluation and saving
    seconds_recorded: float = 0.0  # `seconds` at the last record
    finished_recorded: tuple[int, int] = (0, 0)  # `_finished` at the last record
    # Metrics of this step, to be recorded with its evaluation; None if no evaluation is due. They are saved, so that a
    # run stopped during the evaluation repeats it when it resumes.
    pending_metrics: dict[str, Any] | None = None
    batch: list[Microbatch] = field(default_factory=list)  # of the last step, written to disk if training diverges
    session: Session = field(default_factory=Session)  # what the history of the run holds of this process

    @property
    def averaged_model(self) -> Transformer | None:
        """The model with the averaged weights, if there is one."""
        return None if self.ema is None else cast(Transformer, self.ema.module)

    def evaluated_model(self) -> Transformer:
        """The model with the averaged weights if there is one, else the model; every rank calls this.

        A sharded model is copied with full parameters: ranks run different numbers of forward passes while they
        sample, and a forward pass of a sharded model needs all ranks. The copy takes 4 bytes per parameter on each
        device during evaluation.
        """
        model = self.averaged_model or self.model
        if not is_sharded(model):
            return model
        with self.world.device:
            return copy_full(model, build_model(self.config))


def build_run(config: Config, world: World, run_dir: Path, train: SequenceData, *, resuming: bool = False) -> Run:
    """A run at step 0.

    Args:
        resuming: `restore_run` follows, so the weights are left undefined.

    Raises:
        ValueError: the run has no step, `model.init_from` cannot be used, or as in `build_objective`.
    """
    training = config.training
    # First what is checked quickly: models take long to load.
    n_steps = count_steps(training, len(train))
    stream = SequenceStream(train, training.seed, world.rank, world.n_ranks)
    objective = build_objective(config.objective, training, stream, world.device)
    sharded = training.parallel == "fsdp" and world.n_ranks > 1
    if sharded:
        # The full parameters may not fit on a device, nor in host memory once for each process.
        full = None if resuming else only_on_main(partial(initial_model, config))
        with torch.device("meta"):
            model = build_model(config)
        ema = build_ema(model, training.ema_decay)
        shard(model, model.model.layers, full, world)
        if ema is not None:
            averaged = cast(Transformer, ema.module)
            shard(averaged, averaged.model.layers, full, world)
        del full
    else:
        model = (build_model(config) if resuming else initial_model(config)).to(world.device)
        ema = build_ema(model, training.ema_decay)
    if training.gradient_checkpointing:
        model.recompute_layers()
    if training.compile:
        model.model.compile_training()
    wrapped: nn.Module = model
    if world.n_ranks > 1 and not sharded:
        wrapped = data_parallel(model, world.device)
        dtype = autocast_dtype(training.precision, world.device)
        settle_gradient_buckets(wrapped, objective.micro_rows, train.length, world.device, dtype)
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        n_steps=n_steps,
        length=train.length,
        n_train=len(train),
        data_fingerprint=on_main(lambda: fingerprint(train)),
        model=model,
        wrapped=wrapped,
        ema=ema,
        optimizer=build_optimizer(model, training),
        objective=objective,
        loss_sum=torch.zeros((), dtype=torch.float64, device=world.device),
        grad_norm_sum=torch.zeros((), dtype=torch.float64, device=world.device),
    )


def initial_model(config: Config) -> Transformer:
    """The model at step 0, in host memory. Raises as `build_model` and `load_initial_weights`."""
    model = build_model(config)
    if config.model.init_from is None:
        model.reset_parameters(torch.Generator().manual_seed(config.training.seed))
    else:
        load_initial_weights(model, config)
    return model


def count_steps(training: TrainingSettings, n_rows: int) -> int:
    """Updates of a run on `n_rows` training rows; ValueError if there is none."""
    n_steps = training.max_steps or sys.maxsize
    if training.num_epochs is not None:
        n_trained = int(Fraction(str(training.num_epochs)) * n_rows)  # as written: 4.35 * 100 is 434.99... in floats
        n_steps = min(n_steps, n_trained // training.batch_size)
    if n_steps == 0:
        raise ValueError(f"training.num_epochs {training.num_epochs} of {n_rows} rows make no full batch")
    return n_steps


def build_objective(
    settings: AnyObjectiveSettings,
    training: TrainingSettings,
    stream: SequenceStream,
    device: torch.device,
) -> Objective:
    """The objective that the settings name, on the rank of `stream`.

    Raises:
        ValueError: the batch does not divide over the ranks, the rows of a rank do not divide into microbatches, the
            pool has fewer rows than there are ranks, or the rows need more memory than is free.
        NotImplementedError: no branch builds an objective of this name.
    """
    n_rows, rest = divmod(training.batch_size, stream.n_ranks)
    if rest:
        raise ValueError(
            f"training.batch_size {training.batch_size} does not divide over {stream.n_ranks} processes: start "
            f"{nearest_divisors(training.batch_size, stream.n_ranks)}"
        )
    micro_rows = min(training.micro_batch_size or n_rows, n_rows)
    if n_rows % micro_rows:
        raise ValueError(
            f"training.micro_batch_size {micro_rows} does not divide the {n_rows} rows of each process: set it to "
            f"{nearest_divisors(n_rows, micro_rows)}"
        )
    # Rows in the queue, on their way to it, and in the pool; int64 tokens, masks and their copies.
    n_held = n_rows * (6 + (settings.pool_batches if isinstance(settings, ProgressiveSettings) else 0))
    check_memory(20 * n_held * stream.data.length, f"training.batch_size {training.batch_size}")
    queue = RowQueue(stream, n_rows, device)
    rows = {"n_rows": n_rows, "micro_rows": micro_rows}
    # By name, not by class: settings that derive from another objective's must not train that objective.
    if settings.name == "autoregressive":
        return AutoregressiveObjective(queue, **rows)
    generator = torch.Generator(device).manual_seed(rank_seed(training.seed, stream.rank))
    layout = block_layout(settings, stream.data.length)
    if settings.name in ("puma", "block_puma"):
        return PumaObjective(settings, queue, layout, **rows, generator=generator)
    if settings.name in ("uniform", "block_uniform"):
        return UniformObjective(settings, queue, layout, **rows, generator=generator)
    raise NotImplementedError(f"objective.name {settings.name!r} has no branch in build_objective of training/run.py")


def rank_seed(seed: int, rank: int) -> int:
    """The seed of a rank's random numbers: different on every rank, and different from that of the weights."""
    return seed * 1_000_003 + rank + 1


def nearest_divisors(total: int, number: int) -> str:
    """As text: the largest divisor of `total` below `number`, which is none itself, and the smallest above, if any."""
    divisors = {each for n in range(1, math.isqrt(total) + 1) if total % n == 0 for each in (n, total // n)}
    below, above = [n for n in divisors if n < number], [n for n in divisors if n > number]
    return " or ".join(map(str, [max(below)] + ([min(above)] if above else [])))


def data_parallel(model: Transformer, device: torch.device) -> DistributedDataParallel:
    """The model on `device`, its gradients averaged over the ranks; they are views of the buckets, not copies."""
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def settle_gradient_buckets(
    wrapped: DistributedDataParallel, n_rows: int, length: int, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Run one backward pass with loss 0, which changes no weight.

    DistributedDataParallel rebuilds its gradient buckets after the first backward pass, which changes the order of
    summation over ranks. Without this pass a resumed run would differ from an uninterrupted one.

    Args:
        n_rows, length: shape of a microbatch: a compiled model is compiled for the shape of its first pass.
        dtype: of autocast, as in training.
    """
    tokens = torch.zeros(n_rows, length, dtype=torch.long, device=device)
    with autocast(device, dtype):
        scores = wrapped(tokens, tokens, torch.zeros(n_rows, length, device=device))
    scores.loss.backward()
    wrapped.zero_grad()


def save_run(run: Run, score: float | None) -> None:
    """Write a checkpoint; every rank calls this. `score`: of this step, if it was evaluated; higher is better."""
    weights = {"model": gather_weights(run.model.weights(), run.world)}
    train_state = {
        "optimizer": gather_moments(run.optimizer, run.world),
        "seconds": run.seconds,
        "seconds_recorded": run.seconds_recorded,
        "finished_recorded": run.finished_recorded,
        "data_fingerprint": run.data_fingerprint,
        "pending_metrics": run.pending_metrics,
    }
    if run.ema is not None and run.averaged_model is not None:
        weights["ema"] = gather_weights(run.averaged_model.weights(), run.world)
        train_state["ema_n_averaged"] = run.ema.n_averaged
    # The default generators are seeded anew at every update, so only that of the objective is saved, in its state.
    rank_state = {
        "objective": run.objective.state_dict(),
        "loss_sum": run.loss_sum,
        "grad_norm_sum": run.grad_norm_sum,
        "n_summed": run.n_summed,
    }
    save_checkpoint(
        run.run_dir,
        run.world,
        run.config,
        run.step,
        weights=weights,
        train_state=train_state,
        rank_state=rank_state,
        score=score,
    )


def score_run(run: Run, score: float) -> None:
    """Add the score to the checkpoint of this step, which was saved before its evaluation; every rank calls this."""
    score_checkpoint(run.run_dir, run.world, run.config, run.step, score)


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint, saved by any number of processes, into a run that `build_run` has just built.

    Raises:
        ValueError: the checkpoint was trained on other data, or as in `rescale`.
    """
    # Each process copies the tensors, or its part of them, to its device: a machine need not hold all for each process.
    copied = is_sharded(run.model) or run.world.device.type != "cpu"
    state = checkpoint.state("train", mapped=copied)
    if changed := changed_sources(run.data_fingerprint, state["data_fingerprint"]):
        raise BadInput(
            f"the training data has changed since checkpoint {checkpoint.path} was saved: restore "
            f"{' and '.join(changed)}, or give another --run-dir"
        )
    for name, model in (("model", run.model), ("ema", run.averaged_model)):
        if model is not None:
            weights = checkpoint.weights(name)
            assert weights is not None, name  # a changed ema_decay is refused on resume
            model.load_weights(shard_weights(weights, model.weights()))
    if run.ema is not None:
        run.ema.n_averaged.copy_(state["ema_n_averaged"])
    load_moments(run.optimizer, state["optimizer"])
    if checkpoint.n_ranks == run.world.n_ranks:
        own = checkpoint.state(f"rank_{run.world.rank}")
    else:
        ranks = [checkpoint.state(f"rank_{rank}") for rank in range(checkpoint.n_ranks)]
        own = rescale(ranks, run.world, run.config.training.seed, checkpoint.step)
        if run.world.is_main:
            say(f"{run.run_dir}: saved by {checkpoint.n_ranks} processes, continues on {run.world.n_ranks}")
    generator, saved = run.objective.generator, own["objective"].get("generator")
    if generator is not None and {len(generator.get_state()), len(saved)} == GENERATOR_BYTES:
        own["objective"]["generator"] = fresh_generator_state(run.world, run.config.training.seed, checkpoint.step)
        if run.world.is_main:
            say(f"{run.run_dir}: saved on another kind of device, continues with other random numbers")
    run.objective.load_state_dict(own["objective"])
    run.loss_sum.copy_(own["loss_sum"])
    run.grad_norm_sum.copy_(own["grad_norm_sum"])
    run.step, run.n_summed = checkpoint.step, int(own["n_summed"])
    run.seconds, run.seconds_recorded = float(state["seconds"]), float(state["seconds_recorded"])
    n_finished, n_finished_steps = state["finished_recorded"]
    run.finished_recorded = int(n_finished), int(n_finished_steps)
    if checkpoint.score is None:  # else the evaluation was complete
        run.pending_metrics = state["pending_metrics"]


def progress_metrics(run: Run) -> dict[str, Any]:
    """The x-axes of the curves, and the objective's metrics over all ranks; every rank calls this."""
    metrics = reduce_metrics(run.objective.metrics(), run.world)
    distinct = int(min(metrics.pop("sequences_drawn"), run.n_train))
    n_tokens = run.step * run.config.training.batch_size * run.length  # prompts and padding included
    axes = {"step": run.step, "seconds": run.seconds, "sequences_distinct": distinct, "tokens": n_tokens}
    return axes | {f"train/{name}": value for name, value in metrics.items()}


def interval_metrics(run: Run, progress: dict[str, Any]) -> dict[str, Any]:
    """Means over the steps since `start_interval`; every rank calls this. `progress`: the `progress_metrics` of now."""
    training, n_steps = run.config.training, run.n_summed
    step_ms = 1000 * (run.seconds - run.seconds_recorded) / n_steps
    n_finished, n_finished_steps = (
        now - before for now, before in zip(_finished(progress), run.finished_recorded, strict=True)
    )
    return {
        "train/loss": float(sum_over_ranks(run.loss_sum)) / run.world.n_ranks / n_steps,
        "train/grad_norm": float(run.grad_norm_sum) / n_steps,
        "train/learning_rate": learning_rate(run.step - 1, training, run.n_steps),  # of the last update
        "train/step_ms": step_ms,
        "train/tokens_per_s": training.batch_size * run.length / step_ms * 1000,
        "train/peak_memory_gib": peak_memory_gib(run.world.device),
    } | ({"train/trajectory_length": n_finished_steps / n_finished} if n_finished else {})


def start_interval(run: Run, progress: dict[str, Any]) -> None:
    """Reset the sums of `interval_metrics`. `progress`: the `progress_metrics` of now."""
    run.loss_sum.zero_()
    run.grad_norm_sum.zero_()
    run.n_summed, run.seconds_recorded, run.finished_recorded = 0, run.seconds, _finished(progress)


def _finished(progress: dict[str, Any]) -> tuple[int, int]:
    """Sequences that have left the pools of all ranks, and the sum of their trajectory lengths; 0 without a pool."""
    n_finished, n_steps = (progress.get(f"train/sequences_finished{end}", 0) for end in ("", "_steps"))
    return int(n_finished), int(n_steps)


def start_message(run: Run) -> str:
    """The line that is printed before the first step."""
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    dtype = autocast_dtype(run.config.training.precision, run.world.device) or torch.float32
    source = run.config.model.init_from
    return (
        f"{run.run_dir}: {run.config.objective.name}, {n_parameters / 1e6:.2f}M parameters"
        f"{f' from {source}' if source else ''}, {run.n_train:,} training sequences, steps {run.step:,} to "
        f"{run.n_steps:,} on {run.world.n_ranks} x {run.world.device.type} in {str(dtype).removeprefix('torch.')}"
        f"{', parameters sharded' if is_sharded(run.model) else ''}"
    )
