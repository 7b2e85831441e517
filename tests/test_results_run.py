"""Experiments: every setting with every seed, once, and what is made from their records."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from conftest import PUMA, ROOT, UNIFORM
from forked import Forked

from results import run
from results.experiments import EXPERIMENTS, Experiment, Variant
from results.records import read_note
from runtime.config_file import read_config
from runtime.history import read_history

VARIANTS = tuple(Variant(label, f"{label}.yaml") for label in "abc")
QUESTION = Experiment("Which?", VARIANTS, baseline="b", targets=(0.1, 0.45))
NOTE = ["Seeds differ.", ""]


def records() -> dict[str, Any]:
    """Two of the settings with two seeds; one run is not finished."""
    found = []
    for variant, seed, accuracy in (("a", 0, 0.5), ("b", 0, 0.2), ("a", 1, 0.95), ("b", 1, 0.4)):
        points = [
            {"step": step, "sequences_distinct": 3 * step, "seconds": step / 2, "accuracy": accuracy * step / 20}
            | {"low": 0.0, "high": 1.0}
            for step in (10, 20)
        ]
        groups = [{"by": "clues", "value": clues, "n": 20, "accuracy": accuracy} for clues in (22, 25)]
        final = {"accuracy": accuracy, "low": 0.1, "high": 0.99, "n": 40, "groups": groups}
        facts = {
            "variant": variant,
            "seed": seed,
            "settings": f"seed={seed}",
            "commit": "C",
            "date": "D",
            "machine": "M",
        }
        found.append(facts | {"points": points, "final": final if (variant, seed) != ("b", 1) else None})
    return {"command": "python -m results.run x", "runs": found}


def test_the_page_says_what_was_reached_and_when():
    page = run.report(QUESTION, records(), NOTE)
    assert "| a | 2 | 72.5 (50.0 to 95.0) | 40 | 20 | 60 | 10 |" in page
    assert "| b | 1 | 20.0 | 40 | 20 | 60 | 10 |" in page, "only complete runs count"
    assert "| a | 2 of 2 | 15 (10 to 20) | > 1.3 |" in page
    assert "| b | 0 of 1 | > 20 | 1 |" in page, "never at the target"
    assert "| a | 36 (25 to 48) | 72 (50 to 95) |" in page
    assert "| solved, %, by clues, from | 22 | 25 |" in page
    assert "| questions | 20 | 20 |" in page
    assert "| b | 20 | 20 |" in page
    assert "| a | 0 | 50.0 (10.0 to 99.0) | 40 | 10 | `seed=0` | C | D | M |" in page
    assert "| b | 1 | not finished | - | 10 |" in page
    assert all(fact in page for fact in ("# Which?", "Seeds differ.", "python -m results.run x"))


def test_accuracy_by_difficulty_is_of_all_complete_runs_or_missing():
    found = records()
    del found["runs"][0]["final"]["groups"][1]  # of "a", seed 0
    found["runs"][2]["final"]["groups"][0]["n"] = 10
    page = run.report(QUESTION, found, [])
    assert "| questions | 10 or 20 | 20 |" in page
    assert "| a | 72 (50 to 95) | - |" in page


def test_accuracy_by_sampling_rule_is_shown_where_runs_have_several():
    found = records()
    assert "sampled by" not in run.report(QUESTION, found, [])
    for accuracy, each in enumerate(found["runs"][:3]):
        each["final"]["rules"] = [
            {"rule": "first", "accuracy": each["final"]["accuracy"]},
            {"rule": "second", "accuracy": accuracy / 10},
        ]
    del found["runs"][1]["final"]["rules"][1]  # of "b"
    page = run.report(QUESTION, found, [])
    assert "| solved, %, sampled by | first | second |" in page
    assert "| a | 72.5 (50.0 to 95.0) | 10.0 (0.0 to 20.0) |" in page
    assert "| b | 20.0 | - |" in page


def test_progress_is_shown_where_all_seeds_have_been():
    """As in the figure: else a mean would change because seeds drop out of it."""
    found = records()
    for each in found["runs"]:
        each["final"] = None
    del found["runs"][2]["points"][1]  # of "a", seed 1
    page = run.report(QUESTION, found, [])
    assert "| a | 36 (25 to 48) | - |" in page
    assert "| b | 15 (10 to 20) | 30 (20 to 40) |" in page


@pytest.mark.parametrize("n_evaluations", [1, 10, 11, 24, 100])
def test_progress_is_shown_in_ten_columns_at_most_to_the_last_update(n_evaluations):
    found = records()
    for each in found["runs"]:
        each["points"] = [each["points"][0] | {"step": step} for step in range(5, 5 * n_evaluations + 1, 5)]
    (line,) = (line for line in run.report(QUESTION, found, []).splitlines() if line.startswith("| solved, %, after"))
    columns = [int(cell) for cell in line.split("|")[2:-1]]
    assert len(columns) <= 10
    assert columns[-1] == 5 * n_evaluations
    assert len({b - a for a, b in pairwise(columns)}) <= 1


@pytest.mark.parametrize(("comparable", "n_axes"), [(False, 2), (True, 3)])
def test_seconds_are_compared_only_where_the_experiment_says_so(comparable, n_axes, tmp_path, monkeypatch):
    experiment = replace(QUESTION, seconds_comparable=comparable)
    (target,) = (
        line for line in run.report(experiment, records(), []).splitlines() if line.startswith("| first at 45%")
    )
    assert target.count("| ratio ") == n_axes
    figures = []
    monkeypatch.setattr(run, "save_figure", lambda figure, *_: figures.append(figure))
    run.draw(experiment, records(), tmp_path / "curves.png")
    assert len(figures[0].axes) == n_axes


def test_the_picture_is_drawn_from_the_records(tmp_path):
    run.draw(QUESTION, records(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_all_settings_are_drawn_where_those_to_be_shown_have_no_records(tmp_path):
    run.draw(replace(QUESTION, shown=("c",)), records(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/records.json")), ids=lambda path: path.parent.name)
def test_pages_are_those_of_their_records(path):
    """Each page equals what its records produce, and each recorded run belongs to the current experiment."""
    if path.parent.name not in EXPERIMENTS:
        pytest.skip("records of another program")
    experiment, found = EXPERIMENTS[path.parent.name], json.loads(path.read_text())
    assert (path.parent / "README.md").read_text() == run.report(experiment, found, read_note(path.parent))
    tasks = run.tasks_of(experiment, Path("runs"), found["command"].split()[4:])
    assert {(each["variant"], each["seed"], each["settings"]) for each in found["runs"]} <= {
        (task.variant.label, task.seed, task.settings) for task in tasks
    }


@pytest.mark.parametrize(("one", "other"), [("bias -1", "bias 1"), ("rate 1e-3", "Rate 1E 3"), ("a", "a")])
def test_labels_of_one_run_directory_are_refused(one, other):
    """Else one row would show the runs of another setting."""
    variants = (Variant(one, "a.yaml"), Variant(other, "a.yaml", ("model.rotary=false",)))
    with pytest.raises(ValueError, match=re.escape(f"labels {one!r} and {other!r} give the same folder name")):
        Experiment("Which?", variants, baseline=one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "aa"}, "baseline 'aa' is no label"),
        ({"shown": ("a", "B")}, "shown 'B' is no label"),
        ({"variants": (*VARIANTS, Variant("d", "d.yaml", starts_from="e"))}, "starts_from 'e' is no label"),
    ],
)
def test_a_label_of_no_variant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(QUESTION, **changes)


def test_a_run_without_the_run_it_starts_from_is_refused():
    start, other = Variant("a", "a.yaml", seeds=(0,)), Variant("b", "b.yaml", starts_from="a")
    with pytest.raises(ValueError, match="'b' starts from 'a', which has no seed 1"):
        Experiment("Which?", (start, other), baseline="a", seeds=(0, 1))
    with pytest.raises(ValueError, match="'a' has a seed twice"):
        Experiment("Which?", (Variant("a", "a.yaml"),), baseline="a", seeds=(0, 0))


def test_runs_are_ordered_by_seed_and_a_variant_may_have_seeds_of_its_own(tmp_path):
    variants = (*VARIANTS[:2], Variant("c", "c.yaml", seeds=(5, 0)))
    tasks = run.tasks_of(Experiment("Which?", variants, baseline="a", seeds=(1, 0)), tmp_path, [])
    assert [task.key for task in tasks] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 0), ("c", 5)]


def test_an_experiment_with_a_failed_run_is_not_complete(tmp_path, monkeypatch, capsys):
    """Even if its directory holds a complete run, which is then that of another command."""
    (task,) = run.tasks_of(Experiment("Which?", VARIANTS[:1], baseline="a", seeds=(0,)), tmp_path, [])
    monkeypatch.setattr(run, "POLL_S", 0)
    monkeypatch.setattr(run, "start", lambda _: subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]))
    monkeypatch.setattr(run.Task, "is_complete", True)
    assert not run.run_all([task], 1, None)
    assert f"failed: {task.run_dir}" in capsys.readouterr().err


def test_nothing_is_started_after_the_budget(tmp_path, monkeypatch):
    tasks = run.tasks_of(Experiment("Which?", VARIANTS[:1], baseline="a", seeds=(0, 1)), tmp_path, [])
    begun, clock = [], count()

    def start(task: run.Task) -> subprocess.Popen[bytes]:
        begun.append(task)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    assert not run.run_all(tasks, 1, 2.5)
    assert begun == tasks[:1]


def test_a_record_of_a_complete_run_stays_while_the_run_is_repeated(tmp_path):
    (task,) = run.tasks_of(Experiment("Which?", VARIANTS[:1], baseline="a", seeds=(0,)), tmp_path, [])
    row = {"step": 1, "seconds": 1.0, "sequences_distinct": 8, "validation/accuracy/top_prob_1": 0.25}
    task.run_dir.mkdir(parents=True)
    (task.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    old = records()["runs"][0]
    assert run.collect([task], {task.key: old}) == [old]
    (found,) = run.collect([task], {task.key: old | {"final": None}})
    assert [point["step"] for point in found["points"]] == [1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_all_settings_of_an_experiment_are_read_and_differ(name, tmp_path):
    experiment = EXPERIMENTS[name]
    tasks = run.tasks_of(experiment, tmp_path, [])
    assert len({task.run_dir for task in tasks}) == len(tasks)
    configs = [
        read_config(ROOT / "yaml_files" / variant.config, [*experiment.overrides, *variant.overrides])
        for variant in experiment.variants
    ]
    assert all(config not in configs[:number] for number, config in enumerate(configs))
    schedules = {(config.training.learning_rate, config.training.max_steps) for config in configs}
    rates = {rate for rate, _ in schedules}
    assert len(schedules) == len(rates), "all variants of one learning rate have the same number of updates"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jobs", "0"], "--jobs: must be an integer from 1 to 1024, got 0"),
        (["training.max_step=1"], "did you mean 'max_steps'?"),
        (["--draw", "training.max_steps=1"], "training.max_steps=1: not with --draw"),
        (
            ["validation.n_examples=0", "validation.n_final_examples=0"],
            "validation.n_examples=0: 'rotary and learned' would have no accuracy",
        ),
        (["training.seed=7"], "training.seed=7: would replace seed 0 of 'rotary and learned'; leave it out, or change"),
        (["--budget-s", "nan"], "--budget-s: must be a finite number above 0, got nan"),
        (["--budget-s", "inf"], "--budget-s: must be a finite number above 0, got inf"),
        (["--budget-s", "-1"], "--budget-s: must be a finite number above 0, got -1"),
        (["--budget-s", "0"], "--budget-s: must be a finite number above 0, got 0"),
        (["--budget-s", "soon"], "--budget-s: must be a finite number above 0, got soon"),
    ],
)
def test_bad_input_ends_with_one_message(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run_all", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as stop:
        run.main(["positions", "--runs", str(tmp_path), "--out", str(tmp_path), *words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words", "remedy"),
    [
        ("{", [], "repair or delete it, or choose another --out"),
        ("{", ["--draw"], "repair or delete it, or choose another --out"),
        (None, ["--draw"], "run the experiment without --draw"),
    ],
)
def test_records_that_cannot_be_read_end_with_one_message(content, words, remedy, tmp_path, capsys):
    if content is not None:
        (tmp_path / "positions").mkdir()
        (tmp_path / "positions/records.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        run.main(["positions", "--runs", str(tmp_path), "--out", str(tmp_path), *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"): {remedy}\n")


def test_runs_that_the_experiment_no_longer_names_are_kept_and_not_shown(tmp_path, capsys, monkeypatch):
    """Records may be all that is left of a run."""
    monkeypatch.setattr(run, "read_experiment", lambda _: ("x", replace(QUESTION, seeds=(0,))))
    monkeypatch.setattr(run, "check_settings", lambda *_: None)
    monkeypatch.setattr(run, "run_all", lambda *_: True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/records.json").write_text(json.dumps(records()))
    for words in ([], ["--draw"]):
        with pytest.raises(SystemExit) as stop:
            run.main(["x", "--runs", str(tmp_path), "--out", str(tmp_path), *words])
        assert stop.value.code == 0
        assert "does not name, which are not shown: 'a', seed 1; 'b', seed 1\n" in capsys.readouterr().out
        kept = json.loads((tmp_path / "x/records.json").read_text())["runs"]
        assert sorted(kept, key=str) == sorted(records()["runs"], key=str)
        page = (tmp_path / "x/README.md").read_text()
        assert "| a | 0 | 50.0 " in page
        assert "| a | 1 | 95.0 " not in page


@pytest.mark.parametrize("words", [[], ["--draw"]])
def test_records_of_other_runs_alone_make_no_page(words, tmp_path, capsys, monkeypatch):
    experiment = replace(QUESTION, seeds=(7,))
    monkeypatch.setattr(run, "read_experiment", lambda _: ("x", experiment))
    monkeypatch.setattr(run, "check_settings", lambda *_: None)
    monkeypatch.setattr(run, "run_all", lambda *_: False)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/records.json").write_text(json.dumps(records()))
    with pytest.raises(SystemExit) as stop:
        run.main(["x", "--runs", str(tmp_path), "--out", str(tmp_path), *words])
    message = "run the experiment without --draw" if words else "no run has been evaluated yet"
    assert message in f"{stop.value.code}{capsys.readouterr().err}"
    assert json.loads((tmp_path / "x/records.json").read_text()) == records()


@pytest.mark.parametrize("option", ["--runs", "--out"])
def test_a_file_in_place_of_a_folder_is_refused_before_any_run(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"--runs": str(tmp_path), "--out": str(tmp_path), option: str(tmp_path / "file")}
    with pytest.raises(SystemExit) as stop:
        run.main(["positions", *(word for pair in places.items() for word in pair)])
    assert stop.value.code == 2
    assert f"{option} {tmp_path}/file is not a folder" in capsys.readouterr().err


def test_an_interrupted_experiment_ends_with_status_130(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_all", interrupt)
    with pytest.raises(SystemExit) as stop:
        run.main(["positions", "--runs", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; the same command continues\n"


def test_a_result_that_cannot_be_printed_ends_with_one_message(tmp_path, capsys, monkeypatch):
    (tmp_path / "positions").mkdir()
    (tmp_path / "positions/records.json").write_text(json.dumps(records()))
    monkeypatch.setattr(run, "draw", lambda *_: None)
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            run.main(["positions", "--draw", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


OWN_EXPERIMENT = """
from results.experiments import Experiment, Variant

