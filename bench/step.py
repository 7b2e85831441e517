"""A whole training step: forward, backward, clipping, AdamW, weight average, pool in steady state.

`--sizes` measures our step alone and fits its time against batch, length and vocabulary.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.arithmetic import arithmetic
from bench.dense import DenseTrainer, build_dense_objective, check_has_plain_form
from bench.measure import (
    Report,
    clock_of,
    facts,
    interleave,
    matrix_product,
    measure_peaks,
    medians,
    peak_of,
    row,
    table,
)
from bench.profile import profile_step
from bench.rows import synthetic_rows
from config import Config, PumaSettings, UniformSettings
from data.stream import SequenceData, SequenceStream
from model.logits import SMALL_VOCABULARY
from model.transformer import build_model
from runtime.config_file import parse_config, read_config
from runtime.distributed import World, autocast_dtype, start_world
from training.run import Run, build_objective, build_run
from training.update import Updater

COLUMNS = {
    "name": "objective",
    "ours_ms": "ours, ms",
    "dense_ms": "dense, ms",
    "ratio": "dense / ours",
    "tokens_per_s": "tokens/s",
    "dense_tokens_per_s": "dense tokens/s",
    "ours_peak_gib": "ours, GiB",
    "dense_peak_gib": "dense, GiB",
    "scored": "positions scored",
    "floor_ms": "floor, ms",
    "utilisation": "utilisation",
}
SIZE_COLUMNS = {
    "axis": "axis",
    "size": "size",
    "ours_ms": "ours, ms",
    "gflop": "GFLOP",
    "gflop_per_s": "GFLOP/s",
}
SIZES = {
    "batch": (1, 2, 4, 8),
    "length": (1, 2, 4, 8),
    "vocab": (1, 4, 16, 64),
}
FASTER_THAN_ARITHMETIC = 0.1  # by how much an exponent may exceed the arithmetic's before it is called so


def run(options: Namespace) -> Report | None:
    """Measure as the options say; None in the process that measures memory, which prints one number."""
    config = read_settings(options)
    check_has_plain_form(config)
    world = start_world(config.training.device)
    if options.memory_of:
        names = [options.memory_of]
        print(peak_of(lambda: build_paths(config, world, names, options.length)[names[0]][0], world.device))
        return None
    if options.profile:
        name = f"{config.objective.name}/ours"
        step, _ = build_paths(config, world, [name], options.length)[name]
        title = f"{options.config.stem}, {config.objective.name}, batch {config.training.batch_size}"
        return profile_step(step, warmup_rounds(options), world.device, title)
    return measure_sizes(options, config, world) if options.sizes else compare(options, config, world)


def read_settings(options: Namespace) -> Config:
    """The config with the options' sizes; raises ValueError like the training command."""
    overrides = ["training.compile=true"] * options.compile + ["training.cuda_graph=true"] * options.graph
    config = read_config(options.config, [*overrides, *options.overrides])
    raw = config.model_dump(mode="json")
    on_gpu = torch.cuda.is_available() and config.training.device != "cpu"
    most = 32 if on_gpu or config.model.vocab_size <= SMALL_VOCABULARY else 4
    raw["training"]["batch_size"] = options.batch or min(config.training.batch_size, most)
    raw["training"]["micro_batch_size"] = None
    if options.vocab:
        raw["model"]["vocab_size"] = options.vocab
        if raw["data"].get("mask_id") is not None:
            raw["data"]["mask_id"] = options.vocab - 1
    raw["model"]["init_from"] = None
    return parse_config(raw, str(options.config))


def warmup_rounds(options: Namespace) -> int:
    """Steps before a path is timed: for AdamW's state, for compilation, and for the recording of a graph."""
    return 5 if options.graph else 2 if options.compile else 1


def sibling(config: Config) -> list[Config]:
    """The settings, and for PUMA the uniform baseline's as well."""
    if isinstance(config.objective, PumaSettings):
        return [config, config.model_copy(update={"objective": UniformSettings(name="uniform")})]
    return [config]


