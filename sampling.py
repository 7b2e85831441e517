"""Sample from a trained model: solve Sudoku puzzles, write programs, add numbers.

    python sampling.py --puzzle 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
    python sampling.py --checkpoint runs/tinygsm_puma --prompt "Anna has 5 books and buys 3 more. How many has she now?"
    python sampling.py --checkpoint runs/sudoku_puma --input puzzles.csv --out answers.jsonl

Without a checkpoint it takes the small Sudoku model of this repository. In a notebook:

    from sampling import load

    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    answer = load("runs/sudoku_mini_puma").solve(puzzle, trace=True)
    print(answer.text, answer.verdict.reason)
    answer.save_trace("solved.html")

docs/sampling.md describes both. The samplers are in `samplers/`; the data set (`data/`) defines questions, answers and
verdicts; `report/trace.py` draws how an answer came about.

Shapes: L positions.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args, overload

import numpy as np
from tqdm import tqdm
from typing_extensions import Unpack

from base.commands import CommandParser, ends_with_message, whole_number
from base.files import check_out
from base.text import escape
from config import DEFAULT_RULE, Config, Device, SamplingRule
from data.dataset import AnswerVerdict, DataSet
from data.questions import STANDARD_INPUT, Question, read_questions
from data.text import decode_whole
from samplers.infill import check_infills, encode_template
from samplers.options import add_rule_options, rule_of

if TYPE_CHECKING:
    import torch
    from rich.text import Text

    from model.transformer import Transformer
    from report.trace import Trace

DEVICES = get_args(Device)
# A small trained model, written by `python -m model.hub pack`.
SHIPPED = Path(__file__).resolve().parent / "model" / "sudoku"
BATCH_SIZE = 64
N_CANDIDATES = 5  # of a position in a trace
MAX_TRACES = 20  # on one page
Texts = str | list[str] | tuple[str, ...]  # one question, or a list of them
Gold = str | int | float  # a right answer
OUT_SUFFIXES, TRACE_SUFFIXES = (".jsonl", ".csv"), (".html", ".gif")

# torch takes seconds to import, so functions import it when they need it: `--help` and wrong options answer at once.


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question."""

    question: str
    shown: str | Text  # formatted for a terminal
    verdict: AnswerVerdict  # the answer on its own, and whether it is right
    tokens: np.ndarray  # int64 [L]
    order: np.ndarray  # int64 [L], step at which a position was filled, from 1; 0 for given positions
    # float32 [L], probability that the model gave to the token at the step that filled the position, before any
    # temperature; nan where it filled nothing: given positions, and EOS after the end.
    confidence: np.ndarray
    nfe: int  # network forward evaluations
    trace: Trace | None = None  # how the answer came about, if it was asked for

    @property
    def text(self) -> str:
        """Formatted for a terminal without colours."""
        return str(self.shown)

    def save_trace(self, path: str | Path) -> None:
        """Draw how the answer came about: a page (.html) or an animated GIF (.gif).

        Raises:
            ValueError: the answer has no trace, since `trace=True` was not given, or `path` has another suffix.
            OSError: the file cannot be written.
        """
        _save_traces([self], Path(path))

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the trace if there is one."""
        from report.trace import html_fragment

        return None if self.trace is None else html_fragment(self.trace)


class SampleOptions(TypedDict, total=False):
    """Options of `TrainedModel.solve`, which describes them, `complete` and `fill`."""

    seed: int
    batch_size: int
    trace: bool


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, ready to sample from, by the sampler that fits it."""

    model: Transformer
    config: Config
    data: DataSet
    device: torch.device

    @overload
    def solve(self, puzzles: str, rule: SamplingRule = ..., **options: Unpack[SampleOptions]) -> Answer: ...

    @overload
    def solve(
        self, puzzles: list[str] | tuple[str, ...], rule: SamplingRule = ..., **options: Unpack[SampleOptions]
    ) -> list[Answer]: ...

    def solve(
        self,
        puzzles: Texts,
        rule: SamplingRule = DEFAULT_RULE,
        *,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        trace: bool = False,
    ) -> Answer | list[Answer]:
        """Solve a puzzle, or a list of puzzles in batches; an answer for each, in order.

        Args:
            puzzles: cells row by row, `.` or `0` for empty ones.
            rule: which positions are filled first, and how many per forward pass.
            seed: of the random numbers, used by the temperature and the confidence `random`.
            batch_size: puzzles per forward pass; answers do not depend on it.
            trace: also record how each answer came about.

        Raises:
            ValueError: a puzzle is invalid, the rule does not work with this model, or it was not trained on puzzles.
        """
        self.check_option("puzzle", "solve")
        return self._ask(puzzles, None, rule, seed=seed, batch_size=batch_size, trace=trace)

    @overload
    def complete(
        self, prompts: str, rule: SamplingRule = ..., *, gold: Gold | None = ..., **options: Unpack[SampleOptions]
    ) -> Answer: ...

    @overload
    def complete(
        self,
        prompts: list[str] | tuple[str, ...],
        rule: SamplingRule = ...,
        *,
        gold: Sequence[Gold | None] | None = ...,
        **options: Unpack[SampleOptions],
    ) -> list[Answer]: ...

    def complete(
        self,
        prompts: Texts,
        rule: SamplingRule = DEFAULT_RULE,
        *,
        gold: Gold | Sequence[Gold | None] | None = None,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        trace: bool = False,
    ) -> Answer | list[Answer]:
        """Answer a prompt, or a list of prompts in batches; otherwise as `solve`.

        Args:
            prompts: questions in words, or whatever the data set takes, such as 123+456.
            gold: the right answer, or one per prompt (None where it is not known), for the verdicts.
        """
        self.check_option("prompt", "complete")
        return self._ask(prompts, gold, rule, seed=seed, batch_size=batch_size, trace=trace)

    @overload
    def fill(self, templates: str, rule: SamplingRule = ..., **options: Unpack[SampleOptions]) -> Answer: ...

    @overload
    def fill(
        self, templates: list[str] | tuple[str, ...], rule: SamplingRule = ..., **options: Unpack[SampleOptions]
    ) -> list[Answer]: ...

    def fill(
        self,
        templates: Texts,
        rule: SamplingRule = DEFAULT_RULE,
        *,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        trace: bool = False,
    ) -> Answer | list[Answer]:
        """Fill the holes of texts, such as `def f(): <3> return x` with a hole of three tokens; otherwise as `solve`.

        An answer is the whole text; nothing is said of whether it is right.

        Raises:
            ValueError: see `samplers.infill.encode_template`.
        """
        return self._ask(templates, None, rule, seed=seed, batch_size=batch_size, trace=trace, holes=True)

    def check_option(self, option: str, name: str) -> None:
        """Raise ValueError if the model's questions are not of kind `option` (`puzzle` or `prompt`).

        Args:
            name: the call or option, for the message.
        """
        wanted = self.data.question_option
        if option != wanted:
            other = {"solve": "complete", "complete": "solve"}.get(name, f"--{wanted}")
            raise ValueError(f"{name}: this model was trained on {self.config.data.dataset}; use {other}")

    def check_takes_gold(self, name: str) -> None:
        """Raise ValueError if right answers follow from the questions; `name` is the argument or option."""
        if not self.data.takes_gold:
            raise ValueError(f"{name}: {self.data.question_noun} need no right answers, leave it out")

    def _ask(
        self,
        questions: Texts,
        golds: Gold | Sequence[Gold | None] | None,
        rule: SamplingRule,
        *,
        holes: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Answer | list[Answer]:
        """The answer to one question, or a list of answers to a list."""
        texts = [questions] if isinstance(questions, str) else list(questions)
        right: list[Gold | None] = [None] * len(texts)
        if golds is not None:
            right = [golds] if isinstance(golds, str | int | float | Number) else list(golds)
        if any(gold is not None for gold in right):
            self.check_takes_gold("gold")
        if len(right) != len(texts):
            raise ValueError(f"{len(right)} gold answers for {len(texts)} prompts: give one each, or none")
        noun = "template" if holes else "question" if len(texts) > 1 else None  # None: nothing to tell apart
        asked = [
            Question(text, None if gold is None else str(gold), f"{noun} {number}" if noun else "")
            for number, (text, gold) in enumerate(zip(texts, right, strict=True), 1)
        ]
        answers = list(self.answers(asked, rule, holes=holes, **options))
        return answers[0] if isinstance(questions, str) else answers

    def answers(
        self,
        questions: Sequence[Question],
        rule: SamplingRule = DEFAULT_RULE,
        *,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        trace: bool = False,
        holes: bool = False,
    ) -> Iterator[Answer]:
        """Answers in order, as each batch is finished; a progress bar on a terminal. For arguments see `solve`.

        Args:
            holes: the questions are texts with holes, see `fill`.

        Raises:
            ValueError: questions are invalid (all are checked first, and named), or the rule does not work with this
                model.
        """
        rule.check(causal=self.config.causal)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} must be at least 0 and less than 2^32")
        prompts, golds = self._encode(questions, holes)
        return self._sample(questions, prompts, golds, rule, seed=seed, batch_size=batch_size, trace=trace, holes=holes)

    def answer_test(
        self, rows: Sequence[int], rule: SamplingRule = DEFAULT_RULE, *, seed: int = 0, trace: bool = False
    ) -> Iterator[Answer]:
        """Answers to the questions of the test with these numbers, the same as in an evaluation with this seed."""
        questions = [self.data.question(row) for row in rows]
        golds = [None if each.gold is None else self.data.check_gold(each.gold) for each in questions]
        prompts = self.data.prompts(np.array(rows, dtype=np.int64))
        return self._sample(
            questions, prompts, golds, rule, seed=seed, batch_size=BATCH_SIZE, trace=trace, row_ids=rows
        )

    def _encode(self, questions: Sequence[Question], holes: bool) -> tuple[np.ndarray, list[str | None]]:
        """Prompts (int64 [n, L]) and right answers; ValueError names all invalid questions."""
        if holes:
            check_infills(self.config)
        rows, golds, problems = [], [], []
        for question in questions:
            try:
                text = question.text
                rows.append(encode_template(text, self.data, self.config) if holes else self.data.encode(text))
                golds.append(None if question.gold is None else self.data.check_gold(question.gold))
            except ValueError as error:
                problems.append(f"{question.source}: {error}" if question.source else str(error))
        if len(problems) > 1:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ValueError(f"{len(problems)} of {len(questions)} {self.data.question_noun} are invalid\n{listed}")
        if problems:
            raise ValueError(problems[0])
        return np.stack(rows) if rows else np.empty((0, 0), dtype=np.int64), golds

    def _sample(
        self,
        questions: Sequence[Question],
        prompts: np.ndarray,
        golds: list[str | None],
        rule: SamplingRule,
        *,
        seed: int,
        batch_size: int,
        trace: bool,
        holes: bool = False,
        row_ids: Sequence[int] | None = None,
    ) -> Iterator[Answer]:
        """Answers to encoded questions.

        Args:
            row_ids: numbers of the questions, on which with `seed` the random numbers depend; by default 0, 1, ...
        """
        import torch

        from report.trace import build_trace
        from runtime.distributed import autocast, autocast_dtype
        from samplers.build import build_sampler

        config, data = self.config, self.data
        sampler = build_sampler(config, data.eos_id)
        precision = autocast_dtype(config.training.precision, self.device)
        ids = torch.arange(len(questions)) if row_ids is None else torch.tensor(row_ids)
        with _bar(len(questions), data.question_noun) as (bar, before_pass):
            for start in range(0, len(questions), batch_size):
                rows = slice(start, min(start + batch_size, len(questions)))
                with autocast(self.device, precision):
                    result = sampler(
                        self.model,
                        torch.from_numpy(prompts[rows]).to(self.device),
                        config.mask_id,
                        rule,
                        seed=seed,
                        row_ids=ids[rows],
                        before_pass=before_pass,
                        record=N_CANDIDATES if trace else None,
                    )
                tokens, order, confidence = (
                    each.cpu().numpy() for each in (result.tokens, result.order, result.confidence)
                )
                if holes:
                    verdicts = [AnswerVerdict(decode_whole(data.tokenizer, row)) for row in tokens]
                else:
                    verdicts = data.verdicts(prompts[rows], tokens, golds[rows])
                for i, verdict in enumerate(verdicts):
                    question, prompt = questions[start + i].text, prompts[start + i]
                    passes = result.history(i) if trace else []
                    yield Answer(
                        question,
                        escape(verdict.answer, keep="\n\t") if holes else data.show(prompt, tokens[i], order[i]),
                        verdict,
                        tokens[i],
                        order[i],
                        confidence[i],
                        int(result.nfe[i]),
                        build_trace(data, question, prompt, tokens[i], passes, config.mask_id, verdict)
                        if trace
                        else None,
                    )
                    bar.update()


