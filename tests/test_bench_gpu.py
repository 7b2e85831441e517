"""The pieces for a GPU, tried with tiny sizes on whatever machine this is, without the packages that may be missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PUMA, ROOT, UNIFORM, run_fresh_python, run_python
from safetensors.torch import load_file

from bench.gpu import block, ranks, sudoku
from bench.gpu.__main__ import PIECES, main
from bench.gpu.report import Report
from bench.gpu.runs import PID_FILE, TINY_SUDOKU, attending, paused, resume
from model.block_mask import dense_mask
from runtime.checkpoint import find_checkpoint

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
    options = ["--out", tmp_path / "out", "--runs", tmp_path / "runs", "--deadline-s", 900]
    options += ["--tiny"] * (piece != "tests")
    names = ["--names", "word_problems", "--jobs", 2]
    more = [f"data.data_dir={tmp_path}", *names] if piece == "experiments" else []
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


@pytest.mark.slow
def test_detached_runs_are_collected_before_and_after_their_end(bare_machine, tmp_path):
    where = ["--out", tmp_path / "out", "--runs", tmp_path / "runs"]
    more = [f"data.data_dir={tmp_path}", "training.cuda_graph=true"]
    result = run_fresh_python("-m", "bench.gpu", "sudoku", *where, "--tiny", "--updates", 60, *more)
    assert result.returncode == 0, result.stderr
    seen = set()
    end = time.monotonic() + 300
    while time.monotonic() < end:
        complete = all((tmp_path / f"runs/{name}_rules.json").exists() for name in ("puma", "uniform"))
        done = run_python("-m", "bench.gpu", "collect", *where)
        seen.add((complete, done.returncode))
        if complete:
            break
    assert (True, 0) in seen, done.stderr
    assert len(seen) > 1, "it was also collected while the runs were going on"
    assert results(tmp_path / "out", "collect")["details"]["puma"]["final"]["steps"] == 60


# The parts, in this process.


def test_two_runs_are_collected(config_file, tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    for name, objective in (("puma", PUMA), ("uniform", UNIFORM)):
        result = run_python("train.py", "--config", config_file(objective), "--run-dir", runs / name)
        assert result.returncode == 0, result.stderr
    (runs / "uniform/final.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--out", str(out), "--runs", str(runs), "--target", "0.5"])
    assert stop.value.code == 0
    found = results(out, "collect")
    assert found["details"]["puma"]["final"]["steps"] == 6
    assert "final" not in found["details"]["uniform"]
    assert "| first at 50% |" in found["details"]["target"][0]
    rows = {row["measured"]: row for row in found["rows"]}
    assert rows["puma, updates"]["value"] == rows["uniform, updates so far"]["value"] == 6
    assert "| puma, updates | 6 |" in capsys.readouterr().out
    names = {"collect.json", "curves.png"} | {
        f"{name}{end}" for name in ("puma", "uniform") for end in ("_metrics.jsonl", ".safetensors")
    }
    assert {path.name for path in out.iterdir()} == names
    assert len(names) < N_FILES, "room for log.txt"
    weights, saved = load_file(out / "puma.safetensors"), find_checkpoint(runs / "puma").weights("ema")
    assert weights.keys() == saved.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, saved[name].to(torch.bfloat16))


def test_a_file_in_place_of_the_folder_ends_with_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--out", str(tmp_path / "file"), "--runs", str(tmp_path)])
    assert stop.value.code == 2
    assert "error: [Errno" in capsys.readouterr().err


def test_runs_that_have_not_begun_are_no_error(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--out", str(tmp_path / "out"), "--runs", str(tmp_path)])
    assert stop.value.code == 1
    assert "has been evaluated" in results(tmp_path / "out", "collect")["failures"][-1]


def test_a_run_that_cannot_use_the_graph_starts_again_without(tmp_path, monkeypatch):
    started: list[tuple[str, str]] = []

    def start(runs: Path, name: str, overrides: list[str]) -> subprocess.Popen[bytes]:
        started.append((name, overrides[-1]))
        return subprocess.Popen(["sh", "-c", f"exit {int(overrides[-1] == sudoku.GRAPH or name == 'uniform')}"])

    monkeypatch.setattr(sudoku, "start_run", start)
    monkeypatch.setattr(sudoku, "POLL_S", 0.01)
    assert sudoku.train_both(tmp_path, [sudoku.GRAPH]) == {"puma": 0, "uniform": 1}
    without = "training.cuda_graph=false"
    assert sorted(started) == sorted((name, last) for name in ("puma", "uniform") for last in (sudoku.GRAPH, without))


def state(pid: int) -> str:
    """That of a process, one letter of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(pid: int, states: str) -> None:
    end = time.monotonic() + 20
    while state(pid) not in states:
        assert time.monotonic() < end, state(pid)
        time.sleep(0.01)


