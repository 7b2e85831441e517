"""Start the paper's Sudoku experiment, PUMA and uniform masks side by side on one card.

The runs are detached: the command returns at once, other pieces follow, and `collect` takes what there is at any time.
With --attached the command does the work itself: it generates the boards on all cores, trains both models, and samples
2,000 boards with all rules of the YAML files.

By default a run has 62,500 updates, which are two epochs of a million boards. Expected for ten minutes of a card: 60 to
100 s for the boards, 30 s to start, and, with training.compile=true, 3.3 ms for an update of one run alone, about 7 ms
for one of each, 410 s (without it 11 ms, 700 s); 13 evaluations of 500 boards and the last one take a minute. Whatever
else shares the card comes on top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from bench.gpu.report import Report
from bench.gpu.runs import POLL_S, SUDOKU, TINY_SUDOKU, attending
from bench.inputs import YAML_FILES
from grader.cores import count_cores
from runtime.checkpoint import step_folders
from runtime.config_file import read_config
from runtime.history import ROOT

N_UPDATES = 62_500
ONE_RULE = ["validation.confidence=[top_prob]", "validation.tokens_per_step=[1]"]
GRAPH = "training.cuda_graph=true"


def run(options: Namespace, report: Report) -> None:
    """Start the runs, or with --attached do all their work."""
    runs = options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    overrides = settings(options)
    for yaml in SUDOKU.values():
        read_config(YAML_FILES / f"{yaml}.yaml", overrides)  # ValueError now, not in the log
    if options.attached:
        with attending(runs):
            attend(runs, overrides, report)
        return
    # A folder of its own, since its table is not that of this command; and no deadline.
    words = ["-m", "bench.gpu", "sudoku", "--attached", "--out", runs / "attached", "--runs", runs, "--deadline-s", 1e6]
    words += [*(["--tiny"] if options.tiny else []), *(["--updates", options.updates] if options.updates else [])]
    with open(runs / "sudoku.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, [*words, *options.overrides])],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    report.add("process that attends the runs", float(process.pid))
    report.add("updates of each run", next(word for word in overrides if "max_steps" in word))
    report.add("runs and their logs", str(runs))


def settings(options: Namespace) -> list[str]:
    """Overrides of both runs."""
    n_updates = options.updates or (6 if options.tiny else N_UPDATES)
    length = [f"training.max_steps={n_updates}", "training.num_epochs=null"]
    return [*(TINY_SUDOKU if options.tiny else []), *ONE_RULE, GRAPH, *length, *options.overrides]


def attend(runs: Path, overrides: list[str], report: Report) -> None:
    """Generate the boards, train both models to their end, and evaluate them by all rules."""
    start = time.monotonic()
    read_config(YAML_FILES / f"{SUDOKU['puma']}.yaml", overrides).open_data().load(train=True)  # both use the same
    report.add("boards", time.monotonic() - start, "s")
    statuses = train_both(runs, overrides)
    for name, status in statuses.items():
        if status:
            report.fail(name, f"exit status {status}, see {runs / name}.log")
            continue
        report.add(name, "complete")
        # The rules of the YAML file; while the model is trained, one rule is enough.
        config = read_config(YAML_FILES / f"{SUDOKU[name]}.yaml").validation
        rules = [f"validation.confidence=[{','.join(config.confidence)}]"]
        rules += [f"validation.tokens_per_step=[{','.join(map(str, config.tokens_per_step))}]"]
        json_file = runs / f"{name}_rules.json"
        report.run(f"{name} by all rules", "-m", "eval.evaluate", runs / name, "--json", json_file, *rules)


def train_both(runs: Path, overrides: list[str]) -> dict[str, int]:
    """Train both models at once; exit status by name.

    A run that fails before its first checkpoint starts once more without the CUDA graph.
    """
    retried: set[str] = set()
    running = {name: start_run(runs, name, overrides) for name in SUDOKU}
    statuses: dict[str, int] = {}
    try:
        while running:
            time.sleep(POLL_S)
            for name, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[name]
                started = bool(step_folders(runs / name))
                if status and not started and name not in retried:
                    retried.add(name)
                    running[name] = start_run(runs, name, [*overrides, GRAPH.replace("true", "false")])
                else:
                    statuses[name] = status
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return statuses


def start_run(runs: Path, name: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Start or resume one run; its output is appended to the log beside its directory."""
    words = [
        "train.py",
        "--config",
        str(YAML_FILES / f"{SUDOKU[name]}.yaml"),
        "--run-dir",
        str(runs / name),
        *overrides,
    ]
    n_threads = str(max(1, count_cores() // 4))
    with open(runs / f"{name}.log", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": n_threads}
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
