"""List the runs in a folder: objective, data, steps, best accuracy, and whether each is complete.

    python -m report.runs runs
    python -m report.runs runs --json

The best is the highest accuracy, or the lowest validation loss where no questions were asked.

A run is a folder with a config.yaml, at any depth; packed models (`python -m model.hub pack`) are left out. Its state
is one of

- complete: it has a final.json that can be read;
- running: a process holds its lock (on this machine, or on a file system that shares locks);
- failed: neither, and its last session ended with an error, which the last lines show;
- stopped: neither, for another reason; the same command continues it;
- damaged: its settings, records or result cannot be read.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.commands import CommandParser, ends_with_message
from base.files import walk
from base.reading import BadInput
from base.text import escape, shorten
from report.curves import accuracy_points, can_be_drawn, rules_of
from runtime.config_file import parse_config, read_sections
from runtime.final import load_final
from runtime.history import HISTORY_FILE, read_history
from runtime.lock import is_locked
from runtime.metrics import METRICS_FILE, read_metrics

NOT_SEARCHED = ("checkpoints", "wandb", "tensorboard")  # of a run directory
RECORDS = ("checkpoints", METRICS_FILE, HISTORY_FILE)  # a run with weights has one of them, a packed model none
MAX_DATA = 40  # characters of the data in the table
MAX_REASON = 300  # characters of a session's end

T = TypeVar("T")


@dataclass(frozen=True)
class RunSummary:
    """One line of the list."""

    run: str  # path of its folder
    state: str
    objective: str | None = None
    data: str | None = None
    step: int = 0  # last step in the records
    n_steps: int | None = None  # length in steps; None if it is not known
    accuracy: float | None = None  # best of the first sampling rule
    accuracy_step: int | None = None  # when it was measured
    loss: float | None = None  # lowest of the validation
    loss_step: int | None = None  # when it was measured
    started: str | None = None  # of the first session, UTC
    ended: str | None = None  # of the last session, or its last checkpoint
    commit: str | None = None  # of the last session
    reason: str | None = None  # why the last session ended before the run was complete: a signal, an error
    problem: str | None = None  # what is damaged


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs in `folder`, or itself, sorted, each once, also behind links; ValueError if there are none."""
    found = []
    for path, folders, files in walk(folder):
        folders[:] = [name for name in folders if name not in NOT_SEARCHED]
        if "config.yaml" in files:
            if "model.safetensors" not in files or any(os.path.exists(os.path.join(path, name)) for name in RECORDS):
                found.append(Path(path))
            folders.clear()
    if not found:
        raise ValueError(f"{folder} has no runs: a run is a folder with a config.yaml")
    return found


def summarize(run_dir: Path) -> RunSummary:
    """Read what a run directory says of its run; what cannot be read makes the run `damaged`."""
    facts, problems = _read(run_dir)
    final, failed = facts.pop("final"), facts.pop("failed", False)
    if problems:
        state = "damaged"
    elif final:
        state = "complete"
    elif is_locked(run_dir):
        state = "running"
    else:
        state = "failed" if failed else "stopped"
    return RunSummary(str(run_dir), state, **facts, problem="; ".join(problems) or None)


def _read(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The facts of a run, and what cannot be read."""
    facts: dict[str, Any] = {"final": False}
    problems = []
    try:
        raw = read_sections(run_dir / "config.yaml")
        facts |= {"objective": _setting(raw, "objective", "name", str), "data": _setting(raw, "data", "dataset", str)}
        with suppress(ValueError):  # settings of another version
            facts["data"] = parse_config(raw, "").data.describe()
        facts["n_steps"] = _setting(raw, "training", "max_steps", int)
    except BadInput as error:
        problems.append(str(error))
    if sessions := read_history(run_dir):
        last = sessions[-1]
        facts |= {
            "started": sessions[0].get("started"),
            "ended": last.get("ended", last.get("updated")),
            "commit": last.get("commit"),
            "failed": last.get("state") == "failed",
            "reason": None if last.get("reason") is None else shorten(str(last["reason"]), MAX_REASON),
            "n_steps": last.get("n_steps", facts.get("n_steps")),
        }
    try:
        rows = list(read_metrics(run_dir))
        facts["step"] = max((row["step"] for row in rows), default=0)
        points = accuracy_points(rows, next(iter(rules_of(rows)), ""))
        if points:
            best = max(points, key=lambda point: point["accuracy"])
            facts |= {"accuracy": best["accuracy"], "accuracy_step": int(best["step"])}
        losses = [(row["validation/loss"], row["step"]) for row in rows if can_be_drawn(row.get("validation/loss"))]
        if losses:
            facts["loss"], facts["loss_step"] = min(losses)
        if not rows and (run_dir / METRICS_FILE).exists() and (run_dir / METRICS_FILE).stat().st_size:
            problems.append(f"{run_dir / METRICS_FILE} holds no row that can be read")
    except BadInput as error:
        problems.append(str(error))
    try:
        facts["final"] = load_final(run_dir) is not None
    except BadInput as error:
        problems.append(str(error))
    return facts, problems


def _setting(raw: dict[str, Any], section: str, key: str, kind: type[T]) -> T | None:
    """A setting in unchecked sections; None if it is missing or of another type."""
    values = raw.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if type(value) is kind else None


def table(runs: list[RunSummary], folder: Path) -> str:
    """The list as text, paths relative to `folder`."""
    rows = [("run", "state", "objective", "data", "steps", "best")]
    for run in runs:
        steps = f"{run.step:,}" + (f" of {run.n_steps:,}" if run.n_steps and run.n_steps != run.step else "")
        best = "" if run.loss is None else f"loss {run.loss:.4f} at {run.loss_step:,}"
        if run.accuracy is not None:
            best = f"{100 * run.accuracy:.1f}% at {run.accuracy_step:,}"
        name = os.path.relpath(run.run, folder) if Path(run.run) != folder else run.run
        rows.append((name, run.state, run.objective or "", shorten(run.data or "", MAX_DATA), steps, best))
    shown = [[escape(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    lines += [f"damaged: {run.problem}" for run in runs if run.problem]
    lines += [
        f"failed: {cells[0]}: {escape(run.reason or 'unknown')}"
        for run, cells in zip(runs, shown[1:], strict=True)
        if run.state == "failed"
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="List the runs in a folder.")
    parser.add_argument("folder", type=Path, help="folder of runs, or one run")
    parser.add_argument("--json", action="store_true", help="print a JSON list with more facts instead of a table")
    options = parser.parse_args(arguments)
    with ends_with_message():
        if not options.folder.is_dir():
            raise ValueError(f"{options.folder} is not a folder: give one with runs")
        runs = [summarize(run_dir) for run_dir in find_runs(options.folder)]
        print(json.dumps([asdict(run) for run in runs], indent=1) if options.json else table(runs, options.folder))


if __name__ == "__main__":
    main()
