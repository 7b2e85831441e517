"""Signals through the command line: one saves and ends, the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_fresh_python, started, started_ranks
from forked import Forked
from helpers import losses
from test_train import CASES, assert_same_checkpoint

import samplers.causal
import samplers.step
import train
from runtime import signals
from runtime.checkpoint import latest_checkpoint
from runtime.metrics import read_metrics


def wait_for_step(run_dir: Path, step: int, process: Forked, timeout_s: float = 300) -> None:
    """Poll the records until `step` is there."""
    deadline = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in read_metrics(run_dir)):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no step {step} within {timeout_s} s"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_training_after_the_step_in_hand(number, config_file, tmp_path, monkeypatch, capsys):
    config = str(config_file(training__save_every=100))
    train.main(["--config", config, "--run-dir", str(tmp_path / "straight")])
    step = train.Updater.step

    def signalled_step(updater):
        if updater.run.step == 3:
            os.kill(os.getpid(), number)
        step(updater)

    handlers = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    arguments = ["--config", config, "--run-dir", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        patch.setattr(train.Updater, "step", signalled_step)
        if number == signal.SIGINT:
            with pytest.raises(SystemExit) as stop:
                train.main(arguments)
            assert stop.value.code == 130, "a shell's loop over runs must end as well"
        else:
            train.main(arguments)
    assert f"stopped by {number.name} at step 4" in capsys.readouterr().out
    assert handlers == [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    assert latest_checkpoint(tmp_path / "stopped").step == 4
    assert not (tmp_path / "stopped" / "final.json").exists()
    train.main(arguments)
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "stopped")
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def test_a_step_that_was_saved_already_is_not_saved_again(config_file, tmp_path, monkeypatch, capsys):
    save, score, saves = train.save_run, train.score_run, []

    def signalled_score(run, value):
        score(run, value)
        os.kill(os.getpid(), signal.SIGUSR1)

    def counted_save(run, value):
        save(run, value)
        saves.append(run.step)

    monkeypatch.setattr(train, "save_run", counted_save)
    monkeypatch.setattr(train, "score_run", signalled_score)
    train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    assert saves == [3]
    assert latest_checkpoint(tmp_path / "run").score is not None, "the score of that step must stay with the checkpoint"
    assert "at step 3" in capsys.readouterr().out


def test_a_step_that_a_signal_saves_keeps_its_score(config_file, tmp_path, monkeypatch):
    """It is evaluated, and no save is due."""
    record = train.record_evaluation

    def signalled_record(*arguments):
        record(*arguments)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(train, "record_evaluation", signalled_record)
    train.main(["--config", str(config_file(training__eval_every=2)), "--run-dir", str(tmp_path / "run")])
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint.step == 2
    assert checkpoint.score is not None


def wait_for_handler(process: subprocess.Popen) -> None:
    """Wait until a program has installed its handlers."""
    status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 300

    def caught() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        return int(line.split()[1], 16)

    while not caught() & 1 << (signal.SIGUSR1 - 1):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_signal_before_the_first_step_is_kept_and_costs_nothing(config_file, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", "--config", config_file(), "--run-dir", run_dir]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_handler(process)
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.splitlines()[0] == "SIGUSR1: the run stops once its data and model are ready"
    assert "stopped by SIGUSR1 at step 0" in out
    assert not (run_dir / "final.json").exists()
    assert latest_checkpoint(run_dir) is None


def test_the_handlers_come_before_torch():
    code = """
