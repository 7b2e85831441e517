"""The training command: resume, records, refusals, two processes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import (
    PUMA,
    UNIFORM,
    run_python,
    run_ranks,
    started_ranks,
    tiny_gsm_settings,
    tiny_settings,
)
from tqdm import tqdm

import train
from data import hashes
from data.generate_sudoku import generate_sudoku, write_csv
from data.sudoku_boards import RAW_FILES
from model.transformer import Layer, Transformer
from progressive import PumaObjective
from report import curves
from report.runs import summarize
from report.runs import table as runs_table
from runtime.checkpoint import find_checkpoint, latest_checkpoint, step_folders
from runtime.config_file import read_config
from runtime.final import load_final
from runtime.history import read_history
from runtime.metrics import read_metrics

CASES = {
    "uniform": UNIFORM,
    "puma": PUMA,
    "autoregressive": {"name": "autoregressive"},
    "block_uniform_prefix": {"name": "block_uniform", "block_size": 8, "block_attention": "prefix"},
    "block_uniform_causal": {"name": "block_uniform", "block_size": 8, "block_attention": "block_causal"},
    "block_puma_prefix": PUMA | {"name": "block_puma", "block_size": 8, "block_attention": "prefix"},
    "block_puma_causal": PUMA | {"name": "block_puma", "block_size": 8, "block_attention": "block_causal"},
    "puma_by_margin": PUMA | {"reveal_order": "top_prob_margin"},
    "puma_by_entropy": {"name": "puma", "n_stages": 4, "reveal_order": "neg_entropy"},
    "puma_in_random_order": {"name": "puma", "n_stages": 4, "reveal_order": "random"},
    "puma_with_redrawn_masks": {"name": "puma", "n_stages": 4, "reveal_order": "redrawn"},
    "block_puma_causal_by_entropy": PUMA
    | {"name": "block_puma", "block_size": 8, "block_attention": "block_causal", "reveal_order": "neg_entropy"},
    "puma_with_uniform_rows": {"name": "puma", "n_stages": 4, "uniform_fraction": 0.25},
}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, average, optimizer, schedule, pool, stream and generator are equal bit for bit."""
    ours, theirs = find_checkpoint(first), find_checkpoint(second)
    assert ours.step == theirs.step
    for name in ("model", "ema"):
        weights, others = ours.weights(name), theirs.weights(name)
        assert weights is not None
        assert others is not None
        assert weights.keys() == others.keys()
        for key in weights:
            assert torch.equal(weights[key], others[key]), key
    assert ours.n_ranks == theirs.n_ranks
    for name in ("train", *(f"rank_{rank}" for rank in range(ours.n_ranks))):
        state, other = ours.state(name), theirs.state(name)
        for timed in ("seconds", "seconds_recorded", "pending_metrics"):
            state.pop(timed, None)
            other.pop(timed, None)
        assert_same(state, other, name)


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Nested states are equal bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("objective", CASES.values(), ids=CASES.keys())
def test_six_steps_equal_three_a_restart_and_three(objective, config_file, tmp_path, monkeypatch, capsys):
    config = str(config_file(objective))
    train.main(["--config", config, "--run-dir", str(tmp_path / "straight")])

    def interrupted_save(run, score):
        save(run, score)
        raise KeyboardInterrupt

    save = train.save_run
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", interrupted_save)
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", config, "--run-dir", str(tmp_path / "broken")])
    assert stop.value.code == 130
    assert latest_checkpoint(tmp_path / "broken").step == 3
    train.main(["--config", config, "--run-dir", str(tmp_path / "broken")])
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "broken")
    losses = [[row.get("train/loss") for row in read_metrics(tmp_path / name)] for name in ("straight", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda objective, state: state["my_new_field"], "it lacks 'my_new_field'"),
        (lambda objective, state: objective.my_new_field, "has no attribute 'my_new_field'"),
        (lambda objective, state: torch.zeros(3).copy_(state["pool"]["x0"]), "The size of tensor"),
    ],
    ids=["a missing key", "a missing attribute", "another shape"],
)
def test_an_error_of_changed_code_is_not_blamed_on_the_checkpoint(
    fault, reason, config_file, tmp_path, monkeypatch, capsys
):
    """Who obeys the message would delete a checkpoint that is in order."""
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    (tmp_path / "run" / "final.json").unlink()
    monkeypatch.setattr(PumaObjective, "load_state_dict", fault)
    for traceback in ("0", "1"):
        monkeypatch.setenv("PUMA_TRACEBACK", traceback)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert ("in <lambda>" in message) == (traceback == "1"), "the line of the error"
    error = message[message.index("error: checkpoint ") :]
    assert "step_00000006 does not fit this code" in error
    assert reason in error
    assert "PUMA_TRACEBACK=1" in error
    assert "delete" not in error
    assert latest_checkpoint(tmp_path / "run").step == 6, "it stays under its name"


