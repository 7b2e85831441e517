"""The sweep of sampling rules: what is measured, what is written, and which points are the best."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import PUMA, ROOT, tiny_settings
from helpers import random_model

import train
from config import Config, SamplingRule
from data.questions import Question
from eval import evaluate as evaluation
from eval.accuracy import RuleMeasurement, TestQuestions, measure_rule
from eval.sweep import (
    RULES,
    Point,
    _model_digest,
    _questions_digest,
    by_conditions,
    draw_sweep,
    labels_of,
    n_fixed_passes,
    pareto_front,
    read_sweep,
    sweep_table,
    write_sweep,
)
from model.hub import pack_run
from model.transformer import build_model
from runtime.config_file import parse_config
from samplers.block import sample_blocks
from samplers.full import sample_full

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
    precision="float32",
    model="0123456789abcdef",
    questions="fedcba9876543210",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A run of one step, whose settings give the number of questions of its last evaluation."""
    folder = tmp_path_factory.mktemp("sweep")
    settings = tiny_settings(PUMA, data_dir)
    settings["training"]["max_steps"] = 1
    settings["validation"]["n_final_examples"] = 5
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    train.main(["--config", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps without their picture, which takes longer than all else."""
    monkeypatch.setattr("eval.sweep.draw_sweep", lambda *_: None)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def point(nfe: float, accuracy: float, seconds: float = 1.0) -> Point:
    return replace(POINT, nfe=nfe, accuracy=accuracy, seconds=seconds)


def test_the_best_are_those_that_no_cheaper_point_reaches() -> None:
    cheap, worse, equal, good = point(2, 0.3), point(4, 0.2), point(5, 0.3), point(8, 0.9)
    also_cheap = point(2, 0.25)
    assert pareto_front([good, equal, also_cheap, worse, cheap], "nfe") == [cheap, good]


def test_the_table_marks_the_best_of_each_checkpoint() -> None:
    points = [point(2, 0.3), point(4, 0.2), replace(point(9, 0.1), checkpoint="other")]
    lines = [line for line in sweep_table(points) if line.startswith("| threshold")]
    assert ["**" in line for line in lines] == [True, False, True]


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("n_masked", [(12, 5, 0), (2, 1, 0)])
@pytest.mark.parametrize("name", ["top_prob", "plan"])
def test_passes_by_design_are_those_that_a_sampler_takes(
    name: str, block_size: int | None, n_masked: tuple[int, ...]
) -> None:
    """Of the row that takes most; with blocks, those of all its blocks. A rule that revises may need fewer."""
    model, mask_id = random_model(), 22
    xt = torch.randint(0, 22, (3, 12), generator=torch.Generator().manual_seed(0))
    for row, n in enumerate(n_masked):
        xt[row, 12 - n :] = mask_id
    dial, _, rest = RULES[name]
    for value in (1, 3, 4, 9):
        rule = SamplingRule(**rest, **{dial: value})
        sampled = (
            sample_full(model, xt, mask_id, rule)
            if block_size is None
            else sample_blocks(model, xt, mask_id, rule, block_size=block_size)
        )
        assert n_fixed_passes(dial, rule, (xt == mask_id).numpy(), block_size or 12) == int(sampled.nfe.max())


def test_nothing_is_fixed_where_the_model_decides() -> None:
    assert n_fixed_passes("threshold", SamplingRule(threshold=0.9), np.ones((1, 4), dtype=bool), 4) == 0


@pytest.mark.usefixtures("no_picture")
def test_checkpoints_may_differ_in_the_rules_that_max_passes_leaves(
    run_dir: Path, config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 masked positions in two halves, 8 to 12 on one board."""
    small = tmp_path / "small"
    config = config_file(training__max_steps=1, data__layout="in_place", data__data_dir=str(tmp_path))
    train.main(["--config", str(config), "--run-dir", str(small)])
    out, words = tmp_path / "out", ["validation.n_final_examples=2", "--rules", "top_prob"]
    evaluation.main([str(run_dir), str(small), "--sweep", "--max-passes", "12", "--out", str(out), *words])
    found = [(each.checkpoint, each.value) for each in read_sweep(out)]
    both = [(run, value) for value in (2, 4, 8, 16, 32) for run in (str(run_dir), str(small))]
    assert found == [(str(small), 1), *both]
    message = refused([str(run_dir), "--sweep", "--max-passes", "1", "--rules", "plan", "--out", str(out)], capsys)
    assert f"no rule has at most 1 passes with {run_dir}; the fewest are 4" in message


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
    words = ["--rules", "threshold", "plan", "--out", str(tmp_path / "tau0.9"), "validation.n_final_examples=3"]
    measured: list[tuple[int, int]] = []
    spent: list[float] = []

    def count(model: Any, config: Config, test: TestQuestions, *arguments: Any, **options: Any) -> RuleMeasurement:
        measured.append((config.training.seed, test.n_examples))
        found = measure_rule(model, config, test, *arguments, **options)
        spent.append(found.seconds)
        return found

    monkeypatch.setattr("eval.sweep.measure_rule", count)
    evaluation.main([runs[0], runs[1], "--sweep", *words, "validation.batch_size=2"])
    assert measured == [(0, 2), (0, 3), (1, 2), (1, 3), *[(0, 3), (1, 3)] * 3], "the first batch of each warms up"
    table = capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads((tmp_path / "tau0.9.json").read_text())
    n_values = sum(len(RULES[name][1]) for name in ("threshold", "plan"))
    assert [row["checkpoint"] for row in rows] == runs * n_values, "checkpoints in turn"
    assert [row["seed"] for row in rows] == [0, 1] * n_values
    for row in rows:
        assert row["n"] == 3
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        rule = SamplingRule(**row["settings"])
        assert getattr(rule, row["dial"]) == row["value"]
        assert row["nfe"] <= (row["value"] if row["rule"] == "plan" else 16)
    assert [3 * row["seconds"] for row in rows] == pytest.approx([spent[1], *spent[3:]]), "of one question"
    with (tmp_path / "tau0.9.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert table.strip() == (tmp_path / "tau0.9.md").read_text().strip()
    assert table.count("| plan |") == 2 * len(RULES["plan"][1])
    assert (tmp_path / "tau0.9.png").stat().st_size > 10_000
    # The same command resumes: existing points are kept and missing ones are measured.
    (tmp_path / "tau0.9.json").write_text(json.dumps(rows[2:]))
    measured.clear()
    evaluation.main([runs[0], runs[1], "--sweep", *words, "validation.batch_size=2"])
    assert measured == [(0, 2), (0, 3), (1, 2), (1, 3)]
    again = json.loads((tmp_path / "tau0.9.json").read_text())
    assert again[: len(rows) - 2] == rows[2:]
    assert [row["accuracy"] for row in again[len(rows) - 2 :]] == [row["accuracy"] for row in rows[:2]]


def test_two_sweeps_on_one_file_keep_the_points_of_both(tmp_path: Path) -> None:
    one, other = point(2, 0.3), replace(point(4, 0.2), rule="plan")
    assert write_sweep([one], tmp_path / "out") == [one]
    assert write_sweep([other], tmp_path / "out") == [one, other] == read_sweep(tmp_path / "out")
    again = replace(one, seconds=9.0)
    assert write_sweep([again], tmp_path / "out") == [one, other], "another measurement of the same"
    with (tmp_path / "out.csv").open() as file:
        assert [float(row["nfe"]) for row in csv.DictReader(file)] == [2, 4]


def test_files_of_no_sweep_are_not_overwritten(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("my notes")
    message = refused([str(run_dir), "--sweep", "--out", str(tmp_path / "README")], capsys)
    assert (
        f"README would overwrite {tmp_path / 'README.md'}, not known to be a sweep: name another or delete them"
        in message
    )
    assert (tmp_path / "README.md").read_text() == "my notes"


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("change", ["older", "newer"])
def test_a_rule_is_not_measured_again_by_code_with_other_settings_of_rules(
    change: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`older` code had no kl_bound, `newer` code has a setting more, which this code does not know."""
    monkeypatch.setitem(RULES, "plan", ("n_passes", (2,), {"revise": "plan"}))
    out = tmp_path / "out"
    words = [str(run_dir), "--sweep", "--rules", "plan", "--out", str(out), "validation.n_final_examples=2"]
    evaluation.main(words)
    rows = json.loads((tmp_path / "out.json").read_text())
    if change == "older":
        del rows[0]["settings"]["kl_bound"]
    else:
        rows[0]["settings"]["left_bias"] = 0.0
        rows.append(rows[0] | {"settings": rows[0]["settings"] | {"left_bias": 0.5}, "rule": "left_bias"})
    (tmp_path / "out.json").write_text(json.dumps(rows))
    evaluation.main(words)
    assert json.loads((tmp_path / "out.json").read_text()) == rows
    if change == "newer":  # a setting that is on makes another rule
        (tmp_path / "out.json").write_text(json.dumps([rows[1] | {"rule": "plan"}]))
        evaluation.main(words)
        assert len(read_sweep(out)) == 2


def test_rules_of_other_code_come_last(tmp_path: Path) -> None:
    points = [replace(POINT, rule="left_bias"), replace(POINT, rule="top_prob"), POINT]
    rows = [line.split(" ")[1] for line in sweep_table(points) if line.startswith("| ")]
    assert rows == ["rule", "---", "top_prob", "threshold", "left_bias"]
    draw_sweep(points, tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


CHANGES = (
    "validation.n_final_examples=2",
    "validation.batch_size=2",
    "validation.temperature=1.0",
    "training.seed=7",
    "training.precision=bfloat16",
    "model.rope_theta=100.0",
    "data.max_clues=7",
)


@pytest.mark.usefixtures("no_picture")
def test_what_was_measured_under_other_conditions_is_kept_apart(
    run_dir: Path, config_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings, and other weights in a folder of the same name, which tells no step."""
    monkeypatch.setitem(RULES, "plan", ("n_passes", (2,), {"revise": "plan"}))
    packed, out = tmp_path / "packed", tmp_path / "out"
    pack_run(str(run_dir), packed)
    # Boards of other settings are for this test alone.
    words = [str(packed), "--sweep", "--rules", "plan", "--out", str(out), f"data.data_dir={tmp_path}"]
    for change in ((), *((change,) for change in CHANGES)):
        for _ in range(2):  # the second time there is nothing to do
            evaluation.main([*words, *change])
    assert len(read_sweep(out)) == 1 + len(CHANGES)
    config = config_file(training__max_steps=1, training__seed=1)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "other")])
    packed.rename(tmp_path / "former")
    pack_run(str(tmp_path / "other"), packed)
    evaluation.main([*words, "validation.n_final_examples=5", "training.seed=0"])
    points = read_sweep(out)
    groups = by_conditions(points)
    assert len(groups) == len(points) == 2 + len(CHANGES)
    assert {each.step for each in groups} == {None}
    first, last = points[0], points[-1]
    assert first.conditions == replace(last, model=first.model).conditions, "the weights alone differ"
    labels = labels_of(list(groups))
    assert len(set(labels)) == len(labels)
    headers = [line for line in sweep_table(points) if line.startswith(f"{packed}: the first ")]
    assert len(set(headers)) == len(headers) == len(points)


def test_a_digest_covers_the_shift_and_the_right_answers(data_dir: Path) -> None:
    """The same weights may predict the next token, and the same prompts may have other right answers."""
    config = parse_config(tiny_settings(PUMA, data_dir), "test")
    shifted = config.model_copy(update={"model": config.model.model_copy(update={"shifted": True})})
    model = build_model(config)
    assert _model_digest(model, config) == _model_digest(model, config) != _model_digest(model, shifted)

    def asked(gold: str) -> Any:
        return SimpleNamespace(question=lambda _: Question("1+1", gold), prompts=lambda _: np.zeros((1, 4)))

    assert _questions_digest(asked("2"), 1) == _questions_digest(asked("2"), 1) != _questions_digest(asked("3"), 1)


@pytest.mark.parametrize("name", ["sudoku", "sudoku_mini", "sudoku_mini_block", "word_problems_hard"])
def test_kept_files_give_their_page(name: str) -> None:
    path = ROOT / "results" / "samplers" / name
    assert "\n".join(sweep_table(read_sweep(path))) + "\n" == path.with_name(f"{name}.md").read_text()


@pytest.mark.usefixtures("no_picture")
def test_the_questions_that_an_override_asks_for_are_asked(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the settings give another number for the last evaluation."""
    words = [str(run_dir), "--sweep", "--rules", "plan", "--max-passes", "4", "--out", str(tmp_path / "out")]
    evaluation.main([*words, "validation.n_examples=3"])
    assert [each.n for each in read_sweep(tmp_path / "out")] == [3]
    message = refused([*words, "validation.n_examples=5000"], capsys)
    assert "validation.n_examples 5000: the test has 20 puzzles" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sweep", "--json", "a.json"], "--json: not with --sweep"),
        (["--sweep", "--samples", "a.jsonl"], "--samples: not with --sweep"),
        (["--rules", "plan", "--max-passes", "4"], "--rules, --max-passes: only with --sweep"),
        (["--out", "a"], "--out: only with --sweep"),
        ([str(ROOT)], f"{ROOT}: several runs only with --sweep"),
        ([f"{ROOT}@best"], f"{ROOT}@best: several runs only with --sweep"),
        (["nothing"], "override 'nothing' cannot be read"),
        (["--sweep", "--out", "/nonexistent/a"], "--out /nonexistent/a.json: the folder /nonexistent does not exist"),
        (["--sweep", "--rules", "best"], "--rules best: choose from top_prob"),
        (["--sweep", "validation.threshold=0.9", "training.seed=1"], "validation.threshold: no effect with --sweep"),
    ],
)
def test_options_are_checked_before_work(
    words: list[str],
    expected: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused([str(run_dir), *words], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_is_interrupted_ends_with_status_130(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.sweep.measure_rule", interrupt)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), "--sweep", "--rules", "plan", "--out", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("error: interrupted; the same command continues\n")


def test_a_file_that_no_sweep_wrote_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").write_text('[{"rule": "best"}]')
    message = refused([str(run_dir), "--sweep", "--out", str(tmp_path / "out")], capsys)
    assert "out.json cannot be read" in message


def test_a_causal_model_is_not_swept(
    config_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file({"name": "autoregressive"}, training__max_steps=1)
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    message = refused([str(tmp_path / "run"), "--sweep", "--out", str(tmp_path / "out")], capsys)
    assert "a causal model is sampled left to right" in message
