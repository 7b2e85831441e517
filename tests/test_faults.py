"""What a long run meets: kills while saving, full disks, numbers that are none, a second start, ranks that die or hang.

Through the command line; faults that need no process of their own run it in this one.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import run_python, started, started_ranks
from safetensors.torch import load_file
from test_runtime_checkpoint import Malicious, replace_file
from test_runtime_signals import wait_for_step

import train
from config import WandbSettings
from runtime import checkpoint as checkpoint_module
from runtime.checkpoint import find_checkpoint, latest_checkpoint
from runtime.metrics import Recorder, read_metrics
from training.update import Updater

# Kills


def test_a_kill_before_any_file_operation_of_a_save_costs_nothing_but_time():
    result = run_python("-m", "tests.soak", "--stages", "--steps", 4, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    n_kills = int(re.search(r"killed (\d+) times", result.stdout).group(1))
    assert n_kills >= 15, "fewer operations than a save has"
    assert result.stdout.count("| saving |") == n_kills


@pytest.mark.parametrize(("n_kills", "n_steps"), [(3, 60), pytest.param(30, 600, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_result_as_it_is(n_kills, n_steps):
    result = run_python("-m", "tests.soak", "--kills", n_kills, "--steps", n_steps, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"killed {n_kills} times" in result.stdout


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB, and a way to fill it; a real one, since libraries write in ways of their own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.decode().strip()}")

    def fill(n_left: int) -> Path:
        """Write a file that leaves `n_left` bytes."""
        ballast, state = disk / "ballast", os.statvfs(disk)
        with open(ballast, "wb") as file:
            file.write(b"\0" * (state.f_bavail * state.f_frsize - n_left))
        return ballast

    yield disk, fill
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("n_left", [0, 4096, 20480, 65536])
def test_a_full_disk_while_saving_ends_the_run_with_the_last_checkpoint_kept(
    n_left, small_disk, config_file, monkeypatch, capsys
):
    disk, fill = small_disk
    arguments = ["--config", str(config_file()), "--run-dir", str(disk / "run")]
    step = Updater.step

    def filling_step(updater):
        step(updater)
        if updater.run.step == 5:
            fill(n_left)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "step", filling_step)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert "MiB of disk are free" in message
    assert find_checkpoint(disk / "run").step == 3
    (disk / "ballast").unlink()
    train.main(arguments)
    assert find_checkpoint(disk / "run").step == 6
    assert {path.name for path in (disk / "run" / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}


def test_a_full_disk_while_logging_costs_records_and_nothing_else(small_disk, config_file, monkeypatch):
    disk, fill = small_disk
    step = Updater.step

    def filling_step(updater):
        step(updater)
        if updater.run.step == 2:
            fill(0)
        if updater.run.step == 20:
            (disk / "ballast").unlink()

    monkeypatch.setattr(Updater, "step", filling_step)
    config = config_file(training__max_steps=30, training__eval_every=30, training__save_every=30)
    with pytest.warns(RuntimeWarning, match=r"a record is lost: .*metrics\.jsonl cannot be written \(No space left"):
        train.main(["--config", str(config), "--run-dir", str(disk / "run")])
    steps = [row["step"] for row in read_metrics(disk / "run")]
    assert steps == sorted(set(steps)), "no line is cut short, or nothing after it would be read"
    assert set(steps) >= {1, 2, *range(20, 31)}
    assert len(steps) < 30
    assert json.loads((disk / "run" / "final.json").read_text())["steps"] == 30


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, WandbSettings(), {}, 0)
    recorder.write({"step": 1})
    path = recorder.path
    real_open = open

    class HalfFull:
        """A file on a disk with 3 bytes left."""

        def __init__(self, *arguments, **options):
            self.file = real_open(*arguments, **options)
            self.n_left = 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if not self.n_left:
                raise OSError(errno.ENOSPC, "No space left on device")
            n_written = self.file.write(content[: self.n_left])
            self.n_left -= n_written
            return n_written

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", HalfFull)
        with pytest.warns(RuntimeWarning, match="a record is lost"):
            recorder.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n'
    recorder.write({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("n_calls", range(6))
def test_a_disk_that_fails_at_any_sync_of_a_save_ends_the_run(n_calls, config_file, tmp_path, monkeypatch, capsys):
    """Network file systems may tell of a full disk at the sync alone."""
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor):
        if next(calls) == n_calls:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        fsync(descriptor)

    save = train.save_run

    def failing_save(run, score):
        if run.step < 6:
            return save(run, score)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module.os, "fsync", full)
            return save(run, score)

    monkeypatch.setattr(train, "save_run", failing_save)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert re.search(r"cannot be written \(Disk quota exceeded", capsys.readouterr().err)
    assert latest_checkpoint(tmp_path / "run").step == 3


# Numbers that are none


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_no_number_ends_the_run_with_its_rows(
    bad, log_every, config_file, tmp_path, monkeypatch, capsys
):
    """Weights that overflow at step 5; the run notices when it next reads from the device."""
    apply, batches = Updater.step, {}

    def poisoned_step(updater):
        run = updater.run
        if run.step == 4:
            with torch.no_grad():
                run.model.lm_head.weight[2] = bad
        pool = run.objective.pool
        batches[run.step + 1] = (pool.x0.clone(), pool.masked.clone())
        apply(updater)

    monkeypatch.setattr(Updater, "step", poisoned_step)
    run_dir = tmp_path / "run"
    config = config_file({"name": "puma", "n_stages": 3}, training__max_steps=20)
    arguments = ["--config", str(config), "--run-dir", str(run_dir), f"training.log_every={log_every}"]
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "training.save_every=4", "training.eval_every=100"])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    last = 5 if log_every == 1 else 8
    assert ("not finite in step 5;" if log_every == 1 else "not finite in one of steps 5 to 8;") in message
    assert ("training.log_every=1" in message) == (log_every != 1), "the remedy that finds the very step"
    assert latest_checkpoint(run_dir).step == 4
    (path,) = run_dir.glob("diverged_*")
    assert path.name == f"diverged_step_{last:08d}_rank_0.safetensors"
    assert str(path) in message
    rows = load_file(path)
    x0, masked = batches[last]
    assert torch.equal(rows["0.x0"], x0), "as they were before the pool moved on"
    assert torch.equal(rows["0.xt"], x0.masked_fill(masked, 5))
    assert torch.equal(rows["0.weight"] > 0, masked)


# Data, clocks, directories


def test_data_that_shrank_between_runs_is_refused(config_file, tmp_path, capsys):
    boards = tmp_path / "boards.csv"
    make = f"-m data.generate_sudoku --size 4 --count 40 --min-clues 4 --max-clues 8 --seed 1 --out {boards}"
    result = run_python(*make.split())
    assert result.returncode == 0, result.stderr
    files = {"data__train_file": str(boards), "data__test_file": str(boards)}
    arguments = ["--config", str(config_file(data__source="files", **files)), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    (tmp_path / "run" / "final.json").unlink()
    lines = boards.read_text().splitlines(keepends=True)
    boards.write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert "training data has changed since checkpoint" in capsys.readouterr().err
    boards.write_text("".join(lines))
    train.main(arguments)


def test_a_clock_that_goes_back_harms_nothing(config_file, tmp_path, monkeypatch):
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run_dir = tmp_path / "run"
    train.main(["--config", str(config_file()), "--run-dir", str(run_dir)])
    newest = run_dir / "checkpoints" / "step_00000006"
    os.utime(newest, (0, 0))  # written long before the one before it, by its date
    assert latest_checkpoint(run_dir).step == 6
    seconds = [row["seconds"] for row in read_metrics(run_dir)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_a_directory_that_cannot_be_written_ends_with_one_message(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", str(config_file()), "--run-dir", str(run_dir)])
        assert stop.value.code == 2
        assert str(run_dir) in capsys.readouterr().err


def test_a_checkpoint_that_would_execute_code_ends_with_one_message(config_file, tmp_path, capsys):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    (tmp_path / "run" / "final.json").unlink()
    trace = tmp_path / "executed"
    replace_file(find_checkpoint(tmp_path / "run").path, "rank_0.pt", pickle.dumps({"objective": Malicious(trace)}))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert "rank_0.pt cannot be read" in capsys.readouterr().err
    assert not trace.exists()


# Processes


def test_a_second_start_in_a_run_directory_is_refused_until_the_first_is_killed(config_file, tmp_path):
    config = config_file(training__max_steps=100_000, training__save_every=5, training__eval_every=100_000)
    command, run_dir = ("train.py", "--config", config, "--run-dir", tmp_path / "run"), tmp_path / "run"
    with started(*command) as first:
        wait_for_step(run_dir, 10, first)
        second = run_python(*command)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    with started(*command) as third:
        step = latest_checkpoint(run_dir).step
        wait_for_step(run_dir, step + 5, third)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_rank_that_dies_or_hangs_ends_the_others(number, config_file, tmp_path):
    """Without anybody who looks after the processes, as srun starts them: a rank notices by itself."""
    config = config_file(training__max_steps=100_000, training__save_every=5, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    impatient = (
        "import datetime, runtime.distributed\n"
        "runtime.distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)\n"
        "import train\n"
        "train.main()\n"
    )
    with started_ranks(2, "-c", impatient, "--config", config, "--run-dir", run_dir) as (main, other):
        wait_for_step(run_dir, 8, main)
        other.send_signal(number)
        _, err = main.communicate(timeout=60)
        assert main.returncode not in (0, None)
        assert re.search(r"(?i)connection|reset|closed" if number == signal.SIGKILL else r"(?i)timed out", err), err
        assert (other.poll() == -signal.SIGKILL) == (number == signal.SIGKILL)
    assert latest_checkpoint(run_dir).step >= 5


def test_torchrun_ends_all_and_names_the_rank_that_died(config_file, tmp_path):
    config = config_file(training__max_steps=100_000, training__save_every=5, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    arguments = ["--standalone", "--nproc-per-node=2", "train.py", "--config", config, "--run-dir", run_dir]
    with started("-m", "torch.distributed.run", *arguments) as process:
        wait_for_step(run_dir, 8, process)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = (pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(victim), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL)" in err
    assert re.search(r"rank\s*: 1 ", err), err[-3000:]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert latest_checkpoint(run_dir).step >= 5
