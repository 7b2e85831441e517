"""Run an experiment: every variant with every seed. The table and figure are made only from its records.

    python -m results.run sudoku_mini                  # two runs at a time, one thread each
    python -m results.run sudoku_mini --budget-s 1800  # stops after 1800 s; the same command continues
    python -m results.run sudoku_mini --draw           # only the table and figure, from existing records

Run directories are in runs/results/EXPERIMENT/. Complete runs are not repeated; interrupted runs are resumed. The
output is records.json, README.md and curves.png in results/EXPERIMENT/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.files import write_text
from report.curves import AXES
from results.experiments import EXPERIMENTS, Arm, Experiment
from runtime.config_file import changed_settings, read_config
from runtime.machine import processor_facts
from runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # distinguishable with colour blindness
LINES = ("-", "--", "-.", ":")
POLL_S = 0.5


@dataclass(frozen=True)
class Task:
    """One run of an experiment."""

    arm: Arm
    seed: int
    run_dir: Path
    config: Path
    overrides: list[str]

    @property
    def command(self) -> list[str]:
        """The command that starts or resumes the run."""
        return [
            *(sys.executable, "train.py", "--config", str(self.config), "--run-dir", str(self.run_dir)),
            *self.overrides,
        ]

    @property
    def is_complete(self) -> bool:
        """Whether the run is complete."""
        return (self.run_dir / "final.json").exists()


def tasks_of(experiment: Experiment, folder: Path, run_overrides: list[str]) -> list[Task]:
    """All runs, ordered by seed, so that an interrupted experiment has complete comparisons for some seeds.

    Args:
        folder: parent of the run directories.
        run_overrides: overrides for all runs.
    """
    tasks = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            if seed not in (arm.seeds or experiment.seeds):
                continue
            run_dir = folder.resolve() / f"{re.sub(r'[^a-z0-9]+', '_', arm.label.lower())}_seed{seed}"
            config = ROOT / "yaml_files" / arm.config
            overrides = [*experiment.overrides, *arm.overrides, f"training.seed={seed}", *run_overrides]
            tasks.append(Task(arm, seed, run_dir, config, overrides))
    return tasks


def check_settings(tasks: list[Task]) -> None:
    """Read the settings of all runs.

    Raises:
        ValueError: a setting is wrong, or an existing run directory has other settings.
    """
    for task in tasks:
        config, run_config = read_config(task.config, task.overrides), task.run_dir / "config.yaml"
        if run_config.exists() and (differences := changed_settings(read_config(run_config), config)):
            lines = "\n".join(f"  {line}" for line in differences)
            raise ValueError(f"{task.run_dir} has other settings: delete it or choose another --runs\n{lines}")


def run_all(tasks: list[Task], n_jobs: int, budget_s: float | None) -> bool:
    """Run all tasks that are not complete; returns whether all are complete at the end.

    Args:
        n_jobs: number of parallel runs, one thread each.
        budget_s: seconds after which runs are told to save and stop.
    """
    waiting = [task for task in tasks if not task.is_complete]
    running: dict[subprocess.Popen[bytes], Task] = {}
    deadline = time.monotonic() + budget_s if budget_s is not None else float("inf")
    failed: list[Task] = []
    with tqdm(total=len(tasks), initial=len(tasks) - len(waiting), unit="run") as bar:
        try:
            while running or (waiting and time.monotonic() < deadline):
                while waiting and len(running) < n_jobs and time.monotonic() < deadline:
                    task = waiting.pop(0)
                    running[start(task)] = task
                    bar.set_postfix_str(", ".join(f"{each.arm.label} {each.seed}" for each in running.values()))
                time.sleep(POLL_S)
                if time.monotonic() >= deadline:
                    for process in running:
                        process.send_signal(signal.SIGTERM)
                    deadline = float("inf")
                    waiting = []
                for process in [process for process in running if process.poll() is not None]:
                    task = running.pop(process)
                    bar.update(task.is_complete)
                    if process.returncode:
                        failed.append(task)
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()
    for task in failed:
        print(f"failed: {task.run_dir}, see {task.run_dir}.log", file=sys.stderr)
    return all(task.is_complete for task in tasks)


def start(task: Task) -> subprocess.Popen[bytes]:
    """Start a run with one thread; its output goes to a file beside its directory."""
    task.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{task.run_dir}.log", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(task.command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def collect(name: str, experiment: Experiment, tasks: list[Task], overrides: list[str]) -> dict[str, Any]:
    """Records of the table and figure: shortened metrics of all runs, the command and the machine.

    Args:
        overrides: overrides for all runs.
    """
    runs = []
    for task in tasks:
        rows = list(read_metrics(task.run_dir))
        # The first is the headline.
        key = next((key for row in rows for key in row if key.startswith("validation/accuracy/")), "")
        points = [{axis: row[axis] for axis in AXES} | {"accuracy": row[key]} for row in rows if key in row]
        final = json.loads((task.run_dir / "final.json").read_text()) if task.is_complete else None
        if points:
            figures = final and {key: final[key] for key in ("accuracy", "n")}
            runs.append({"arm": task.arm.label, "seed": task.seed, "points": points, "final": figures})
    return {
        "command": " ".join(["python -m results.run", name, *overrides]),
        "question": experiment.question,
        "target": experiment.target,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "runs": runs,
    }


def machine() -> str:
    """The processor, its number of cores and its fastest instruction set for matrix products."""
    facts = processor_facts()
    flags = facts.get("flags", "").split()
    fast = [
        name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("avx2", "AVX2")) if flag in flags
    ]
    return f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores, {fast[0] if fast else 'no AVX2'}"


def commit() -> str:
    """The commit of the checkout, with `-dirty` if files are modified."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def runs_by_arm(records: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs by the label of their variant, in the order of the experiment."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in records["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def first_reaching(run: dict[str, Any], target: float, axis: str) -> float | None:
    """Value on `axis` at which the run first reaches accuracy `target`; None if it never does."""
    return next((point[axis] for point in run["points"] if point["accuracy"] >= target), None)


def report(records: dict[str, Any]) -> str:
    """README.md of the experiment: question, final figures, when the target is reached, and accuracy by update."""
    arms, target = runs_by_arm(records), records["target"]
    lines = [f"# {records['question']}", "", "![Accuracy of each setting](curves.png)", ""]
    lines += [
        "| setting | seed | solved, % | of | updates | seconds | distinct sequences | "
        f"updates to {target:.0%} | distinct sequences to {target:.0%} | seconds to {target:.0%} |",
        "| --- | " + " | ".join(["---:"] * 9) + " |",
    ]
    for label, runs in arms.items():
        for run in runs:
            last, final = run["points"][-1], run["final"]
            reached = [first_reaching(run, target, axis) for axis in ("step", "sequences_distinct", "seconds")]
            solved = f"{100 * final['accuracy']:.1f} | {final['n']:,}" if final else "not finished | -"
            cells = [f"{last['step']:,}", f"{last['seconds']:,.0f}", f"{last['sequences_distinct']:,}"]
            cells += ["-" if value is None else f"{value:,.0f}" for value in reached]
            lines.append(f"| {label} | {run['seed']} | {solved} | {' | '.join(cells)} |")
    steps = sorted({point["step"] for run in records["runs"] for point in run["points"]})
    lines += ["", "Solved during training, %, mean over seeds (lowest to highest):", ""]
    lines += [f"| updates | {' | '.join(f'{step:,}' for step in steps)} |", "| --- |" + " ---: |" * len(steps)]
    for label, runs in arms.items():
        cells = []
        for step in steps:
            found = [100 * point["accuracy"] for run in runs for point in run["points"] if point["step"] == step]
            spread = f" ({min(found):.0f} to {max(found):.0f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.0f}{spread}" if found else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"`{records['command']}`, commit {records['commit']}, {records['date']}, "
        f"{records['machine']}; each run on one thread, while others ran. 'Updates to {target:.0%}' is the first "
        "evaluation during training at or above it.",
    ]
    if "note" in records:  # written by hand, on what the figures do not show
        lines += ["", records["note"]]
    return "\n".join(lines) + "\n"


