"""A whole training step: forward, backward, clipping, AdamW, weight average, pool in steady state."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench.dense import DenseTrainer, dense_step
from bench.inputs import read_inputs
from bench.measure import Benchmark, Call, Case, Times, ratio_quartiles
from config import Config, ModelSettings, PumaSettings, UniformSettings
from data.stream import SequenceStream
from model.transformer import build_model
from runtime.distributed import World
from training.run import Run, build_objective, build_run
from training.update import Updater


def build(options: Namespace) -> Benchmark:
    """Our step and the dense one for the objective of the settings; for PUMA, the uniform baseline's too.

    Each side trains one model on all objectives. Only the path `options.only` is built, if that is set.
    """
    config, data, device, dtype = read_inputs(options, "sudoku_puma", n_rows=32, n_rows_slow=4)
    configs, paths, cases = [config], dict[str, Call](), list[Case]()
    if isinstance(config.objective, PumaSettings):
        configs.append(config.model_copy(update={"objective": UniformSettings(name="uniform")}))
    run = cache(lambda: build_run(config, World(0, 1, device), Path("unused"), data))
    trainer = cache(lambda: DenseTrainer(build_model(config).to(device), config, dtype, device))
    for each in configs:
        ours, dense = f"{each.objective.name}/ours", f"{each.objective.name}/dense"
        stream, n_scored = SequenceStream(data, each.training.seed), list[Tensor]()
        if options.only in (None, dense):
            paths[dense] = dense_step(each, trainer(), SequenceStream(data, each.training.seed))
        if options.only in (None, ours):
            objective = build_objective(each.objective, each.training, stream, device)
            paths[ours] = _our_step(replace(run(), config=each, objective=objective), n_scored)
        cases.append(_case(each, data.length, n_scored))

    def remarks(times: Times) -> list[str]:
        if len(cases) == 1:
            return []
        gflop = [case.facts()["gflop"] for case in cases]
        lines = [f"puma / uniform, gflop by the positions that were masked: {gflop[0] / gflop[1]:.3f}"]
        for side in ("ours", "dense"):
            low, ratio, high = ratio_quartiles(times[f"puma/{side}"], times[f"uniform/{side}"])
            lines.append(f"puma / uniform, {side}_ms: {ratio:.3f}, quartiles {low:.3f} and {high:.3f}")
        return lines

    size = f"batch {config.training.batch_size} x {data.length}, vocabulary {config.model.vocab_size:,}"
    return Benchmark(f"Training step, {config.data.dataset}, {size}", paths, cases, device, dtype, remarks)


def _our_step(run: Run, n_scored: list[Tensor]) -> Call:
    """One update; appends the number of positions that carried weight, without a host sync."""
    updater = Updater(run)

    def step() -> None:
        updater.step()
        n_scored.append(torch.stack([(batch.weight != 0).sum() for batch in run.batch]).sum())

    return step


def _case(config: Config, length: int, n_scored: list[Tensor]) -> Case:
    name, n_rows = config.objective.name, config.training.batch_size

    def facts() -> dict[str, float]:
        n = float(torch.stack(n_scored).double().mean())
        flop = arithmetic(config.model, n_rows, length, n, config.causal)
        return {"scored": n / n_rows / length, "gflop": flop / 1e9}

    return Case(name, f"{name}/ours", f"{name}/dense", n_rows * length, "tokens", facts)


def arithmetic(settings: ModelSettings, n_rows: int, length: int, n_scored: float, causal: bool = False) -> float:
    """Operations of a forward and backward pass: backbone, attention's two products, head on `n_scored` positions."""
    width, tokens = settings.hidden_size, n_rows * length
    kv_width = width // settings.num_attention_heads * settings.n_key_value_heads
    n_weights = 2 * width * width + 2 * width * kv_width + 3 * width * settings.intermediate_size
    layers = settings.num_hidden_layers * tokens * (6.0 * n_weights + 12.0 * width * length / (2 if causal else 1))
    return layers + 6.0 * width * settings.vocab_size * n_scored
