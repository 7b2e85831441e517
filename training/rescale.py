"""Continue a run on another number of processes than saved its checkpoint.

The rows of the data that no process has drawn are divided anew (`data/stream.py`). So are the rows in flight: those of
all ranks, in rank order, are split evenly over the new ranks. No sequence is lost and none is drawn twice within an
epoch. Only the random numbers differ from those of an uninterrupted run. Other state of an objective is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.reading import BadInput
from data.stream import merge_streams
from runtime.distributed import World, rank_slice

State = dict[str, Any]


def rescale(states: Sequence[State], world: World, seed: int, step: int) -> State:
    """The state from which one rank of `world` continues.

    Args:
        states: what `save_run` saved for each rank, in rank order.
        seed: `training.seed`.
        step: step of the checkpoint.

    Returns:
        The state of this rank, in the form in which `save_run` saves it.

    Raises:
        BadInput: the objective has state that cannot be divided.
    """
    objectives = [state["objective"] for state in states]
    if unknown := objectives[0].keys() - {"queue", "generator", "pool"}:
        listed = ", ".join(map(repr, sorted(unknown)))
        raise BadInput(
            f"the objective's state {listed} cannot be carried over to another number of processes: "
            f"start {len(states)} again, or give another --run-dir"
        )
    queue = merge_streams([objective["queue"] for objective in objectives])
    objective: State = {"queue": queue | {"n_earlier": _part(queue["n_earlier"], world)}}
    if "generator" in objectives[0]:
        objective["generator"] = fresh_generator_state(world, seed, step)
    if "pool" in objectives[0]:
        objective["pool"] = _rescale_pool([objective["pool"] for objective in objectives], world)
    # Each rank sums over the steps since the last record, and the record is the mean over ranks: the mean keeps it.
    sums = {name: torch.stack([state[name] for state in states]).mean(0) for name in ("loss_sum", "grad_norm_sum")}
    return {"objective": objective, "n_summed": states[0]["n_summed"]} | sums


def fresh_generator_state(world: World, seed: int, step: int) -> Tensor:
    """A generator for a rank that cannot continue with a saved one, as `Generator.get_state` returns it.

    Different on every rank, as in a new run, and different from every generator used before.
    """
    numbers = np.random.SeedSequence([seed, step, world.n_ranks, world.rank])
    generator = torch.Generator(world.device).manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
    return generator.get_state()


def _rescale_pool(pools: Sequence[State], world: World) -> State:
    """This rank's part of the rows of all pools (see `PumaPool.state_dict`) and of their counters."""
    n_batches = pools[0]["n_batches"]
    n_rows = sum(len(pool["age"]) for pool in pools) // n_batches  # of a batch, on all ranks
    own = rank_slice(n_rows, world.rank, world.n_ranks)
    state: State = {}
    for name, value in pools[0].items():
        values = [pool[name] for pool in pools]
        if not isinstance(value, Tensor):  # equal on all ranks: K, the number of batches and the current batch
            state[name] = value
        elif value.ndim == 0:
            state[name] = torch.tensor(_part(sum(map(int, values)), world))
        else:  # each batch is split over the ranks
            batches = torch.cat([part.view(n_batches, -1) for part in values], dim=1)  # [M, values of a batch]
            per_row = batches.shape[1] // n_rows
            part = batches[:, own.start * per_row : own.stop * per_row]
            state[name] = part.reshape(-1, *value.shape[1:]).clone()
    return state


def _part(count: int, world: World) -> int:
    """This rank's part of a count; the parts of all ranks add up to it."""
    own = rank_slice(count, world.rank, world.n_ranks)
    return own.stop - own.start