def build_paths(
    config: Config, world: World, names: list[str] | None = None, length: int | None = None
) -> dict[str, tuple[Callable[[], object], Any]]:
    """Steps by name, `puma/ours` and so on, each with the objective that it trains on; all share one model.

    Args:
        names: which of them; by default all.
        length: tokens per sequence, if not the data set's.
    """
    known = {f"{each.objective.name}/{side}" for each in sibling(config) for side in ("ours", "dense")}
    if unknown := set(names or known) - known:
        raise ValueError(f"no path {sorted(unknown)} in this benchmark, which has {sorted(known)}")
    data = synthetic_rows(config, length)
    if config.model.learned_positions is not None:  # as many as this length needs
        model_settings = config.model.model_copy(update={"learned_positions": data.length})
        config = config.model_copy(update={"model": model_settings})
    dtype = autocast_dtype(config.training.precision, world.device)
    paths: dict[str, tuple[Callable[[], object], Any]] = {}
    ours: Run | None = None
    dense: DenseTrainer | None = None
    for each in sibling(config):
        for side in ("ours", "dense"):
            name = f"{each.objective.name}/{side}"
            if names is not None and name not in names:
                continue
            if side == "ours":
                ours = _with_objective(ours, each, data) if ours else build_run(each, world, Path("unused"), data)
                paths[name] = Updater(ours).step, ours.objective
                continue
            if dense is None:
                model = ours.model if ours else build_model(each).to(world.device)
                dense = DenseTrainer(model.train(), each, dtype, world.device)
            plain = build_dense_objective(each, SequenceStream(data, each.training.seed), world.device)
            paths[name] = _dense_step(dense, plain), plain
    return paths


def _with_objective(ours: Run, config: Config, data: SequenceData) -> Run:
    """The same run on another objective."""
    stream = SequenceStream(data, config.training.seed)
    objective = build_objective(config.objective, config.training, stream, config.mask_id, ours.world.device)
    return replace(ours, config=config, objective=objective)


def _dense_step(dense: DenseTrainer, objective: Any) -> Callable[[], object]:
    return lambda: dense.step(objective)


def compare(options: Namespace, config: Config, world: World) -> Report:
    """Our step against the dense one, for each objective."""
    device, dtype = world.device, autocast_dtype(config.training.precision, world.device)
    objectives = [each.objective.name for each in sibling(config)]
    peaks = measure_peaks(options, [f"{name}/{side}" for name in objectives for side in ("ours", "dense")])
    paths = build_paths(config, world, length=options.length)
    product, product_flop = matrix_product(dtype, device)
    calls = {name: call for name, (call, _) in paths.items()} | {"product": product}
    scored: dict[str, list[float]] = {name: [] for name in objectives}
    for name in objectives:
        calls[f"{name}/ours"] = _counted(*paths[f"{name}/ours"], scored[name])
    times = interleave(
        calls,
        device,
        options.iterations,
        options.seconds,
        n_warmup=warmup_rounds(options),
        label="step",
        clock=clock_of(options),
    )
    middle = medians(times)
    peak_flops = 1000 * product_flop / middle["product"]  # per second
    n_rows, length = config.training.batch_size, options.length or synthetic_rows(config).length
    rows = []
    for name in objectives:
        n_scored = sum(float(share) for share in scored[name]) / len(scored[name]) * n_rows * length
        work = arithmetic(config.model, n_rows, length, n_scored, config.causal)
        ours_ms, dense_ms = middle[f"{name}/ours"], middle[f"{name}/dense"]
        rows.append(
            row(
                name,
                ours_ms,
                dense_ms,
                peaks[f"{name}/ours"],
                peaks[f"{name}/dense"],
                batch=n_rows,
                length=length,
                vocab=config.model.vocab_size,
                n_rounds=len(times["product"]),
                tokens_per_s=1000 * n_rows * length / ours_ms,
                dense_tokens_per_s=1000 * n_rows * length / dense_ms,
                scored=f"{n_scored / n_rows / length:.0%}",
                gflop=work.total / 1e9,
                floor_ms=1000 * work.total / peak_flops,
                utilisation=f"{1000 * work.total / peak_flops / ours_ms:.0%}",
            )
        )
    lines = [
        f"# Training step, {options.config.stem}, batch {n_rows} x {length}, {config.model.vocab_size:,} tokens",
        "",
    ]
    lines += [*table(rows, COLUMNS), "", *_remarks(times, rows, peak_flops)]
    return Report(rows, lines)


def _counted(call: Callable[[], object], objective: Any, shares: list[float]) -> Callable[[], object]:
    """The step, which also notes what share of the positions it scores (kept on the device)."""
    drawn = objective.microbatches

    def microbatches(step: int) -> Any:
        batches = list(drawn(step))
        shares.append(sum((batch.weight != 0).float().mean() for batch in batches) / len(batches))
        return iter(batches)

    objective.microbatches = microbatches
    return call


