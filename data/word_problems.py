"""A small replacement for TinyGSM and GSM8K that needs no network: generated word problems with programs.

Easy problems come from templates and take one or two operations on numbers up to 30, which are one token each. Medium
and hard problems are stories composed of two to four steps, each of which adds a sentence to the question and an
operation to the program. Their numbers go up to 99, one token each, or up to 999, tokenized digit by digit. The program
does the arithmetic, so a model has to find the right numbers and write the right expressions. The files have the format
of the real data (tokenized rows, a tokenizer, a test.jsonl like GSM8K's), so that all other code is the same.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from base.commands import say
from base.files import make_once, making_folder
from base.memory import check_memory
from data.text import TOKENIZER_DIR, encode_completions, encode_prompts, encode_rows, train_byte_pairs
from data.token_files import META_FILE, write_token_files

Difficulty = Literal["easy", "medium", "hard"]

TEST_FILE = "test.jsonl"


@dataclass(frozen=True)
class Level:
    """What the problems of one difficulty have in common."""

    name: str  # of a set; part of the seed of its problems
    folder: str  # beginning of its name, with the version of the texts, so that files of older versions are not used
    max_number: int  # in stories, results may be larger; templates have bounds of their own
    number: str  # regular expression that matches what one token contains of a number
    vocab_size: int  # large enough that nearly every word is one token; first token EOS, last the mask


LEVELS: dict[Difficulty, Level] = {
    # A small model copies each number from a position that the template fixes.
    "easy": Level("word problems", "word_problems_v3", 30, "[0-9]{1,2}", 512),
    # The space before a number belongs to its first digit, in the question and in the program.
    "medium": Level("medium word problems", "word_problems_medium_v1", 99, " ?[0-9]{1,2}", 640),
    "hard": Level("hard word problems", "word_problems_hard_v1", 999, " ?[0-9]", 576),
}
# A token spans at most: part of a number (above); a newline and an indent without its last space; a word or identifier
# with the space before it (so that a word is the same token in the question and at the start of a line); signs; spaces.
PIECES = r"|\n {0,3}| ?[A-Za-z_]+| ?[^A-Za-z_0-9\s]+|\s+"
N_TOKENIZER_ROWS = 5000
OPERATION = re.compile(r" (?:\+|-|\*|//) ")
MAX_STALE = 10_000  # consecutive draws of known problems, after which the templates are taken to be used up

NAMES = {
    "Anna": "she", "Ben": "he", "Carla": "she", "David": "he", "Emma": "she", "Felix": "he", "Grace": "she",
    "Jack": "he", "Kate": "she", "Liam": "he",
}  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "marbles", "pens", "plums", "shells", "stamps", "stickers"
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A kind of problem. The question contains `{name}`, `{he}`, `{things}` and the numbers."""

    question: str
    program: str  # lines of the function's body before `return result`
    numbers: dict[str, tuple[int, int]]  # lowest and highest
    answer: Callable[..., int]  # from the numbers by name
    allowed: Callable[..., bool] = lambda **numbers: True  # which combinations of numbers make sense


TEMPLATES = (
    Template(
        "{name} has {a} {things}. Then {he} buys {b} more. How many {things} does {name} have now?",
        "items = {a}\nbought = {b}\nresult = items + bought",
        {"a": (2, 30), "b": (2, 30)},
        lambda a, b: a + b,
    ),
    Template(
        "{name} has {a} {things} and gives {b} of them to a friend. How many {things} are left?",
        "items = {a}\ngiven = {b}\nresult = items - given",
        {"a": (2, 30), "b": (2, 30)},
        lambda a, b: a - b,
        lambda a, b: a > b,
    ),
    Template(
        "{name} buys {a} boxes of {things}. There are {b} {things} in each box. How many {things} does {he} buy?",
        "boxes = {a}\nper_box = {b}\nresult = boxes * per_box",
        {"a": (2, 30), "b": (2, 30)},
        lambda a, b: a * b,
    ),
    Template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "items = {a}\nfriends = {b}\nresult = items // friends",
        {"a": (4, 30), "b": (2, 9)},
        lambda a, b: a // b,
        lambda a, b: a % b == 0,
    ),
    Template(
        "{name} has {a} {things}. Then {he} buys {b} boxes with {c} {things} each. How many {things} does {he} have?",
        "items = {a}\nboxes = {b}\nper_box = {c}\nresult = items + boxes * per_box",
        {"a": (2, 30), "b": (2, 30), "c": (2, 30)},
        lambda a, b, c: a + b * c,
    ),
    Template(
        "{name} works {a} hours a day for {b} days and earns ${c} an hour. How much does {he} earn?",
        "hours = {a}\ndays = {b}\nwage = {c}\nresult = hours * days * wage",
        {"a": (2, 10), "b": (2, 30), "c": (8, 30)},
        lambda a, b, c: a * b * c,
    ),
)


