"""The sampler beside a loop over rows, and its other rules: boards at one token per step, or TinyGSM's shape.

All steps of a run cost much the same, so every row takes a few (`--steps`). A board has that many cells left. A program
is masked so far, and filled in equal parts, that on average half of it is masked, as over a whole run. The samplers may
choose differently at near ties: products of one and of many rows round differently.

The other rules, each beside the first, are set so that with random weights they take about as many evaluations: what
differs is their cost in a pass.
"""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import dense
from bench.inputs import read_inputs
from bench.measure import Benchmark, Call, Case
from config import SamplingRule
from data.sudoku import SudokuSettings
from model.transformer import build_model
from runtime.distributed import autocast
from samplers.full import sample_full


def build(options: Namespace) -> Benchmark:
    """Both samplers on rows with masked positions for `--steps` evaluations, and a model with random weights."""
    config, data, device, dtype = read_inputs(options, "sudoku_puma", n_rows=64, n_rows_slow=8)
    n_rows, n_steps, mask_id = config.training.batch_size, options.steps or 4, config.mask_id
    one_by_one = isinstance(config.data, SudokuSettings)
    tokens, prompt_mask = data.rows(np.arange(n_rows) % len(data))
    rng = np.random.default_rng(0)
    for row, given in zip(tokens, prompt_mask, strict=True):
        places = rng.permutation(np.flatnonzero(~given))
        n = n_steps if one_by_one else math.ceil(n_steps / (n_steps + 1) * len(places))
        row[places[:n]] = mask_id
    per_step = 1 if one_by_one else math.ceil((tokens == mask_id).sum(1).max() / n_steps)
    model = build_model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.to(device).eval()
    xt = torch.from_numpy(tokens).to(device)
    results: dict[str, Tensor] = {}
    evaluations: dict[str, float] = {}

    def ours() -> None:
        with autocast(device, dtype):
            found = sample_full(model, xt, mask_id, SamplingRule(tokens_per_step=per_step))
        results["ours"], evaluations["ours"] = found.tokens, float(found.nfe.double().mean())

    bound = (per_step - 1) * math.log(config.model.vocab_size - 1)  # random weights: entropies just below log V
    rules = {
        "threshold": SamplingRule(tokens_per_step=per_step, threshold=0.99),
        "stable": SamplingRule(tokens_per_step=per_step, threshold=0.99, kl_bound=0.01),
        "entropy_bound": SamplingRule(confidence="neg_entropy", entropy_bound=bound),
        "remask": SamplingRule(revise="remask", n_passes=n_steps),
        "plan": SamplingRule(revise="plan", n_passes=n_steps),
        "running_confidence": SamplingRule(revise="running_confidence", n_passes=n_steps),
    }

    def by_rule(name: str) -> None:
        with autocast(device, dtype):
            found = sample_full(model, xt, mask_id, rules[name])
        evaluations[name] = float(found.nfe.double().mean())

    def row_loop() -> None:
        with autocast(device, dtype):
            results["dense"] = dense.sample(model, xt, mask_id, per_step)

    def facts() -> dict[str, Any]:
        agree = (results["ours"] == results["dense"])[xt == mask_id].double().mean()
        return {"nfe": evaluations["ours"], "tokens_per_step": per_step, "agreement": f"{agree:.1%}"}

    def evaluations_of(name: str) -> dict[str, Any]:
        return {"nfe": evaluations[name]}

    n_tokens = int((xt == mask_id).sum())
    cases = [Case(config.data.dataset, "ours", "dense", n_tokens, "tokens", facts)]
    cases += [
        Case(
            f"{name} beside top_prob",
            name,
            "ours",
            n_tokens,
            "tokens",
            partial(evaluations_of, name),
        )
        for name in rules
    ]
    paths: dict[str, Call] = {name: partial(by_rule, name) for name in rules}
    title = f"Sampling with random weights, {n_rows} rows of {data.length} tokens"
    return Benchmark(title, {"ours": ours, "dense": row_loop} | paths, cases, device, dtype)
