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
from bench.gpu.tiny import TINY_MODEL
from bench.inputs import YAML_FILES
from model.block_mask import dense_mask, flex_mask
from model.transformer import Transformer
from progressive_block import BlockLayout
from runtime.config_file import read_config
from runtime.distributed import autocast, start_world

YAML_FILE = YAML_FILES / "tinygsm_block_causal_puma.yaml"
SMALL_VOCABULARY = ["model.vocab_size=4096"]  # the head is the same on both sides
TINY = [*TINY_MODEL, "model.vocab_size=64", "data.max_len=32", "objective.block_size=8"]
# Relative error in float32, in which FlexAttention sums in another order than the dense mask.
TOLERANCE = 1e-3
# In bfloat16 rounding errors add up over layers, so both masks are compared with the dense one in float32, and
# FlexAttention may be this many times as far from it.
ROUNDING = 2.0
BFLOAT16_STEP = 2.0**-8  # a smaller error of the dense mask is luck
WIDER = 5.0  # than initial weights, with which attention has next to no effect on the loss


def run(options: Namespace, report: Report) -> None:
    """Compare the masks, then measure."""
    overrides = [*(TINY if options.tiny else SMALL_VOCABULARY), *options.overrides]
    for precision, limit, unit in (("float32", TOLERANCE, ""), ("bfloat16", ROUNDING, "times")):
        name = f"FlexAttention against the dense mask, {precision}"
        errors = report.measure(name, compare_masks, precision, overrides)
        for key, error in (errors or {}).items():
            report.add(f"{name}: {key}", error, unit, ("<=", limit))
    limits = ["--no-memory", "--iterations", "3", "--seconds", "1" if options.tiny else "20"]
    tiny = ["--config", str(YAML_FILES / "tinygsm_puma.yaml"), "--batch", "2", "--length", "32", *TINY_MODEL]
    # Rows of 512 tokens take minutes: hundreds of passes for a row, and four rounds of six decodings.
    sizes = [*tiny, "--vocab", "64"] if options.tiny else ["--batch", "16", "--length", "256"]
    rows = report.measure("speed", bench_rows, ["block", *limits, *sizes, *options.overrides], limit_s=300)
    report.details["speed"] = rows
    for row in rows or []:
        ours, dense = ("cached", "uncached") if row["unit"] == "tokens" else ("block_causal", "prefix")
        report.add(f"{row['name']}: {ours}", row["ours_per_s"], f"{row['unit']}/s")
        report.add(f"{row['name']}: {dense}", row["dense_per_s"], f"{row['unit']}/s")


def compare_masks(precision: str, overrides: list[str]) -> dict[str, float]:
    """Errors of loss, confidence and gradients with FlexAttention.

    In float32 the relative error, ‖flex - dense‖ / ‖dense‖. In bfloat16 the relative error against the dense mask in
    float32, as a multiple of that of the dense mask in bfloat16.

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

    def compute(
        build_mask: Callable[[int, int, torch.device], Tensor | BlockMask], dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
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

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {key: float((found[key].double() - own).norm() / own.double().norm()) for key, own in exact.items()}

    exact = compute(dense_mask, None)
    if precision == "float32":
        return errors(compute(flex_mask, None))
    flex, dense = (errors(compute(mask, torch.bfloat16)) for mask in (flex_mask, dense_mask))
    return {key: error / max(dense[key], BFLOAT16_STEP) for key, error in flex.items()}
