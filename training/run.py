"""Everything that a training run changes: how it is built, saved, restored and put into figures.

`train.py` holds the loop that changes it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from baselines import AutoregressiveObjective, UniformObjective
from config import AutoregressiveSettings, Config, ObjectiveSettings, ProgressiveSettings, TrainingSettings
from data.row_queue import RowQueue
from data.stream import SequenceData, SequenceStream, fingerprint
from model.hub import load_initial_weights
from model.transformer import Transformer, build_model
from objective import Microbatch, Objective
from progressive import PumaObjective
from progressive_block import block_layout
from runtime.checkpoint import Checkpoint, save_checkpoint
from runtime.distributed import World, autocast_dtype, sum_over_ranks
from runtime.metrics import peak_memory_gib, reduce_metrics
from runtime.optim import build_ema, build_optimizer, build_scheduler
from runtime.sharding import copy_whole, cut_weights, gather_moments, gather_weights, is_cut, load_moments, shard
from training.rescale import take_over


@dataclass
class Run:
    """Everything that training changes, and what it needs to go on."""

    config: Config
    world: World
    run_dir: Path
    n_steps: int
    length: int  # tokens per sequence
    n_train: int
    data_fingerprint: str
    model: Transformer
    wrapped: nn.Module  # the model, or DistributedDataParallel around it
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    objective: Objective
    totals: Tensor  # float64 [2], loss and gradient norm summed since the last record
    n_summed: int = 0
    step: int = 0
    seconds: float = 0.0  # of training; evaluation and saving left out
    seconds_recorded: float = 0.0  # what `seconds` was at the last record
    learning_rate: float = 0.0  # of the last step
    batch: list[Microbatch] = field(default_factory=list)  # of the last step, to be saved if it went wrong

    @property
    def averaged_model(self) -> Transformer | None:
        """The model with the averaged weights, if there is one."""
        return None if self.ema is None else cast(Transformer, self.ema.module)

    def evaluated_model(self) -> Transformer:
        """The averaged weights where there are any; every rank calls this.

        If they are cut over the ranks, this is a whole copy: ranks sample with different numbers of passes, while a
        pass of a cut model needs all ranks. So evaluation takes 4 bytes per parameter on each device, then free again.
        """
        model = self.averaged_model or self.model
        if not is_cut(model):
            return model
        with self.world.device:
            return copy_whole(model, build_model(self.config))


def build_run(config: Config, world: World, run_dir: Path, train: SequenceData, *, resuming: bool = False) -> Run:
    """Everything at step 0.

    Args:
        resuming: a checkpoint follows, which has all weights: those that the run started from are not needed.

    Raises:
        ValueError: the batch does not divide over the ranks, or `model.init_from` cannot be used.
    """
    training = config.training
    model = build_model(config)
    if config.model.init_from is None:
        model.reset_parameters(torch.Generator().manual_seed(training.seed))
    elif not resuming:
        load_initial_weights(model, config)
    cut = training.parallel == "fsdp" and world.n_ranks > 1
    model.to("cpu" if cut else world.device)  # a device may not hold all of what is to be cut
    ema = build_ema(model, training.ema_decay)
    for each in (model, ema.module if ema else None) if cut else ():
        if isinstance(each, Transformer):
            shard(each, each.model.layers, world)
    if training.gradient_checkpointing:
        model.recompute_blocks()
    if training.compile:
        model.compile_training()
    n_steps = training.max_steps or sys.maxsize
    if training.num_epochs is not None:
        n_steps = min(n_steps, int(training.num_epochs * len(train)) // training.batch_size)
    if n_steps == 0:
        raise ValueError(f"training.num_epochs {training.num_epochs} of {len(train)} rows make no full batch")
    wrapped: nn.Module = model
    if world.n_ranks > 1 and not cut:
        wrapped = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
        settle_gradient_buckets(wrapped, train.length, world.device)
    optimizer = build_optimizer(model, training)
    return Run(
        config,
        world,
        run_dir,
        n_steps,
        train.length,
        len(train),
        fingerprint(train),
        model,
        wrapped,
        ema,
        optimizer,
        build_scheduler(optimizer, training.warmup_steps, n_steps),
        build_objective(
            config.objective,
            training,
            SequenceStream(train, training.seed, world.rank, world.n_ranks),
            train.mask_id,
            world.device,
        ),
        torch.zeros(2, dtype=torch.float64, device=world.device),
    )


def build_objective(
    settings: ObjectiveSettings,
    training: TrainingSettings,
    stream: SequenceStream,
    mask_id: int,
    device: torch.device,
) -> Objective:
    """The objective that the settings name, on the rank that `stream` belongs to.

    Raises:
        ValueError: the batch does not divide over the ranks or into microbatches, or the rows into blocks.
    """
    n_rows, rest = divmod(training.batch_size, stream.n_ranks)
    if rest:
        raise ValueError(f"training.batch_size {training.batch_size} does not divide over {stream.n_ranks} processes")
    micro_rows = min(training.micro_batch_size or n_rows, n_rows)
    if n_rows % micro_rows:
        raise ValueError(
            f"training.micro_batch_size {micro_rows} does not divide the {n_rows} rows that each process has"
        )
    queue = RowQueue(stream, n_rows, device)
    rows = {"n_rows": n_rows, "micro_rows": micro_rows}
    if isinstance(settings, AutoregressiveSettings):
        return AutoregressiveObjective(queue, stream.data.eos_id, **rows)
    # Masks differ between ranks, and from the weights' seed.
    generator = torch.Generator(device).manual_seed(training.seed * 1_000_003 + stream.rank + 1)
    layout = block_layout(settings, stream.data.length)
    if isinstance(settings, ProgressiveSettings):
        return PumaObjective(settings, queue, layout, mask_id, **rows, generator=generator)
    return UniformObjective(queue, layout, mask_id, **rows, generator=generator)


def settle_gradient_buckets(wrapped: DistributedDataParallel, length: int, device: torch.device) -> None:
    """One backward pass that changes nothing.

    After its first backward pass, DistributedDataParallel lays gradients out anew, which changes the order in which
    ranks are added: a run that was restarted would differ from one that was not.
    """
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    wrapped(tokens, tokens, torch.zeros(1, length, device=device)).loss.backward()
    wrapped.zero_grad()


def save_run(run: Run, score: float | None) -> None:
    """Write a checkpoint; every rank calls this. `score`: the headline figure if it was measured at this step."""
    weights = {"model": gather_weights(run.model.weights(), run.world)}
    train_state = {
        "optimizer": gather_moments(run.optimizer, run.world),
        "scheduler": run.scheduler.state_dict(),
        "seconds": run.seconds,
        "seconds_recorded": run.seconds_recorded,
        "data_fingerprint": run.data_fingerprint,
    }
    if run.ema is not None and run.averaged_model is not None:
        weights["ema"] = gather_weights(run.averaged_model.weights(), run.world)
        train_state["ema_n_averaged"] = run.ema.n_averaged
    # The objective's generator is the only one that training draws from; its state is in the objective's.
    rank_state = {"objective": run.objective.state_dict(), "totals": run.totals, "n_summed": run.n_summed}
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


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Put a freshly built run where the checkpoint was taken, whatever the number of processes was then.

    Raises:
        ValueError: it was taken with other training data.
    """
    state = checkpoint.state("train")
    if state["data_fingerprint"] != run.data_fingerprint:
        raise ValueError(
            f"the training data is not what checkpoint {checkpoint.path} was trained on: restore the data, or give "
            "another --run-dir"
        )
    for name, model in (("model", run.model), ("ema", run.averaged_model)):
        if model is not None:
            weights = checkpoint.weights(name)
            assert weights is not None, name  # whether there is an average cannot change on resume
            model.load_weights(cut_weights(weights, model.weights()))
    if run.ema is not None:
        run.ema.n_averaged.copy_(state["ema_n_averaged"])
    load_moments(run.optimizer, state["optimizer"])
    for group in run.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(run.world.device)  # where a recorded update reads it
    run.scheduler.load_state_dict(state["scheduler"])
    if checkpoint.n_ranks == run.world.n_ranks:
        own = checkpoint.state(f"rank_{run.world.rank}")
    else:
        ranks = [checkpoint.state(f"rank_{rank}") for rank in range(checkpoint.n_ranks)]
        own = take_over(ranks, run.world, run.config.training.seed, checkpoint.step)
        if run.world.is_main:
            print(f"{run.run_dir} goes on from {checkpoint.n_ranks} processes on {run.world.n_ranks}", flush=True)
    run.objective.load_state_dict(own["objective"])
    run.totals.copy_(own["totals"])
    run.step, run.n_summed = checkpoint.step, own["n_summed"]
    run.seconds, run.seconds_recorded = state["seconds"], state["seconds_recorded"]


