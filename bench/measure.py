"""What all benchmarks share: interleaved timing, peak memory, the machine, tables.

The paths to compare are called in turn in one process, so that whatever else the machine does slows all of them alike,
and figures are medians. Peak memory is taken in a process of its own for each path.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MIN_ROUNDS = 3
MIN_SAMPLE_S = 0.05  # a path that is faster is called several times per round
MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Report:
    """What a benchmark found: rows for the JSON file, and lines of Markdown."""

    rows: list[dict[str, Any]]
    lines: list[str]


def row(
    name: str,
    ours_ms: float | None,
    dense_ms: float | None = None,
    ours_peak_gib: float | None = None,
    dense_peak_gib: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row of the JSON file; `ratio` is dense_ms / ours_ms, None where there is no dense path."""
    return {
        "name": name,
        "ours_ms": ours_ms,
        "dense_ms": dense_ms,
        "ratio": dense_ms / ours_ms if ours_ms and dense_ms else None,
        "ours_peak_gib": ours_peak_gib,
        "dense_peak_gib": dense_peak_gib,
        **more,
    }


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Markdown lines; `columns` maps keys of the rows to headings. What is missing or None shows as a dash."""
    lines = [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(entry.get(key)) for key in columns)} |" for entry in rows]
    return lines


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def interleave(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    n_rounds: int,
    seconds: float,
    *,
    n_warmup: int = 1,
    label: str = "measuring",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call every path in turn, again and again; milliseconds per call of each round.

    Args:
        n_rounds, seconds: it ends when either is reached, but not before `MIN_ROUNDS` rounds (or n_rounds, if fewer).
        n_warmup: calls of each path before the clock starts, for compilation and caches.
        clock: gives seconds; see `clock_of`.
    """
    n_inner = {}
    with tqdm(total=n_rounds + n_warmup, desc=label, unit="round", leave=False) as bar:
        for _ in range(n_warmup):
            for name, call in calls.items():
                n_inner[name] = min(50, int(MIN_SAMPLE_S // _time(call, 1, device, clock)) + 1)
            bar.update()
        times: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for number in range(1, n_rounds + 1):
            # Every other round backwards, so that nobody always comes after the same neighbour.
            for name in list(calls) if number % 2 else reversed(calls):
                times[name].append(1000 * _time(calls[name], n_inner[name], device, clock))
            bar.update()
            if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each path."""
    return {name: statistics.median(values) for name, values in times.items()}


def clock_of(options: Namespace) -> Callable[[], float]:
    """The wall's clock, or with `--cpu-time` the time that the cores worked for this process.

    The second hardly depends on what else runs, and with one thread it is what the wall's would be on an idle machine.
    """
    return time.process_time if options.cpu_time else time.perf_counter


def _time(call: Callable[[], object], n_calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds per call."""
    synchronize(device)
    start = clock()
    for _ in range(n_calls):
        call()
    synchronize(device)
    return (clock() - start) / n_calls


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product(dtype: torch.dtype | None, device: torch.device) -> tuple[Callable[[], object], float]:
    """A large square product in the type that the models compute in, and its floating-point operations.

    Timed among the paths it gives the machine's peak as it is at that time, neighbours included.
    """
    size = MATRIX_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype or torch.float32)
    return lambda: a @ b, 2.0 * size**3


def peak_of(build: Callable[[], Callable[[], object]], device: torch.device, n_calls: int = 2) -> float:
    """GiB at most in use while a path is built and called, beyond what this process had before.

    A training step is called twice: in the first, there is no state of the optimizer yet.
    """
    before = _resident_gib(device)
    call = build()
    for _ in range(n_calls):
        call()
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30 - before
    return _peak_resident_gib() - before


def measure_peaks(options: Namespace, names: list[str]) -> dict[str, float | None]:
    """Peak memory of each path in GiB: this command again with `--memory-of NAME`, one process after another."""
    peaks: dict[str, float | None] = dict.fromkeys(names)
    if options.no_memory:
        return peaks
    for name in tqdm(names, desc="memory", unit="path", leave=False):
        result = subprocess.run(
            [sys.executable, "-m", "bench", *options.arguments, "--memory-of", name],
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        if result.returncode == 0:  # else it has said why, e.g. that memory ran out
            peaks[name] = float(result.stdout.split()[-1])
    return peaks


def _resident_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return _status_gib("VmRSS") or _peak_resident_gib()


def _peak_resident_gib() -> float:
    # Linux's ru_maxrss begins with the peak of the process that started this one; VmHWM does not.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_gib("VmHWM") or peak / (2**30 if sys.platform == "darwin" else 2**20)


def _status_gib(key: str) -> float | None:
    """An entry of this process's status on Linux, None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{key}:")), None)


def facts(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {
        "machine": machine,
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "clock": "processor time" if options.cpu_time else "wall",
        "load": f"{os.getloadavg()[0]:.1f} processes on average in the last minute",
        "command": f"python -m bench {' '.join(options.arguments)}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def publish(report: Report, options: Namespace, about: dict[str, Any]) -> None:
    """Print the report, and write it where the options say."""
    text = "\n".join([*report.lines, "", *(f"- {key}: {value}" for key, value in about.items())])
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps([entry | about for entry in report.rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.markdown, text + "\n")
