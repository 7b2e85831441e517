"""The detached Sudoku runs: their folders, and how a piece that takes times pauses them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.files import write_text

SUDOKU = {"puma": "sudoku_puma", "uniform": "sudoku_baseline"}  # name of a run and of its YAML file
PIDS_FILE = "sudoku_pids.json"
PAUSE_FILE = "sudoku_paused"

# 4x4 boards and one small layer, for `--tiny`.
TINY_MODEL = [
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
]
TINY_SUDOKU = [
    *TINY_MODEL,
    "model.vocab_size=6",
    "model.learned_positions=32",
    "data.source=generated",
    "data.size=4",
    "data.n_train=200",
    "data.n_test=20",
    "data.min_clues=6",
    "data.max_clues=10",
    "training.batch_size=8",
    "training.log_every=2",
    "training.eval_every=3",
    "training.save_every=3",
    "validation.n_examples=10",
    "validation.n_final_examples=20",
    "validation.n_loss_rows=20",
]


def write_pids(folder: Path, pids: list[int]) -> None:
    """Record the processes that train."""
    write_text(folder / PIDS_FILE, json.dumps(pids))


def is_paused(folder: Path) -> bool:
    """Whether no run may start now."""
    return (folder / PAUSE_FILE).exists()


@contextmanager
def paused(folder: Path) -> Iterator[int]:
    """Stop the runs meanwhile, so that they take no part of the GPU; gives their number.

    A paused run continues from the same update; its recorded seconds include the pause.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAUSE_FILE).touch()
    try:
        yield _signal(folder, signal.SIGSTOP)
    finally:
        resume(folder)


def resume(folder: Path) -> None:
    """Let the runs go on; no-op if they do."""
    (folder / PAUSE_FILE).unlink(missing_ok=True)
    _signal(folder, signal.SIGCONT)


def _signal(folder: Path, number: signal.Signals) -> int:
    """Signal the runs; the number of those that are there."""
    path, n_found = folder / PIDS_FILE, 0
    for pid in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        command = Path(f"/proc/{pid}/cmdline")
        # The number of a run that has ended may belong to another program by now.
        if command.exists() and b"train.py" in command.read_bytes():
            os.kill(pid, number)
            n_found += 1
    return n_found