@dataclass(frozen=True)
class Step:
    """A kind of step of a story: one operation on what somebody has.

    Sentences contain the number `{n}`, `{units}`, `{Owner}` (name or pronoun of those who have them, with a verb that
    ends in `{s}`), `{name}` (always their name) and `{other}` (the name of the other person). An opening sentence also
    says how many units there are at first, `{a}`, and most say it after `{n}`.
    """

    variable: str  # of the result
    sign: str  # of the operation on what there was before and `n`, or on what two persons have
    sentences: tuple[str, ...]
    before: tuple[str, ...]  # which units the step takes
    openings: tuple[str, ...] = ()
    after: str | None = None  # units of the result, if it has others
    owner: Literal["same", "other", "both"] = "same"  # whose the result is


GOODS, BOXES, DOLLARS = "{things}", "boxes", "dollars"
COUNTED = (GOODS, BOXES)
ALL_UNITS = (GOODS, BOXES, DOLLARS)
JOIN = Step("both", "+", ("They put their {units} together.",), ALL_UNITS, owner="both")
STEPS = (
    Step(
        "total",
        "+",
        ("{Owner} buy{s} {n} more {units}.", "{Owner} get{s} {n} more {units}."),
        COUNTED,
        ("{name} buys {n} {units} and has {a} at home.",),
    ),
    Step(
        "left",
        "-",
        ("{Owner} give{s} {n} {units} away.", "{Owner} lose{s} {n} {units}."),
        COUNTED,
        ("{name} gives {n} of {his} {a} {units} away.", "{name} loses {n} of {his} {a} {units}."),
    ),
    Step("saved", "+", ("{Owner} earn{s} {n} more dollars.",), (DOLLARS,)),
    Step(
        "rest",
        "-",
        ("{Owner} spend{s} {n} dollars.",),
        (DOLLARS,),
        ("{name} spends {n} of {his} {a} dollars.",),
    ),
    Step("part", "//", ("{Owner} split{s} the {units} into {n} equal parts and keep{s} one.",), ALL_UNITS),
    Step("boxes", "//", ("{Owner} pack{s} the {units} into boxes of {n}.",), (GOODS,), after=BOXES),
    Step("items", "*", ("Each box has {n} {things} in it.",), (BOXES,), after=GOODS),
    Step(
        "money",
        "*",
        ("{Owner} sell{s} the {units} for {n} dollars each.",),
        COUNTED,
        ("For {n} dollars each, {name} sells {a} {units}.",),
        after=DOLLARS,
    ),
    Step(
        "times",
        "*",
        ("{other} has {n} times as many {units} as {name}.",),
        ALL_UNITS,
        ("{other} has {n} times as many {units} as {name}, who has {a}.",),
        owner="other",
    ),
    Step(
        "more",
        "+",
        ("{other} has {n} more {units} than {name}.",),
        ALL_UNITS,
        ("{other} has {n} more {units} than {name}, who has {a}.",),
        owner="other",
    ),
    Step(
        "fewer",
        "-",
        ("{other} has {n} fewer {units} than {name}.",),
        ALL_UNITS,
        ("{other} has {n} fewer {units} than {name}, who has {a}.",),
        owner="other",
    ),
    Step("joined", "+", ("{other} has {n} {units}. They put their {units} together.",), ALL_UNITS, owner="both"),
    JOIN,
)
MAX_FACTOR = 99  # of factors and divisors
MAX_VALUE = 9999  # of results


@dataclass(frozen=True)
class WordProblem:
    """A question, a program that computes the answer, in the format of TinyGSM, and the answer."""

    question: str
    code: str
    answer: int


def generate_problems(n_problems: int, seed: int, difficulty: Difficulty = "easy") -> list[WordProblem]:
    """Distinct problems in random order; the first k do not depend on `n_problems`."""
    level = LEVELS[difficulty]
    generator = random.Random(f"{level.name} {seed}")
    problems: dict[str, WordProblem] = {}
    check_memory(1500 * n_problems, f"a set of {n_problems:,} word problems")
    n_drawn_before = 0  # consecutive draws of known problems
    while len(problems) < n_problems and n_drawn_before < MAX_STALE:
        problem = _draw_easy(generator) if difficulty == "easy" else _draw_story(generator, level.max_number)
        n_drawn_before = n_drawn_before + 1 if problem.question in problems else 0
        problems.setdefault(problem.question, problem)
    if len(problems) < n_problems:
        raise ValueError(
            f"found {len(problems):,} distinct word problems, but {n_problems:,} are requested: lower data.n_train"
        )
    return list(problems.values())


