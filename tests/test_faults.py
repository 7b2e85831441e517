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
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, PUMA, run_python, run_ranks, started, started_ranks, tiny_settings
from forked import Forked
from safetensors.torch import load_file
from test_data_text_pairs import open_text, write_pairs
from test_runtime_checkpoint import Malicious, replace_file
from test_runtime_signals import wait_for_step
from test_train import assert_same_checkpoint

import train
from base.files import WriteError
from baselines import AutoregressiveObjective, UniformObjective
from data import pretokenize as pretokenize_module
from data import word_problems
from data.sudoku_boards import save_array
from data.text import train_byte_pairs
from data.text_pairs import PIECES
from data.word_problems import cached_word_problems
from progressive import PumaObjective
from runtime import checkpoint as checkpoint_module
from runtime.checkpoint import find_checkpoint, latest_checkpoint, open_checkpoint
from runtime.config_file import parse_config, read_config
from runtime.launch import _first_failure
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
    n_damaged = n_kills * 4 // 5
    counts = ("--kills", n_kills, "--damaged", n_damaged, "--steps", n_steps)
    result = run_python("-m", "tests.soak", *counts, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"killed (\d+) times", result.stdout).group(1)) >= n_kills
    assert f"after {n_damaged} of the kills" in result.stdout


# Full disks


