"""The sampler against a loop over rows: 64 boards at one token per step, and TinyGSM's shape.

Every row takes the same few network evaluations (`--steps`), since all steps of a run cost much the same: a board has
that many cells left; of a program so many tokens are masked, and filled in equal parts, that on average half of it is,
as over a whole run.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import dense
from bench.measure import ROOT, Report, clock_of, facts, interleave, measure_peaks, medians, peak_of, row, table
from bench.rows import synthetic_rows
from config import Config, SamplingRule
from model.transformer import Transformer, build_model
from runtime.config_file import read_config
from runtime.distributed import World, autocast, autocast_dtype, start_world
from samplers.full import sample_full

N_ROWS = {"sudoku": 64, "tinygsm": 8}
SMALL = [
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
]
COLUMNS = {
    "name": "model",
    "n_rows": "rows",
    "nfe": "evaluations per row",
    "tokens_per_step": "tokens per step",
    "ours_ms": "ours, ms",
    "dense_ms": "row loop, ms",
    "ratio": "row loop / ours",
    "tokens_per_s": "tokens/s",
    "ours_peak_gib": "ours, GiB",
    "dense_peak_gib": "row loop, GiB",
    "agreement": "tokens that agree",
}


@dataclass
class Problem:
    """Rows to fill in, and a model that does."""

    model: Transformer
    xt: Tensor  # int64 [B, L]
    mask_id: int
    tokens_per_step: int
    dtype: torch.dtype | None

    def ours(self) -> Tensor:
        """All rows at once; int64 [B, L]."""
        with autocast(self.xt.device, self.dtype):
            return sample_full(
                self.model, self.xt, self.mask_id, SamplingRule(tokens_per_step=self.tokens_per_step)
            ).tokens

    def dense(self) -> Tensor:
        """Row by row."""
        with autocast(self.xt.device, self.dtype):
            return dense.sample(self.model, self.xt, self.mask_id, self.tokens_per_step)


def read_settings(name: str, small: bool) -> Config:
    """The paper's experiment, or a tiny model on the same data."""
    overrides = SMALL + ["model.vocab_size=64", "data.mask_id=63", "data.max_len=32"] * (name == "tinygsm")
    return read_config(ROOT / "yaml_files" / f"{name}_puma.yaml", overrides if small else [])


def build(name: str, options: Namespace, world: World) -> Problem:
    """Rows with masked positions for `options.steps` evaluations, and the model with random weights."""
    config = read_settings(name, options.small)
    tokens, prompt_mask = synthetic_rows(config).rows(np.arange(options.rows or N_ROWS[name]))
    rng = np.random.default_rng(0)
    n_masked = []
    for row_tokens, given in zip(tokens, prompt_mask, strict=True):
        places = np.flatnonzero(~given)
        share = options.steps / (options.steps + 1)
        n = min(options.steps, len(places)) if name == "sudoku" else math.ceil(share * len(places))
        row_tokens[rng.permutation(places)[:n]] = config.mask_id
        n_masked.append(n)
    model = build_model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    dtype = autocast_dtype(config.training.precision, world.device)
    per_step = 1 if name == "sudoku" else math.ceil(max(n_masked) / options.steps)
    xt = torch.from_numpy(tokens).to(world.device)
    return Problem(model.to(world.device).eval(), xt, config.mask_id, per_step, dtype)


def run(options: Namespace) -> Report | None:
    """Measure as the options say; None in the process that measures memory, which prints one number."""
    world = start_world("auto")
    if options.memory_of:
        name, side = options.memory_of.split("/")
        print(peak_of(lambda: getattr(build(name, options, world), side), world.device, n_calls=1))
        return None
    names = [options.only] if options.only else list(N_ROWS)
    peaks = measure_peaks(options, [f"{name}/{side}" for name in names for side in ("ours", "dense")])
    rows = [_measure(name, options, world, peaks) for name in names]
    lines = [
        "# Sampling",
        "",
        *table(rows, COLUMNS),
        "",
        "Random weights, temperature 0. Tokens that do not agree come from near ties: products of one row and of many "
        "rows round differently.",
    ]
    return Report(rows, lines)


def _measure(name: str, options: Namespace, world: World, peaks: dict[str, float | None]) -> dict[str, Any]:
    problem = build(name, options, world)
    results: dict[str, Tensor] = {}

    def keep(side: str, call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: results.update({side: call()})

    calls = {"ours": keep("ours", problem.ours), "dense": keep("dense", problem.dense)}
    times = interleave(calls, world.device, options.iterations, options.seconds, label=name, clock=clock_of(options))
    middle = medians(times)
    masked = problem.xt == problem.mask_id
    agreement = (results["ours"] == results["dense"])[masked].float().mean()
    return row(
        name,
        middle["ours"],
        middle["dense"],
        peaks[f"{name}/ours"],
        peaks[f"{name}/dense"],
        n_rows=len(masked),
        nfe=options.steps,
        tokens_per_step=problem.tokens_per_step,
        n_rounds=len(times["ours"]),
        tokens_per_s=1000 * int(masked.sum()) / middle["ours"],
        agreement=f"{agreement:.1%}",
    )


def about(options: Namespace) -> dict[str, Any]:
    """See `bench.measure.facts`."""
    device = start_world("auto").device
    return facts(options, device, autocast_dtype("auto", device))
