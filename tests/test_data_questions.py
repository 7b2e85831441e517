"""Questions in files: three formats, right answers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.questions import Question, read_questions


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_right_answers_are_read_under_both_names(tmp_path: Path) -> None:
    lines = '{"question": "Why?", "answer": "so #### 18"}\n\n{"prompt": "How?", "gold": 3.5}\n{"prompt": "Who?"}\n'
    path = write(tmp_path, "a.jsonl", lines)
    expected = [("Why?", "so #### 18"), ("How?", "3.5"), ("Who?", None)]
    found = read_questions(path, "prompt")
    assert [(question.text, question.gold) for question in found] == expected
    assert [question.source for question in found] == [f"{path}, line {number}" for number in (1, 3, 4)]
    written = write(tmp_path, "written.jsonl", '{"prompt": "Why?", "answer": "a guess", "gold": null}\n')
    assert read_questions(written, "prompt")[0].gold is None, "an answer in a file of sampling.py is the model's"
    path = write(tmp_path, "a.csv", '\ufeffprompt,gold\n"Why,\nso?",18\nHow?,\n')
    assert read_questions(path, "prompt") == [
        Question("Why,\nso?", "18", f"{path}, line 3"),
        Question("How?", None, f"{path}, line 4"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "it has no question"),
        ("a.csv", "board\n123\n", r"it has no column 'puzzle' or 'question'; its columns are \['board'\]"),
        ("a.jsonl", '{"puzzle": "1"}\n{"puzzle": 1}\n', "line 2 cannot be read .it has no text 'puzzle'"),
        ("a.jsonl", '{"puzzle": "1", "gold": [1]}\n', "the right answer must be text or a number"),
        ("a.jsonl", "[1]\n", "must be a JSON object"),
    ],
)
def test_a_file_without_questions_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, name, text), "puzzle")