def _draw_easy(generator: random.Random) -> WordProblem:
    template = generator.choice(TEMPLATES)
    name = generator.choice(sorted(NAMES))
    words = {"name": name, "he": NAMES[name], "things": generator.choice(THINGS)}
    while True:
        numbers = {key: generator.randint(*bounds) for key, bounds in template.numbers.items()}
        if template.allowed(**numbers):
            break
    lines = template.program.format(**words, **numbers).split("\n")
    return WordProblem(
        template.question.format(**words, **numbers), _function([*lines, "return result"]), template.answer(**numbers)
    )


def _function(lines: list[str]) -> str:
    """A program in the form of TinyGSM's."""
    return "def simple_math_problem() -> int:\n" + "\n".join(f"    {line}" for line in lines)


def _draw_story(generator: random.Random, max_number: int) -> WordProblem:
    units = generator.choice(ALL_UNITS)
    steps = _draw_steps(generator, generator.randint(2, 4), units)
    numbers = None
    while numbers is None:
        numbers = _draw_numbers(generator, steps, max_number)
    start, operands, answer = numbers
    name, other = generator.sample(sorted(NAMES), 2)
    story = _Story(name, other, generator.choice(THINGS), start, units)
    for step, n in zip(steps, operands, strict=True):
        story.add(step, n, generator)
    return WordProblem(" ".join([*story.sentences, story.question()]), story.program(), answer)


@dataclass
class _Story:
    """A medium or hard problem as far as it is told: its sentences, its program, and who has what now."""

    owner: str  # who is asked about at the end: one of two people, or "they"
    other: str
    things: str
    start: int  # the number that the first person has at the start
    units: str  # what is counted, as a form with {things}
    kept: str = ""  # variable of the first person's number, once the story has turned to the other one
    variable: str = "start"  # of the owner's number
    sentences: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, step: Step, n: int, generator: random.Random) -> None:
        """Tell one step with the number `n`, in a sentence and a line of the program."""
        forms = step.sentences
        if not self.sentences:
            self.lines.append(f"start = {self.start}")
            if step.openings and generator.random() < 0.5:
                forms = step.openings
            else:
                self.sentences.append(f"{self.owner} has {self.start} {self._counted()}.")
        self.sentences.append(generator.choice(forms).format(**self._words(n)))
        self.lines.append(f"{step.variable} = {self.variable} {step.sign} {self.kept if step is JOIN else n}")
        if step.owner == "other":
            self.owner, self.other, self.kept = self.other, self.owner, self.variable
        elif step.owner == "both":
            self.owner = "they"
        self.variable, self.units = step.variable, step.after or self.units

    def _words(self, n: int) -> dict[str, str | int]:
        """What the form of a sentence may name."""
        words: dict[str, str | int] = {"n": n, "a": self.start, "units": self._counted(), "things": self.things}
        words |= {"name": self.owner, "other": self.other}
        if self.owner == "they":
            return words | {"Owner": "They", "s": ""}
        he = NAMES[self.owner]
        # A pronoun only while the story has one person; later it could mean either.
        subject = he.capitalize() if self.sentences and not self.kept else self.owner
        return words | {"Owner": subject, "s": "s", "his": {"he": "his", "she": "her"}[he]}

    def _counted(self) -> str:
        return self.units.format(things=self.things)

    def question(self) -> str:
        """The last sentence."""
        do = "do" if self.owner == "they" else "does"
        return f"How many {self._counted()} {do} {self.owner} have now?"

    def program(self) -> str:
        """The program, which returns the owner's number."""
        return _function([*self.lines, f"return {self.variable}"])


def _draw_steps(generator: random.Random, n_operations: int, units: str) -> list[Step]:
    """Kinds of steps that make sense in this order, each at most once; `units` are those at the start."""
    steps: list[Step] = []
    while len(steps) < n_operations:
        step = generator.choice([step for step in STEPS if units in step.before and _may_follow(step, steps)])
        steps.append(step)
        units = step.after or units
    return steps


def _may_follow(step: Step, earlier: list[Step]) -> bool:
    if step in earlier:
        return False
    if step.after in COUNTED and any(each.after in COUNTED for each in earlier):
        return False  # goods are put into boxes, or are in boxes from the start
    switches = [number for number, each in enumerate(earlier) if each.owner != "same"]
    if step is JOIN:  # both still have the same units
        return len(switches) == 1 and all(each.owner != "both" and not each.after for each in earlier[switches[0] :])
    return step.owner == "same" or not switches


