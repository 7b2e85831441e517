"""Optimizer, learning-rate schedule and weight average."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from config import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW in one fused kernel; norms and biases are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    # A recorded update reads the learning rate from the device.
    rate = torch.tensor(settings.learning_rate, device=parameters[0].device) if on_gpu else settings.learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=settings.adam_betas, fused=True, capturable=on_gpu)


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, n_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup_steps`, then half a cosine down to 0 at `n_steps`."""
    from transformers.optimization import get_cosine_schedule_with_warmup  # seconds to import: only training pays

    return get_cosine_schedule_with_warmup(optimizer, warmup_steps, n_steps)


def ema_decay(decay: float, n_averaged: int) -> float:
    """Share of the average that the next update keeps, after `n_averaged` of them: min(decay, (1 + n) / (10 + n)).

    As in the published code. A constant decay d keeps d^n of the first weights: with 0.9999, 37% after 10,000 updates.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


def build_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the weights; its `module` is a model of its own. None without a decay."""
    return None if decay is None else AveragedModel(model)


@torch.no_grad()
def update_ema(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Move the average towards the weights; the first update copies them.

    Not by `AveragedModel.update_parameters`, which copies its counter to the device: a host sync.
    """
    n_averaged = int(ema.n_averaged)  # on the CPU
    weight = 1.0 - ema_decay(decay, n_averaged) if n_averaged else 1.0
    torch._foreach_lerp_(list(ema.module.parameters()), list(model.parameters()), weight)
    ema.n_averaged += 1
