"""The list of runs, and the history that each keeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import train
from report.runs import find_runs, main, summarize
from runtime import history
from runtime.history import HISTORY_FILE, Session, read_history
from runtime.metrics import read_metrics


@pytest.fixture
def resumed(config_file, tmp_path, monkeypatch) -> Path:
    """A run of six steps that was stopped by SIGTERM after three and resumed."""
    config, run_dir = str(config_file()), tmp_path / "runs" / "resumed"
    write = train.Recorder.write

    def write_and_stop(recorder, values, samples=()):
        write(recorder, values, samples)
        if values["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Recorder, "write", write_and_stop)
        train.main(["--config", config, "--run-dir", str(run_dir)])
    assert summarize(run_dir).state == "stopped"
    train.main(["--config", config, "--run-dir", str(run_dir)])
    return run_dir


def test_a_resumed_run_keeps_a_history(resumed):
    first, second = read_history(resumed)
    assert (first["state"], first["reason"], first["from_step"], first["to_step"]) == ("stopped", "SIGTERM", 0, 4)
    assert (second["state"], second["reason"], second["from_step"], second["to_step"]) == ("complete", None, 4, 6)
    assert datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(first["ended"])
    assert datetime.fromisoformat(first["ended"]) <= datetime.fromisoformat(second["started"])
    for session in (first, second):
        assert {"data", "training", "evaluation", "checkpoints"} <= session["seconds"].keys()
        assert session["hardware"]["processes"] == 1
        assert session["packages"]["torch"]
        assert session["n_steps"] == 6
    assert first["seconds"]["training"] + second["seconds"]["training"] == pytest.approx(
        json.loads((resumed / "final.json").read_text())["train_seconds"], abs=0.02
    )


def test_a_failure_is_in_the_history_and_in_the_list(config_file, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(train, "save_run", fail)
    with pytest.raises(ZeroDivisionError):
        train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    (session,) = read_history(tmp_path / "run")
    assert (session["state"], session["reason"]) == ("failed", "ZeroDivisionError: of a test")
    summary = summarize(tmp_path / "run")
    assert (summary.state, summary.reason) == ("failed", "ZeroDivisionError: of a test")
    capsys.readouterr()
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["run", "failed"]
    assert lines[-1] == "failed: run: ZeroDivisionError: of a test"


def test_a_damaged_history_stops_nothing(resumed):
    (resumed / HISTORY_FILE).write_text("[")
    with pytest.warns(RuntimeWarning, match="only the history of the run is lost"):
        assert read_history(resumed) == []
    session = Session(run_dir=resumed, facts={"started": "now"})
    with pytest.warns(RuntimeWarning):
        session.write("stopped", 5)
    assert [each["to_step"] for each in read_history(resumed)] == [5]


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def test_states_and_figures(resumed, capsys):
    folder = resumed.parent
    for name in ("damaged", "nothing"):
        (folder / name).mkdir()
    (folder / "damaged" / "config.yaml").write_text("model: [")
    (folder / "nothing" / "metrics.jsonl").write_text("")
    shutil.copytree(resumed, folder / "long")
    (folder / "long" / "final.json").unlink()
    command = [sys.executable, "-c", HOLD, folder / "long" / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert [path.name for path in find_runs(folder)] == ["damaged", "long", "resumed"]
        main([str(folder)])
        holder.communicate(b"\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "objective", "data", "steps", "best"]
    states = {line.split()[0]: line.split()[1] for line in lines[1:4]}
    assert states == {"damaged": "damaged", "long": "running", "resumed": "complete"}
    assert lines[4].startswith(f"damaged: config {folder}/damaged/config.yaml cannot be read")
    assert summarize(folder / "long").state == "stopped", "the process has ended"
    (folder / "resumed" / "final.json").write_text("{")
    main([str(folder / "resumed"), "--json"])
    (run,) = json.loads(capsys.readouterr().out)
    best = max(row.get("validation/accuracy/top_prob_1", -1) for row in read_metrics(resumed))
    assert (run["state"], run["step"], run["n_steps"], run["accuracy"]) == ("damaged", 6, 6, best)
    assert "final.json cannot be read" in run["problem"]


def test_a_damaged_history_or_result_hides_no_other_run(resumed, capsys):
    folder = resumed.parent
    final, history = (json.loads((resumed / name).read_text()) for name in ("final.json", HISTORY_FILE))
    del final["evaluation"]["loss"]
    history["sessions"][0]["from_step"] = None
    for name, file, content in (("a", "final.json", final), ("b", HISTORY_FILE, history)):
        shutil.copytree(resumed, folder / name)
        (folder / name / file).write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match=r"0\.from_step: Input should be a valid integer"):
        main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["a", "damaged"], ["b", "complete"], ["resumed", "complete"]]
    assert "evaluation.loss: Field required" in lines[4]


def test_a_packed_model_is_no_run(tmp_path):
    for name, files in {
        "packed": ("model.safetensors",),
        "new": (),
        "run": ("model.safetensors", "metrics.jsonl"),
    }.items():
        (tmp_path / name).mkdir()
        for file in ("config.yaml", *files):
            (tmp_path / name / file).touch()
    assert [path.name for path in find_runs(tmp_path)] == ["new", "run"]
    with pytest.raises(ValueError, match="has no runs"):
        find_runs(tmp_path / "packed")


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    assert "has no runs" in capsys.readouterr().err


def test_a_list_that_cannot_be_printed_ends_with_one_message(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").touch()
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_runs_behind_links_are_listed_once(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "config.yaml").write_text("")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "disk" / "run")
    (folder / "once more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "circle").symlink_to(folder)
    assert find_runs(folder) == [folder / "linked"]


def test_a_copy_without_git_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setattr(history, "ROOT", copy)
    assert history.git("rev-parse", "--is-inside-work-tree") is None
    monkeypatch.setattr(history, "ROOT", tmp_path)
    assert history.git("rev-parse", "--is-inside-work-tree") == "true"