# A process that says which one it has started.
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("word", "is_ours"), [("bench.gpu", True), ("other", False)])
def test_a_pause_stops_the_runs_and_no_other_program(tmp_path, word, is_ours):
    with subprocess.Popen([sys.executable, "-c", PARENT, word], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [parent.pid, int(parent.stdout.readline())]
        try:
            (tmp_path / PID_FILE).write_text(str(parent.pid))
            with suppress(RuntimeError), paused(tmp_path) as n_paused:
                assert n_paused == 2 * is_ours
                for pid in pids:
                    wait_for(pid, "T" if is_ours else "RS")
                raise RuntimeError("whatever happens meanwhile")
            for pid in pids:
                wait_for(pid, "RS")
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGKILL)


def test_runs_wait_for_the_end_of_a_pause(tmp_path, monkeypatch):
    waits = []

    def end_pause(seconds: float) -> None:
        waits.append((tmp_path / PID_FILE).exists())
        resume(tmp_path)

    monkeypatch.setattr(time, "sleep", end_pause)
    with paused(tmp_path), attending(tmp_path):
        assert waits == [True], "the process can be stopped while it waits"
    assert list(tmp_path.iterdir()) == []


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
        (["speed", "--updates", "5"], "speed does not read updates"),
        (["tests", "training.seed=1"], "tests does not read overrides"),
        (["collect", "--tiny"], "collect does not read tiny"),
        (["sudoku", "--updates", "0"], "--updates: must be an integer from 1 to"),
        (["collect", "--target", "2"], "target must be above 0"),
        (["experiments", "--names", "word_problems", "--deadline-s", "9"], "--deadline-s must be above"),
        (["experiments", "--names", "positions,chess"], "--names: 'chess' is not one of"),
        (["experiments"], "experiments needs --names"),
        (["sudoku", "training.max_step=5"], "did you mean 'max_steps'"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    where = ["--out", str(tmp_path), "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *(where if message != "--out" else [])])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_length_of_a_run_is_that_of_the_yaml_file():
    options = SimpleNamespace(updates=None, tiny=False, overrides=[])
    assert f"training.max_steps={2 * 1_000_000 // 32}" in sudoku.settings(options)


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


def test_the_graph_is_compared_with_eager_updates():
    """On a CPU the two are one."""
    assert ranks.graph_against_eager(False, TINY_SUDOKU) == {"graph": 0.0, "again": 0.0}


def test_differences_are_relative():
    weights = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    assert ranks.difference(weights, weights) == 0
    assert ranks.difference({name: 1.1 * weight for name, weight in weights.items()}, weights) == pytest.approx(0.1)


def test_signals_end_a_piece_with_its_table(tmp_path):
    """A shell's `timeout` sends SIGTERM."""
    words = [sys.executable, "-m", "bench.gpu", "block", "--tiny", "--out", str(tmp_path), "--runs", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("== block: FlexAttention")
        process.send_signal(signal.SIGTERM)
        assert "nothing was measured" in process.stdout.read()
        assert process.wait() == 143