@contextmanager
def _bar(n_questions: int, unit: str) -> Iterator[tuple[tqdm, Callable[[], None]]]:
    """A progress bar of answers where standard error is a terminal, and what to call before each pass."""
    with tqdm(total=n_questions, desc="sampling", unit=f" {unit}", disable=None, leave=False) as bar:
        n_passes = 0

        def before_pass() -> None:
            nonlocal n_passes
            n_passes += 1
            bar.set_postfix_str(f"{n_passes} forward passes")

        yield bar, before_pass


def load(path: str | Path | None = None, device: str = "auto", overrides: Sequence[str] = ()) -> TrainedModel:
    """Load a run directory (its newest checkpoint), a checkpoint folder, or a folder written by `model.hub`.

    `runs/NAME@best` is the best checkpoint of a run, `runs/NAME@5000` that of a step. Averaged weights if there are
    any.

    Args:
        path: None: the small Sudoku model of this repository.
        device: `auto`, `cpu` or `cuda`.
        overrides: `section.key=value` settings that replace the run's, such as the place of its data.

    Raises:
        ValueError: there is no usable checkpoint, a setting is wrong, or `device` is another one, or `cuda` and there
            is no GPU.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} must be one of {', '.join(DEVICES)}")
    if path is None:
        path = SHIPPED
        if not path.is_dir():
            raise ValueError(f"this checkout has no {path}: name a run directory or an exported folder")
    from model.hub import load_model
    from runtime.distributed import start_world

    chosen = start_world(device).device
    loaded = load_model(str(path), overrides)
    return TrainedModel(loaded.model.to(chosen), loaded.config, loaded.config.open_data(), chosen)


def record_of(answer: Answer, option: str) -> dict[str, Any]:
    """An answer as a line of a file; the same keys for all answers of a model.

    Args:
        option: what a question is called: `puzzle`, `prompt` or `template`.
    """
    verdict = answer.verdict
    return {
        option: answer.question,
        "answer": verdict.answer,
        "right": verdict.right,
        "verdict": verdict.reason,
        **verdict.facts,
        "nfe": answer.nfe,
    }


@contextmanager
def _output(out: Path | None, option: str, *, several: bool) -> Iterator[Callable[[Answer], None]]:
    """A function that writes an answer to a .jsonl or .csv file, or prints it if `out` is None.

    Args:
        option: see `record_of`.
        several: print each question above its answer.
    """
    if out is None:
        yield lambda answer: _print_answer(answer, escape(answer.question) if several else "")
        return
    with open(out, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        is_first = True

        def write(answer: Answer) -> None:
            nonlocal is_first
            record = record_of(answer, option)
            if out.suffix == ".jsonl":
                file.write(json.dumps(record) + "\n")
            else:
                if is_first:
                    table.writerow(record)
                table.writerow(record.values())
            is_first = False
            file.flush()  # answers so far outlive an interruption

        yield write


def _save_traces(answers: Sequence[Answer], path: Path) -> None:
    """See `Answer.save_trace`; a page may hold several."""
    traces = [answer.trace for answer in answers if answer.trace is not None]
    if len(traces) < len(answers):
        raise ValueError("the answer has no trace: sample it with trace=True")
    _check_trace_file(path, len(traces))
    from report.trace import draw_gif, write_trace_page

    if path.suffix == ".gif":
        draw_gif(traces[0], path)
    else:
        write_trace_page(traces, path)


def _check_trace_file(path: Path, n_traces: int) -> None:
    """Raise ValueError unless `path` is a file that can hold so many traces."""
    if path.suffix not in TRACE_SUFFIXES:
        raise ValueError(f"trace {path}: the suffix must be {' or '.join(TRACE_SUFFIXES)}")
    allowed = 1 if path.suffix == ".gif" else MAX_TRACES
    if n_traces > allowed:
        raise ValueError(f"trace {path}: {n_traces} questions, but it holds at most {allowed}; give fewer")


def _parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, SamplingRule]:
    parser = CommandParser(description="Solve puzzles, write programs or add numbers with a trained model.")
    parser.add_argument(
        "--checkpoint",
        help="run directory, RUN@best, RUN@STEP, checkpoint, or folder of `python -m model.hub`; by default the "
        "repository's Sudoku model",
    )
    parser.add_argument(
        "--puzzle", action="append", default=[], help="Sudoku: cells row by row, . or 0 for empty cells; repeatable"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a question in words, to which TinyGSM writes a program; or 123+456; repeatable",
    )
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        help="a text with holes for a model of text: `def f(): <3> return x` has a hole of three tokens; repeatable",
    )
    parser.add_argument(
        "--gold", action="append", default=[], help="the right answer to a --prompt, one for each, in their order"
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help=".csv, .txt or .jsonl file of questions (data/questions.py); - for standard input",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=".jsonl or .csv; by default answers are printed")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="draw how the answer came about: .html page or .gif")
    add_rule_options(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="from 0 to 2^32 - 1")
    parser.add_argument("--batch-size", type=whole_number(1, 1 << 20), default=BATCH_SIZE, help="questions per pass")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    options = parser.parse_args(arguments)
    if not (options.puzzle or options.prompt or options.input or options.template):
        parser.error("give a question: --puzzle, --prompt, --template or --input")
    if options.template and (options.puzzle or options.prompt or options.input):
        parser.error("--template goes with no other question: leave out --puzzle, --prompt and --input")
    if options.gold and len(options.gold) != len(options.prompt):
        parser.error(f"--gold: {len(options.gold)} for {len(options.prompt)} of --prompt; give one each, or none")
    return options, rule_of(parser, options)


def _questions(options: argparse.Namespace, trained: TrainedModel) -> list[Question]:
    """All questions of the command line: those of the options, then those of the file."""
    questions = []
    if options.gold:
        trained.check_takes_gold("--gold")
    for option in ("puzzle", "prompt", "template"):
        texts = getattr(options, option)
        if texts and option != "template":
            trained.check_option(option, f"--{option}")
        golds = options.gold if option == "prompt" and options.gold else [None] * len(texts)
        sources = [f"--{option} {number}" if len(texts) > 1 else "" for number in range(1, len(texts) + 1)]
        questions += [Question(*each) for each in zip(texts, golds, sources, strict=True)]
    if options.input is not None:
        questions += read_questions(options.input, trained.data.question_option)
    return questions


def _check_files(options: argparse.Namespace) -> None:
    """Raise ValueError, before any work is done, if a file cannot be written."""
    for option, suffixes in (("out", OUT_SUFFIXES), ("trace", TRACE_SUFFIXES)):
        path = getattr(options, option)
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise ValueError(f"--{option} {path}: the suffix must be {' or '.join(suffixes)}")
        check_out(path, f"--{option}", None if options.input in (None, STANDARD_INPUT) else Path(options.input))


def _print_answer(answer: Answer, heading: str) -> None:
    """Print an answer, in colours where standard output is a terminal that has them."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    verdict = answer.verdict
    with tqdm.external_write_mode():  # the bar moves out of the way
        if heading:
            console.print(heading, style="bold")
        console.print(answer.shown)
        if verdict.reason:
            console.print(escape(verdict.reason), style={True: "green", False: "red", None: ""}[verdict.right])
        console.print(f"{answer.nfe} network forward evaluations")
        if heading:
            console.print()


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    options, rule = _parse_arguments(arguments)
    with ends_with_message():
        _check_files(options)
        trained = load(options.checkpoint, options.device)
        questions = _questions(options, trained)
        if options.trace is not None:
            _check_trace_file(options.trace, len(questions))
        holes, traces = bool(options.template), options.trace is not None
        answers = trained.answers(
            questions, rule, seed=options.seed, batch_size=options.batch_size, trace=traces, holes=holes
        )
        verdicts, traced = [], []
        name = "template" if holes else trained.data.question_option
        with _output(options.out, name, several=len(questions) > 1) as write:
            for answer in answers:
                write(answer)
                verdicts.append(answer.verdict.right)
                traced += [answer] if answer.trace is not None else []
        if options.out is not None:
            print(f"wrote {options.out}")
        n_known = len(verdicts) - verdicts.count(None)
        if len(verdicts) > 1 and n_known:
            unknown = f", {verdicts.count(None)} unknown" if n_known < len(verdicts) else ""
            print(f"{verdicts.count(True)} of {n_known} right{unknown}")
        if options.trace is not None:
            _save_traces(traced, options.trace)
            print(f"wrote {options.trace}")


if __name__ == "__main__":
    main()
