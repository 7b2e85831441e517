"""Questions in files: puzzles or prompts, with right answers if they are known.

.txt: one question per line. .csv: a column named like the option of sampling.py (`puzzle` or `prompt`), or `question`,
and if the right answers are known `gold`, `answer` or `completion`; rows without a question are skipped. .jsonl:
objects with the same keys, such as GSM8K's files. Standard input is read like .txt, or like .jsonl if it begins with
`{`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base.reading import MAX_TEXT_BYTES, parse_object, read_text, reading

STANDARD_INPUT = "-"
BYTE_ORDER_MARK = "\ufeff"  # spreadsheets write one
# The first of these keys that is present is used, even if its value is empty: files that sampling.py wrote have the
# model's own `answer`.
GOLD_KEYS = ("gold", "answer", "completion")
SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Question:
    """A question as its user wrote it."""

    text: str
    gold: str | None = None  # the right answer, if it is known
    source: str = ""  # for messages: file and line, or empty


def read_questions(path: str, name: str) -> list[Question]:
    """Read the questions of a file, or of standard input if `path` is `-`.

    Args:
        name: what the data set calls a question, `puzzle` or `prompt`: the name of its column or key.

    Raises:
        ValueError: the file cannot be read, has another suffix, lacks the column or key, or has no question.
    """
    remedy = f"give {', '.join(SUFFIXES)} with {name}s, or - for standard input"
    shown = "standard input" if path == STANDARD_INPUT else path
    with reading(f"questions {shown}", remedy):
        if path == STANDARD_INPUT:
            text = sys.stdin.read(MAX_TEXT_BYTES + 1).removeprefix(BYTE_ORDER_MARK)
            if len(text) > MAX_TEXT_BYTES:
                raise ValueError(f"it has more than {MAX_TEXT_BYTES:,} characters")
            suffix = ".jsonl" if text.lstrip().startswith("{") else ".txt"
        else:
            suffix = Path(path).suffix.lower()
            if suffix not in SUFFIXES:
                raise ValueError(f"its suffix is {suffix!r}")
            text = read_text(Path(path)).removeprefix(BYTE_ORDER_MARK)
        read = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_jsonl}[suffix]
        questions = list(read(text, name, shown))
        if not questions:
            raise ValueError("it has no question")
        return questions


def _read_lines(text: str, name: str, shown: str) -> Iterator[Question]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Question(line.strip(), None, f"{shown}, line {number}")


def _read_csv(text: str, name: str, shown: str) -> Iterator[Question]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = rows.fieldnames or []
    key = next((key for key in (name, "question") if key in columns), None)
    if key is None:
        raise ValueError(f"it has no column {name!r} or 'question'; its columns are {columns}")
    gold = next((key for key in GOLD_KEYS if key in columns), None)
    for row in rows:
        if row[key]:
            yield Question(row[key], row[gold] or None if gold else None, f"{shown}, line {rows.line_num}")


def _read_jsonl(text: str, name: str, shown: str) -> Iterator[Question]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        with reading(f"questions {shown}, line {number}", f'give objects such as {{"{name}": "..."}}'):
            row = parse_object(line)
            question = row.get(name, row.get("question"))
            gold = next((row[key] for key in GOLD_KEYS if key in row), None)
            if not isinstance(question, str):
                raise ValueError(f"it has no text {name!r} or 'question'")
            if not isinstance(gold, str | int | float | None):
                raise ValueError(f"the right answer must be text or a number, got {gold!r}")
            yield Question(question, None if gold is None else str(gold), f"{shown}, line {number}")