import runpy, sys
from runtime import signals
signals.listen = lambda: print("torch" in sys.modules)
sys.argv = ["train.py", "--help"]
runpy.run_path("train.py", run_name="__main__")
"""
    result = run_fresh_python("-c", code)
    assert result.stdout.split("\n", 1)[0] == "False", result.stderr


def long_evaluation(config_file, **changes: object) -> Path:
    """A config whose step 2 is evaluated for minutes, and not saved before."""
    rules = {"confidence": ["top_prob", "top_prob_margin", "neg_entropy", "random"], "tokens_per_step": [1, 2, 3, 4]}
    settings = {f"validation__{key}": value for key, value in rules.items()}
    settings |= {"data__n_test": 200, "validation__n_examples": 200, "validation__batch_size": 1}
    return config_file(**settings, training__eval_every=2, training__save_every=100, **changes)


def wait_for_text(process: Forked, text: str) -> None:
    """Wait until a program has written something."""
    deadline = time.monotonic() + 300
    while not any(text in written for written in process.written()):
        assert process.poll() is None, process.written()
        assert time.monotonic() < deadline, process.written()
        time.sleep(0.02)


def in_evaluation(process: Forked) -> None:
    """Wait until the evaluation of step 2 has begun: its row is written when it has ended."""
    wait_for_text(process, "step 2 of")
    time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_an_evaluation_between_two_passes(number, config_file, tmp_path):
    config, run_dir = long_evaluation(config_file), tmp_path / "run"
    with started("train.py", "--config", config, "--run-dir", run_dir) as process:
        in_evaluation(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else 0), err
    assert f"stopped by {number.name} at step 2" in out
    assert not err
    checkpoint = latest_checkpoint(run_dir)
    assert (checkpoint.step, checkpoint.score) == (2, None)
    assert max(losses(run_dir)) == 1, "the row of a step comes with its evaluation"


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [("puma", samplers.step), ("block_uniform_causal", samplers.step), ("autoregressive", samplers.causal)],
)
def test_an_evaluation_asks_before_every_pass(objective, sampler, config_file, tmp_path, monkeypatch, capsys):
    """In this process, where passes can be counted: none follows the signal."""
    predict, n_passes = sampler.predict_tokens, 0

    def signalled_predict(*arguments, **options):
        nonlocal n_passes
        n_passes += 1
        if n_passes == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(*arguments, **options)

    config = config_file(CASES[objective], training__save_every=100)
    arguments = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "predict_tokens", signalled_predict)
        train.main(arguments)
    assert n_passes == 3
    assert "stopped by SIGTERM at step 3" in capsys.readouterr().out
    train.main(arguments)
    train.main([*arguments[:3], str(tmp_path / "straight")])
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "run")
    timed = ("seconds", "train/step_ms", "train/tokens_per_s", "train/peak_memory_gib")
    rows = [
        [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(tmp_path / name)]
        for name in ("straight", "run")
    ]
    assert rows[0] == rows[1], "the evaluation is made up for, and each row is there once"


def test_a_second_interrupt_loses_nothing_and_a_third_ends_at_once(config_file, tmp_path):
    config, run_dir = long_evaluation(config_file), tmp_path / "run"
    slow = """
import os, time, train
def slow_save(run, score, save=train.save_run):
    print("saving", flush=True)
    while not os.path.exists(os.environ["GO_ON"]):
        time.sleep(0.05)
    save(run, score)
