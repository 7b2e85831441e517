"""GSM8K: grade-school maths questions, their answers, and prompts for a model that writes programs.

A row starts with the prompt (question and newline); all other positions are masked.

Shapes: N problems, L positions.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_text
from data.text import encode_prompts, load_tokenizer, prompt_fits

HUB_NAME = "openai/gsm8k"
COLUMNS = ("question", "answer")
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


def read_problems(source: str, cache_dir: str | Path | None = None) -> list[Problem]:
    """Read problems from a .jsonl file with `question` and `answer`, or the test split of a Hugging Face data set.

    Args:
        cache_dir: folder in which a downloaded split is saved and searched first, for machines without a network.

    Raises:
        ValueError: the file is missing or a row is malformed; the message names the first such row.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".jsonl" or path.is_absolute() or source.count("/") != 1:
            raise ValueError(f"problem file {source} does not exist")
        path = _download(source, cache_dir)
    problems = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in COLUMNS):
                    raise ValueError(f"must have {' and '.join(COLUMNS)}, both text")
                problems.append(Problem(row["question"], final_answer(row["answer"])))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not problems:
        raise ValueError(f"{path} has no problems")
    return problems


def final_answer(solution: str) -> str:
    """The number after `####`, without commas; raises ValueError if there is none."""
    found = ANSWER.search(solution)
    if found is None:
        raise ValueError(f"no number after '####' in {solution[-60:]!r}")
    return found.group(1).replace(",", "")


def build_prompts(problems: Sequence[Problem], tokenizer: Any, mask_id: int, max_len: int) -> Prompts:
    """Encode questions as prompts; questions that are too long are left out with a warning.

    Args:
        tokenizer: from `data.text.load_tokenizer`.

    Raises:
        ValueError: the mask token occurs in a question, or no question fits.
    """
    prompts = encode_prompts(tokenizer.backend_tokenizer, [problem.question for problem in problems])
    fitting = [i for i, prompt in enumerate(prompts) if prompt_fits(len(prompt), max_len)]
    n_left_out = len(problems) - len(fitting)
    if not fitting:
        raise ValueError(f"none of the {len(problems)} questions fits {max_len} tokens: raise max_len")
    if n_left_out:
        warnings.warn(
            f"{n_left_out} of {len(problems)} questions are left out: they leave no room for a program in max_len "
            f"{max_len} tokens",
            stacklevel=2,
        )
    xt = np.full((len(fitting), max_len), mask_id, dtype=np.int64)  # [N, L]
    for row, i in zip(xt, fitting, strict=True):
        row[: len(prompts[i])] = prompts[i]
        if mask_id in prompts[i]:
            raise ValueError(f"the mask token {mask_id} occurs in the question {problems[i].question!r}")
    return Prompts([problems[i] for i in fitting], xt, n_left_out)


def prompt_records(test_file: str, tokenizer_name: str, mask_id: int, max_len: int) -> tuple[list[dict[str, Any]], int]:
    """Prompts of a file of problems as `{"input_ids", "answer"}`, in order, and the number of problems left out.

    Raises:
        ValueError: see `read_problems` and `build_prompts`.
    """
    prompts = build_prompts(read_problems(test_file), load_tokenizer(tokenizer_name), mask_id, max_len)
    rows = zip(prompts.xt.tolist(), prompts.problems, strict=True)
    return [{"input_ids": ids, "answer": problem.answer} for ids, problem in rows], prompts.n_left_out


def _download(name: str, cache_dir: str | Path | None) -> Path:
    """The test split of a Hugging Face data set as a file in `cache_dir`; downloaded once."""
    folder = Path(cache_dir or "data/gsm8k")
    path = folder / f"{name.replace('/', '--')}.jsonl"
    if not path.exists():
        from datasets import load_dataset  # slow to import, and only used here

        try:
            rows = load_dataset(name, "main" if name == HUB_NAME else None, split="test", trust_remote_code=False)
        except Exception as error:  # the library raises many types of errors
            raise ValueError(f"data set {name!r} cannot be loaded: {error}. A local .jsonl file also works") from None
        lines = [json.dumps({key: row.get(key) for key in COLUMNS}) for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")
    return path