def draw(records: dict[str, Any], out: Path) -> None:
    """Draw the accuracy of each variant over each axis: a line per seed, a marker per evaluation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    plots = figure.subplots(1, len(AXES), sharey=True)
    for plot, (axis, label) in zip(plots, AXES.items(), strict=True):
        for number, (arm, runs) in enumerate(runs_by_arm(records).items()):
            for run in runs:
                x = [0, *(point[axis] for point in run["points"])]
                y = [0, *(100 * point["accuracy"] for point in run["points"])]
                style = {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number % len(LINES)]}
                name = f"{arm}, {len(runs)} seeds" if run is runs[0] else None
                plot.plot(x, y, **style, linewidth=1.6, marker="o", markersize=3, label=name)
        plot.axhline(100 * records["target"], color="0.6", linewidth=0.8)
        plot.set(xlabel=label, ylim=(-2, 102))
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        plot.xaxis.set_major_locator(MaxNLocator(5))
        plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    plots[0].set_ylabel("solved, %")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run an experiment and write its table and figure.")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs, one thread each")
    parser.add_argument("--budget-s", type=float, help="seconds after which runs are told to save and stop")
    parser.add_argument(
        "--draw", action="store_true", help="run nothing; write the table and figure of existing records"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "results", help="parent folder of the run directories"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="parent folder of the output folder")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`, which stops the runs
    experiment, folder = EXPERIMENTS[options.experiment], options.out / options.experiment
    records_file, complete = folder / "records.json", True
    if not options.draw:
        tasks = tasks_of(experiment, options.runs / options.experiment, options.overrides)
        try:
            check_settings(tasks)
            complete = run_all(tasks, options.jobs, options.budget_s)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command continues")
        records = collect(options.experiment, experiment, tasks, options.overrides)
        if not records["runs"]:
            sys.exit("no run has been evaluated yet")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(records_file, json.dumps(records, indent=1) + "\n")
    if not records_file.exists():
        sys.exit(f"{records_file} is missing: run the experiment without --draw first")
    records = json.loads(records_file.read_text(encoding="utf-8"))
    write_text(folder / "README.md", report(records))
    draw(records, folder / "curves.png")
    print(f"wrote {folder}/README.md" + ("" if complete else "; incomplete: the same command continues"))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