train.save_run = slow_save
train.main()
"""
    go_on = tmp_path / "go on"
    for n_interrupts in (2, 3):
        with started("-c", slow, "--config", config, "--run-dir", run_dir, GO_ON=str(go_on)) as process:
            in_evaluation(process)
            process.send_signal(signal.SIGINT)
            wait_for_text(process, "saving")
            process.send_signal(signal.SIGINT)
            wait_for_text(process, "the run is being saved")
            if n_interrupts == 2:
                go_on.touch()
            else:
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
        assert err.splitlines()[-1] == "the run is being saved; Ctrl-C again ends it without"
        if n_interrupts == 2:
            assert process.returncode == 130
            assert latest_checkpoint(run_dir).step == 2
            shutil.rmtree(run_dir)
            go_on.unlink()
        else:
            assert process.returncode == -signal.SIGINT
            assert latest_checkpoint(run_dir) is None


def test_an_interrupt_during_the_imports_ends_with_one_line(config_file, tmp_path):
    command = [sys.executable, "train.py", "--config", config_file(), "--run-dir", tmp_path / "run"]
    for delay_s in (0, 0.5):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_for_handler(process)
            time.sleep(delay_s)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert len(err.splitlines()) == 1, err
        assert "interrupted" in err
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_wandb_that_dies_of_the_same_signal_costs_no_step(config_file, tmp_path):
    """SIGTERM to the whole process group, as a terminal's end or some clusters send it."""
    pytest.importorskip("wandb")
    config = config_file(training__max_steps=100_000, training__save_every=100_000, training__eval_every=100_000)
    settings = config.read_text() + "wandb: {mode: offline}\n"
    config.write_text(settings)
    run_dir = tmp_path / "run"
    with started("train.py", "--config", config, "--run-dir", run_dir, group=True) as process:
        wait_for_step(run_dir, 5, process)
        assert list((run_dir / "wandb").glob("offline-run-*"))
        os.killpg(process.pid, signal.SIGTERM)
        before = time.monotonic()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "stopped by SIGTERM" in out
    assert time.monotonic() - before < 29, "SIGKILL follows half a minute later"
    step = latest_checkpoint(run_dir).step
    assert step >= 5
    assert max(losses(run_dir)) == step


def test_a_forked_process_keeps_the_usual_meaning_of_a_signal():
    code = """
import multiprocessing, time
from runtime import signals
signals.listen()
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(10)
    print(child.exitcode)
"""
    result = run_fresh_python("-c", code)
    assert result.stdout.strip() == str(-signal.SIGTERM), result.stderr


def test_listening_imports_nothing_slow():
    result = run_fresh_python(
        "-c", "import sys, runtime.signals as s; s.listen(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert result.stdout.split() == ["False", "False"], result.stderr
    assert signals.EARLY_SIGNALS == (signal.SIGUSR1, signal.SIGTERM)


def test_one_rank_signalled_stops_all_at_the_same_step(config_file, tmp_path):
    config = config_file(training__max_steps=100_000, training__save_every=100_000, training__eval_every=100_000)
    run_dir = tmp_path / "run"
    with started_ranks(2, "train.py", "--config", config, "--run-dir", run_dir) as ranks:
        wait_for_step(run_dir, 5, ranks[0])
        ranks[1].send_signal(signal.SIGUSR1)
        before = max(losses(run_dir))
        written = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], written
    assert "stopped by SIGUSR1" in written[0][0]
    checkpoint = latest_checkpoint(run_dir)
    assert json.loads((checkpoint.path / "manifest.json").read_text())["n_ranks"] == 2
    assert max(losses(run_dir)) == checkpoint.step
    # The first or second exchange after the signal; the number of steps between exchanges at most doubles each time.
    assert checkpoint.step <= 4 * before + 20, "the stop must not take long"


def test_one_rank_signalled_in_an_evaluation_stops_all(config_file, tmp_path):
    config, run_dir = long_evaluation(config_file), tmp_path / "run"
    with started_ranks(2, "train.py", "--config", config, "--run-dir", run_dir) as ranks:
        in_evaluation(ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        written = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], written
    assert "stopped by SIGTERM at step 2" in written[0][0]
    assert (latest_checkpoint(run_dir).step, latest_checkpoint(run_dir).n_ranks) == (2, 2)


def test_a_signal_sent_again_does_not_kill_a_process_that_shuts_down():
    code = """
import builtins, os, signal, threading, time
from runtime import signals
signals.listen()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # may get the signal as well
class Late:  # outlives the handlers
    kill, pid, number, write = os.kill, os.getpid(), int(signal.SIGUSR1), os.write
    def __del__(self):
        self.kill(self.pid, self.number)
        self.write(1, b"survived")
builtins.late = Late()
"""
    result = run_fresh_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "survived"
