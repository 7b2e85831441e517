"""A run's page: complete, of one file, and never the reason why a run fails."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import PUMA, tiny_settings
from typing_extensions import override

import train
from report.page import build_page, main
from report.trace import html_fragment, read_traces
from runtime.config_file import read_config

VOID = {"meta", "br", "link", "use", "path", "image", "img", "input"}


class Structure(HTMLParser):
    """Checks that all elements are closed and that the page loads no other file."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    @override
    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            assert name not in ("src", "srcset"), value
            assert name not in ("href", "xlink:href") or value.startswith("#"), value
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    @override
    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    @override
    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words += data.split()


def parsed(page: str) -> str:
    """The words of a page whose structure is checked."""
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert "url(http" not in page
    return " ".join(structure.words)


@pytest.fixture(scope="module")
def complete(tmp_path_factory, data_dir) -> Path:
    """A complete run without curves and page."""
    folder, settings = tmp_path_factory.mktemp("complete"), tiny_settings(PUMA, data_dir)
    settings["training"]["seed"], settings["validation"]["temperature"] = 1, 1.0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda *_: None)
        patch.setattr(train, "write_page", lambda run_dir: run_dir / "report.html")
        train.main(["--config", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def run_dir(complete, tmp_path) -> Path:
    return shutil.copytree(complete, tmp_path / "run")


def test_the_page_holds_what_the_files_do(run_dir, tmp_path, capsys):
    main([str(run_dir), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    words = parsed(page)
    final = json.loads((run_dir / "final.json").read_text())
    (rule,) = final["evaluation"]["samplers"]
    assert f"final accuracy {100 * final['accuracy']:.1f}% of 10" in words
    for group in rule["groups"]:
        assert f"{group['value']:g} {group['n']} {100 * group['accuracy']:.1f}%" in words
    config = read_config(run_dir / "config.yaml")
    assert f"training.learning_rate {config.training.learning_rate} " in words
    assert "training.adam_betas" not in words, "a default"
    history = json.loads((run_dir / "history.json").read_text())["sessions"][0]
    assert history["hardware"]["processor"] in words
    assert page.count("<svg") == 4
    traces = read_traces(run_dir / "traces.json")
    assert page.count('class="pt pt-has-board"') == len(traces) == 3
    assert html_fragment(traces[0]) in page
    assert "#010203" not in page
    samples = [json.loads(line) for line in (run_dir / "samples_00000006.jsonl").read_text().splitlines()]
    assert page.count("<table class=board>") == len(samples) == 10
    assert page.count("<p class=good>solved") == sum(each["verdict"] == "solved" for each in samples)


def test_ids_are_unique_and_those_that_figures_refer_to_are_there(run_dir):
    page = build_page(run_dir)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(ids) >= set(re.findall(r'(?:href="|url\()#([^")]*)', page)) > set()


def test_warnings_about_the_data_are_shown(run_dir):
    assert "Warning" not in build_page(run_dir)
    history = json.loads((run_dir / "history.json").read_text())
    history["sessions"][-1]["data_warnings"] = ["3 of the 10 test puzzles are in the training set"]
    (run_dir / "history.json").write_text(json.dumps(history))
    assert "Warning: 3 of the 10 test puzzles are in the training set" in build_page(run_dir)


def test_a_session_that_another_followed_was_killed(run_dir):
    history = json.loads((run_dir / "history.json").read_text())
    (complete,) = history["sessions"]
    for states, expected in ((["running", "complete"], ["killed", "complete"]), (["running"], ["running"])):
        history["sessions"] = [complete | {"state": state, "started": f"day {n}"} for n, state in enumerate(states)]
        (run_dir / "history.json").write_text(json.dumps(history))
        words = parsed(build_page(run_dir))
        assert all(f"day {n} {outcome} " in words for n, outcome in enumerate(expected))


def test_shares_are_percentages_and_other_numbers_are_not(run_dir):
    final = json.loads((run_dir / "final.json").read_text())
    final["evaluation"]["samplers"][0] |= {"details": {"letter_accuracy": 0.5}, "numbers": {"edit_distance": 3.2}}
    (run_dir / "final.json").write_text(json.dumps(final))
    words = parsed(build_page(run_dir))
    assert "letter accuracy edit distance passes" in words
    assert " 50.0% 3.2 " in words


def test_traces_are_answers_of_the_evaluation_a_wrong_one_first(run_dir):
    samples = [json.loads(line) for line in (run_dir / "samples_00000006.jsonl").read_text().splitlines()]
    answers = {each["puzzle"]: each for each in samples}
    traces = read_traces(run_dir / "traces.json")
    assert [trace.verdict.answer for trace in traces] == [answers[trace.question]["answer"] for trace in traces]
    right = [each["right"] for each in samples]
    assert [answers[trace.question]["right"] for trace in traces] == sorted(right)[:1] + sorted(right, reverse=True)[:2]
    assert all(len(trace.steps) > 1 for trace in traces)


def test_texts_of_a_model_are_shown_and_not_obeyed(run_dir):
    sample = {"verdict": "wrong", "program": "<script>alert(1)</script>\n\x1b[31m", "value": None}
    (run_dir / "samples_00000009.jsonl").write_text(json.dumps(sample) + "\n")
    page = build_page(run_dir)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n\\x1b[31m" in page
    assert "0 of the first 1 answers at update 9 are right" in parsed(page)


def test_a_run_that_has_just_begun_has_a_page(run_dir):
    for name in (
        "final.json",
        "traces.json",
        "history.json",
        "metrics.jsonl",
        "samples_00000003.jsonl",
        "samples_00000006.jsonl",
    ):
        (run_dir / name).unlink()
    words = parsed(build_page(run_dir))
    assert "stopped" in words
    assert "No records yet." in words
    assert "How answers came about" not in words


def test_the_options_of_a_rule_are_shown(run_dir):
    final = json.loads((run_dir / "final.json").read_text())
    (rule,) = final["evaluation"]["samplers"]
    rule["options"] = {"threshold": 0.9, "revise": "remask"}
    final["evaluation"]["samplers"].append(rule | {"tokens_per_step": 2, "options": {}})
    (run_dir / "final.json").write_text(json.dumps(final))
    words = parsed(build_page(run_dir))
    assert "passes top_prob, 1 per step, threshold 0.9, revise remask" in words
    assert "are right (top_prob, 1 per step, threshold 0.9, revise remask)" in words
    assert re.search(r"top_prob, 2 per step \d", words)


def test_a_line_of_the_samples_that_was_cut_short_costs_that_line(run_dir):
    path = run_dir / "samples_00000006.jsonl"
    path.write_text(path.read_text()[:-20])
    assert build_page(run_dir).count("<table class=board>") == 9


def test_a_sample_without_a_verdict_says_whether_it_is_right(run_dir):
    samples = [{"answer": "a", "right": True}, {"answer": "b", "right": False}]
    (run_dir / "samples_00000009.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert re.findall(r"<p class=(\w+)>(\w+)</p>", build_page(run_dir)) == [("bad", "wrong"), ("good", "right")]


def test_other_files_are_no_samples(run_dir):
    for name in ("samples_backup.jsonl", "samples_00000007 (copy).jsonl", "samples_9_old.jsonl"):
        (run_dir / name).write_text("{}\n")
    assert "answers at update 6 are right" in parsed(build_page(run_dir))


def test_faults_of_a_board_are_outlined(run_dir):
    boards = [
        ("1.3.........4..1", "1234341221434321", set()),
        ("1.3.........4..1", "1234341221434322", {7, 14, 15}),  # two 2s in row, column and box; 15 is a clue
        ("1.3.........4..1", "12343412214?4321", {11}),
        ("1.3.........4..1", "1274341221434321", {2}),
    ]
    samples = [{"verdict": "", "puzzle": puzzle, "answer": answer, "right": True} for puzzle, answer, _ in boards]
    (run_dir / "samples_00000009.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    tables = re.findall("<table class=board>(.*?)</table>", build_page(run_dir))
    found = [re.findall('<td class="(.*?)">', board) for board in tables]
    assert [{i for i, names in enumerate(cells) if "bad" in names.split()} for cells in found] == [
        bad for _, _, bad in boards
    ]
    assert [i for i, names in enumerate(found[0]) if "clue" in names.split()] == [0, 2, 12, 15]


@pytest.mark.pictures
def test_a_page_that_fails_is_a_warning(config_file, tmp_path, monkeypatch):
    def fail(_):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(train, "write_page", fail)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"report\.html cannot be written \(of a test\)"):
        train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.yaml").unlink(), "config .*config.yaml cannot be read"),
        (lambda path: (path / "final.json").write_text("[]"), "final.json cannot be read"),
        (lambda path: (path / "traces.json").write_text("[{}]"), "only the traces are lost"),
        (lambda path: (path / "samples_00000009.jsonl").mkdir(), "only the samples are lost"),
    ],
)
def test_damaged_runs_end_with_one_message(damage, message, run_dir, capsys):
    damage(run_dir)
    with pytest.raises(SystemExit) as stop:
        main([str(run_dir)])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("words", [[], ["--out", "/proc/a"]])
def test_a_page_that_cannot_be_written_is_told_with_the_option(words, run_dir, capsys):
    (run_dir / "report.html").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([str(run_dir), *words])
    assert stop.value.code == 2
    assert re.search("--out .*: name another file", capsys.readouterr().err)
