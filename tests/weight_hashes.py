"""Hashes of the weights after a short run of every objective, to show that a change moves code and no result.

    python tests/weight_hashes.py                 # of this checkout
    python tests/weight_hashes.py ../old > old    # of another, by the same interpreter

Every run is `python train.py` on generated data in a temporary folder: 25 updates of a tiny model, float32, one thread.
Equal lines on two commits mean equal weights, bit for bit, and equal validation losses. The hashes themselves depend on
the CPU and on the version of torch, so compare lines of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

N_STEPS = 25
MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SUDOKU = {
    "dataset": "sudoku",
    "source": "generated",
    "size": 4,
    "n_train": 150,
    "n_test": 20,
    "min_clues": 4,
    "max_clues": 8,
}
WORDS = {"dataset": "tiny_gsm", "source": "word_problems", "max_len": 96, "n_train": 200, "n_test": 10, "seed": 0}
PUMA = {"k_schedule": [[4, 0], [6, 12]], "collapse_threshold": 0.3, "pool_batches": 2, "uniform_fraction": 0.25}
RUNS: dict[str, dict[str, Any]] = {
    "uniform": {"objective": {"name": "uniform"}},
    "puma": {"objective": {"name": "puma", "n_stages": 4}},
    "puma, all options": {"objective": {"name": "puma"} | PUMA, "data": {"layout": "in_place"}},
    "block_uniform, prefix": {
        "objective": {"name": "block_uniform", "block_size": 8, "block_attention": "prefix"},
    },
    "block_uniform, block_causal": {
        "objective": {"name": "block_uniform", "block_size": 4, "block_attention": "block_causal"},
    },
    "block_puma, prefix": {
        "objective": {"name": "block_puma", "block_size": 8, "block_attention": "prefix"} | PUMA,
    },
    "block_puma, block_causal": {
        "objective": {"name": "block_puma", "block_size": 4, "block_attention": "block_causal", "n_stages": 3},
    },
    "autoregressive": {"objective": {"name": "autoregressive"}},
    "puma, word problems": {"objective": {"name": "puma"} | PUMA, "data": WORDS},
    "autoregressive, word problems": {"objective": {"name": "autoregressive"}, "data": WORDS},
}


def settings_of(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Complete settings of one run."""
    data = run.get("data", {})
    words = data.get("dataset") == "tiny_gsm"
    return {
        "model": MODEL | {"vocab_size": 512 if words else 6, "learned_positions": 96 if words else 32},
        "data": (data if words else SUDOKU | data) | {"data_dir": str(folder), **({"n_held_out": 20} if words else {})},
        "objective": run["objective"],
        "training": {
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 2.0e-3,
            "warmup_steps": 5,
            "max_steps": N_STEPS,
            "ema_decay": 0.9,
            "device": "cpu",
            "precision": "float32",
            "log_every": 5,
            "eval_every": N_STEPS,
            "save_every": N_STEPS,
        },
        "validation": {"n_examples": 8, "n_loss_rows": 20, "batch_size": 8},
    }


def hash_run(checkout: Path, folder: Path, name: str) -> str:
    """Train one run and say what it ended with: weights, average, loss and accuracy."""
    config, run_dir = folder / "config.yaml", folder / name.replace(", ", "_").replace(" ", "_")
    config.write_text(json.dumps(settings_of(RUNS[name], folder / "data")), encoding="utf-8")  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "train.py", "--config", config, "--run-dir", run_dir],
        cwd=checkout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    weights = run_dir / "checkpoints" / f"step_{N_STEPS:08d}"
    files = [weights / f"{each}.safetensors" for each in ("model", "ema")]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    final = json.loads((run_dir / "final.json").read_text(encoding="utf-8"))
    return f"{name}: weights {digests[0]}, average {digests[1]}, loss {final['evaluation']['loss']:.12g}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Hash the weights after a short run of every objective.")
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            print(hash_run(options.checkout, Path(folder), name), flush=True)


if __name__ == "__main__":
    main()
