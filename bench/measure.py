"""The timer, peak memory and the report of all benchmarks."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from base.files import write_text
from runtime.machine import device_name
from runtime.markdown import markdown_table
from runtime.metrics import peak_memory_gib

LEGEND = {
    "ratio": "dense / ours, with the quartiles of the rounds' own ratios",
    "ours_peak_gib": "the peak that a path adds to the imports, in a process of its own",
    "floor_ms": "gflop at the speed of a large matrix product, timed between the paths; utilisation is floor / ours",
}

N_KERNELS, N_GAPS, NAME_WIDTH = 40, 15, 110  # of the report of a GPU's kernels
GAP_LIMITS_US = (3.0, 20.0)  # between launches one after another, waits for the launch of the next, and longer waits

Call = Callable[[], object]
Times = dict[str, list[float]]  # by path: ms per call of each round


@dataclass(frozen=True)
class Case:
    """One of our paths beside a plain one: a row of the report."""

    name: str
    ours: str  # name of a path
    dense: str | None  # name of its plain counterpart, if there is one
    n: float  # how many `unit`s one call processes
    unit: str
    facts: Callable[[], dict[str, Any]] = dict  # columns read after the timing; `gflop`: what a call of ours computes


@dataclass(frozen=True)
class Benchmark:
    """What a command measures."""

    title: str
    paths: dict[str, Call]  # in the order of a round
    cases: list[Case]
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32
    remarks: Callable[[Times], list[str]] = lambda times: []


def measure(options: Namespace, benchmark: Benchmark) -> None:
    """Measure memory, then times; print the report and write its rows to `--json`."""
    device, calls = benchmark.device, dict(benchmark.paths)
    peaks = {} if options.no_memory else measure_peaks(options, list(calls))
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device).to(benchmark.dtype or torch.float32)
    calls["product"] = lambda: a @ b  # a large product gives the machine's peak under the same load
    times = time_in_turn(calls, device, options.iterations, options.seconds, options.n_warmup)
    gflop_per_ms = 2e-9 * size**3 / float(np.median(times["product"]))
    rows = [build_row(case, times, peaks, gflop_per_ms) for case in benchmark.cases]
    notes = [f"{key}: {text}" for key, text in LEGEND.items() if any(key in row for row in rows)]
    notes += benchmark.remarks(times)
    notes.append(f"medians of {len(times['product'])} rounds; matrix product: {1000 * gflop_per_ms:,.0f} GFLOP/s")
    about = {"machine": machine(device, benchmark.dtype), "command": f"python -m bench {' '.join(options.arguments)}"}
    notes += [f"{key}: {text}" for key, text in about.items()]
    print(f"# {benchmark.title}\n", *table(rows), "", *(f"- {note}" for note in notes), sep="\n")
    if options.json:
        write_text(options.json, json.dumps([row | about for row in rows], indent=1) + "\n")


def build_row(case: Case, times: Times, peaks: dict[str, float], gflop_per_ms: float) -> dict[str, Any]:
    """The figures of a case by column; what was not measured is left out."""
    row: dict[str, Any] = {"name": case.name, "unit": case.unit}
    for side, path in {"ours": case.ours, "dense": case.dense}.items():
        if path is not None:
            row[f"{side}_ms"] = float(np.median(times[path]))
            row[f"{side}_per_s"] = 1000 * case.n / row[f"{side}_ms"]
        if path in peaks:
            row[f"{side}_peak_gib"] = peaks[path]
    if case.dense:
        row["ratio_low"], row["ratio"], row["ratio_high"] = ratio_quartiles(times[case.dense], times[case.ours])
    row |= case.facts()
    if "gflop" in row:
        row["floor_ms"] = row["gflop"] / gflop_per_ms
        row["utilisation"] = row["floor_ms"] / row["ours_ms"]
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table with all keys of the rows as columns; numbers have three digits."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [(dict.fromkeys(keys, "-") | row).values() for row in rows]
    shown = [[f"{float(f'{x:.3g}'):,g}" if isinstance(x, float) else str(x) for x in line] for line in cells]
    return markdown_table(keys, shown, text_columns=range(len(keys)))


def ratio_quartiles(a: list[float], b: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of a / b, round by round."""
    return np.quantile(np.divide(a, b), (0.25, 0.5, 0.75)).tolist()


