"""The command line that grades files and makes prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.word_problems import train_tokenizer
from eval.gsm8k_eval import main
from tests.conftest import SHARED, run_python

GOOD = {"completion": "def f():\n    return 18", "gold": "18"}
CASES = [
    GOOD,
    {"completion": "```python\ndef f():\n    return '$1,000'\n```\nDone.", "gold": 1000, "id": 7},
    {"completion": "def f():\n    return 1e999", "gold": "18"},
    {"completion": "def f():\n    return 1 / 0", "gold": "18"},
    {"completion": "no idea", "gold": "18"},
    {"completion": "def f():\n    return 17", "gold": 18.5},
]
VERDICTS = [
    {"verdict": True, "value": 18, "reason": "right"},
    {"verdict": True, "value": "$1,000", "reason": "right"},
    {"verdict": False, "value": "inf", "reason": "no number"},
    {"verdict": False, "value": None, "reason": "failed to run: ZeroDivisionError: division by zero"},
    {"verdict": False, "value": None, "reason": "no program"},
    {"verdict": False, "value": 17, "reason": "wrong value"},
]


def write_lines(path: Path, cases: list[object]) -> Path:
    path.write_text("".join(f"{case if isinstance(case, str) else json.dumps(case)}\n" for case in cases))
    return path


def test_a_file_of_cases_is_graded_in_order(tmp_path: Path) -> None:
    cases, out = write_lines(tmp_path / "cases.jsonl", [CASES[0], "", *CASES[1:], ""]), tmp_path / "verdicts.jsonl"
    done = run_python("-m", "eval.gsm8k_eval", "grade", cases, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == VERDICTS
    assert done.stdout.startswith("6 graded: right 33.3%, wrong value 16.7%, no number 16.7%, no program 16.7%")
    assert done.stderr == ""  # no progress bar in a log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "verdicts.jsonl"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2 cannot be read (it is not JSON"),
        ("[" * 100_000, "line 2 cannot be read (it is nested too deeply"),
        ([1], "line 2 cannot be read (must be a JSON object, got list"),
        ({"gold": "18"}, "line 2 cannot be read (it has no completion"),
        ({}, "line 2 cannot be read (it has no completion and no gold"),
        ({"completion": None, "gold": "18"}, "line 2 cannot be read (completion must be text, got None"),
        ({"completion": "x", "gold": "eighteen"}, "line 2 cannot be read (gold is not a number: 'eighteen'"),
        ({"completion": "x", "gold": True}, "line 2 cannot be read (gold is not a number: True"),
        ({"completion": "x", "gold": None}, "line 2 cannot be read (gold is not a number: None"),
    ],
)
def test_a_bad_line_is_refused_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: object, message: str
) -> None:
    cases = write_lines(tmp_path / "cases.jsonl", [GOOD, bad, "also bad"])
    refuse(capsys, ["grade", str(cases), "--out", str(tmp_path / "out.jsonl")], message)
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_paths_and_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, empty = write_lines(tmp_path / "cases.jsonl", [GOOD]), write_lines(tmp_path / "empty.jsonl", [])
    out = str(tmp_path / "out.jsonl")
    refuse(capsys, ["grade", str(tmp_path / "none.jsonl"), "--out", out], "none.jsonl cannot be read (No such file")
    refuse(capsys, ["grade", str(empty), "--out", out], "has no cases")
    refuse(capsys, ["grade", str(cases), "--out", str(cases)], "would overwrite the input")
    refuse(capsys, ["grade", str(cases), "--out", str(tmp_path / "no" / "out")], "does not exist")
    with pytest.raises(SystemExit):
        main(["grade", str(cases), "--out", out, "--workers", "0"])
    assert "--workers: must be an integer from 1 to 1024, got 0" in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_bytes(json.dumps(GOOD).encode() + b'\n{"completion": "\xff", "gold": 1}\n')
    refuse(capsys, ["grade", str(cases), "--out", str(tmp_path / "out.jsonl")], "line 2 cannot be read ('utf-8' codec")


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """The command ends with status 2 and one line that holds the message."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_prompts_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prompts", "openai/gsm8k", "--tokenizer", "t", "--mask-id", "1", "--out", str(tmp_path / "a.json")])
    assert stop.value.code == 2
    assert "error: openai/gsm8k is no file: give a .jsonl file" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows: list[object] = [
        {"question": "How many?", "answer": "#### 1,234"},
        {"question": "How many? " * 24, "answer": "#### 1"},
    ]
    test, out = write_lines(tmp_path / "test.jsonl", rows), tmp_path / "prompts.json"
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--mask-id", "511", "--out", str(out)]
    main(["prompts", str(test), *options, "--max-len", "24"])
    ids = tokenizer.encode("How many?") + tokenizer.encode("\n")
    assert json.loads(out.read_text()) == [{"input_ids": ids + [511] * (24 - len(ids)), "answer": "1234"}]
    assert capsys.readouterr().out == f"wrote 1 prompts of 24 tokens to {out}, left out 1\n"
    refuse(capsys, ["prompts", str(test), *options, "--max-len", "2"], "the 2 questions fits --max-len 2: raise it")


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not here")
def test_prompts_end_in_mask_tokens(tmp_path: Path) -> None:
    lines = (SHARED / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    test, out = write_lines(tmp_path / "test.jsonl", list(lines)), tmp_path / "prompts.json"
    main(
        ["prompts", str(test), "--tokenizer", str(SHARED / "qwen2_tokenizer"), "--mask-id", "151644", "--out", str(out)]
    )
    records = json.loads(out.read_text())
    assert [record["answer"] for record in records] == [json.loads(line)["answer"].split("#### ")[1] for line in lines]
    for record in records:
        ids = record["input_ids"]
        assert len(ids) == 512
        n_prompt = ids.index(151644)
        assert ids[n_prompt - 1] == 198  # the newline
        assert set(ids[n_prompt:]) == {151644}
