"""What feeds and judges a model beside general tools: puzzles, stream of rows, tokens of TinyGSM's rows, grader."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from functools import partial
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from bench.measure import Benchmark, Call, Case
from data.generate_sudoku import generate_sudoku
from data.row_queue import RowQueue
from data.stream import SequenceStream
from data.text import encode_rows
from data.word_problems import generate_problems, train_tokenizer
from grader.sandbox import run_programs

MAX_LEN, BATCH, N_BOARDS = 512, 32, 1024


def build(options: Namespace) -> Benchmark:
    """`--batch` (by default 2000) rows per round, a tenth as many puzzles and a 40th as many programs."""
    options.no_memory = True  # the programs run in other processes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_rows = options.batch or 2000
    n_puzzles, n_batches, n_programs = max(1, n_rows // 10), max(1, min(n_rows, N_BOARDS) // BATCH), -(-n_rows // 40)
    make_boards = partial(generate_sudoku, 9, min_clues=30, max_clues=40, n_workers=1, show_progress=False)
    seeds, boards = count(1), make_boards(N_BOARDS, seed=0)
    queue = RowQueue(SequenceStream(boards, 0), BATCH, device)
    tensors = TensorDataset(*map(torch.from_numpy, boards.rows(np.arange(N_BOARDS))))
    loader = DataLoader(tensors, BATCH, shuffle=True)
    problems, tokenizer = generate_problems(n_rows, seed=0), train_tokenizer()
    questions, codes = [problem.question for problem in problems], [problem.code for problem in problems]
    eos_id = tokenizer.eos_token_id
    programs = [problem.code for problem in generate_problems(n_programs, seed=1)]
    commands = [[sys.executable, "-c", f"{program}\nprint(simple_math_problem())"] for program in programs]

    def take_batches() -> None:
        for _ in range(n_batches):
            queue.take_next(BATCH)
            queue.top_up()

    def encode_row(question: str, code: str) -> tuple[list[int], list[bool]]:
        prompt = tokenizer(question + "\n", add_special_tokens=False).input_ids
        ids = (prompt + tokenizer(code, add_special_tokens=False).input_ids)[: MAX_LEN - 1]
        return ids + [eos_id] * (MAX_LEN - len(ids)), [place < len(prompt) for place in range(MAX_LEN)]

    paths: dict[str, Call] = {
        "generator": lambda: make_boards(n_puzzles, seed=next(seeds)),
        "stream": take_batches,
        "DataLoader": lambda: [[part.to(device) for part in batch] for batch in islice(loader, n_batches)],
        "tokens": lambda: encode_rows(tokenizer.backend_tokenizer, eos_id, questions, codes, MAX_LEN),
        "tokenizer": lambda: list(map(encode_row, questions, codes)),
        "grader": lambda: run_programs(programs),
        "processes": lambda: [subprocess.run(each, capture_output=True, timeout=60, check=True) for each in commands],
    }
    cases = [
        Case("generator, on one core", "generator", None, n_puzzles, "puzzles"),
        Case("stream beside DataLoader", "stream", "DataLoader", n_batches * BATCH, "rows"),
        Case("tokens beside the tokenizer, row by row", "tokens", "tokenizer", n_rows, "rows"),
        Case("grader beside a process per program", "grader", "processes", n_programs, "programs"),
    ]
    return Benchmark("Data and grading", paths, cases, device, None)
