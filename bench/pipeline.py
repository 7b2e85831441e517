"""What feeds and judges a model: puzzle generator, stream of rows, tokens of TinyGSM's rows, grader.

There is a plain path where a plain tool does the same: PyTorch's DataLoader, the tokenizer row by row, a Python process
per program.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.measure import Report, facts, interleave, medians, row, table
from bench.rows import random_boards
from config import SudokuSettings
from data.generate_sudoku import generate_sudoku
from data.row_queue import RowQueue
from data.stream import SequenceData, SequenceStream
from data.text import encode_rows, load_tokenizer
from data.word_problems import generate_problems, train_tokenizer
from grader.sandbox import run_programs

MAX_LEN = 512
BATCH = 32
COLUMNS = {
    "name": "what",
    "n": "number per round",
    "ours_ms": "ours, ms",
    "dense_ms": "plain, ms",
    "ratio": "plain / ours",
    "per_s": "per second",
    "plain": "the plain path",
}
Paths = tuple[int, Callable[[], object], Callable[[], object] | None, str]


class PlainRows(Dataset[tuple[Tensor, Tensor]]):
    """A data set as PyTorch's DataLoader wants it: row by row."""

    def __init__(self, data: SequenceData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, prompt_mask = self.data.rows(np.array([index]))
        return torch.from_numpy(tokens[0]), torch.from_numpy(prompt_mask[0])


def generator_paths(n: int) -> Paths:
    """9x9 puzzles with 30 to 40 clues on one core."""
    seeds = count()
    return n, lambda: generate_sudoku(9, n, 0, 30, 40, next(seeds), n_workers=1, show_progress=False), None, "-"


def stream_paths(n: int, device: torch.device) -> Paths:
    """Rows of boards in shuffled batches on the device."""
    data = random_boards(SudokuSettings(dataset="sudoku"))
    queue = RowQueue(SequenceStream(data, 0), BATCH, device)
    loader = DataLoader(PlainRows(data), BATCH, shuffle=True)
    n_batches = max(1, min(n, len(data)) // BATCH)

    def ours() -> None:
        for _ in range(n_batches):
            queue.take_next(BATCH)
            queue.top_up()

    def plain() -> None:
        for _, (tokens, prompt_mask) in zip(range(n_batches), loader, strict=False):
            tokens.to(device), prompt_mask.to(device)

    return n_batches * BATCH, ours, plain, "DataLoader"


def token_paths(n: int, tokenizer_name: str | None) -> Paths:
    """Rows of tokens from questions and programs, in one process."""
    problems = generate_problems(n, seed=0)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else train_tokenizer()
    questions, codes = [problem.question for problem in problems], [problem.code for problem in problems]

    def ours() -> None:
        encode_rows(tokenizer.backend_tokenizer, tokenizer.eos_token_id, questions, codes, MAX_LEN)

    def plain() -> list[tuple[list[int], list[bool]]]:
        rows = []
        for question, code in zip(questions, codes, strict=True):
            prompt = tokenizer(question + "\n", add_special_tokens=False).input_ids
            ids = (prompt + tokenizer(code, add_special_tokens=False).input_ids)[: MAX_LEN - 1]
            ids += [tokenizer.eos_token_id] * (MAX_LEN - len(ids))
            rows.append((ids, [place < len(prompt) for place in range(MAX_LEN)]))
        return rows

    return n, ours, plain, "the tokenizer, row by row"


def grader_paths(n: int) -> Paths:
    """Programs, run and their values read."""
    programs = [problem.code for problem in generate_problems(n, seed=1)]

    def plain() -> None:
        for program in programs:
            call = f"{program}\nprint(simple_math_problem())"
            subprocess.run([sys.executable, "-c", call], capture_output=True, timeout=60, check=True)

    return n, lambda: run_programs(programs), plain, "a Python process per program"


def run(options: Namespace) -> Report:
    """Measure all four; always by the wall's clock, since the grader's work is done by other processes."""
    options.cpu_time = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = {
        "generator": generator_paths(max(1, options.rows // 10)),
        "stream": stream_paths(options.rows, device),
        "tokens": token_paths(options.rows, options.tokenizer),
        "grader": grader_paths(max(1, options.rows // 40)),
    }
    rows = []
    for name, (n, ours, plain, what) in everything.items():
        calls = {"ours": ours} | ({"dense": plain} if plain else {})
        seconds = options.seconds / len(everything)
        middle = medians(interleave(calls, device, options.iterations, seconds, label=name))
        per_s = 1000 * n / middle["ours"]
        rows.append(row(name, middle["ours"], middle.get("dense"), n=n, per_s=per_s, plain=what))
    lines = ["# Data and grading", "", *table(rows, COLUMNS), "", "The generator runs on one core."]
    return Report(rows, lines)


def about(options: Namespace) -> dict[str, Any]:
    """See `bench.measure.facts`."""
    return facts(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)