EXPERIMENT = Experiment(
    "Which?",
    (
        Variant("from PUMA", "uniform.yaml", ("model.shifted=false",), starts_from="with PUMA", seeds=(1,)),
        Variant("with PUMA", "puma.yaml"),
        Variant("uniform", "uniform.yaml", ("validation.confidence=[top_prob,neg_entropy]",)),
    ),
    baseline="uniform",
    seeds=(0, 1),
)
"""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, "missing.py is no file: give a Python file"),
        ("missing", None, "experiment 'missing': give a Python file, or one of sudoku, "),
        ("own.py", "X = 1", "own.py defines no EXPERIMENT: add EXPERIMENT = "),
        ("own.py", "EXPERIMENT = 1", "own.py defines no EXPERIMENT: add EXPERIMENT = "),
        ("own.py", "EXPERIMENT = (", "own.py cannot be run (SyntaxError: "),
        ("own.py", OWN_EXPERIMENT.replace('baseline="uniform"', 'baseline="u"'), "(ValueError: baseline 'u' is no "),
        ("own.py", OWN_EXPERIMENT, "own.py: config 'uniform.yaml' is neither in "),
        ("sudoku.py", OWN_EXPERIMENT, "'sudoku' is the name of an experiment in results/experiments.py; rename"),
    ],
)
def test_a_file_that_is_no_experiment_ends_with_one_message(name, text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        run.main([name, "--runs", str(tmp_path / "runs")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_files_of_an_own_experiment(tmp_path, monkeypatch):
    """Its YAML files are beside it or those of the repository; its page is beside its run directories."""
    text = OWN_EXPERIMENT.replace("puma.yaml", "sudoku_mini_puma.yaml")
    (tmp_path / "own.py").write_text(text)
    shutil.copy(ROOT / "yaml_files/sudoku_mini_baseline.yaml", tmp_path / "uniform.yaml")
    name, experiment = run.read_experiment(str(tmp_path / "own.py"))
    tasks = run.tasks_of(experiment, tmp_path / "runs" / name, [])
    assert [task.settings.split()[1] for task in tasks[:2]] == [
        "yaml_files/sudoku_mini_puma.yaml",
        str(tmp_path / "uniform.yaml"),
    ]
    monkeypatch.setattr(run, "draw", lambda *_: None)
    (tmp_path / "runs/own").mkdir(parents=True)
    found = records()
    for each in found["runs"]:
        each["variant"] = experiment.variants["ab".index(each["variant"])].label
    (tmp_path / "runs/own/records.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit) as stop:
        run.main([str(tmp_path / "own.py"), "--draw", "--runs", str(tmp_path / "runs")])
    assert stop.value.code == 0
    assert (tmp_path / "runs/own/README.md").exists()


def fork(command: list[str], cwd: Path, env: dict[str, str], stdout: IO[bytes], stderr: IO[bytes]) -> Forked:
    """`subprocess.Popen` for programs of the repository."""
    assert (command[0], cwd, stdout) == (sys.executable, ROOT, stderr)
    return Forked(*command[1:], environment=env, output=stdout)


def test_an_experiment_runs_once_and_continues(
    config_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without time nothing runs; with time all does; a second call repeats nothing. An experiment in its own file."""
    config_file(PUMA, "puma.yaml")
    uniform = config_file(UNIFORM, "uniform.yaml")
    tiny = tmp_path / "tiny.py"
    tiny.write_text(OWN_EXPERIMENT)
    monkeypatch.setattr(run, "POLL_S", 0.02)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=fork, run=subprocess.run))
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        run.main([str(tiny), *places, "--budget-s", "1e-9"])
    assert "no run has been evaluated yet" in str(stop.value.code)
    assert not (tmp_path / "out").exists(), "nothing is replaced by nothing"
    for number in range(2):
        if number:  # a damaged result that no record has is written again by train.py
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "runs/tiny/uniform_seed1/final.json").write_text('{"accuracy": 0.5')
        with pytest.raises(SystemExit) as stop:
            run.main([str(tiny), *places])
        assert stop.value.code == 0
        assert len(list(tmp_path.glob("runs/tiny/*/final.json"))) == 5
    with pytest.raises(SystemExit) as stop:
        run.main([str(tiny), *places, "training.learning_rate=2.0e-3"])
    assert stop.value.code == 2, "runs of other settings are not taken for these"
    logs = list(tmp_path.glob("runs/tiny/*.log"))
    assert len(logs) == 5
    counts = {path.stem: path.read_text().count("test puzzles") for path in logs}
    assert counts.pop("uniform_seed1") == 2, "it was damaged"
    assert set(counts.values()) == {1}, "each other ran once"
    kept = json.loads((tmp_path / "out/tiny/records.json").read_text())
    assert [(each["variant"], each["seed"]) for each in kept["runs"]] == [
        ("with PUMA", 0),
        ("uniform", 0),
        ("with PUMA", 1),
        ("uniform", 1),
        ("from PUMA", 1),
    ]
    assert all([point["step"] for point in each["points"]] == [3, 6] for each in kept["runs"])
    first, second = kept["runs"][1]["final"]["rules"]
    assert (first["rule"], second["rule"]) == ("top_prob, 1 per step", "neg_entropy, 1 per step")
    assert first["accuracy"] == kept["runs"][1]["final"]["accuracy"]
    assert "rules" not in kept["runs"][0]["final"]
    (last,) = read_history(tmp_path / "runs/tiny/from_puma_seed1")
    assert kept["runs"][-1]["commit"].startswith(last["commit"][:7] if last["commit"] else "unknown")
    assert kept["runs"][-1]["date"] == last["ended"][:10]
    assert last["hardware"]["processor"] in kept["runs"][-1]["machine"]
    started = read_config(tmp_path / "runs/tiny/from_puma_seed1/config.yaml").model.init_from
    assert started == str(tmp_path / "runs/tiny/with_puma_seed1")
    assert kept["runs"][1]["settings"].startswith(f"--config {uniform} validation.confidence=")
    page = (tmp_path / "out/tiny/README.md").read_text()
    assert all(f"| {label} | {seed} |" in page for label, seed in (("with PUMA", 0), ("from PUMA", 1)))
    assert (tmp_path / "out/tiny/curves.png").exists()

    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(SystemExit) as stop:
        run.main([str(tiny), *places])
    assert stop.value.code == 0
    assert not (tmp_path / "runs").exists(), "what the records hold is not run again"
    assert json.loads((tmp_path / "out/tiny/records.json").read_text()) == kept
    with pytest.raises(SystemExit) as stop:
        run.main([str(tiny), *places, "training.learning_rate=2.0e-3"])
    assert stop.value.code == 2, "nor are records of other settings"

    del kept["runs"][4]
    (tmp_path / "out/tiny/records.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit) as stop:
        run.main([str(tiny), *places])
    assert stop.value.code == 0
    ran = {path.parent.name for path in tmp_path.glob("runs/tiny/*/final.json")}
    assert ran == {"with_puma_seed1", "from_puma_seed1"}, "a missing run, and the one that it starts from"
