"""Go on with another number of processes than a checkpoint was saved by.

The rows of the data that no process has drawn are shared out anew (`data/stream.py`), and so are the rows in flight:
those of all processes in the order of ranks, cut into as many parts as there are processes now. So no sequence is lost
and none is drawn twice within an epoch. Only the random numbers differ from those of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.stream import merge_streams
from runtime.distributed import World, own_share

State = dict[str, Any]


def take_over(states: Sequence[State], world: World, seed: int, step: int) -> State:
    """What one process goes on with.

    Args:
        states: what `save_run` saved for each rank, in order.
        seed: of training.
        step: at which the states were saved.

    Returns:
        The state of this rank, as `save_run` would have saved it.
    """
    objectives = [state["objective"] for state in states]
    queue = merge_streams([objective["queue"] for objective in objectives])
    objective: State = {"queue": queue | {"n_earlier": _part(queue["n_earlier"], world)}}
    if "generator" in objectives[0]:
        # Like a new run's, different on every rank, and never one that was in use before.
        numbers = np.random.SeedSequence([seed, step, world.n_ranks, world.rank])
        generator = torch.Generator(world.device).manual_seed(int(numbers.generate_state(1, np.uint64)[0]))
        objective["generator"] = generator.get_state()
    if "pool" in objectives[0]:
        objective["pool"] = _take_over_pool([objective["pool"] for objective in objectives], world)
    # Each process holds its own sum over the steps since the last record; the record is the mean over processes.
    totals = torch.stack([state["totals"] for state in states]).mean(0)
    return {"objective": objective, "totals": totals, "n_summed": states[0]["n_summed"]}


def _take_over_pool(pools: Sequence[State], world: World) -> State:
    """This rank's part of the rows of all pools (see `PumaPool.state_dict`), and of what they have counted."""
    n_batches = pools[0].get("n_batches", 1)
    n_rows = sum(len(pool["age"]) for pool in pools) // n_batches  # of a batch, on all ranks
    own = own_share(n_rows, world.rank, world.n_ranks)
    state: State = {}
    for name, value in pools[0].items():
        values = [pool[name] for pool in pools]
        if not isinstance(value, Tensor):  # K and whose turn it is, the same everywhere
            state[name] = value
        elif value.ndim == 0:
            state[name] = torch.tensor(_part(sum(map(int, values)), world))
        else:  # each batch is shared out on its own
            batches = torch.cat([part.view(n_batches, -1) for part in values], dim=1)  # [M, values of a batch]
            per_row = batches.shape[1] // n_rows
            part = batches[:, own.start * per_row : own.stop * per_row]
            state[name] = part.reshape(-1, *value.shape[1:]).clone()
    return state


def _part(count: int, world: World) -> int:
    """This rank's part of a count, such that the parts of all ranks add up to it."""
    own = own_share(count, world.rank, world.n_ranks)
    return own.stop - own.start