def time_in_turn(calls: dict[str, Call], device: torch.device, n_rounds: int, seconds: float, n_warmup: int) -> Times:
    """Call all paths in turn, so that load affects them alike, for `n_rounds`, or `seconds` and three rounds."""
    for _ in range(n_warmup):
        first_ms = {name: time_ms(call, 1, device) for name, call in calls.items()}
    # Fast paths several times in a row; on a GPU for longer, since the host launches ahead of it, as in training.
    row_ms = 500 if device.type == "cuda" else 50
    n_inner = {name: min(50, int(row_ms // ms) + 1) for name, ms in first_ms.items()}
    times: Times = {name: [] for name in calls}
    start = time.perf_counter()
    for number in tqdm(range(n_rounds), desc="timing", unit="round", leave=False):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        # Every other round is in reverse order, so that no path always follows the same one.
        for name in reversed(calls) if number % 2 else list(calls):
            times[name].append(time_ms(calls[name], n_inner[name], device))
    return times


def time_ms(call: Call, n_calls: int, device: torch.device) -> float:
    """Milliseconds per call."""
    synchronize: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    synchronize()
    return 1000 * (time.perf_counter() - start) / n_calls


def measure_peaks(options: Namespace, names: list[str]) -> dict[str, float]:
    """Peak memory of each path in GiB, one new process after another; without those that failed."""
    # A fork server imports the libraries once for all paths.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"bench.{options.command}"])
    peaks = {}
    for name in tqdm(names, desc="memory", unit="path", leave=False):
        with ProcessPoolExecutor(1, context) as pool:
            try:
                peaks[name] = pool.submit(added_peak_gib, options, name).result()
            except (RuntimeError, MemoryError) as error:  # too little memory, or killed for it
                print(f"memory of {name}: {error}", file=sys.stderr)
    return peaks


def added_peak_gib(options: Namespace, name: str) -> float:
    """GiB that building and calling one path adds to what this process has used before."""
    before_gib = peak_memory_gib(torch.device("cpu"))
    options.only = name
    benchmark = importlib.import_module(f"bench.{options.command}").build(options)
    for _ in range(options.n_warmup + (options.command == "step")):  # the first step has no optimizer state yet
        benchmark.paths[name]()
    return peak_memory_gib(benchmark.device) - (before_gib if benchmark.device.type == "cpu" else 0.0)


def profile(options: Namespace, benchmark: Benchmark) -> None:
    """Print where the first of our paths spends its time: by PyTorch operation, or by kernel of a GPU."""
    name, on_cpu = benchmark.cases[0].ours, benchmark.device.type == "cpu"
    n_calls = 3 if on_cpu else 10
    path, device = benchmark.paths[name], benchmark.device
    time_ms(path, options.n_warmup if on_cpu else 10, device)
    plain_ms = time_ms(path, n_calls, device)
    # On a GPU without the operations of the CPU, whose recording would delay the host.
    activities = [torch.profiler.ProfilerActivity.CPU if on_cpu else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as spent:
        profiled_ms = time_ms(path, n_calls, device)
    print(f"# {n_calls} calls of {name}: {benchmark.title}")
    print(f"{plain_ms:.2f} ms per call, {profiled_ms:.2f} ms under the profiler\n")
    if on_cpu:
        print(spent.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))
        return
    intervals = [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in spent.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    print("\n".join(kernel_report(intervals, n_calls)))


class Interval(NamedTuple):
    """One run of a kernel."""

    name: str
    start_us: float
    end_us: float


def kernel_report(intervals: list[Interval], n_calls: int) -> list[str]:
    """Kernels by their time per call, then the times between two kernels, when the device was idle.

    These by length, since a thousand short ones (launches) need another remedy than one long one (the host waits), and
    by the kernels around them.
    """
    if not intervals:
        return ["the profiler saw no kernel"]
    intervals = sorted(intervals, key=lambda interval: interval.start_us)
    spent: dict[str, list[float]] = {}
    gaps: dict[tuple[str, str], list[float]] = {}  # by the kernels before and after
    last, end_us = "", intervals[0].start_us
    for name, start, end in intervals:
        spent.setdefault(name, []).append(end - start)
        if start > end_us:
            gaps.setdefault((_short(last), _short(name)), []).append(start - end_us)
        if end > end_us:
            last, end_us = name, end

    def per_call(times: list[float]) -> dict[str, Any]:
        return {"idle us per call": sum(times) / n_calls, "times per call": len(times) / n_calls}

    all_gaps = [gap for times in gaps.values() for gap in times]
    idle_ms = sum(all_gaps) / n_calls / 1000
    total_ms = (end_us - intervals[0].start_us) / n_calls / 1000
    lines = [
        f"{len(intervals) / n_calls:,.0f} kernels per call of {total_ms:.2f} ms, the device idle for {idle_ms:.2f} ms"
    ]
    rows: list[dict[str, Any]] = [
        {"us per call": sum(times) / n_calls, "runs per call": len(times) / n_calls, "kernel": _short(name)}
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    lines += ["", *table(rows[:N_KERNELS])]
    if not all_gaps:
        return lines
    lengths: list[dict[str, Any]] = []
    for low, high in pairwise((0.0, *GAP_LIMITS_US, math.inf)):
        found = [gap for gap in all_gaps if low <= gap < high]
        words = f"{low:g} us or more" if high == math.inf else f"{low:g} to {high:g} us"
        lengths.append(per_call(found) | {"each": words})
    places = [
        per_call(times) | {"after": before, "before": after}
        for (before, after), times in sorted(gaps.items(), key=lambda item: -sum(item[1]))
    ]
    return [*lines, "", *table(lengths), "", *table(places[:N_GAPS])]


def _short(name: str) -> str:
    """A kernel's name without the templates of C++, in which most names differ only at their ends."""
    name = name.replace("void ", "").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 43]}...{name[-40:]}"


def machine(device: torch.device, dtype: torch.dtype | None) -> str:
    """What a figure depends on besides the code."""
    precision = str(dtype or torch.float32).removeprefix("torch.")
    return (
        f"{device_name(device)}, {precision}, torch {torch.__version__}, {date.today()}, load {os.getloadavg()[0]:.1f}"
    )