def _draw_numbers(generator: random.Random, steps: list[Step], max_number: int) -> tuple[int, list[int], int] | None:
    """The number at the start, those of the steps and the answer; None if none fits a step, or a result is too large.

    Every number and every result is at least 2, so that units are plural.
    """
    start = value = _draw_number(generator, 10, max_number)
    operands, kept = [], 0
    for step in steps:
        highest = {"+": max_number, "-": min(max_number, value - 2), "*": min(MAX_FACTOR, MAX_VALUE // value)}
        if step is JOIN:
            n = kept
        elif step.sign == "//":
            divisors = [n for n in range(2, min(MAX_FACTOR, value // 2) + 1) if value % n == 0]
            if not divisors:
                return None
            n = generator.choice(divisors)
        elif highest[step.sign] < 2:
            return None
        else:
            n = _draw_number(generator, 2, highest[step.sign])
        if step.owner == "other":
            kept = value
        value = {"+": value + n, "-": value - n, "*": value * n, "//": value // n}[step.sign]
        if value > MAX_VALUE:
            return None
        operands.append(n)
    return start, operands, value


def _draw_number(generator: random.Random, low: int, high: int) -> int:
    """A number from low to high, both included; every number of digits is equally likely."""
    n_digits = generator.randint(len(str(low)), len(str(high)))
    return generator.randint(max(low, 10 ** (n_digits - 1)), min(high, 10**n_digits - 1))


def train_tokenizer(difficulty: Difficulty = "easy") -> Any:
    """Train a byte-pair tokenizer on such problems; the result is deterministic."""
    level = LEVELS[difficulty]
    problems = generate_problems(N_TOKENIZER_ROWS, 0, difficulty)
    texts = [text for problem in problems for text in (problem.question, problem.code)]
    return train_byte_pairs(texts, level.number + PIECES, level.vocab_size)


def cached_word_problems(
    data_dir: str | Path, n_train: int, n_test: int, seed: int, max_len: int, difficulty: Difficulty = "easy"
) -> Path:
    """The folder of these problems in `data_dir`, written atomically on first use.

    It contains the files that `data/pretokenize.py` writes, with `n_train` rows, and `test.jsonl` with `n_test` other
    problems.

    Raises:
        ValueError: a problem does not fit `max_len` tokens.
        WriteError: the folder cannot be written.
    """
    folder = Path(data_dir) / f"{LEVELS[difficulty].folder}_{n_train}_{n_test}_seed{seed}_len{max_len}"

    def make() -> None:
        say(f"writing {n_train + n_test:,} word problems to {folder}")
        problems = generate_problems(n_train + n_test, seed, difficulty)
        tokenizer = train_tokenizer(difficulty)
        questions, codes = [problem.question for problem in problems], [problem.code for problem in problems]
        longest = _longest(tokenizer, questions, codes)
        if longest > max_len:
            raise ValueError(
                f"data.max_len {max_len} is too short for the word problems: set it to {longest + -longest % 8}"
            )
        labels, prompt_bits, _ = encode_rows(
            tokenizer.backend_tokenizer, tokenizer.eos_token_id, questions[:n_train], codes[:n_train], max_len
        )
        assert len(labels) == n_train  # all fit
        facts = {"dataset": "word problems", "tokenizer": TOKENIZER_DIR, "eos_id": tokenizer.eos_token_id}
        with making_folder(folder) as scratch:
            tokenizer.save_pretrained(scratch / TOKENIZER_DIR)
            with open(scratch / TEST_FILE, "w", encoding="utf-8") as file:
                for problem in problems[n_train:]:
                    row = {"question": problem.question, "answer": f"{problem.code}\n#### {problem.answer}"}
                    file.write(json.dumps(row) + "\n")
            write_token_files(scratch, labels, prompt_bits, facts)

    make_once(folder, (folder / META_FILE).exists, make, "data.data_dir")
    return folder


def count_operations(folder: Path) -> np.ndarray:
    """Number of operations of the program of each test problem in a folder of word problems, int64 [n]."""
    lines = (folder / TEST_FILE).read_text(encoding="utf-8").splitlines()
    return np.array([len(OPERATION.findall(json.loads(line)["answer"])) for line in lines])


def _longest(tokenizer: Any, questions: list[str], codes: list[str]) -> int:
    """Length of the longest row in tokens, including EOS."""
    prompts = encode_prompts(tokenizer.backend_tokenizer, questions)
    programs = encode_completions(tokenizer.backend_tokenizer, codes)
    return max(len(prompt) + len(program) for prompt, program in zip(prompts, programs, strict=True)) + 1
