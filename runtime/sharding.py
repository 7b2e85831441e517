"""Parameters cut over the ranks (PyTorch's FSDP2), for models that outgrow one GPU: `training.parallel: fsdp`.

Each rank keeps its part of every parameter, of its average and of AdamW's moments. Parameters are put together when a
pass comes to them, block by block; gradients are averaged over ranks and cut again on the way back, after every
microbatch, since whole gradients that wait for the last one would take up what was saved. (Not run on GPUs yet.)

What is cut is a `DTensor`. Checkpoints hold whole tensors, so that they are the same whatever the number of ranks, and
open on one process. They are not written by `torch.distributed.checkpoint`: its reader unpickles an index file, which
may execute code. The price is that the main process holds the whole state in its host's memory while it saves, 16
bytes per parameter: weights, average and two moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.distributed import World

M = TypeVar("M", bound=nn.Module)


def shard(model: nn.Module, blocks: Iterable[nn.Module], world: World) -> None:
    """Cut a model's parameters over all ranks, each of which has the same; moves them to the ranks' devices.

    Args:
        blocks: modules whose parameters are needed only while their own `forward` or its backward pass runs. All
            others stay whole from the start of the model's `forward` to the end of its backward pass.
    """
    mesh = init_device_mesh(world.device.type, (world.n_ranks,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut, put together; every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `pattern` is cut."""
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def is_cut(model: nn.Module) -> bool:
    """Whether `shard` has cut the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def copy_whole(source: nn.Module, target: M) -> M:
    """Give `target`, which is not cut, the parameters of `source`, which is; every rank calls this."""
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.copy_(whole(theirs))
    return target


def cut_weights(weights: dict[str, Tensor], patterns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `gather_weights`, whether they were cut then or are cut now; names without a pattern stay as they are."""
    return {name: cut_like(tensor, patterns.get(name, tensor)) for name, tensor in weights.items()}


def gather_weights(weights: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the main process, in its host's memory if they are cut; every rank calls this."""
    return {name: _on_main(tensor, world) for name, tensor in weights.items()}


def gather_moments(optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """The optimizer's state as if nothing were cut, to be used on the main process; every rank calls this."""
    state = optimizer.state_dict()
    moments = {number: gather_weights(tensors, world) for number, tensors in state["state"].items()}
    return state | {"state": moments}


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Undo `gather_moments`, whether parameters were cut then or are cut now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, tensors in state["state"].items():  # in the order of parameters; AdamW's step count is never cut
        patterns = {name: parameters[number] for name, tensor in tensors.items() if tensor.ndim > 0}
        moments[number] = cut_weights(tensors, patterns)
    optimizer.load_state_dict(state | {"state": moments})


def _on_main(tensor: Tensor, world: World) -> Tensor:
    """One tensor after the other, so that a device never holds more than one whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    together = tensor.full_tensor()
    return together.cpu() if world.is_main else torch.empty(0)
