"""Block diffusion: training in one pass over [noisy ; clean] or a pass per block, decoding with and without a cache."""

from __future__ import annotations

from argparse import Namespace
from functools import cache, partial

import torch

from bench.inputs import read_inputs
from bench.measure import Benchmark, Call, Case
from config import BlockAttention, SamplingRule
from model.transformer import Transformer
from progressive_block import BlockLayout
from runtime.distributed import autocast
from samplers.block import sample_blocks

N_BLOCKS = (2, 8, 16)
RULE = SamplingRule(tokens_per_step=2)
# A CPU takes minutes for a round of TinyGSM's model; a small one compares the layouts as well.
SMALL_MODEL = ["model.vocab_size=1024", "data.mask_id=1023", "data.max_len=256", "model.hidden_size=128"]
SMALL_MODEL += ["model.intermediate_size=384", "model.num_hidden_layers=4", "model.num_attention_heads=4"]


def build(options: Namespace) -> Benchmark:
    """Both ways to train and both ways to decode rows of each of `N_BLOCKS` blocks."""
    on_gpu = torch.cuda.is_available()
    changes = () if on_gpu or options.config else SMALL_MODEL
    config, data, device, dtype = read_inputs(options, "tinygsm_puma", 32 if on_gpu else 8, 8, changes)
    n_rows, length, mask_id = config.training.batch_size, data.length, config.mask_id
    if length % max(N_BLOCKS):
        raise ValueError(f"{max(N_BLOCKS)} blocks do not divide rows of {length} tokens: see --length")
    # A quarter of the row is prompt, and half of the rest is masked, as on average in training.
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, mask_id, (n_rows, length), generator=generator).to(device)
    maskable = torch.arange(length, device=device).expand_as(x0) >= length // 4
    masked = maskable & (torch.rand(x0.shape, generator=generator).to(device) < 0.5)

    @cache
    def build_model(block_size: int | None) -> Transformer:
        return Transformer(config.model, block_size=block_size).to(device)

    def train(block_size: int, layout: BlockAttention) -> None:
        """Forward and backward of one step; the optimizer costs both layouts the same."""
        model, blocks = (
            build_model(block_size if layout == "block_causal" else None),
            BlockLayout(length, block_size, layout),
        )
        xt, weight = x0.masked_fill(masked, mask_id), blocks.weights(masked)
        with autocast(device, dtype):
            for batch in blocks.microbatches(xt, x0, weight, n_rows):
                model(batch.xt, batch.x0, batch.weight).loss.backward()
        model.zero_grad()

    def decode(block_size: int, cached: bool) -> None:
        model, xt = build_model(block_size), x0.masked_fill(maskable, mask_id)
        with autocast(device, dtype):
            sample_blocks(model, xt, mask_id, RULE, block_size=block_size, cached=cached)

    paths, cases = dict[str, Call](), list[Case]()
    for n in N_BLOCKS:
        paths[f"block_causal/{n}"] = partial(train, length // n, "block_causal")
        paths[f"prefix/{n}"] = partial(train, length // n, "prefix")
        paths[f"cached/{n}"] = partial(decode, length // n, cached=True)
        paths[f"uncached/{n}"] = partial(decode, length // n, cached=False)
        cases.append(Case(f"training, {n} blocks", f"block_causal/{n}", f"prefix/{n}", 1, "steps"))
        cases.append(Case(f"decoding, {n} blocks", f"cached/{n}", f"uncached/{n}", int(maskable.sum()), "tokens"))
    title = f"Block diffusion, {n_rows} x {length} tokens: block_causal and cached beside prefix and uncached"
    return Benchmark(title, paths, cases, device, dtype)