def _remarks(times: dict[str, list[float]], rows: list[dict[str, Any]], peak_flops: float) -> list[str]:
    lines = [
        f"Medians of {len(times['product'])} rounds. Peak memory is what a path adds to the imports, in a process of "
        "its own. The floor is 6 * parameters * tokens for the backbone, attention's products, and the head on the "
        "scored positions, at the speed of a large matrix product timed between the steps "
        f"({peak_flops / 1e9:,.0f} GFLOP/s); utilisation is floor / ours.",
    ]
    if "puma/ours" in times and "uniform/ours" in times:
        for side in ("ours", "dense"):
            puma, uniform = times[f"puma/{side}"], times[f"uniform/{side}"]
            paired = statistics.median(a / b for a, b in zip(puma, uniform, strict=True))
            ratio = statistics.median(puma) / statistics.median(uniform)
            lines += ["", f"PUMA / uniform, {side}: {ratio:.3f} (median of the rounds' own ratios {paired:.3f})."]
        work = [entry["gflop"] for entry in rows]
        lines += [
            "",
            f"The positions that happened to be masked put the arithmetic of ours at {work[0] / work[1]:.3f}.",
        ]
    return lines


def measure_sizes(options: Namespace, config: Config, world: World) -> Report:
    """Our step's time against batch, length and vocabulary, with the exponent of a fit on logarithms."""
    rows, remarks = [], []
    length = options.length or synthetic_rows(config).length
    for axis, factors in tqdm(SIZES.items(), desc="axes", unit="axis", leave=False):
        points = [_point(options, config, length, axis, factor) for factor in factors]
        # Points in turn, so that a slow minute of the machine touches all of them.
        name = f"{config.objective.name}/ours"
        paths = {size: build_paths(own, world, [name], own_length)[name] for size, own, own_length in points}
        scored: dict[int, list[float]] = {size: [] for size in paths}
        calls = {str(size): _counted(call, objective, scored[size]) for size, (call, objective) in paths.items()}
        times = interleave(
            calls,
            world.device,
            options.iterations,
            options.seconds / len(SIZES),
            n_warmup=warmup_rounds(options),
            label=axis,
            clock=clock_of(options),
        )
        own_rows = []
        for size, own, own_length in points:
            ours_ms, n_rows = medians(times)[str(size)], own.training.batch_size
            n_scored = sum(float(share) for share in scored[size]) / len(scored[size]) * n_rows * own_length
            gflop = arithmetic(own.model, n_rows, own_length, n_scored, own.causal).total / 1e9
            own_rows.append(
                row(f"{axis}={size}", ours_ms, axis=axis, size=size, gflop=gflop, gflop_per_s=1000 * gflop / ours_ms)
            )
        rows += own_rows
        remarks.append(_fit(axis, own_rows))
    title = f"# Training step against size, {options.config.stem}, {config.objective.name}"
    return Report(rows, [title, "", *table(rows, SIZE_COLUMNS), "", *remarks])


def _point(options: Namespace, config: Config, length: int, axis: str, factor: int) -> tuple[int, Config, int]:
    """One size of an axis, the settings of it and the length; the other axes stand in the middle."""
    raw = config.model_dump(mode="json")
    if axis == "batch":
        size = raw["training"]["batch_size"] = max(1, config.training.batch_size // 4) * factor
    elif axis == "length":
        size = length = max(8, length // 4) * factor
    else:
        # From a vocabulary that costs nothing to one that costs most, or a share of what is large already.
        base = 512 if config.model.vocab_size <= SMALL_VOCABULARY else config.model.vocab_size // 64
        size = raw["model"]["vocab_size"] = base * factor
        if raw["data"].get("mask_id") is not None:
            raw["data"]["mask_id"] = size - 1
    return size, parse_config(raw, str(options.config)), length


def _fit(axis: str, rows: list[dict[str, Any]]) -> str:
    """What a straight line through the logarithms says, and whether the largest step outgrows its arithmetic."""
    ours = exponent([entry["size"] for entry in rows], [entry["ours_ms"] for entry in rows])
    least = exponent([entry["size"] for entry in rows], [entry["gflop"] for entry in rows])
    verdict = "grows FASTER than the arithmetic" if ours > least + FASTER_THAN_ARITHMETIC else "no faster"
    return f"- {axis}: time grows as size^{ours:.2f}, the arithmetic as size^{least:.2f}: {verdict}"


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of the least-squares line through (log size, log value)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def about(options: Namespace) -> dict[str, Any]:
    """See `bench.measure.facts`."""
    config = read_settings(options)
    world = start_world(config.training.device)
    return facts(options, world.device, autocast_dtype(config.training.precision, world.device))
