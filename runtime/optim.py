"""Optimizer, learning-rate schedule and weight average."""

from __future__ import annotations

from typing import Any

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
    """Decay of the average after `n_averaged` updates: min(decay, (1 + n) / (10 + n)), as in the published code.

    A constant decay d keeps d^n of the first weights: with 0.9999, 37% after 10,000 updates.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


def build_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the weights; its `module` is a model of its own. None without a decay."""
    if decay is None:
        return None

    def update(averaged: Any, current: Any, _: Any) -> None:
        # The count on the host: the argument is its copy on the device, which would have to be waited for.
        torch._foreach_lerp_(averaged, current, 1 - ema_decay(decay, int(average.n_averaged)))

    average = AveragedModel(model, multi_avg_fn=update)
    return average
