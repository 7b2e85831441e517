"""Fixtures of the tests that run the real command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def tiny_settings(objective: dict, data_dir: Path) -> dict:
    """A run of seconds: 4x4 boards, one layer, float32, 40 rows so that a few steps cross an epoch's end."""
    return {
        "model": {
            "vocab_size": 6,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "learned_positions": 32,
        },
        "data": {
            "dataset": "sudoku",
            "data_dir": str(data_dir),
            "source": "generated",
            "size": 4,
            "n_train": 40,
            "n_test": 20,
            "min_clues": 4,
            "max_clues": 8,
        },
        "objective": objective,
        "training": {
            "batch_size": 8,
            "learning_rate": 1.0e-3,
            "warmup_steps": 2,
            "max_steps": 6,
            "ema_decay": 0.9,
            "device": "cpu",
            "precision": "float32",
            "log_every": 1,
            "eval_every": 3,
            "save_every": 3,
        },
        "validation": {"n_examples": 10, "n_loss_rows": 10, "batch_size": 8},
    }


PUMA = {"name": "puma", "k_schedule": [[3, 0], [5, 4]], "collapse_threshold": 0.9, "pool_batches": 2}
UNIFORM = {"name": "uniform"}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated boards, shared by all tests."""
    return tmp_path_factory.mktemp("boards")


@pytest.fixture
def config_file(tmp_path: Path, data_dir: Path):
    """Writes a tiny config with the given objective; returns its path."""

    def write(objective: dict = PUMA, name: str = "tiny.yaml", **changes: object) -> Path:
        settings = tiny_settings(objective, data_dir)
        for key, value in changes.items():
            section, _, setting = key.partition("__")
            settings[section][setting] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def run_python(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository as its users do, and wait for its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
