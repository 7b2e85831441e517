"""Block diffusion on a GPU: FlexAttention computes what a dense mask does, and decoding with cached keys and values.

Shapes: B rows, L positions, S block size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench.gpu.report import Report, bench_rows
from bench.gpu.runs import TINY_MODEL, paused
from bench.inputs import YAML_FILES
from model.block_mask import dense_mask, flex_mask
from model.transformer import Transformer
from progressive_block import BlockLayout
from runtime.config_file import read_config
from runtime.distributed import autocast, start_world

YAML_FILE = YAML_FILES / "tinygsm_block_causal_puma.yaml"
SMALL_VOCABULARY = ["model.vocab_size=4096"]  # the head is the same on both sides
TINY = [*TINY_MODEL, "model.vocab_size=64", "data.max_len=32", "objective.block_size=8"]
# Relative errors: FlexAttention sums in another order. bfloat16 has 8 bits, and errors add up over layers.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
WIDER = 5.0  # than initial weights, with which attention has next to no effect on the loss


def run(options: Namespace, report: Report) -> None:
    """Compare the masks, then measure."""
    overrides = [*(TINY if options.tiny else SMALL_VOCABULARY), *options.overrides]
    for precision, tolerance in TOLERANCES.items():
        name = f"FlexAttention against the dense mask, {precision}"
        errors = report.measure(name, compare_masks, precision, overrides)
        for key, error in (errors or {}).items():
            report.add(f"{name}: {key}", error, "", ("<=", tolerance))
    limits = ["--no-memory", "--iterations", "3", "--seconds", "1" if options.tiny else "20"]
    sizes = ["--config", str(YAML_FILES / "tinygsm_puma.yaml"), "--batch", "2", "--length", "32", *TINY_MODEL]
    small = [*sizes, "--vocab", "64"] if options.tiny else []
    with paused(options.runs):
        rows = report.measure("speed", bench_rows, ["block", *limits, *small, *options.overrides], limit_s=300)
    report.details["speed"] = rows
    for row in rows or []:
        ours, dense = ("cached", "uncached") if row["unit"] == "tokens" else ("block_causal", "prefix")
        report.add(f"{row['name']}: {ours}", row["ours_per_s"], f"{row['unit']}/s")
        report.add(f"{row['name']}: {dense}", row["dense_per_s"], f"{row['unit']}/s")


def compare_masks(precision: str, overrides: list[str]) -> dict[str, float]:
    """Relative errors of loss, confidence and gradients with FlexAttention, ‖flex - dense‖ / ‖dense‖.

    On a CPU without gradients, which FlexAttention does not have there.
    """
    config, device = read_config(YAML_FILE, overrides), start_world("auto").device
    block_size, mask_id = config.block_causal_size, config.mask_id
    assert block_size is not None
    model = Transformer(config.model, block_size=block_size)
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(WIDER if parameter.ndim > 1 else 1.0)
    model.to(device)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, mask_id, (8, config.data.length), generator=generator)
    masked = torch.rand(x0.shape, generator=generator) < 0.5
    weight = BlockLayout(config.data.length, block_size, "block_causal").weights(masked).to(device)
    x0, xt = x0.to(device), x0.masked_fill(masked, mask_id).to(device)
    dtype = torch.bfloat16 if precision == "bfloat16" else None

    def compute(build_mask: Callable[[int, int, torch.device], Tensor | BlockMask]) -> dict[str, Tensor]:
        """Loss, confidence [N] of masked positions, and all gradients in one vector."""

        def training_mask(length: int, size: int, on: torch.device, head_width: int) -> Tensor | BlockMask:
            return build_mask(length, size, on)

        needs_gradients = device.type == "cuda"
        with mock.patch("model.transformer.training_mask", training_mask), torch.set_grad_enabled(needs_gradients):
            with autocast(device, dtype):
                scores = model(xt, x0, weight)
            found = {"loss": scores.loss.detach(), "confidence": scores.confidence[weight != 0]}
            if needs_gradients:
                gradients = torch.autograd.grad(scores.loss, list(model.parameters()))
                found["gradients"] = torch.cat([gradient.flatten() for gradient in gradients])
        return found

    flex, dense = compute(flex_mask), compute(dense_mask)
    return {key: float((flex[key].double() - dense[key]).norm() / dense[key].double().norm()) for key in dense}
