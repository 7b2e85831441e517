"""Parameters sharded over the ranks (PyTorch's FSDP2), for models that outgrow one GPU: `training.parallel: fsdp`.

Each rank keeps a shard of every parameter, of its average and of AdamW's moments. Parameters are gathered layer by
layer in the forward and the backward pass. Gradients are reduce-scattered after every microbatch: accumulating full
gradients would need the memory that sharding saves. (On GPUs run with one rank only.)

A sharded parameter is a `DTensor`. Checkpoints hold full tensors, so they do not depend on the number of ranks and open
on one process. They are not written by `torch.distributed.checkpoint`, whose reader unpickles an index file, which may
execute code. So the main process holds the full state in host memory while it saves, 16 bytes per parameter: weights,
average and two moments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


def shard(model: nn.Module, layers: Iterable[nn.Module], full: nn.Module | None, world: World) -> None:
    """Give a model the parameters of another one, sharded over all ranks; every rank calls this.

    A device holds the full parameters of one layer at a time, or those that are in no layer.

    Args:
        model: has its parameters on the meta device, where they take no memory.
        layers: modules whose parameters are gathered for their own forward and backward pass. All other parameters
            stay gathered from the start of the model's forward pass to the end of its backward pass.
        full: the same model with its parameters, on the main process; None on the others. None on all leaves the
            parameters undefined.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.n_ranks,))
    names = {parameter: name for name, parameter in model.named_parameters()}
    values = {} if full is None else dict(full.named_parameters())
    for layer in layers:
        _receive(layer, names, values, world)
        fully_shard(layer, mesh=mesh)
    _receive(model, names, values, world)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


@torch.no_grad()
def _receive(module: nn.Module, names: dict[nn.Parameter, str], values: dict[str, nn.Parameter], world: World) -> None:
    """Replace a module's parameters on the meta device by those of the main process, which has them in `values`."""
    received: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for owner in module.modules():
        for own_name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in received:
                source = values.get(names[parameter])
                tensor = torch.empty_like(parameter, device=world.device) if source is None else source.to(world.device)
                dist.broadcast(tensor, src=0)
                received[parameter] = nn.Parameter(tensor)
            setattr(owner, own_name, received[parameter])


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, any other as it is; every rank calls this."""
    sharded = _as_dtensor(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A copy of this rank's shard of a full tensor if `pattern` is sharded, else the tensor."""
    sharded = _as_dtensor(pattern)
    if sharded is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # On a CPU the shard is a view, which would keep the full tensor.
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None).clone()


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are sharded."""
    return any(_as_dtensor(parameter) is not None for parameter in model.parameters())


@torch.no_grad()
def copy_full(source: nn.Module, target: M) -> M:
    """Copy the full parameters of `source`, which is sharded, to `target`, which is not; every rank calls this."""
    for own, sharded in zip(target.parameters(), source.parameters(), strict=True):
        own.copy_(full_tensor(sharded))
    return target


def shard_weights(weights: dict[str, Tensor], patterns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shard full tensors like the patterns of the same names; a tensor without a sharded pattern is left as it is."""
    return {name: shard_like(tensor, patterns.get(name, tensor)) for name, tensor in weights.items()}


def gather_weights(weights: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Full tensors on the main process, in host memory if they were sharded; every rank calls this."""
    return {name: _on_main(tensor, world) for name, tensor in weights.items()}


def gather_moments(optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """The optimizer's state dict with full tensors, valid on the main process; every rank calls this."""
    state = optimizer.state_dict()
    moments = {number: gather_weights(tensors, world) for number, tensors in state["state"].items()}
    return state | {"state": moments}


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of `gather_moments` into an optimizer, sharded or not; its own hyperparameters stay.

    So a checkpoint saved on a CPU continues on a GPU and the reverse, where AdamW runs with other options.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, tensors in state["state"].items():  # in the order of parameters
        parameter = parameters[number]
        if wrong := [name for name, tensor in tensors.items() if tensor.ndim > 0 and tensor.shape != parameter.shape]:
            raise ValueError(f"the optimizer's {wrong[0]} of parameter {number} has another shape than the parameter")
        # AdamW's step count, without dimensions, is never sharded. A view of it would keep a mapped file.
        moments[number] = {
            name: shard_like(tensor, parameter) if tensor.ndim > 0 else tensor.clone()
            for name, tensor in tensors.items()
        }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _on_main(tensor: Tensor, world: World) -> Tensor:
    """Gathers one tensor, so that a device holds at most one full tensor at a time."""
    sharded = _as_dtensor(tensor)
    if sharded is None:
        return tensor
    full = sharded.full_tensor()
    return full.cpu() if world.is_main else torch.empty(0)


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor. Nothing is one before `shard` has imported the class, which takes a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
