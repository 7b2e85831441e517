"""Optimizer, learning-rate schedule and weight average, against their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import UNIFORM, tiny_settings
from torch import nn
from torch.optim.swa_utils import AveragedModel

from config import TrainingSettings
from model.transformer import Transformer
from runtime.config_file import parse_config
from runtime.optim import build_ema, build_optimizer, decay_start, learning_rate, set_learning_rate, update_ema

CONFIG = parse_config(tiny_settings(UNIFORM, Path("boards")), "test")


def averaged(layer: nn.Linear, decay: float) -> tuple[AveragedModel, nn.Linear]:
    """The average of a layer, and the layer that holds it."""
    ema = build_ema(layer, decay)
    assert ema is not None
    assert isinstance(ema.module, nn.Linear)
    return ema, ema.module


def settings(**values: object) -> TrainingSettings:
    return TrainingSettings.model_validate({"batch_size": 1, "learning_rate": 0.1, "max_steps": 1} | values)


def test_norms_and_biases_are_not_decayed_and_matrices_are():
    model = Transformer(CONFIG.model)
    optimizer = build_optimizer(model, settings(weight_decay=0.5))
    assert isinstance(optimizer, torch.optim.AdamW)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = name.endswith("weight") and "norm" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5 if decayed else 1), msg=name)
    n_seen = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert n_seen == sum(parameter.numel() for parameter in model.parameters())


def test_adamw_follows_its_formula():
    layer = nn.Linear(3, 2)
    weight, bias = (parameter.detach().double().clone() for parameter in layer.parameters())
    optimizer = build_optimizer(layer, settings(weight_decay=0.1, adam_betas=(0.8, 0.95)))
    generator = torch.Generator().manual_seed(0)
    moments = {id(value): [torch.zeros_like(value), torch.zeros_like(value)] for value in (weight, bias)}
    for step in range(1, 6):
        for parameter, value, decay in ((layer.weight, weight, 0.1), (layer.bias, bias, 0.0)):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            first, second = moments[id(value)]
            first.mul_(0.8).add_(0.2 * gradient)
            second.mul_(0.95).add_(0.05 * gradient.double() ** 2)
            value.mul_(1 - 0.1 * decay)
            value.sub_(0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8))
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_one_parameter():
    model = Transformer(CONFIG.model.model_copy(update={"tie_word_embeddings": True}))
    optimizer = build_optimizer(model, settings())
    parameters = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))


@pytest.mark.parametrize(("warmup_steps", "n_steps"), [(0, 10), (4, 20), (7, 1000), (10, 11), (30, 20), (500, 907_000)])
def test_the_learning_rate_is_that_of_transformers_bit_for_bit(warmup_steps, n_steps):
    from transformers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.3)
    factor = get_cosine_schedule_with_warmup(optimizer, warmup_steps, n_steps).lr_lambdas[0]
    training = settings(learning_rate=0.3, warmup_steps=warmup_steps)
    for step in range(0, n_steps + 1, max(1, n_steps // 1000)):
        assert learning_rate(step, training, n_steps) == 0.3 * factor(step), step


@pytest.mark.parametrize(
    ("warmup_steps", "decay_steps", "n_steps"), [(0, 4, 10), (4, 10, 20), (3, 0, 9), (0, 1, 5), (10, 90, 100)]
)
def test_a_constant_rate_with_a_decay_at_the_end_is_that_of_transformers(warmup_steps, decay_steps, n_steps):
    from transformers.optimization import get_wsd_schedule

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.3)
    schedule = get_wsd_schedule(optimizer, warmup_steps, decay_steps, n_steps, decay_type="cosine")
    training = settings(learning_rate=0.3, warmup_steps=warmup_steps, decay_steps=decay_steps)
    for step in range(n_steps):
        assert learning_rate(step, training, n_steps) == pytest.approx(0.3 * schedule.lr_lambdas[0](step)), step
        if step <= decay_start(training, n_steps):
            assert learning_rate(step, training, n_steps) == learning_rate(step, training, 2 * n_steps), step


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    training = settings(warmup_steps=4, decay_steps=30)
    assert decay_start(training, 20) == 4
    assert learning_rate(20, training, 20) == 0


def test_a_learning_rate_in_a_tensor_is_set_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(()))], lr=rate, capturable=True)
    optimizer.param_groups[0]["lr"] = rate
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25


def test_the_average_follows_its_formula():
    """The first update copies the weights; after n updates d = min(decay, (1 + n) / (10 + n)) of the average is kept.

    So the first weights are soon forgotten: a constant decay would keep them with weight decay^n.
    """
    layer = nn.Linear(3, 2)
    ema, average = averaged(layer, 0.9)
    generator = torch.Generator().manual_seed(0)
    expected = None
    for n in range(120):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=generator))
        update_ema(ema, layer, 0.9)
        weight = layer.weight.detach().double()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = weight.clone() if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_a_model_of_its_own():
    layer = nn.Linear(3, 2)
    ema, average = averaged(layer, 0.9)
    update_ema(ema, layer, 0.9)
    before = average.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(average.weight, before)


def test_no_decay_no_average():
    assert build_ema(nn.Linear(3, 2), None) is None
