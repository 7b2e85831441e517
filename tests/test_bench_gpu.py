"""The pieces for a GPU, tried with tiny sizes on whatever machine this is, without the packages that may be missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_fresh_python

from bench.gpu import block, ranks
from bench.gpu.__main__ import PIECES, main
from bench.gpu.report import Report
from bench.gpu.tiny import TINY_SUDOKU
from model.block_mask import dense_mask

# What a bare machine with PyTorch lacks.
MISSING = ("wandb", "datasets", "xdist", "rich")
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {MISSING} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
N_FILES = 8  # that a piece may write to a folder of its own


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python that is started finds `MISSING`."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def new_report(out: Path, seconds: float = 300.0) -> Report:
    return Report("piece", ["piece"], out, time.monotonic() + seconds)


def results(out: Path, piece: str) -> dict[str, Any]:
    """PIECE.json."""
    found: dict[str, Any] = json.loads((out / f"{piece}.json").read_text())
    assert found.keys() == {"piece", "command", "machine", "seconds", "rows", "failures", "details"}
    return found


def test_programs_start_without_the_missing_packages(bare_machine):
    names = ["train", "sampling", "eval.evaluate", "results.run", "bench.__main__"]
    names += [f"bench.{name}" for name in ("step", "head", "sample", "data", "block")]
    names += [f"bench.gpu.{name}" for name in ("__main__", *PIECES)]
    code = f"""
import importlib
for name in {MISSING}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " can be imported")
for name in {names}:
    importlib.import_module(name)
