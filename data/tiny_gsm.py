"""TinyGSM: questions answered by programs, tested on GSM8K; and generated word problems as a small replacement.

    python data/tiny_gsm.py --source TinyGSM/TinyGSM --tokenizer Qwen/Qwen2-0.5B --out data/tiny_gsm

tokenizes TinyGSM once, see `data/pretokenize.py`; `data/word_problems.py` generates the word problems. A row is a
question, a newline and a program, padded with EOS (`data/text.py`). An answer is right if its program returns the right
number.

Shapes: n questions, L positions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

if __name__ == "__main__":  # `python data/tiny_gsm.py` puts data/ on the path instead of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.commands import CommandParser, ends_with_message, whole_number
from data.dataset import AnswerVerdict, JudgedAnswers
from data.gsm8k import HUB_NAME, Prompts, build_prompts, final_answer, problem_file, read_problems
from data.pretokenize import is_on_hub, pretokenize
from data.questions import Question
from data.settings import FREE_ON_RESUME
from data.text import decode_completions, differing_tokens, load_tokenizer
from data.text_pairs import PairDataSet, PairSettings
from data.token_files import TokenFileData, tokenizer_of
from data.word_problems import LEVELS, TEST_FILE, Difficulty, cached_word_problems, count_operations
from grader.grade import FAILURES, gold_number, grade


class TinyGsmSettings(PairSettings):
    """Source of the questions and programs."""

    dataset: Literal["tiny_gsm"]
    data_dir: str = Field(
        "data/tiny_gsm",
        description="folder of the tokenized files or of the word problems",
        json_schema_extra=FREE_ON_RESUME,
    )
    source: Literal["files", "word_problems"] = Field(
        "files", description="files: written by data/tiny_gsm.py; word_problems: a small generated set"
    )
    tokenizer: str | None = Field(None, description="Hugging Face name or folder; null: the one that wrote the rows")
    test_source: str | None = Field(
        None,
        description="files: a .jsonl file in the format of GSM8K, or a Hugging Face data set; null: openai/gsm8k",
        json_schema_extra=FREE_ON_RESUME,
    )
    n_train: int | None = Field(None, gt=0, description="word_problems: number of rows, including the held-out ones")
    n_test: int | None = Field(
        None, gt=0, description="word_problems: number of test problems, none of them in the rows"
    )
    seed: int | None = Field(None, ge=0, description="word_problems: seed of the problems")
    difficulty: Difficulty | None = Field(
        None,
        description="word_problems: easy: one or two operations, numbers to 30; medium: two to four, "
        "numbers to 99; hard: two to four, numbers to 999; null: easy",
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> TinyGsmSettings:
        problems = []
        required = ("n_train", "n_test", "seed")
        keys_by_source = {"files": ("test_source",), "word_problems": (*required, "difficulty")}
        for source, keys in keys_by_source.items():
            given = [key for key in keys if getattr(self, key) is not None]
            if source != self.source and given:
                problems.append(f"{', '.join(given)}: only used by source {source!r}, but source is {self.source!r}")
        missing = [key for key in required if getattr(self, key) is None]
        if self.source == "word_problems" and missing:
            problems.append(f"source 'word_problems' needs {', '.join(missing)}")
        if self.n_train is not None and self.n_train <= self.n_held_out:
            problems.append(f"n_held_out {self.n_held_out} must be less than n_train {self.n_train}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @override
    def describe(self) -> str:
        if self.source == "word_problems":
            kind = LEVELS[self.difficulty or "easy"].name
            return f"{self.n_train:,} generated {kind} with programs, {self.n_test:,} more for the test"
        return f"questions with programs in {self.data_dir}, tested on {self.test_source or HUB_NAME}"

    @override
    def open(self, vocab_size: int) -> TinyGsm:
        return TinyGsm(self, vocab_size)


class TinyGsm(PairDataSet):
    """Questions with programs to train on, and questions to answer by a program, which is run."""

    figures = ("accuracy", *FAILURES)
    question_noun = "problems"
    settings: TinyGsmSettings

    @cached_property
    @override
    def folder(self) -> Path:
        """The folder of the tokenized rows; word problems are written on first use."""
        settings = self.settings
        if settings.source == "files":
            return Path(settings.data_dir)
        assert settings.n_train is not None  # checked by the settings, as are the next two
        assert settings.n_test is not None
        assert settings.seed is not None
        return cached_word_problems(
            settings.data_dir,
            n_train=settings.n_train,
            n_test=settings.n_test,
            seed=settings.seed,
            max_len=settings.max_len,
            difficulty=settings.difficulty or "easy",
        )

    @property
    @override
    def tokenizer_name(self) -> str:
        """The tokenizer of the settings, or the one that wrote the rows."""
        return self.settings.tokenizer or tokenizer_of(self.folder)

    @cached_property
    @override
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_name)

    @override
    def open_rows(self, folder: Path) -> TokenFileData:
        """See `PairDataSet`; the rows must be of the tokenizer, as far as that can be told without a network."""
        rows = super().open_rows(folder)
        if rows.eos_id != self.eos_id:
            raise ValueError(
                f"the rows in {folder} end in token {rows.eos_id}, but EOS of tokenizer {self.tokenizer_name!r} "
                f"is {self.eos_id}: set data.tokenizer to the tokenizer that wrote them"
            )
        given = self.settings.tokenizer
        if (
            self.settings.source == "word_problems"
            and given is not None
            and differing_tokens(self.tokenizer, load_tokenizer(tokenizer_of(folder)))
        ):
            raise ValueError(
                f"the word problems in {folder} have another tokenizer than {given!r}: leave data.tokenizer out of a "
                "new run; for a trained model take the version of this code that trained it, or copy its problems there"
            )
        return rows

    @cached_property
    def test_prompts(self) -> Prompts:
        """The test problems as prompts."""
        if self.settings.source == "word_problems":
            source = str(self.folder / TEST_FILE)
        else:
            source = self.settings.test_source or HUB_NAME
        problems = read_problems(problem_file(source, self.folder))
        return build_prompts(problems, self.tokenizer, self.mask_id, self.settings.max_len, self.vocab_size)

    @override
    def warnings(self) -> Sequence[str]:
        """Warn about questions that do not fit."""
        n_left_out, n_asked = self.test_prompts.n_left_out, self.n_questions
        if not n_left_out:
            return []
        return [
            f"{n_left_out} of {n_left_out + n_asked} questions are left out: they leave no room for a program in "
            f"data.max_len {self.settings.max_len}"
        ]

    @property
    @override
    def n_questions(self) -> int:
        return len(self.test_prompts.problems)

    @override
    def prompts(self, indices: np.ndarray) -> np.ndarray:
        return self.test_prompts.xt[indices]

    @override
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> JudgedAnswers:
        """See `DataSet`; runs the programs."""
        problems = [self.test_prompts.problems[i] for i in indices]
        programs = decode_completions(self.tokenizer, tokens, self.test_prompts.xt[indices] != self.mask_id)
        verdicts = grade(programs, [problem.answer for problem in problems])
        figures = {"accuracy": np.array([verdict.right for verdict in verdicts], dtype=np.float32)}
        for name, reasons in FAILURES.items():
            figures[name] = np.array([verdict.reason in reasons for verdict in verdicts], dtype=np.float32)
        samples = [
            {
                "question": problem.question,
                "program": program,
                "value": verdict.value,
                "answer": problem.answer,
                "verdict": verdict.reason,
            }
            for problem, program, verdict in zip(problems, programs, verdicts, strict=True)
        ]
        return JudgedAnswers(figures, samples)

    @override
    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Number of operations of the program that solves a word problem; unknown for other questions."""
        if self.settings.source == "files":
            return {}
        return {"operations": count_operations(self.folder)[indices]}

    @override
    def verdicts(
        self, prompts: np.ndarray, tokens: np.ndarray, golds: Sequence[str | None] | None = None
    ) -> list[AnswerVerdict]:
        """Runs the programs in the sandbox; facts: `value` and, if it is known, the right `gold` answer."""
        texts = [self.completion(prompt, row) for prompt, row in zip(prompts, tokens, strict=True)]
        # Without a gold answer, 0 stands for it, and what is said of a number that is returned is left out.
        golds = [None] * len(texts) if golds is None else golds
        graded = grade(texts, ["0" if gold is None else gold for gold in golds])
        verdicts = []
        for text, verdict, gold in zip(texts, graded, golds, strict=True):
            returned = verdict.value is not None
            right: bool | None = verdict.right
            reason = verdict.explanation
            if gold is None and verdict.reason in ("right", "wrong value"):
                right, reason = None, ""
            reason = "; ".join(part for part in (f"returns {verdict.value}" if returned else "", reason) if part)
            if gold is not None and not right:
                reason = f"{reason}; the answer is {gold}"
            verdicts.append(AnswerVerdict(text, right, reason, {"value": verdict.value, "gold": gold}))
        return verdicts

    @override
    def check_gold(self, gold: str) -> str:
        """A number, or text that ends in `#### 18`, as GSM8K's answers do."""
        if "####" in gold:
            return final_answer(gold)
        gold_number(gold, "the gold answer")
        return gold

    @override
    def question(self, index: int) -> Question:
        """A problem and its number."""
        problem = self.test_prompts.problems[index]
        return Question(problem.question, problem.answer)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2.

    With rows from Hugging Face it also fetches the questions of GSM8K, on which models are tested.
    """
    parser = CommandParser(description="Tokenize TinyGSM into flat files for training, and fetch GSM8K's test.")
    parser.add_argument("--source", default="TinyGSM/TinyGSM", help="file, folder or Hugging Face data set")
    parser.add_argument("--tokenizer", default="Qwen/Qwen2-0.5B", help="Hugging Face name or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-len", type=whole_number(1, 1 << 20), default=512, help="tokens per row, a multiple of 8")
    parser.add_argument("--limit", type=whole_number(1), help="rows of the source to read")
    parser.add_argument("--workers", type=whole_number(1, 1024), help="processes; all cores by default")
    options = parser.parse_args(arguments)
    with ends_with_message(f"interrupted; the same command continues in {options.out}"):
        done = pretokenize(
            options.source, options.tokenizer, options.out, options.max_len, options.limit, options.workers
        )
        if is_on_hub(options.source):  # now, since the nodes of a cluster often have no network
            read_problems(problem_file(HUB_NAME, options.out))
        print(f"{options.out}: {done.n_written:,} rows, {done.n_left_out:,} left out (question too long)")


if __name__ == "__main__":
    main()
