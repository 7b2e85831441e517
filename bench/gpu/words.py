"""Generated word problems, PUMA against uniform masks with three seeds, several runs side by side on one card.

It is the experiment `word_problems` of results/experiments.py, run by `python -m results.run`. Its records come back as
words_records.json: copied to results/word_problems/records.json they give the page and the figure, by
`python -m results.run word_problems --draw`.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from typing import Any

from bench.gpu.report import STOP_S, Report
from bench.gpu.runs import TINY_MODEL
from results.experiments import EXPERIMENTS
from results.run import runs_by_arm

EXPERIMENT = "word_problems"
N_JOBS = 6
DRAW_S = 30.0  # for the page and the figure, after the runs were told to stop
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
    runs = options.runs.resolve() / "words"
    pages, budget_s = runs / "results", report.remaining_s() - 2 * STOP_S - DRAW_S
    if budget_s < 1:
        raise ValueError(f"--deadline-s must be above {2 * STOP_S + DRAW_S:.0f} for this piece")
    words = ["-m", "results.run", EXPERIMENT, "--jobs", options.jobs or N_JOBS, "--budget-s", budget_s]
    words += ["--runs", runs, "--out", pages, *(TINY if options.tiny else []), *options.overrides]
    report.run("results.run, not complete where it fails", *words, limit_s=report.remaining_s())
    records_file = pages / EXPERIMENT / "records.json"
    if not records_file.exists():
        return
    shutil.copyfile(records_file, report.out / "words_records.json")
    records: dict[str, Any] = json.loads(records_file.read_text(encoding="utf-8"))
    for label, found in runs_by_arm(records).items():
        report.add(f"{label}: complete runs", sum(run["final"] is not None for run in found), "runs")
        last = [100 * (run["final"] or run["points"][-1])["accuracy"] for run in found]
        report.add(f"{label}: solved, mean over {len(last)} seeds", sum(last) / len(last), "%")
    report.details["wanted seeds"] = EXPERIMENTS[EXPERIMENT].seeds