print("imported all")
"""
    result = run_fresh_python("-c", code)
    assert result.stdout == "imported all\n", result.stderr


# Each piece as it is run on a GPU.


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["tests", "speed", "block", "ranks", "experiments"])
def test_a_piece_from_end_to_end(piece, bare_machine, tmp_path):
    options = ["--out", tmp_path / "out", "--deadline-s", 900]
    options += ["--tiny"] * (piece != "tests")
    names = ["--names", "word_problems", "--jobs", 2]
    more = [f"data.data_dir={tmp_path}", *names, "--runs", tmp_path / "runs"] if piece == "experiments" else []
    result = run_fresh_python("-m", "bench.gpu", piece, *options, *more, timeout=1000)
    assert result.returncode == 0, result.stdout + result.stderr + (tmp_path / "out/log.txt").read_text()
    found = results(tmp_path / "out", piece)
    assert found["failures"] == []
    assert len(found["rows"]) >= 1
    table = result.stdout.partition("| measured | value | unit | goal | reached |")[2]
    assert all(f"| {row['measured']} |" in table for row in found["rows"])
    assert sum(path.is_file() for path in (tmp_path / "out").iterdir()) <= N_FILES
    measured = {row["measured"] for row in found["rows"]}
    expected = {
        "tests": {"tests passed"},
        "speed": {"sudoku_puma, graph: update", "tinygsm_puma, compile: dense / ours"},
        "block": {"FlexAttention against the dense mask, bfloat16: loss", "decoding, 16 blocks: cached"},
        "ranks": {"train.py, one rank of torchrun", "FSDP2 of one rank against plain updates"},
        "experiments": {f"word_problems, {name}: solved, mean of 3 complete runs" for name in ("puma", "uniform")},
    }
    assert expected[piece] <= measured
    if piece == "tests":
        n_passed, n_skipped = (len(found["details"][outcome]) for outcome in ("passed", "skipped"))
        assert n_passed + n_skipped >= 10
        assert (n_skipped == 0) == torch.cuda.is_available()


# The parts, in this process.


def test_a_file_in_place_of_the_folder_ends_with_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["tests", "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "error: [Errno" in capsys.readouterr().err


def raise_error() -> None:
    raise RuntimeError("CUDA error: out of luck\nmore")


def print_and_add(a: int, b: int) -> int:
    print("adding")
    return a + b


def test_a_part_that_fails_costs_one_row(tmp_path, capsys):
    report = new_report(tmp_path)
    assert report.measure("good", print_and_add, 2, 3) == 5
    assert "adding" in report.log.read_text()
    assert report.measure("bad", raise_error) is None
    assert report.measure("dead", os._exit, 3) is None
    assert report.measure("slow", time.sleep, 30, limit_s=1.0) is None
    report.deadline = time.monotonic()
    assert report.measure("late", print_and_add, 2, 3) is None
    reasons = [
        "bad: RuntimeError: CUDA error: out of luck",
        "dead: its process ended with status 3",
        "slow: no result after 1 s",
        "late: no time left",
    ]
    assert results(tmp_path, "piece")["failures"] == report.failures == reasons
    report.show()
    assert "| dead | FAILED: its process ended with status 3 |" in capsys.readouterr().out


def test_programs_have_a_limit_too(tmp_path):
    report = new_report(tmp_path)
    assert report.run("good", "-c", "import os; print(os.environ['WORD'])", environment={"WORD": "loopback"})
    assert "loopback" in report.log.read_text()
    assert not report.run("bad", "-c", "import sys; sys.exit(4)")
    assert not report.run("slow", "-c", "import time; time.sleep(30)", limit_s=1.0)
    assert report.failures == [f"bad: exit status 4, see {report.log}", "slow: not finished after 1 s"]


def test_goals(tmp_path):
    report = new_report(tmp_path)
    for value, goal in ((2.5, ("<=", 2.5)), (2.6, ("<=", 2.5)), (3.5, (">=", 3.5)), (3.4, (">=", 3.5)), ("?", None)):
        report.add("name", value, "ms", goal)
    assert [row["reached"] for row in results(tmp_path, "piece")["rows"]] == ["yes", "NO", "yes", "NO", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "--out"),
        (["speed", "--jobs", "5"], "speed does not read jobs"),
        (["speed", "--runs", "folder"], "speed does not read runs"),
        (["tests", "training.seed=1"], "tests does not read overrides"),
        (["tests", "--tiny"], "tests does not read tiny"),
        (["experiments", "--names", "positions", "--jobs", "0"], "--jobs: must be an integer from 1 to"),
        (["experiments", "--names", "word_problems", "--deadline-s", "9"], "--deadline-s must be above"),
        (["experiments", "--names", "positions,chess"], "--names: 'chess' is not one of"),
        (["experiments"], "experiments needs --names"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    where = ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *(where if message != "--out" else [])])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# What the pieces compare, without their processes.


def test_flex_attention_is_compared_with_the_dense_mask():
    errors = block.compare_masks("float32", block.TINY)
    assert errors.keys() >= {"loss", "confidence"}
    assert max(errors.values()) < block.TOLERANCE
    assert max(block.compare_masks("bfloat16", block.TINY).values()) < block.ROUNDING


def test_a_difference_of_masks_is_seen(monkeypatch):
    """In the coarser precision too; the first noisy block sees only its own positions here."""

    def wrong_mask(length: int, block_size: int, device: torch.device) -> torch.Tensor:
        mask = dense_mask(length, block_size, device).clone()
        mask[:block_size, :block_size] = torch.eye(block_size, dtype=torch.bool)
        return mask

    monkeypatch.setattr(block, "flex_mask", wrong_mask)
    assert block.compare_masks("bfloat16", block.TINY)["confidence"] > block.ROUNDING


def test_a_run_goes_from_device_to_device(capsys):
    found = ranks.across_devices(TINY_SUDOKU)
    assert len(found) == 4
    assert set(found.values()) == {0.0}


def test_differences_are_relative():
    weights = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    assert ranks.difference(weights, weights) == 0
    assert ranks.difference({name: 1.1 * weight for name, weight in weights.items()}, weights) == pytest.approx(0.1)


def test_signals_end_a_piece_with_its_table(tmp_path):
    """A shell's `timeout` sends SIGTERM."""
    words = [sys.executable, "-m", "bench.gpu", "block", "--tiny", "--out", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("== block: FlexAttention")
        process.send_signal(signal.SIGTERM)
        assert "nothing was measured" in process.stdout.read()
        assert process.wait() == 143