def where(run: Run) -> dict[str, Any]:
    """What curves are drawn against, and the objective's figures over all ranks."""
    figures = reduce_metrics(run.objective.metrics(), run.world)
    distinct = int(min(figures.pop("sequences_drawn"), run.n_train))
    position = {"step": run.step, "seconds": run.seconds, "sequences_distinct": distinct}
    return position | {f"train/{name}": value for name, value in figures.items()}


def summarize(run: Run) -> dict[str, Any]:
    """Means over the steps since the last record, which is now."""
    training, n_steps = run.config.training, run.n_summed
    loss = float(sum_over_ranks(run.totals)[0]) / run.world.n_ranks / n_steps
    step_ms = 1000 * (run.seconds - run.seconds_recorded) / n_steps
    values = {
        "train/loss": loss,
        "train/grad_norm": float(run.totals[1]) / n_steps,
        "train/learning_rate": run.learning_rate,
        "train/step_ms": step_ms,
        "train/tokens_per_s": training.batch_size * run.length / step_ms * 1000,
        "train/peak_memory_gib": peak_memory_gib(run.world.device),
    }
    run.totals.zero_()
    run.n_summed, run.seconds_recorded = 0, run.seconds
    return values


def describe(run: Run) -> str:
    """One line about a run before it starts."""
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    dtype = autocast_dtype(run.config.training.precision, run.world.device) or torch.float32
    source = run.config.model.init_from
    return (
        f"{run.run_dir}: {run.config.objective.name}, {n_parameters / 1e6:.2f}M parameters"
        f"{f' from {source}' if source else ''}, {run.n_train:,} training sequences, steps {run.step:,} to "
        f"{run.n_steps:,} on {run.world.n_ranks} x {run.world.device.type} in {str(dtype).removeprefix('torch.')}"
        f"{', parameters cut over them' if is_cut(run.model) else ''}"
    )
