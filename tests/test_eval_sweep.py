"""The sweep of sampling rules: what is measured, what is written, and which points are the best."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from config import SamplingRule
from eval import evaluate as evaluation
from eval.sweep import RULES, Point, best, rules_of, sweep_table
from model.hub import pack_run
from runtime.config_file import read_config

POINT = Point(
    checkpoint="run",
    step=5,
    rule="threshold",
    dial="threshold",
    value=0.9,
    settings=SamplingRule(threshold=0.9).model_dump(),
    temperature=0.0,
    seed=0,
    n=100,
    accuracy=0.5,
    accuracy_low=0.4,
    accuracy_high=0.6,
    nfe=10.0,
    seconds=1.0,
    batch_size=8,
    device="cpu",
)


def point(nfe: float, accuracy: float, seconds: float = 1.0) -> Point:
    return replace(POINT, nfe=nfe, accuracy=accuracy, seconds=seconds)


def test_the_best_are_those_that_no_cheaper_point_reaches() -> None:
    cheap, worse, equal, good = point(2, 0.3), point(4, 0.2), point(5, 0.3), point(8, 0.9)
    also_cheap = point(2, 0.25)
    assert best([good, equal, also_cheap, worse, cheap], "nfe") == [cheap, good]


def test_the_table_marks_the_best_of_each_checkpoint() -> None:
    points = [point(2, 0.3), point(4, 0.2), replace(point(9, 0.1), checkpoint="other")]
    lines = [line for line in sweep_table(points) if line.startswith("| threshold")]
    assert ["**" in line for line in lines] == [True, False, True]


def test_rules_of_too_many_passes_are_left_out(config_file: Callable[..., Path]) -> None:
    config = read_config(config_file())
    found = rules_of(config, ["top_prob", "threshold", "plan"], n_masked=16, max_passes=4)
    values = {
        name: [rule.options | {"n": rule.tokens_per_step} for each, _, rule in found if each == name] for name in RULES
    }
    assert [each["n"] for each in values["top_prob"]] == [4, 8, 16, 32]
    assert [each["n_passes"] for each in values["plan"]] == [4]
    assert len(values["threshold"]) == len(RULES["threshold"][1]), "the model decides"


def test_a_sweep_writes_what_it_measured(
    config_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two checkpoints of two steps each; every rule that a row names gives the row again."""
    for name in ("threshold", "plan"):
        dial, values, rest = RULES[name]
        monkeypatch.setitem(RULES, name, (dial, values[:2], rest))
    runs = [str(tmp_path / name) for name in ("first", "second")]
    for seed, run in enumerate(runs):
        config = config_file(training__max_steps=2, training__seed=seed)
        train.main(["--config", str(config), "--run-dir", run])
    capsys.readouterr()
    words = ["--rules", "threshold", "plan", "--out", str(tmp_path / "out"), "validation.n_final_examples=3"]
    evaluation.main([runs[0], runs[1], "--sweep", *words])
    table = capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())
    n_values = sum(len(RULES[name][1]) for name in ("threshold", "plan"))
    assert [row["checkpoint"] for row in rows] == runs * n_values, "checkpoints in turn"
    assert [row["seed"] for row in rows] == [0, 1] * n_values
    for row in rows:
        assert row["n"] == 3
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        rule = SamplingRule(**row["settings"])
        assert getattr(rule, row["dial"]) == row["value"]
        assert row["nfe"] <= (row["value"] if row["rule"] == "plan" else 16)
        assert row["seconds"] > 0
    with (tmp_path / "out.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert table.strip() == (tmp_path / "out.md").read_text().strip()
    assert table.count("| plan |") == 2 * len(RULES["plan"][1])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    # The same command resumes: existing points are kept and missing ones are measured.
    (tmp_path / "out.json").write_text(json.dumps(rows[2:]))
    evaluation.main([runs[0], runs[1], "--sweep", *words])
    again = json.loads((tmp_path / "out.json").read_text())
    assert again[: len(rows) - 2] == rows[2:]
    assert [row["accuracy"] for row in again[len(rows) - 2 :]] == [row["accuracy"] for row in rows[:2]]


def test_a_packed_model_is_swept(
    config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--config", str(config_file(training__max_steps=1)), "--run-dir", str(tmp_path / "run")])
    pack_run(str(tmp_path / "run"), tmp_path / "packed")
    words = ["--sweep", "--rules", "plan", "--max-passes", "4", "--out", str(tmp_path / "out")]
    evaluation.main([str(tmp_path / "packed"), *words, "validation.n_final_examples=2"])
    assert f"{tmp_path / 'packed'}: the first 2 questions" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["step"] is None


def test_a_file_that_no_sweep_wrote_is_refused(
    config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--config", str(config_file(training__max_steps=1)), "--run-dir", str(tmp_path / "run")])
    (tmp_path / "out.json").write_text('[{"rule": "best"}]')
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "run"), "--sweep", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "out.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "objective", "expected"),
    [
        (["--rules", "best"], "puma", "--rules best: choose from top_prob"),
        ([], "autoregressive", "a causal model is sampled left to right"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    words: list[str], objective: str, expected: str, config_file: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    settings = {"name": objective} | ({"n_stages": 2} if objective == "puma" else {})
    train.main(["--config", str(config_file(settings, training__max_steps=1)), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "run"), "--sweep", "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
