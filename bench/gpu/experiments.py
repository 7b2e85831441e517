"""Named experiments of results/experiments.py with all their seeds, many runs side by side on one card.

They are run by `python -m results.run`. The records of each come back as NAME_records.json: copied to
results/NAME/records.json they give the page and the figure, by `python -m results.run NAME --draw`.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from bench.gpu.report import STOP_S, Report
from bench.gpu.tiny import TINY_MODEL
from results.experiments import EXPERIMENTS
from results.run import runs_by_variant

# The mini models take a small part of a card, and a run spends much of its time on starting and on single passes.
N_JOBS = 12
DRAW_S = 30.0  # for the page and the figure, after the runs were told to stop
# Compiling takes longer than the training of such a model; the CUDA graph is there without it.
NOT_COMPILED = "training.compile=false"
TINY = [
    *TINY_MODEL,
    "data.n_train=200",
    "data.n_held_out=20",
    "data.n_test=8",
    "training.batch_size=8",
    "training.max_steps=2",
    "training.eval_every=1",
    "validation.n_examples=2",
    "validation.n_final_examples=4",
    "validation.n_loss_rows=4",
]


def run(options: Namespace, report: Report) -> None:
    """Run what fits before the deadline; a later call continues."""
    names = options.names.split(",")
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"--names: {name!r} is not one of {', '.join(EXPERIMENTS)}")
    runs = (options.runs or Path("runs/gpu")).resolve() / "experiments"
    end_s = 2 * STOP_S + DRAW_S
    if report.remaining_s() < end_s + 1:
        raise ValueError(f"--deadline-s must be above {end_s:.0f} for this piece")
    for name in names:
        budget_s = report.remaining_s() - end_s
        if budget_s < 1:
            report.fail(name, "no time left")
            continue
        words = ["-m", "results.run", name, "--jobs", options.jobs or N_JOBS, "--budget-s", budget_s]
        words += ["--runs", runs, "--out", runs / "pages", *(TINY if options.tiny else [])]
        report.run(f"{name}, not complete where it fails", *words, NOT_COMPILED, *options.overrides, limit_s=1e6)
        records_file = runs / "pages" / name / "records.json"
        if records_file.exists():
            shutil.copyfile(records_file, report.out / f"{name}_records.json")
            add_runs(report, name, json.loads(records_file.read_text(encoding="utf-8")))


def add_runs(report: Report, name: str, records: dict[str, Any]) -> None:
    """Rows with the number of complete runs of each variant and their accuracy."""
    for label, found in runs_by_variant(records).items():
        last = [100 * (run["final"] or run["points"][-1])["accuracy"] for run in found]
        n_complete = sum(run["final"] is not None for run in found)
        report.add(f"{name}, {label}: solved, mean of {n_complete} complete runs", sum(last) / len(last), "%")
