"""GSM8K: grade-school maths questions, their answers, and prompts for a model that writes programs.

A row starts with the prompt (question and newline); all other positions are masked.

Shapes: N problems, L positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.files import reported, write_text
from base.reading import may_be_on_hub, parse_object, read_lines, reading
from data.text import check_tokens, encode_prompts, prompt_fits, prompt_row
from grader.grade import gold_number

HUB_NAME = "openai/gsm8k"
COLUMNS = ("question", "answer")
REMEDY = 'each line must be {"question": "...", "answer": "... #### 18"}'
ANSWER = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


@dataclass(frozen=True)
class Problem:
    """A question and its answer, a number."""

    question: str
    answer: str  # as text without commas, e.g. "-3" or "2125"


@dataclass(frozen=True)
class Prompts:
    """Problems as rows for a model to fill."""

    problems: list[Problem]
    xt: np.ndarray  # int64 [N, L], mask tokens after each prompt
    n_left_out: int  # number of problems whose question leaves no room for a program


def problem_file(source: str, cache_dir: str | Path) -> Path:
    """The file of a source of problems: itself, or the test split of a Hugging Face data set, downloaded once.

    Args:
        source: .jsonl file or name of a data set.
        cache_dir: folder in which a downloaded split is saved and searched first, for machines without a network.

    Raises:
        ValueError: there is no such file or data set.
        WriteError: a downloaded split cannot be saved.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix == ".jsonl" or not may_be_on_hub(source):
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"problem file {source} {problem}: set data.test_source to a .jsonl file or a data set of the Hub"
        )
    saved = Path(cache_dir) / f"{source.replace('/', '--')}.jsonl"
    if not saved.exists():
        from datasets import load_dataset  # slow to import, and only used here

        with reading(
            f"data set {source!r}", "set data.test_source to a local .jsonl file, or fetch it where there is a network"
        ):
            rows = load_dataset(source, "main" if source == HUB_NAME else None, split="test", trust_remote_code=False)
            lines = [json.dumps({key: row.get(key) for key in COLUMNS}) for row in rows]
        with reported(saved):
            saved.parent.mkdir(parents=True, exist_ok=True)
        write_text(saved, "\n".join(lines) + "\n")
    return saved


def read_problems(path: Path) -> list[Problem]:
    """Read problems from a .jsonl file with `question` and `answer`.

    Raises:
        ValueError: the file is missing or empty, or a row is malformed; the message names the first such row.
    """
    problems = []
    with reading(f"{path}", REMEDY):
        for number, line in read_lines(path):
            if not line.strip():
                continue
            with reading(f"{path}, line {number}", REMEDY):
                row = parse_object(line)
                if not all(isinstance(row.get(key), str) for key in COLUMNS):
                    raise ValueError(f"must have {' and '.join(COLUMNS)}, both text")
                problems.append(Problem(row["question"], final_answer(row["answer"])))
    if not problems:
        raise ValueError(f"{path} has no problems")
    return problems


def final_answer(solution: str) -> str:
    """The number after `####`, without commas; raises ValueError if there is none that answers can be compared with."""
    found = ANSWER.match(solution, max(0, solution.rfind("####")))
    if found is None:
        raise ValueError(f"no number after '####' in {solution[-60:]!r}")
    answer = found.group(1).replace(",", "")
    gold_number(answer, "the answer")
    return answer


def build_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    mask_id: int,
    max_len: int,
    vocab_size: int | None = None,
    option: str = "data.max_len",
) -> Prompts:
    """Encode questions as prompts; questions that are too long are left out.

    Args:
        tokenizer: from `data.text.load_tokenizer`.
        vocab_size: of the model; None: not checked.
        option: the setting or option that gave `max_len`, for the message.

    Raises:
        ValueError: the mask token or one outside the vocabulary occurs in a question, or no question fits.
    """
    with reading("the questions of the test", "give text that the tokenizer can encode"):
        prompts = encode_prompts(tokenizer.backend_tokenizer, [problem.question for problem in problems])
    fitting = [i for i, prompt in enumerate(prompts) if prompt_fits(len(prompt), max_len)]
    n_left_out = len(problems) - len(fitting)
    if not fitting:
        raise ValueError(f"none of the {len(problems)} questions fits {option} {max_len}: raise it")
    for i in fitting:
        check_tokens(prompts[i], mask_id, vocab_size, f"the question {problems[i].question!r}")
    xt = np.stack([prompt_row(prompts[i], mask_id, max_len) for i in fitting])  # [N, L]
    return Prompts([problems[i] for i in fitting], xt, n_left_out)