def mount(*arguments: object) -> None:
    """Mount something, or skip the test where that is not allowed."""
    mounted = subprocess.run(["mount", *map(str, arguments)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a disk that fails needs the right to mount one: {mounted.stderr.decode().strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB and 200 files, and a way to fill it; a real one, since libraries write in ways of their own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "tmpfs", disk)

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


def break_disk(kind: str, disk: Path, fill: Callable[[int], Path]) -> Callable[[], object]:
    """Make the next save fail; returns what repairs the disk."""
    checkpoints = disk / "run" / "checkpoints"
    if kind == "full":
        return fill(0).unlink
    if kind == "no inodes":
        folder = disk / "many"
        folder.mkdir()
        with suppress(OSError):
            for number in itertools.count():
                (folder / str(number)).touch()
        return lambda: shutil.rmtree(folder)
    if kind == "read-only":
        mount("--bind", checkpoints, checkpoints)
        mount("-o", "remount,bind,ro", checkpoints)
        return lambda: subprocess.run(["umount", str(checkpoints)], check=True)
    assert kind == "a file in place of the folder"
    aside = checkpoints.with_name("aside")
    checkpoints.rename(aside)
    checkpoints.touch()

    def repair() -> None:
        checkpoints.unlink()
        aside.rename(checkpoints)

    return repair


REASONS = {
    "full": ".*; 0 MiB of disk are free",  # torch.save has words of its own
    "no inodes": "No space left on device; 8 MiB of disk are free, but the number of files on it has reached its limit",
    "read-only": "Read-only file system",
    "a file in place of the folder": "Not a directory",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_disk_that_takes_no_checkpoint_ends_the_run_with_the_last_one_kept(
    kind, small_disk, config_file, monkeypatch, capsys
):
    disk, fill = small_disk
    arguments = ["--config", str(config_file()), "--run-dir", str(disk / "run")]
    step, repairs = Updater.step, []

    def breaking_step(updater):
        step(updater)
        if updater.run.step == 5:
            repairs.append(break_disk(kind, disk, fill))

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # records are lost too
        patch.setattr(Updater, "step", breaking_step)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert re.search(rf"cannot be written \({REASONS[kind]}", message)
    assert "once it can, the same command continues from the newest checkpoint" in message
    repairs[0]()
    assert find_checkpoint(disk / "run").step == 3
    train.main(arguments)
    assert find_checkpoint(disk / "run").step == 6


@pytest.mark.parametrize("kind", ["full", "no inodes"])
def test_a_run_that_starts_on_a_full_disk_ends_with_the_same_message(kind, small_disk, config_file, capsys):
    disk, fill = small_disk
    arguments = ["--config", str(config_file()), "--run-dir", str(disk / "run")]
    train.main(arguments)
    (disk / "run" / "final.json").unlink()
    capsys.readouterr()
    repair = break_disk(kind, disk, fill)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert re.search(rf"cannot be written \({REASONS[kind]}", message)
    repair()
    train.main(arguments)
    assert len(list(read_metrics(disk / "run"))) == 6, "the records of before are there"


def test_a_save_that_fails_on_one_rank_ends_all_with_one_message(config_file, tmp_path):
    run_dir = tmp_path / "run"
    for failing in (0, 1):
        code = f"""
import errno, os
from base.files import reported
import train
from runtime import checkpoint
save = checkpoint._save_state
def save_state(path, state):
    if os.environ["RANK"] == "{failing}" and path.parent.name.startswith(".step_00000006"):
        with reported(path):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    return save(path, state)
checkpoint._save_state = save_state
train.main()
"""
        result = run_ranks(2, "-c", code, "--config", config_file(), "--run-dir", run_dir)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert f"rank_{failing}.pt cannot be written (Disk quota exceeded" in result.stderr
        assert latest_checkpoint(run_dir).step == 3


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
    recorder = Recorder(tmp_path, parse_config(tiny_settings(PUMA, tmp_path), "test"), 0)
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
    """Network file systems may report a full disk at the sync alone."""
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


def test_a_full_disk_while_data_is_written_is_one_error_and_leaves_nothing(small_disk, tmp_path, monkeypatch):
    disk, fill = small_disk
    write_pairs(tmp_path / "pairs.jsonl", 40)
    tokenizer = train_byte_pairs(["a b", "b c"] * 20, PIECES, 300)
    monkeypatch.setattr(word_problems, "train_tokenizer", lambda _: tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    boards = np.zeros((1000, 32), dtype=np.uint8)
    writers: dict[str, Callable[[], object]] = {
        "boards.npy": lambda: save_array(disk / "boards.npy", boards),
        "word_problems": lambda: cached_word_problems(disk, 200, 20, 0, 512),
        "tokenizer": lambda: open_text(tmp_path, data_dir=str(disk / "text")).tokenizer,
    }
    for name, write in writers.items():
        for n_left in (0, 4096):
            ballast = fill(n_left)
            with pytest.raises(WriteError, match=rf"{name}.*cannot be written \(.*MiB of disk are free"):
                write()
            ballast.unlink()
            assert [path for path in disk.rglob("*") if ".incomplete" in str(path)] == [], name
        write()


def test_tokenizing_on_a_full_disk_continues_when_there_is_room(small_disk, tmp_path, monkeypatch):
    disk, fill = small_disk
    write_pairs(tmp_path / "pairs.jsonl", 900)
    train_byte_pairs(["a b", "b c"] * 20, PIECES, 300).save_pretrained(tmp_path / "tokenizer")
    encode = pretokenize_module._encode_chunks

    def filling(*arguments):
        for number, rows in enumerate(encode(*arguments)):
            if number == 1:
                fill(100)  # what remains of a page of memory
            yield rows

    def tokenize(out: Path) -> None:
        source, tokenizer = str(tmp_path / "pairs.jsonl"), str(tmp_path / "tokenizer")
        pretokenize_module.pretokenize(source, tokenizer, out, 32, n_workers=1, columns=("prompt", "completion"))

    with monkeypatch.context() as patch:
        patch.setattr(pretokenize_module, "_encode_chunks", filling)
        with pytest.raises(WriteError, match=r"labels\.bin cannot be written \(No space left on device"):
            tokenize(disk / "out")
    (disk / "ballast").unlink()
    tokenize(disk / "out")
    tokenize(tmp_path / "straight")
    for name in ("labels.bin", "prompt_mask.bin"):
        assert (disk / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


# Damaged and missing files


def harm(kind: str, path: Path) -> None:
    """Damage the checkpoint at `path`."""
    if kind == "a flipped bit":
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    elif kind == "a file that is missing":
        (path / "rank_0.pt").unlink()
    elif kind == "an empty manifest":
        (path / "manifest.json").write_text("")
    else:
        shutil.rmtree(path)
        path.mkdir()


DAMAGE = ("a flipped bit", "a file that is missing", "an empty manifest", "an empty folder")


def interrupted_after(n_saves: int, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Run until a save has been made, then end as by Ctrl-C."""
    save, calls = train.save_run, itertools.count(1)

    def interrupted_save(run, score):
        save(run, score)
        if next(calls) == n_saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", interrupted_save)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    assert stop.value.code == 130


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_set_aside_and_fresh_ones_stay(kind, config_file, tmp_path, monkeypatch):
    """Their steps are higher than those of the resumed run, so pruning by step would delete the new checkpoints."""
    config = config_file(training__save_every=1, training__eval_every=100, training__keep_checkpoints=2)
    run_dir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    arguments = ["--config", str(config), "--run-dir", str(run_dir)]
    interrupted_after(5, monkeypatch, arguments)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000005"]
    for _ in range(2):
        newest = latest_checkpoint(run_dir)
        harm(kind, newest.path)
        with pytest.warns(RuntimeWarning, match=r"step_00000005 is damaged and was renamed to step_"):
            interrupted_after(1, monkeypatch, arguments)
        assert latest_checkpoint(run_dir).step == newest.step, "what was saved last is there and is read"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"step_00000005.damaged", "step_00000005.damaged_2"}, "the first is not replaced"
    train.main(arguments)
    train.main([*arguments[:3], str(tmp_path / "straight")])
    assert_same_checkpoint(run_dir, tmp_path / "straight")


@pytest.mark.filterwarnings("ignore:checkpoint .*:RuntimeWarning")
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(config_file, tmp_path, monkeypatch, capsys):
    config = config_file(training__save_every=1, training__eval_every=100)
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config), "--run-dir", str(run_dir)]
    interrupted_after(3, monkeypatch, arguments)
    records = (run_dir / "metrics.jsonl").read_text()
    for path in (run_dir / "checkpoints").iterdir():
        harm(DAMAGE[0], path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert f"error: {run_dir}: all its checkpoints are damaged (2): restore one" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_text() == records
    shutil.rmtree(run_dir / "checkpoints")
    train.main(arguments)


def test_an_evaluation_that_crashes_costs_nothing(config_file, tmp_path, monkeypatch):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    for n_measured, step in ((0, 3), (0, 3), (1, 6), (0, 6)):
        evaluate, calls = train.evaluate, itertools.count()

        def crashing(*arguments, n=n_measured, calls=calls, evaluate=evaluate):
            if next(calls) == n:
                raise RuntimeError("out of memory")
            return evaluate(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", crashing)
            with pytest.raises(RuntimeError, match="out of memory"):
                train.main(arguments)
        assert (latest_checkpoint(tmp_path / "run").step, latest_checkpoint(tmp_path / "run").score) == (step, None)
    train.main(arguments)
    train.main([*arguments[:3], str(tmp_path / "straight")])
    assert_same_checkpoint(tmp_path / "run", tmp_path / "straight")
    ours, theirs = (list(read_metrics(tmp_path / name)) for name in ("run", "straight"))
    for key in ("step", "train/loss", "validation/loss", "validation/accuracy/top_prob_1", "train/masked_fraction"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs], key
    scores = [
        [open_checkpoint(path).score for path in sorted((tmp_path / name / "checkpoints").iterdir())]
        for name in ("run", "straight")
    ]
    assert scores[0] == scores[1]
    assert None not in scores[0]


@pytest.mark.pictures
def test_a_run_whose_records_are_gone_is_finished_all_the_same(config_file, tmp_path, monkeypatch):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    draw = train.draw_curves

    def draw_nothing(*arguments):
        (tmp_path / "run" / "metrics.jsonl").unlink()
        draw(*arguments)

    monkeypatch.setattr(train, "draw_curves", draw_nothing)
    with pytest.warns(RuntimeWarning, match=r"curves_step\.png cannot be written \(.* holds no metrics\.jsonl"):
        train.main(arguments)
    assert json.loads((tmp_path / "run" / "final.json").read_text())["steps"] == 6
    train.main(arguments)


def test_a_final_result_that_is_gone_or_damaged_is_written_again(config_file, tmp_path):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    path = tmp_path / "run" / "final.json"
    before = json.loads(path.read_text())
    for content in (None, "", "[]", '{"accuracy": "high"}', "[" * 100_000):
        path.unlink()
        if content is None:
            train.main(arguments)
        else:
            path.write_text(content)
            with pytest.warns(RuntimeWarning, match=r"final\.json cannot be read"):
                train.main(arguments)
        assert json.loads(path.read_text()) == before
    assert len(list(read_metrics(tmp_path / "run"))) == 6


def test_a_bad_line_of_the_records_costs_that_line(config_file, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config_file()), "--run-dir", str(run_dir)]
    interrupted_after(1, monkeypatch, arguments)
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2, "that of step 3 comes with its evaluation"
    bad = [b"\xff\xfe\n", b'{"step": 1\n', b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join([*bad, lines[0], *bad, lines[1], *bad]))
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    train.main(arguments)
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]


# Numbers that are none


@pytest.mark.parametrize(
    ("bad", "log_every", "name"),
    [
        (math.nan, 1, "puma"),
        (math.inf, 1, "uniform"),
        (math.nan, 4, "autoregressive"),
        (math.inf, 4, "puma"),
    ],
)
def test_a_loss_that_is_no_number_ends_the_run_with_its_rows(
    bad, log_every, name, config_file, tmp_path, monkeypatch, capsys
):
    """Weights that overflow at step 5; the run notices when it next reads from the device."""
    kind: Any = {"puma": PumaObjective, "uniform": UniformObjective, "autoregressive": AutoregressiveObjective}[name]
    apply, draw, batches = Updater.step, kind.draw, {}

    def poisoned_step(updater):
        run = updater.run
        if run.step == 4:
            with torch.no_grad():
                run.model.lm_head.weight[2] = bad
        apply(updater)

    def recorded_draw(objective, step):
        batch = draw(objective, step)
        batches[step + 1] = dict(zip(("0.xt", "0.x0", "0.weight"), (each.clone() for each in batch), strict=True))
        return batch

    monkeypatch.setattr(Updater, "step", poisoned_step)
    monkeypatch.setattr(kind, "draw", recorded_draw)
    run_dir = tmp_path / "run"
    objective = {"name": name} | ({"n_stages": 3} if name == "puma" else {})
    config = config_file(objective, training__max_steps=20)
    arguments = ["--config", str(config), "--run-dir", str(run_dir), f"training.log_every={log_every}"]
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "training.save_every=4", "training.eval_every=100"])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    last = 5 if log_every == 1 else 8
    assert ("not finite in step 5;" if log_every == 1 else "not finite in one of steps 5 to 8;") in message
    assert ("training.log_every=1" in message) == (log_every != 1), "the remedy that finds the very step"
    assert latest_checkpoint(run_dir).step == 4
    assert f"the newest checkpoint in {run_dir} is from before that" in message
    (path,) = run_dir.glob("diverged_*")
    assert path.name == f"diverged_step_{last:08d}_rank_0.safetensors"
    assert str(path) in message
    rows = load_file(path)
    assert rows.keys() == batches[last].keys()
    for key, tensor in batches[last].items():
        assert torch.equal(rows[key], tensor), f"{key} as it was before the pool moved on"


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
        first.wait(300)
    with started(*command) as third:
        step = latest_checkpoint(run_dir).step
        wait_for_step(run_dir, step + 5, third)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_rank_that_dies_or_hangs_ends_the_others(number, config_file, tmp_path):
    """Without anybody who looks after the processes, as srun starts them: a rank notices by itself."""
    config = config_file(training__max_steps=100_000, training__save_every=5, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    read_config(config).open_data().load(train=True)  # writes the boards, which can take longer than a rank waits below
    program: tuple[object, ...] = ("train.py",)
    if number == signal.SIGSTOP:  # only the limit of a collective ends it, which holds for the start and each save too
        impatient = (
            "import datetime, runtime.distributed\n"
            "limit = datetime.timedelta(seconds=15)\n"
            "runtime.distributed.COLLECTIVE_TIMEOUT = runtime.distributed.PATIENT_TIMEOUT = limit\n"
            "import train\n"
            "train.main()\n"
        )
        program = ("-c", impatient)
    with started_ranks(2, *program, "--config", config, "--run-dir", run_dir) as (main, other):
        wait_for_step(run_dir, 8, main)
        other.send_signal(number)
        _, err = main.communicate(timeout=300)
        assert main.returncode not in (0, None)
        assert re.search(r"(?i)connection|reset|closed" if number == signal.SIGKILL else r"(?i)timed out", err), err
        if number == signal.SIGKILL:
            assert other.wait(60) == -signal.SIGKILL
        else:
            assert other.poll() is None
    assert latest_checkpoint(run_dir).step >= 5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_stop_under_the_launcher_ends_with_one_line(number, status, config_file, tmp_path):
    config = config_file(training__max_steps=100_000, training__save_every=100_000, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    arguments = ["--standalone", "--nproc-per-node=2", "train.py", "--config", config, "--run-dir", run_dir]
    with started("-m", "runtime.launch", *arguments) as process:
        wait_for_step(run_dir, 8, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert not err
    assert out.splitlines()[-1].startswith(f"stopped by {number.name} at step ")
    assert latest_checkpoint(run_dir).n_ranks == 2


def test_the_launcher_ends_all_and_names_the_rank_that_died(config_file, tmp_path):
    config = config_file(training__max_steps=100_000, training__save_every=5, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    arguments = ["--standalone", "--nproc-per-node=2", "train.py", "--config", config, "--run-dir", run_dir]
    with started("-m", "runtime.launch", *arguments) as process:
        wait_for_step(run_dir, 8, process)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = (pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(victim), signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert err.splitlines()[-1] == "error: the process of rank 1 was ended by SIGKILL"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert latest_checkpoint(run_dir).step >= 5


def test_of_ranks_that_fail_in_one_second_the_one_that_a_signal_ended_is_named():
    def first_of(*failures: tuple[int, int]) -> int:
        ranks: dict[int, Any] = {
            rank: SimpleNamespace(timestamp=time, exitcode=status) for rank, (time, status) in enumerate(failures)
        }
        return _first_failure(ranks)[0]

    assert first_of((5, 1), (5, -signal.SIGKILL)) == 1
    assert first_of((5, -signal.SIGTERM), (5, 2)) == 1, "torchrun ended the other"
    assert first_of((5, 2), (6, -signal.SIGKILL)) == 0


def test_an_error_of_all_ranks_is_printed_once(config_file, tmp_path):
    """Whether it is found before the ranks know of each other, on the main process alone, or on all after that."""
    (tmp_path / "file").touch()
    good = ("--config", config_file(), "--run-dir", tmp_path / "run")
    cases = {
        "training.batch_sise": (*good, "training.batch_sise=4"),
        "are free): give another --run-dir": ("--config", config_file(), "--run-dir", tmp_path / "file" / "run"),
        "does not divide over 2 processes": (*good, "training.batch_size=7"),
    }
    for message, arguments in cases.items():
        result = run_ranks(2, "train.py", *arguments)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("error: ") == 1, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    result = run_python("-m", "runtime.launch", "--standalone", "--nproc-per-node=2", "train.py", *good, "nonsense")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_rank_that_fails_late_adds_nothing_to_the_message():
    """The main process, which holds the store that tells the others of its message, waits for them."""
    code = """
import os, time
from runtime.distributed import fail_once, start_world
start_world("cpu")
time.sleep(int(os.environ["RANK"]))
fail_once("of all")
"""
    result = run_ranks(2, "-c", code)
    assert result.returncode == 2
    assert result.stderr == "error: of all\n"


def test_an_error_of_one_rank_alone_is_printed(config_file, tmp_path):
    good = ("--config", config_file(), "--run-dir", tmp_path / "run")
    assert run_ranks(2, "train.py", *good).returncode == 0
    (tmp_path / "run" / "final.json").unlink()
    replace_file(find_checkpoint(tmp_path / "run").path, "rank_1.pt", b"no archive")
    result = run_ranks(2, "train.py", *good)
    assert result.returncode != 0
    assert "rank_1.pt cannot be read" in result.stderr


# Logs


def test_a_log_that_is_no_terminal_gets_a_line_for_each_record(config_file, tmp_path):
    config = config_file(
        training__log_every=2, training__max_steps=1000, training__eval_every=4, training__save_every=4
    )
    with started("train.py", "--config", config, "--run-dir", tmp_path / "run") as process:
        wait_for_step(tmp_path / "run", 8, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert not err
    assert "\r" not in out
    assert "it/s" not in out
    record = r"step 6 of 1,000: loss \d\.\d{4}, lr \d\.\de-\d\d, [\d.,]+ steps/s, \d+:\d\d:\d\d left"
    assert len(re.findall(f"^{record}$", out, re.MULTILINE)) == 1, out
    assert re.search(r"^step 4: top_prob, 1 per step: accuracy", out, re.MULTILINE)


def test_a_log_on_a_full_disk_does_not_end_the_run(small_disk, config_file, tmp_path):
    disk, fill = small_disk
    fill(0)
    with (disk / "ballast").open("ab") as full:  # any byte more does not fit
        arguments = ["train.py", "--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
        process = Forked(*arguments, environment=ENVIRONMENT, output=full)
        with process:
            process.wait(300)
    assert (tmp_path / "run" / "final.json").exists()
    assert latest_checkpoint(tmp_path / "run").step == 6


def test_a_gpu_that_torch_cannot_use_is_reported(config_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("torch can use this machine's GPU")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    code = f"""
from pathlib import Path
import train, runtime.distributed
runtime.distributed.GPU_FILES = Path({str(tmp_path / "dev")!r})
train.main()
"""
    command = ("-c", code, "--config", config_file(training__device="auto"), "--run-dir", tmp_path / "run")
    result = run_python(*command, CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0, result.stderr
    reason = r"Torch not compiled with CUDA enabled|driver"
    assert re.fullmatch(
        rf"warning: the CPU is used, since torch cannot use this machine's GPU: .*({reason}).*\n", result.stderr
    )
    shutil.rmtree(tmp_path / "run")
    refused = run_python(*command, CUDA_VISIBLE_DEVICES="0", PUMA_GPUS="4")
    assert refused.returncode == 2
    assert re.search(
        rf"4 GPUs on each node, but torch can use none \(.*({reason}).*training\.device=cpu", refused.stderr
    )
    assert run_python(*command, "training.device=cpu", PUMA_GPUS="4").returncode == 0
    shutil.rmtree(tmp_path / "run")
    hidden = run_python(*command, CUDA_VISIBLE_DEVICES="")
    assert not hidden.stderr, "the user has chosen so"
