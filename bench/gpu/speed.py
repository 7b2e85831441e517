"""Times of whole updates, eager, compiled and as a CUDA graph, and peak memory. Nothing else may use the card.

The most important measurements come first, since the deadline may cut off the rest.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bench.__main__ import parse
from bench.gpu.report import Report, bench_rows
from bench.gpu.tiny import TINY_MODEL, TINY_SUDOKU
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


def run(options: Namespace, report: Report) -> None:
    """Measure all variants."""
    for number, (experiment, switches) in enumerate(VARIANTS):
        if number == N_WITH_GOALS:
            add_memory(options, report)
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


def add_memory(options: Namespace, report: Report) -> None:
    """Peak memory of an update of TinyGSM's size."""
    memory = report.measure("peak memory", peak_gib, words(options, TINYGSM))
    if memory is not None:
        report.add(f"{TINYGSM}, eager: peak memory of an update", memory, "GiB", ("<=", 14))


def peak_gib(arguments: list[str]) -> float:
    """GiB that building and running PUMA's updates takes, in a process that does nothing else."""
    return added_peak_gib(parse(arguments), "puma/ours")
