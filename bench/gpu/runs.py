"""The detached Sudoku runs: their folders, and how a piece that takes times pauses them and all their work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.files import write_text

SUDOKU = {"puma": "sudoku_puma", "uniform": "sudoku_baseline"}  # name of a run and of its YAML file
PID_FILE = "sudoku.pid"
PAUSE_FILE = "sudoku_paused"
POLL_S = 0.5

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


@contextmanager
def attending(folder: Path) -> Iterator[None]:
    """Let `paused` stop this process and all that it starts. If there is a pause now, it begins after that."""
    write_text(folder / PID_FILE, str(os.getpid()))
    try:
        while (folder / PAUSE_FILE).exists():
            time.sleep(POLL_S)
        yield
    finally:
        (folder / PID_FILE).unlink(missing_ok=True)


@contextmanager
def paused(folder: Path) -> Iterator[int]:
    """Stop the runs meanwhile, so that they take no part of the GPU or its cores; gives the number of processes.

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
    """Signal the process that attends the runs and all that it has started; their number."""
    path = folder / PID_FILE
    if not path.exists():
        return 0
    pid = int(path.read_text(encoding="utf-8"))
    command = Path(f"/proc/{pid}/cmdline")
    # The number of a process that has ended may belong to another program by now.
    return _signal_tree(pid, number) if command.exists() and b"bench.gpu" in command.read_bytes() else 0


def _signal_tree(pid: int, number: signal.Signals) -> int:
    """Signal a process, then those below it, so that a process that is stopped starts no more; their number."""
    try:
        os.kill(pid, number)
        children = [path.read_text(encoding="utf-8") for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return 0
    return 1 + sum(_signal_tree(int(child), number) for child in " ".join(children).split())
