"""Times of whole updates, eager, compiled and as a CUDA graph; host syncs; peak memory. The Sudoku runs are paused.

The most important measurements come first, since the deadline may cut off the rest.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from bench import step
from bench.__main__ import parse
from bench.gpu.report import Report, bench_rows
from bench.gpu.runs import TINY_MODEL, TINY_SUDOKU, paused
from bench.inputs import YAML_FILES
from bench.measure import added_peak_gib

SUDOKU, TINYGSM = "sudoku_puma", "tinygsm_puma"
VARIANTS: tuple[tuple[str, list[str]], ...] = (
    (SUDOKU, ["--graph"]),
    (TINYGSM, ["--compile"]),
    (SUDOKU, ["--compile", "--graph"]),
    (SUDOKU, []),
    (TINYGSM, []),
    (SUDOKU, ["--compile"]),
)
N_WITH_GOALS = 3  # of the variants, the first
N_SYNC_STEPS = 20


def run(options: Namespace, report: Report) -> None:
    """Measure all variants."""
    with paused(options.runs) as n_paused:
        report.details["paused processes"] = n_paused
        for number, (experiment, switches) in enumerate(VARIANTS):
            if number == N_WITH_GOALS:
                add_memory_and_syncs(options, report)
            name = f"{experiment}, {' '.join(switches).replace('--', '') or 'eager'}"
            limit_s = 900.0 if options.tiny else 240.0  # two busy cores take minutes to compile
            limits = ["--no-memory", "--iterations", "2" if options.tiny else "20", "--seconds", "15"]
            rows = report.measure(name, bench_rows, [*words(options, experiment), *switches, *limits], limit_s=limit_s)
            if rows is not None:
                report.details[name] = rows
                add_step(report, name, experiment, switches, rows)


def words(options: Namespace, experiment: str) -> list[str]:
    """Options of `python -m bench step` for 32 rows of the experiment's size."""
    sizes = ["--batch", "4" if options.tiny else "32"]
    tiny = TINY_SUDOKU if experiment == SUDOKU else [*TINY_MODEL, "model.vocab_size=5000", "data.mask_id=4999"]
    if options.tiny and experiment == TINYGSM:
        sizes += ["--length", "32"]
    overrides = [*(tiny if options.tiny else []), *options.overrides]
    return ["step", "--config", str(YAML_FILES / f"{experiment}.yaml"), *sizes, *overrides]


def add_step(report: Report, name: str, experiment: str, switches: list[str], rows: list[dict[str, Any]]) -> None:
    """Rows of the table: time, share of the matrix peak, ratio to the dense path and to uniform masks."""
    puma, uniform = rows
    tinygsm = experiment == TINYGSM
    graph = not tinygsm and "--graph" in switches
    best = tinygsm and "--compile" in switches
    report.add(f"{name}: update", puma["ours_ms"], "ms", ("<=", 2.5) if graph else None)
    report.add(f"{name}: dense / ours", puma["ratio"], "", (">=", 3.5) if best else None)
    share = 100 * puma["utilisation"]
    report.add(f"{name}: share of the measured matrix peak", share, "%", (">=", 45) if best else None)
    ratio = puma["ours_ms"] / uniform["ours_ms"]
    report.add(f"{name}: puma / uniform", ratio, "", ("<=", 1.03) if graph or best else None)
    if best:
        report.add(f"{name}: puma / uniform, operations by drawn masks", puma["gflop"] / uniform["gflop"])
        report.add(f"{name}: matrix peak", puma["gflop"] / puma["floor_ms"], "TFLOP/s")


def add_memory_and_syncs(options: Namespace, report: Report) -> None:
    """Peak memory of an update of TinyGSM's size, and updates that may not wait for the device."""
    memory = report.measure("peak memory", peak_gib, words(options, TINYGSM))
    if memory is not None:
        report.add(f"{TINYGSM}, eager: peak memory of an update", memory, "GiB", ("<=", 14))
    for experiment in (SUDOKU, TINYGSM):
        checked = report.measure(f"{experiment}, host syncs", steps_without_syncs, words(options, experiment))
        if checked is not None:
            report.add(f"{experiment}: updates without a sync of the stream", checked if checked else "needs a GPU")


def peak_gib(arguments: list[str]) -> float:
    """GiB that building and running PUMA's updates takes, in a process that does nothing else."""
    return added_peak_gib(parse(arguments), "puma/ours")


def steps_without_syncs(arguments: list[str]) -> int:
    """Number of updates that ran in the mode of PyTorch in which a host sync is an error; 0 on a CPU, which has none.

    The mode does not see waits for an event, of which a large vocabulary has one per pass.

    Raises:
        RuntimeError: an update waited for the device.
    """
    options = parse(arguments)
    options.only = "puma/ours"
    benchmark = step.build(options)
    update, on_gpu = benchmark.paths["puma/ours"], benchmark.device.type == "cuda"
    for _ in range(3):
        update()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    for _ in range(N_SYNC_STEPS):
        update()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    return N_SYNC_STEPS if on_gpu else 0
