"""Optimizer, learning-rate schedule and weight average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    # A captured CUDA graph reads the learning rate from device memory.
    rate = torch.tensor(settings.learning_rate, device=parameters[0].device) if on_gpu else settings.learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=settings.adam_betas, fused=True, capturable=on_gpu)


def learning_rate(step: int, settings: TrainingSettings, n_steps: int) -> float:
    """Learning rate of the update after `step` updates: linear warm-up, constant, then half a cosine to 0 at `n_steps`.

    Without `decay_steps` the decay begins at the end of the warm-up.
    """
    warmup_steps = settings.warmup_steps
    if step < warmup_steps:
        return settings.learning_rate * (step / warmup_steps)
    start = decay_start(settings, n_steps)
    progress = max(0, step - start) / max(1, n_steps - start)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_start(settings: TrainingSettings, n_steps: int) -> int:
    """Number of updates before the learning rate decays; up to there it does not depend on `n_steps`."""
    decay_steps = n_steps if settings.decay_steps is None else settings.decay_steps
    return max(settings.warmup_steps, n_steps - decay_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters; in place where it is a tensor, which a captured CUDA graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def ema_decay(decay: float, n_averaged: int) -> float:
    """Decay of the average after n = `n_averaged` updates, as in the published code: min(decay, (1 + n) / (10 + n)).

    A constant decay d keeps d^n of the initial weights: with 0.9999, 37% after 10,000 updates.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


def build_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the weights; `module` is the averaged model. None without a decay."""
    return None if decay is None else AveragedModel(model)


@torch.no_grad()
def update_ema(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Update the average; the first update copies the weights.

    `AveragedModel.update_parameters` is not used: it copies its counter to the device, a host sync.
    """
    n_averaged = int(ema.n_averaged)  # on the CPU
    weight = 1.0 - ema_decay(decay, n_averaged) if n_averaged else 1.0
    torch._foreach_lerp_(list(ema.module.parameters()), list(model.parameters()), weight)
    ema.n_averaged += 1