def test_a_resumed_run_may_be_compiled(config_file, tmp_path, monkeypatch):
    config, run_dir = str(config_file()), tmp_path / "run"
    train.main(["--config", config, "--run-dir", str(run_dir)])
    shutil.copytree(run_dir, tmp_path / "eager")
    (run_dir / "final.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    compiled = []

    def compile_nothing(function, **_):
        """The compiler takes a minute; its numbers are the same up to rounding (tests/test_model_transformer.py)."""
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    train.main(["--config", config, "--run-dir", str(run_dir), "training.compile=true"])
    assert compiled
    assert_same_checkpoint(tmp_path / "eager", run_dir)


def test_a_killed_run_continues_as_if_nothing_had_happened(config_file, tmp_path):
    config = config_file(training__max_steps=80, training__save_every=20, training__eval_every=80)
    arguments = ["train.py", "--config", config, "--run-dir"]
    killed = """
import os, signal, train
from training.update import Updater
def step_or_die(updater, step=Updater.step):
    if updater.run.step == 47:
        os.kill(os.getpid(), signal.SIGKILL)
    step(updater)
Updater.step = step_or_die
train.main()
"""
    assert run_python("-c", killed, *arguments[1:], tmp_path / "killed").returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "killed").step == 40
    for name in ("killed", "straight"):
        result = run_python(*arguments, tmp_path / name, PUMA_TESTS_DRAW="1")
        assert result.returncode == 0, result.stderr
        assert {"report.html", "curves_step.png"} <= {path.name for path in (tmp_path / name).iterdir()}
    assert_same_checkpoint(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.pictures
def test_records_and_final_result(config_file, tmp_path, capsys):
    config = str(
        config_file(validation__confidence=["top_prob", "top_prob_margin"], validation__tokens_per_step=[1, 2])
    )
    train.main(["--config", config, "--run-dir", str(tmp_path / "run")])
    assert re.search(r"^solved \d+\.\d% of 10 test puzzles$", capsys.readouterr().out.splitlines()[-2])
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["n"] == 10
    assert final["steps"] == 6
    assert final["train_seconds"] > 0
    assert 0 <= final["accuracy"] <= 1
    assert len(final["evaluation"]["samplers"]) == 4
    rows = list(read_metrics(tmp_path / "run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/learning_rate"] > 0 for row in rows] == [False] + [True] * 5, "warm-up starts from 0"
    for key in ("loss", "grad_norm", "step_ms", "tokens_per_s", "peak_memory_gib", "masked_fraction"):
        assert all(row[f"train/{key}"] > 0 for row in rows), key
    assert [row["train/n_stages"] for row in rows] == [3, 3, 3, 3, 5, 5]
    assert all(abs(sum(row["train/stage_histogram"]) - 1) < 1e-6 for row in rows)
    assert rows[-1]["train/sequences_finished"] > 0
    assert rows[-1]["train/trajectory_length"] >= 1
    distinct = [row["sequences_distinct"] for row in rows]
    assert distinct[0] >= 8
    assert distinct == sorted(distinct)
    assert distinct[-1] <= 40
    assert [row["tokens"] for row in rows] == [step * 8 * 32 for step in range(1, 7)]
    assert {"validation/loss", "validation/accuracy/top_prob_margin_2", "validation/nfe/top_prob_1"} <= rows[-1].keys()
    assert rows[-1]["validation/nfe/top_prob_1"] == 16
    assert rows[-1]["validation/nfe/top_prob_2"] == 8
    for axis in ("step", "seconds", "sequences_distinct"):
        assert (tmp_path / "run" / f"curves_{axis}.png").stat().st_size > 1000
    assert f"of {final['n']}" in (tmp_path / "run" / "report.html").read_text()


def test_the_records_are_means_over_the_steps_since_the_last_one(config_file, tmp_path, monkeypatch):
    """Also of the last interval, which is shorter; PUMA draws more sequences in some steps than in others."""

    def watched_step(updater):
        run = updater.run
        before = float(run.loss_sum), float(run.grad_norm_sum)
        step(updater)
        losses.append(float(run.loss_sum) - before[0])
        norms.append(float(run.grad_norm_sum) - before[1])
        drawn.append(int(run.objective.queue.sequences_drawn))

    step = train.Updater.step
    losses: list[float] = []
    norms: list[float] = []
    drawn: list[int] = []
    monkeypatch.setattr(train.Updater, "step", watched_step)
    changes = {"training__log_every": 3, "training__max_steps": 7, "training__eval_every": 7}
    config = str(config_file({"name": "puma", "n_stages": 6, "pool_batches": 2}, **changes))
    train.main(["--config", config, "--run-dir", str(tmp_path / "run")])
    rows = list(read_metrics(tmp_path / "run"))
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert len(losses) == 7
    seconds = [0.0, *(row["seconds"] for row in rows)]
    for row, first, started in zip(rows, (0, 3, 6), seconds, strict=False):
        n_steps = row["step"] - first
        assert row["train/loss"] == pytest.approx(sum(losses[first : row["step"]]) / n_steps)
        assert row["train/grad_norm"] == pytest.approx(sum(norms[first : row["step"]]) / n_steps)
        assert row["train/step_ms"] == pytest.approx(1000 * (row["seconds"] - started) / n_steps)
        assert row["train/tokens_per_s"] == pytest.approx(n_steps * 8 * 32 / (row["seconds"] - started))
        assert row["sequences_distinct"] == drawn[row["step"] - 1]
    assert drawn[5] == 24, "16 in the pool at the start; half of them have retired after 3 of their 6 stages"


def test_seconds_are_those_of_training_alone(config_file, tmp_path, monkeypatch):
    """A step takes a second here, each evaluation and each checkpoint an hour."""
    now = [0.0]

    def slow(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            now[0] += seconds
            return call(*arguments)

        return called

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "measure", slow(train.measure, 3600))
    monkeypatch.setattr(train, "save", slow(train.save, 3600))
    monkeypatch.setattr(train.Updater, "step", slow(train.Updater.step, 1))
    train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    assert [row["seconds"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_is_repeated_is_recorded_once(config_file, tmp_path, monkeypatch):
    """It was recorded, and the checkpoint did not get its score."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "score_run", interrupted)
        with pytest.raises(SystemExit):
            train.main(command)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    train.main(command)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_last_evaluation_has_its_own_number_of_examples(config_file, tmp_path):
    config = str(config_file(validation__n_examples=5, validation__n_final_examples=10))
    train.main(["--config", config, "--run-dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "final.json").read_text())["n"] == 10
    evaluated = [row for row in read_metrics(tmp_path / "run") if "validation/loss" in row]
    n_by_clues = [{key: row[key] for key in row if re.fullmatch("validation/by_clues/.*/n", key)} for row in evaluated]
    assert [sum(counts.values()) for counts in n_by_clues] == [5, 10]


def test_a_finished_run_says_so_and_does_nothing(config_file, tmp_path, capsys):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    last_line = capsys.readouterr().out.splitlines()[-1]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train.main(arguments)
    out = capsys.readouterr().out
    assert "complete" in out
    assert out.splitlines()[-1] == last_line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_the_last_line_is_a_command_that_samples(config_file, tmp_path, capsys):
    run_dir = tmp_path / "a run"
    train.main(["--config", str(config_file(PUMA)), "--run-dir", str(run_dir)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"wrote {run_dir} (report.html, final.json, ")
    result = subprocess.run(line.split(", next: ")[1], shell=True, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "network forward evaluations" in result.stdout


def test_a_complete_run_says_how_to_train_longer(config_file, tmp_path, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    train.main(["--config", config, "--run-dir", str(run_dir)])
    for change, longer in (("training.max_steps=8", True), ("training.max_steps=4", False)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", config, "--run-dir", str(run_dir), change])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert f"training.max_steps: 6 -> {change[-1]}" in message
        assert ("cannot be made longer" in message) == longer
        if longer:
            result = subprocess.run(message.splitlines()[-1], shell=True, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert f"parameters from {run_dir}" in result.stdout
            assert json.loads((tmp_path / "run_longer" / "final.json").read_text())["steps"] == 8


def test_a_run_keeps_its_boards_when_the_published_ones_appear(config_file, tmp_path, capsys):
    data = f"data={{dataset: sudoku, n_train: 40, n_test: 20, data_dir: '{tmp_path}'}}"
    command = ["--config", str(config_file(UNIFORM)), "--run-dir", str(tmp_path / "run"), data, "model.vocab_size=11"]
    command += ["model.learned_positions=162"]
    train.main(command)
    assert "40 generated 9x9 boards" in capsys.readouterr().out
    assert read_config(tmp_path / "run/config.yaml").data.source == "generated"
    assert find_checkpoint(tmp_path / "run").config().data.source == "generated"
    (tmp_path / "run/final.json").unlink()
    for split in RAW_FILES:
        (tmp_path / RAW_FILES[split]).touch()
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    assert stop.value.code == 2
    assert "data.source: generated -> published" in capsys.readouterr().err


def test_a_run_whose_rate_has_not_decayed_gets_another_length(config_file, tmp_path, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    train.main(["--config", config, "--run-dir", str(run_dir), "training.decay_steps=2"])
    (run_dir / "final.json").unlink()
    longer = ["--config", config, "training.max_steps=8", "training.decay_steps=3"]
    with pytest.raises(SystemExit) as stop:  # its newest checkpoint has the decay of 6 steps
        train.main([*longer, "--run-dir", str(run_dir)])
    assert stop.value.code == 2
    assert "training.max_steps: 6 -> 8" in capsys.readouterr().err
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    for changes in (["training.max_steps=4"], ["training.max_steps=8", "training.learning_rate=0.5"]):
        with pytest.raises(SystemExit):
            train.main(["--config", config, "--run-dir", str(run_dir), "training.decay_steps=2", *changes])
    for name in ("run", "straight"):
        train.main([*longer, "--run-dir", str(tmp_path / name)])
    assert_same_checkpoint(tmp_path / "run", tmp_path / "straight")
    rates = [row["train/learning_rate"] for row in read_metrics(run_dir)]
    assert len(rates) == 8
    assert rates[2:6] == [1e-3] * 4
    assert rates[6] > rates[7] > 0


def test_random_numbers_of_the_model_repeat_on_resume(config_file, tmp_path, monkeypatch):
    compute = Layer._compute
    monkeypatch.setattr(Layer, "_compute", lambda *given: F.dropout(compute(*given), 0.5, given[0].training))
    for name in ("run", "straight"):
        torch.manual_seed(len(name))
        train.main(["--config", str(config_file(PUMA)), "--run-dir", str(tmp_path / name)])
    assert_same_checkpoint(tmp_path / "run", tmp_path / "straight")
    (tmp_path / "run" / "final.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    torch.manual_seed(1)
    train.main(["--config", str(config_file(PUMA)), "--run-dir", str(tmp_path / "run")])
    assert_same_checkpoint(tmp_path / "run", tmp_path / "straight")


def test_a_run_cannot_get_shorter_than_it_is(config_file, tmp_path, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    command = ["--config", config, "--run-dir", str(run_dir), "training.warmup_steps=5"]
    with pytest.warns(UserWarning, match="warmup_steps 5: the learning rate still rises when the run ends, after 5"):
        train.main([*command, "training.max_steps=5"])
    (run_dir / "final.json").unlink()
    with pytest.raises(SystemExit) as stop:  # in the warm-up all lengths have the same rates
        train.main([*command, "training.max_steps=4"])
    assert stop.value.code == 2
    assert "training.max_steps: 5 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize(("save_every", "warned"), [(2, True), (3, False), (6, False), (1, False)])
def test_saved_steps_that_are_not_evaluated_are_a_warning(save_every, warned, config_file, tmp_path):
    config = str(config_file(PUMA, training__eval_every=3, training__save_every=save_every))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train.main(["--config", config, "--run-dir", str(tmp_path / "run")])
    assert any("let one of the numbers divide the other" in str(each.message) for each in caught) == warned


def test_weights_that_the_last_update_ruins_are_no_result(config_file, tmp_path, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    command = ["--config", config, "--run-dir", str(run_dir), "training.max_steps=1", "training.warmup_steps=0"]
    for rate, reason in (("1.0e+38", "the loss, the gradient or a weight was not finite in step 1"),
                         ("1.0e+15", "the last validation loss is")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            train.main([*command, f"training.learning_rate={rate}"])
        assert stop.value.code == 1
        assert reason in capsys.readouterr().err
        assert not (run_dir / "final.json").exists()


def test_a_question_that_begins_like_an_option_is_one_argument(config_file, tmp_path, monkeypatch, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    train.main(["--config", config, "--run-dir", str(run_dir)])
    final = json.loads((run_dir / "final.json").read_text())
    (run_dir / "final.json").write_text(json.dumps(final | {"example": "-x"}))
    capsys.readouterr()
    train.main(["--config", config, "--run-dir", str(run_dir)])
    assert capsys.readouterr().out.endswith(" --puzzle=-x\n")


def test_a_shorter_length_by_another_key_is_not_called_longer(config_file, tmp_path, capsys):
    config, run_dir = str(config_file(PUMA)), tmp_path / "run"
    train.main(["--config", config, "--run-dir", str(run_dir)])
    with pytest.raises(SystemExit):
        train.main(
            ["--config", config, "--run-dir", str(run_dir), "training.max_steps=null", "training.num_epochs=0.3"]
        )
    assert "was started with other settings" in capsys.readouterr().err


def test_the_settings_that_a_run_wrote_train_again(config_file, tmp_path):
    """They hold defaults: more test examples than a small test set has."""
    config = config_file(PUMA, training__max_steps=1)
    content = yaml.safe_load(config.read_text())
    del content["validation"]["n_examples"]
    config.write_text(yaml.safe_dump(content))
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    train.main(["--config", str(tmp_path / "run" / "config.yaml"), "--run-dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "final.json").exists()


def test_more_examples_than_the_test_has_are_refused_before_training(config_file, tmp_path, capsys):
    config = config_file(PUMA, validation__n_examples=21)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "validation.n_examples 21: the test has 20 puzzles" in capsys.readouterr().err


def test_changed_settings_are_refused_with_the_difference(config_file, tmp_path, capsys):
    arguments = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "training.learning_rate=0.5", "validation.n_examples=5"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "training.learning_rate: 0.001 -> 0.5" in message
    assert "n_examples" not in message, "what is only measured may change"


def test_a_cuda_graph_without_a_gpu_is_ignored_with_a_warning(config_file, tmp_path):
    config = config_file(training__max_steps=1, training__device="cpu", training__cuda_graph=True)
    with pytest.warns(UserWarning, match="training.cuda_graph is ignored: this machine has no GPU"):
        train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])


def test_a_complete_run_without_checkpoints_keeps_its_settings(config_file, tmp_path, capsys):
    config = str(config_file(training__max_steps=1))
    train.main(["--config", config, "--run-dir", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", config, "--run-dir", str(tmp_path / "run"), "training.seed=1"])
    assert stop.value.code == 2
    assert "training.seed: 0 -> 1" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped_with_a_warning(config_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config_file()), "--run-dir", str(run_dir)]
    train.main(arguments)
    untouched = {name: tensor.clone() for name, tensor in find_checkpoint(run_dir).weights("model").items()}
    (run_dir / "final.json").unlink()
    damaged = run_dir / "checkpoints" / "step_00000006" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"step_00000006.*model\.safetensors has changed"):
        train.main(arguments)
    for name, tensor in find_checkpoint(run_dir).weights("model").items():
        assert torch.equal(tensor, untouched[name]), name


def test_other_training_data_is_refused_on_resume(config_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    boards = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for seed, path in enumerate(boards):
        result = run_python(
            *f"-m data.generate_sudoku --size 4 --count 40 --min-clues 4 --max-clues 8 --seed {seed} --out".split(),
            path,
        )
        assert result.returncode == 0, result.stderr
    changes = {
        "data__source": "files",
        "data__train_file": str(tmp_path / "train.csv"),
        "data__test_file": str(boards[1]),
    }
    config = config_file(**changes)
    (tmp_path / "train.csv").write_bytes(boards[0].read_bytes())
    train.main(["--config", str(config), "--run-dir", str(run_dir)])
    (run_dir / "final.json").unlink()
    (tmp_path / "train.csv").write_bytes(boards[1].read_bytes())
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config), "--run-dir", str(run_dir)])
    assert stop.value.code == 2
    assert "training data has changed since checkpoint" in capsys.readouterr().err


def settings_of_files(kind: str, folder: Path) -> dict:
    """A run on 200 rows: generated boards, the same in a .csv file, or tokenized problems."""
    if kind in ("labels.bin", "prompt_mask.bin"):
        return tiny_gsm_settings(folder, n_rows=210)
    settings = tiny_settings(dict(UNIFORM), folder)
    settings["data"]["n_train"] = 200
    settings["training"]["max_steps"] = 2
    if kind == "boards.csv":
        boards = generate_sudoku(4, 200, 4, 8, seed=1, show_progress=False)
        write_csv(folder / kind, boards)
        files = {"train_file": str(folder / kind), "test_file": str(folder / kind)}
        settings["data"] = {"dataset": "sudoku", "size": 4, "source": "files"} | files
    return settings


@pytest.mark.parametrize(
    ("kind", "n_header", "n_row"),
    [("boards.csv", 16, 34), ("*_train.npy", 128, 32), ("labels.bin", 0, 512), ("prompt_mask.bin", 0, 16)],
)
def test_one_changed_row_is_refused_on_resume(kind, n_header, n_row, tmp_path, monkeypatch, capsys):
    """Of a file whose size and modification time stay as they were, and whose hash is cached if it is a large one."""
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)  # the files are seconds old
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings_of_files(kind, tmp_path)))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    (tmp_path / "run" / "final.json").unlink()
    (file,) = tmp_path.rglob(kind)
    before, content = file.stat(), file.read_bytes()
    first, *rows = (content[start : start + n_row] for start in range(n_header, len(content), n_row))
    other = next(row for row in rows if row != first)
    with open(file, "r+b") as opened:  # in place
        opened.seek(n_header + 2 * n_row)
        opened.write(other if rows[1] == first else first)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert sum(a != b for a, b in zip(content, file.read_bytes(), strict=True)) in range(1, n_row + 1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    newest = latest_checkpoint(tmp_path / "run")
    assert error == (
        f"error: the training data has changed since checkpoint {newest.path} was saved: restore {file}, or give "
        "another --run-dir"
    )
    with open(file, "r+b") as opened:
        opened.write(content)
    train.main(arguments)
    assert (tmp_path / "run" / "final.json").exists()


def test_data_in_another_folder_is_the_same_data(tmp_path):
    settings = tiny_gsm_settings(tmp_path / "here")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    train.main(arguments)
    (tmp_path / "run" / "final.json").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = {key: settings["data"][key].replace("/here/", "/there/") for key in ("data_dir", "test_source")}
    train.main([*arguments, *(f"data.{key}={value}" for key, value in moved.items())])
    assert (tmp_path / "run" / "final.json").exists()


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(config_file, tmp_path, monkeypatch, capsys):
    def poisoned_step(updater):
        step(updater)
        if updater.run.step == 5:
            updater.run.loss_sum.fill_(float("nan"))

    step = train.Updater.step
    monkeypatch.setattr(train.Updater, "step", poisoned_step)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert "step 5" in capsys.readouterr().err
    assert latest_checkpoint(tmp_path / "run").step == 3


def test_out_of_memory_ends_with_the_settings_to_change(config_file, tmp_path):
    """On the rank where it happens; the others may have enough."""
    code = """
import os
import torch
import train
step = train.Updater.step
def step_of_a_small_gpu(updater):
    if os.environ["RANK"] == "1" and updater.run.step == 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 8")
    step(updater)
train.Updater.step = step_of_a_small_gpu
train.main()
"""
    with started_ranks(2, "-c", code, "--config", config_file(), "--run-dir", tmp_path / "run") as (_, second):
        _, message = second.communicate(60)
    assert second.wait() == 1
    error = message.splitlines()[-1]  # torch says before that it has waited for the first
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Lower training.micro_batch_size or")
    assert "training.gradient_checkpointing=true" in error
    assert "Traceback" not in message


@pytest.mark.pictures
def test_what_an_interrupt_after_the_end_has_kept_from_being_drawn_is_drawn_later(
    config_file, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config_file(training__max_steps=1)), "--run-dir", str(run_dir)]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_curves", interrupted)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    assert stop.value.code == 130
    assert "run is complete, and the same command draws what is missing" in capsys.readouterr().err
    (session,) = read_history(run_dir)
    assert session["state"] == "complete"
    drawn = [run_dir / "report.html", *(run_dir / f"curves_{axis}.png" for axis in train.RUN_AXES)]
    assert not any(path.exists() for path in drawn)
    train.main(arguments)
    assert all(path.exists() for path in drawn)
    written = drawn[0].stat().st_mtime_ns
    train.main(arguments)
    assert drawn[0].stat().st_mtime_ns == written


def test_gradient_accumulation_changes_nothing_but_rounding(config_file, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = str(config_file({"name": "puma", "n_stages": 3}))
    train.main(["--config", config, "--run-dir", str(whole)])
    train.main(["--config", config, "--run-dir", str(parts), "training.micro_batch_size=2"])
    for name, tensor in find_checkpoint(whole).weights("model").items():
        torch.testing.assert_close(tensor, find_checkpoint(parts).weights("model")[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["puma", "autoregressive", "block_uniform_causal"])
def test_recomputing_blocks_changes_nothing(name, config_file, tmp_path, monkeypatch):
    calls: list[None] = []
    recompute = Transformer.recompute_layers
    monkeypatch.setattr(Transformer, "recompute_layers", lambda self: calls.append(recompute(self)))
    config = str(config_file(CASES[name]))
    train.main(["--config", config, "--run-dir", str(tmp_path / "kept")])
    assert not calls
    train.main(["--config", config, "--run-dir", str(tmp_path / "recomputed"), "training.gradient_checkpointing=true"])
    assert calls
    assert_same_checkpoint(tmp_path / "kept", tmp_path / "recomputed")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["training.batch_sise=4"], "batch_size"),
        (["objective.n_stages=0", "objective.collapse_threshold=1.5"], "collapse_threshold"),
        (["objective.k_schedule=[[2, 5], [3, 1]]"], "k_schedule"),
        (["model.hidden_size=15"], "num_attention_heads"),
        (["model.vocab_size=5"], "vocab_size"),
        (["data.source=files", "data.train_file=nowhere.csv", "data.test_file=nowhere.csv"], "nowhere.csv"),
        (["training.device=cuda"], "CUDA"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_settings_end_with_one_message(change, expected, config_file, tmp_path, capsys):
    if change == ["training.device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU, so asking for one is no error")
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run"), *change])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert expected in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_bad_setting_ends_the_program_with_status_2(config_file, tmp_path):
    result = run_python("train.py", "--config", config_file(), "--run-dir", tmp_path / "run", "nonsense")
    assert result.returncode == 2
    assert re.fullmatch("error: .*nonsense.*\n", result.stderr)


@pytest.mark.parametrize("text", ["- a list", "just text", "", "a: [unclosed"])
def test_a_config_that_is_no_mapping_is_refused(text, tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(path), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_two_processes_train_together(config_file, tmp_path):
    run_dir = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command += ["--config", config_file(), "--run-dir", run_dir]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads((run_dir / "final.json").read_text())["n"] == 10
    assert {file.name for file in (run_dir / "checkpoints" / "step_00000006").iterdir()} >= {"rank_0.pt", "rank_1.pt"}
    alone = run_python(*command[4:])
    assert "solved" in alone.stdout, "a finished run needs no second process"
    (run_dir / "final.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    before = {row["step"]: row for row in read_metrics(run_dir)}
    alone = run_python(*command[4:], "training.micro_batch_size=4")
    assert alone.returncode == 0, alone.stderr
    assert "saved by 2 processes, continues on 1" in alone.stdout
    assert (find_checkpoint(run_dir).step, find_checkpoint(run_dir).n_ranks) == (6, 1)
    after = {row["step"]: row for row in read_metrics(run_dir)}
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert [after[step] for step in (1, 2, 3)] == [before[step] for step in (1, 2, 3)]
    for name in ("train/sequences_finished", "sequences_distinct"):
        counts = [row[name] for row in after.values()]
        assert counts == sorted(counts), "counters go on"


def test_four_processes_restart_as_if_nothing_had_happened(config_file, tmp_path):
    """More than two, because the sum of two numbers does not depend on their order, and that of four does."""
    command = ("train.py", "--config", config_file(model__num_hidden_layers=2), "--run-dir")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    result = run_ranks(4, *command, straight)
    assert result.returncode == 0, result.stderr
    shutil.copytree(straight, broken)
    (broken / "final.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "step_00000006")
    result = run_ranks(4, *command, broken)
    assert result.returncode == 0, result.stderr
    assert "steps 3 to 6 on 4 x cpu" in result.stdout
    assert_same_checkpoint(straight, broken)


def test_a_full_disk_under_standard_output_does_not_end_a_run_with_a_bar(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    evaluation: Any = SimpleNamespace(headline="rule 50%")
    run: Any = SimpleNamespace(step=3)
    with tqdm(total=6, file=io.StringIO()) as bar, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        train.show_evaluation(run, evaluation, bar)


# Without sampling


@pytest.fixture
def losses_of(monkeypatch):
    """Validation losses in place of the measured ones, in the order of the evaluations."""

    def replace(*values: float) -> None:
        remaining = iter(values)
        monkeypatch.setattr("eval.evaluate.validation_loss", lambda *_: next(remaining))

    return replace


@pytest.mark.parametrize(("rate", "kept"), [("0.003", True), ("0.001", False)])
def test_an_attempt_that_left_no_checkpoint_keeps_its_curves_in_wandb(rate, kept, config_file, tmp_path, monkeypatch):
    """Which refuses steps that it has: the run that begins with other settings is another one there."""
    command = ["--config", str(config_file()), "--run-dir", str(tmp_path / "run"), "training.learning_rate=0.003"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", lambda *_: sys.exit("killed before the first save"))
        with pytest.raises(SystemExit):
            train.main(command)
    (tmp_path / "run/wandb_id.txt").write_text("earlier")
    train.main([*command, f"training.learning_rate={rate}"])
    assert (tmp_path / "run/wandb_id.txt").exists() == kept


@pytest.mark.pictures
def test_a_run_that_asks_no_questions_is_judged_by_its_loss(config_file, tmp_path, losses_of, capsys):
    """Its best checkpoint, result, page, and what the commands show of it."""
    losses_of(0.5, 0.25, 0.75, 1.0)
    steps = {"training__max_steps": 4, "training__eval_every": 1, "training__save_every": 1}
    config = config_file(validation__n_examples=0, training__keep_checkpoints=1, **steps)
    run_dir = tmp_path / "run"
    train.main(["--config", str(config), "--run-dir", str(run_dir)])
    assert "validation loss 1.0000" in capsys.readouterr().out
    assert [path.name for path in step_folders(run_dir)] == ["step_00000004", "step_00000002"]
    final = json.loads((run_dir / "final.json").read_text())
    assert (final["accuracy"], final["n"], final["evaluation"]) == (None, 0, {"loss": 1.0, "samplers": []})
    assert load_final(run_dir).example == final["example"]
    page = (run_dir / "report.html").read_text()
    assert "final validation loss" in page
    assert "0.2500 at 2" in page
    summary = summarize(run_dir)
    assert (summary.state, summary.accuracy, summary.loss, summary.loss_step) == ("complete", None, 0.25, 2)
    assert "loss 0.2500 at 2" in runs_table([summary], tmp_path)
    curves.main([str(run_dir), "--out", str(tmp_path / "curves.png")])
    assert "| run | 1 | 4 | - | 1.0000 |" in capsys.readouterr().out
    train.main(["--config", str(config), "--run-dir", str(run_dir)])
    assert "is complete" in capsys.readouterr().out


def test_a_run_may_ask_questions_only_at_its_end(config_file, tmp_path, losses_of):
    """Its checkpoints are still compared by the loss."""
    losses_of(0.25, 0.5)
    config = config_file(validation__n_examples=0, validation__n_final_examples=3, training__keep_checkpoints=1)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["n"] == final["evaluation"]["samplers"][0]["n"] == 3
    assert [find_checkpoint(path).score for path in step_folders(tmp_path / "run")] == [-0.5, -0.25]


def test_a_loss_that_is_no_number_is_the_worst(config_file, tmp_path, losses_of):
    losses_of(float("nan"), 0.5)
    config = config_file(validation__n_examples=0)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    last, first = (find_checkpoint(path).score for path in step_folders(tmp_path / "run"))
    assert first is not None
    assert first < -1e300
    assert last == -0.5
