"""One update of the weights: forward, loss, backward, clipping, optimizer, average, pool.

There is no host sync, so the host runs ahead of the device; with a large vocabulary it waits once per update for
numbers that are known before the first backbone runs (`model/token_scores.py`). A small model on a GPU is bound by the
launches of hundreds of kernels; `training.cuda_graph` captures the update once and replays it with one launch.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from base.files import WriteError
from config import Config, ProgressiveSettings
from model.logits import SMALL_VOCABULARY
from model.token_scores import scored_positions, unit_gradient
from runtime.checkpoint import save_tensors, step_folders
from runtime.distributed import World, autocast, autocast_dtype
from runtime.optim import learning_rate, set_learning_rate, update_ema
from runtime.sharding import full_tensor
from training.run import Run, rank_seed

# Updates before the capture: in the first ones libraries choose kernels and allocate workspaces.
N_WARMUP = 3


class TrainingDiverged(RuntimeError):
    """The loss, the gradient or a weight is not finite."""


class Updater:
    """Runs the updates of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.dtype = autocast_dtype(run.config.training.precision, run.world.device)
        self.uses_graph = uses_graph(run.config, run.world)
        self.graph: torch.cuda.CUDAGraph | None = None
        # One for all updates before a capture: libraries keep a workspace for each stream.
        self._stream = torch.cuda.Stream() if self.uses_graph else None
        self._n_eager = 0
        self._captured_stages: int | None = None

    def step(self) -> None:
        """One update of the weights and of their average."""
        run = self.run
        seed_default_generator(run)
        set_learning_rate(run.optimizer, learning_rate(run.step, run.config.training, run.n_steps))
        if self.uses_graph:
            self._step_graph()
        else:
            apply_update(run, self.dtype)
        if run.ema is not None:  # outside the CUDA graph: the decay changes between updates
            update_ema(run.ema, run.model, cast(float, run.config.training.ema_decay))
        run.objective.prefetch()
        run.n_summed += 1
        run.step += 1

    def _step_graph(self) -> None:
        """Replay the captured update; capture it first, and again when K changes."""
        run, settings = self.run, self.run.config.objective
        n_stages = settings.n_stages_at(run.step) if isinstance(settings, ProgressiveSettings) else None
        if n_stages != self._captured_stages:
            self.graph, self._n_eager, self._captured_stages = None, 0, n_stages
        if self.graph is None and self._n_eager < N_WARMUP:
            # On a side stream, as in the capture.
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                apply_update(run, self.dtype)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._n_eager += 1
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            if run.objective.generator is not None:
                graph.register_generator_state(run.objective.generator)
            with torch.cuda.graph(graph):
                apply_update(run, self.dtype)
            self.graph = graph
        self.graph.replay()


def seed_default_generator(run: Run) -> None:
    """Seed the default generators, which dropout draws from, by seed, rank and step: a resumed run draws the same."""
    seed = (rank_seed(run.config.training.seed, run.world.rank) * 1_000_000_007 + run.step) % (1 << 63)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for other devices, which takes far longer
    if run.world.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def apply_update(run: Run, dtype: torch.dtype | None) -> None:
    """The part of an update that a CUDA graph captures: the same kernels on the same memory every time."""
    microbatches = list(run.objective.microbatches(run.step))
    scored = scored_positions([each.weight for each in microbatches], run.config.model.vocab_size)
    for number, (microbatch, positions) in enumerate(zip(microbatches, scored, strict=True), start=1):
        last = number == len(microbatches)
        sync = run.wrapped.no_sync() if isinstance(run.wrapped, DistributedDataParallel) and not last else nullcontext()
        with sync:
            with autocast(run.world.device, dtype):
                scores = run.wrapped(
                    microbatch.xt, microbatch.x0, microbatch.weight, run.objective.confidence, positions
                )
            scores.loss.backward(unit_gradient(scores.loss.device))
        run.loss_sum += scores.loss.detach()
        run.objective.observe(microbatch, scores)
    run.grad_norm_sum += full_tensor(
        nn.utils.clip_grad_norm_(run.model.parameters(), run.config.training.max_grad_norm)
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.objective.end_step()
    run.batch = microbatches


def check_finite(run: Run) -> None:
    """Check losses and gradient norms since the last record, and the weights, before these are evaluated or saved.

    Gradients and weights are equal on all ranks, so all ranks raise. This is a host sync.

    Raises:
        TrainingDiverged: one was not finite; each rank has written its rows of the last step to a file.
    """
    weights = full_tensor(nn.utils.get_total_norm([each.detach() for each in run.model.parameters()]))
    if all(math.isfinite(float(number)) for number in (run.loss_sum, run.grad_norm_sum, weights)):
        return
    first = run.step - run.n_summed + 1
    when = f"in step {run.step}" if first == run.step else f"in one of steps {first} to {run.step}"
    path = run.run_dir / f"diverged_step_{run.step:08d}_rank_{run.world.rank}.safetensors"
    try:
        save_tensors(
            path,
            {
                f"{number}.{key}": getattr(part, key).clone()  # xt and x0 may be one tensor, which cannot be written
                for number, part in enumerate(run.batch)
                for key in ("xt", "x0", "weight")
            },
        )
        rows = f"the rows of step {run.step} are in {path}"
    except WriteError as error:
        rows = str(error)
    exactly = "" if first == run.step else "training.log_every=1 finds the exact step and its rows. "
    saved = f"the newest checkpoint in {run.run_dir} is from before that"
    if not step_folders(run.run_dir):
        saved = "no checkpoint had been saved"
    raise TrainingDiverged(
        f"the loss, the gradient or a weight was not finite {when}; {rows}; {saved}. "
        f"{exactly}Lower training.learning_rate or raise training.warmup_steps"
    )


def uses_graph(config: Config, world: World) -> bool:
    """Whether updates are replayed from a CUDA graph: on a GPU, if it is not switched off and nothing is in the way."""
    wanted, on_gpu = config.training.cuda_graph is not False, world.device.type == "cuda"
    return wanted and on_gpu and graph_obstacle(config, world) is None


def several_ranks_prevent_graph(config: Config, world: World) -> bool:
    """Whether updates would be replayed from a CUDA graph if there were one process."""
    return uses_graph(config, replace(world, rank=0, n_ranks=1)) and not uses_graph(config, world)


def check_graph(config: Config, world: World) -> None:
    """Raise ValueError if `training.cuda_graph` is true, but updates cannot be captured."""
    if config.training.cuda_graph is True and (obstacle := graph_obstacle(config, world)) is not None:
        raise ValueError(obstacle)


def graph_obstacle(config: Config, world: World) -> str | None:
    """Why updates cannot be captured, with the remedy; None if they can be, on a GPU."""
    if world.n_ranks > 1:
        return "training.cuda_graph works with one process only: leave it out, or start one process"
    if config.training.gradient_checkpointing:  # has not been tried in a graph
        return "training.cuda_graph cannot be combined with training.gradient_checkpointing: leave one of them out"
    if config.model.vocab_size > SMALL_VOCABULARY:
        return (
            f"training.cuda_graph needs a model.vocab_size of at most {SMALL_VOCABULARY}, got "
            f"{config.model.vocab_size}: with more, the number of positions that are scored changes between steps"
        )
    return None
