"""How fast block diffusion trains and decodes.

Training: steps per second of one pass over [noisy ; clean] (`block_causal`) against a pass per block (`prefix`).
Decoding: tokens per second with and without cached keys and values of finished blocks.

    python -m bench block
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import BlockAttention, ModelSettings, SamplingRule
from data.files import write_text
from model.transformer import Transformer
from progressive_block import BlockLayout
from runtime.distributed import autocast, autocast_dtype
from samplers.block import sample_blocks

N_BLOCKS = (2, 8, 16)
MIN_SECONDS = 2.0  # of each measurement, after the first call
MAX_CALLS = 50
TOKENS_PER_STEP = 2


def settings_for(device: torch.device) -> tuple[ModelSettings, int, int]:
    """Model, rows and length: TinyGSM's on a GPU, a small model on a CPU."""
    on_gpu = device.type == "cuda"
    model = ModelSettings(
        vocab_size=151_645 if on_gpu else 1024,
        hidden_size=512 if on_gpu else 128,
        intermediate_size=1536 if on_gpu else 384,
        num_hidden_layers=14 if on_gpu else 4,
        num_attention_heads=8 if on_gpu else 4,
        tie_word_embeddings=True,
    )
    return (model, 32, 512) if on_gpu else (model, 8, 256)


def run(json_path: Path | None) -> list[dict[str, Any]]:
    """Measure everything on this machine; a row per measurement, written to `json_path` as JSON if given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for n_blocks in tqdm(N_BLOCKS, desc="blocks", unit="size"):
        rows += measure(n_blocks, device)
    if json_path is not None:
        write_text(json_path, json.dumps(rows, indent=1) + "\n")
    return rows


def measure(n_blocks: int, device: torch.device) -> list[dict[str, Any]]:
    """The two ways to train and the two ways to decode rows of `n_blocks` blocks."""
    settings, n_rows, length = settings_for(device)
    precision = autocast_dtype("auto", device)
    mask_id, size = settings.vocab_size - 1, length // n_blocks
    # A quarter of the row is prompt, and half of the rest is masked, as on average in training.
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, mask_id, (n_rows, length), generator=generator).to(device)
    maskable = torch.arange(length, device=device).expand_as(x0) >= length // 4
    masked = maskable & (torch.rand(x0.shape, generator=generator).to(device) < 0.5)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": str(precision or torch.float32).removeprefix("torch."),
        "n_rows": n_rows,
        "length": length,
        "n_blocks": n_blocks,
    }
    rows: list[dict[str, Any]] = []
    attention: BlockAttention
    for attention in ("prefix", "block_causal"):
        model = Transformer(settings, block_size=size if attention == "block_causal" else None).to(device)
        blocks = BlockLayout(length, size, attention)
        with autocast(device, precision):
            seconds = _time(lambda: _train(model, blocks, x0, masked, mask_id), device)  # noqa: B023, called at once
        rows.append(facts | {"what": "training", "how": attention, "steps_per_s": 1 / seconds})
    model.eval()  # the last is the block-causal one, which can decode either way
    xt = x0.masked_fill(maskable, mask_id)
    for cached in (False, True):
        with autocast(device, precision):
            seconds = _time(lambda: _decode(model, xt, mask_id, size, cached), device)  # noqa: B023
        tokens_per_s = int(maskable.sum()) / seconds
        rows.append(
            facts | {"what": "decoding", "how": "cached" if cached else "uncached", "tokens_per_s": tokens_per_s}
        )
    return rows


def _train(model: Transformer, blocks: BlockLayout, x0: Tensor, masked: Tensor, mask_id: int) -> None:
    """Forward and backward of one step; the optimizer costs both layouts the same."""
    xt, weight = x0.masked_fill(masked, mask_id), blocks.weights(masked)
    for batch in blocks.microbatches(xt, x0, weight, len(x0)):
        model(batch.xt, batch.x0, batch.weight).loss.backward()
    model.zero_grad()


def _decode(model: Transformer, xt: Tensor, mask_id: int, size: int, cached: bool) -> None:
    sample_blocks(model, xt, mask_id, SamplingRule(tokens_per_step=TOKENS_PER_STEP), block_size=size, cached=cached)


def _time(call: Callable[[], None], device: torch.device) -> float:
    """Seconds per call: the mean over at least `MIN_SECONDS`, the first call (compilation, caches) left out."""
    call()
    n_calls, start = 0, _now(device)
    while n_calls == 0 or (n_calls < MAX_CALLS and _now(device) - start < MIN_SECONDS):
        call()
        n_calls += 1
    return (_now(device) - start) / n_calls


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
