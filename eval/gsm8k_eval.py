"""Grade-school maths problems in files: make prompts for any model, grade the programs of any model.

    python -m eval.gsm8k_eval prompts TEST.jsonl --tokenizer DIR --mask-id 151644 --max-len 512 --out FILE.json
    python -m eval.gsm8k_eval grade CASES.jsonl --out VERDICTS.jsonl

The prompts are a JSON list of objects with `input_ids` (question, newline, then mask tokens to the full length) and
`answer`. Each line of the cases has `completion` (the model's output) and `gold` (the right answer); blank lines are
skipped. Each line of the verdicts, in the same order, has `verdict` (true or false), `value` (returned by the program)
and `reason`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from base.commands import CommandParser, ends_with_message, whole_number
from base.files import check_out, write_text
from base.reading import parse_object, read_lines, reading
from data.gsm8k import build_prompts, read_problems
from data.text import load_tokenizer
from grader.grade import REASONS, gold_number, grade

REMEDY = 'each line must be {"completion": "...", "gold": 18}'


def read_cases(path: Path) -> tuple[list[str], list[float]]:
    """Read completions and gold answers, one case per line.

    Raises:
        ValueError: the file is missing or empty, or a line is malformed; the message names the first such line, counted
            from 1.
    """
    completions: list[str] = []
    golds: list[float] = []
    with reading(f"{path}", REMEDY):
        for number, line in read_lines(path):
            if not line.strip():
                continue
            with reading(f"{path} line {number}", REMEDY):
                case = parse_object(line)
                missing = [key for key in ("completion", "gold") if key not in case]
                if missing:
                    raise ValueError(f"it has no {' and no '.join(missing)}")
                if not isinstance(case["completion"], str):
                    raise ValueError(f"completion must be text, got {case['completion']!r}")
                completions.append(case["completion"])
                golds.append(gold_number(case["gold"], "gold"))
    if not completions:
        raise ValueError(f"{path} has no cases")
    return completions, golds


def grade_file(cases: Path, out: Path, n_workers: int | None) -> str:
    """Grade a file of cases and write a file of verdicts; returns a summary. Raises ValueError for bad input."""
    check_out(out, "--out", cases)
    completions, golds = read_cases(cases)
    start = time.monotonic()
    with tqdm(total=len(completions), desc="grading", unit="program", disable=None) as bar:
        verdicts = grade(completions, golds, n_workers=n_workers, on_done=bar.update)
    programs_per_s = len(verdicts) / (time.monotonic() - start)
    lines = ({"verdict": verdict.right, "value": verdict.value, "reason": verdict.explanation} for verdict in verdicts)
    write_text(out, "".join(json.dumps(line) + "\n" for line in lines))
    counts = Counter(verdict.reason for verdict in verdicts)
    shares = ", ".join(
        f"{reason} {100 * counts[reason] / len(verdicts):.1f}%" for reason in REASONS if counts[reason] > 0
    )
    return f"{len(verdicts)} graded: {shares} ({programs_per_s:.0f} programs/s)"


def write_prompts(test: Path, tokenizer: str, mask_id: int, max_len: int, out: Path) -> str:
    """Write the prompts of a file of problems; returns a summary. Raises ValueError for bad input."""
    check_out(out, "--out", test)
    if not test.is_file():
        raise ValueError(f"{test} is no file: give a .jsonl file with question and answer, as in GSM8K")
    problems = read_problems(test)
    prompts = build_prompts(problems, load_tokenizer(tokenizer), mask_id, max_len, option="--max-len")
    rows = zip(prompts.xt.tolist(), prompts.problems, strict=True)
    write_text(out, json.dumps([{"input_ids": ids, "answer": problem.answer} for ids, problem in rows]))
    return f"wrote {len(prompts.problems)} prompts of {max_len} tokens to {out}, left out {prompts.n_left_out}"


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Make prompts of grade-school maths problems and grade answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    grading = commands.add_parser("grade", help="run and judge programs written by a model")
    grading.add_argument("cases", type=Path, help="jsonl with completion and gold")
    grading.add_argument("--out", type=Path, required=True, help="jsonl of verdict, value and reason")
    grading.add_argument(
        "--workers", type=whole_number(1, 1024), help="programs run in parallel, at most 16; by default two per core"
    )
    prompting = commands.add_parser("prompts", help="make prompts from a file of problems")
    prompting.add_argument("test", type=Path, help="jsonl with question and answer, as in GSM8K")
    prompting.add_argument("--tokenizer", required=True, help="folder or name of a Hugging Face tokenizer")
    prompting.add_argument("--mask-id", type=whole_number(0), required=True, help="the mask token")
    prompting.add_argument("--max-len", type=whole_number(1, 1 << 20), default=512, help="tokens per row")
    prompting.add_argument("--out", type=Path, required=True, help="json list of input_ids and answer")
    options = parser.parse_args(arguments)
    with ends_with_message():
        if options.command == "grade":
            print(grade_file(options.cases, options.out, options.workers))
        else:
            print(write_prompts(options.test, options.tokenizer, options.mask_id, options.max_len, options.out))


if __name__ == "__main__":
    main()
