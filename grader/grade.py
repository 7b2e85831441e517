"""Grade a model's answers to maths problems: extract the program, run it, compare its value with the gold answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Literal, get_args

from grader.sandbox import MAX_PROGRAM, Outcome, run_programs

TOLERANCE = 1e-3  # absolute; two integers must be equal

Reason = Literal[
    "right",
    "wrong value",
    "no number",  # the value is not a number
    "no program",  # the text contains no function
    "syntax error",  # no part of the function compiles
    "failed to run",  # an exception, or no result
    "out of time",
    "out of memory",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
REASON_OF_STATUS: dict[str, Reason] = {  # of an outcome without a value
    "syntax_error": "syntax error",
    "error": "failed to run",
    "killed": "failed to run",
    "timeout": "out of time",
    "memory": "out of memory",
}
# What is counted in records, and the reasons for it.
FAILURES: dict[str, tuple[Reason, ...]] = {
    "fails_to_parse": ("no program", "syntax error"),
    "fails_to_run": ("failed to run", "out of memory"),
    "out_of_time": ("out of time",),
}

# The patterns below take linear time on any text, so a model's output cannot stall the grader. The number of names
# in an import is limited, because the search keeps a hundred bytes of state for each.
# The first line of a function, at the start of a line or after an opening fence.
FIRST_DEF = re.compile(r"(?:^(?P<indent>[ \t]*)|```\w*[ \t]*)(?P<code>def[ \t]+\w+[ \t]*\()", re.MULTILINE)
IMPORT = re.compile(
    r"^(?:import[ \t]+[\w.]+(?:[ \t]+as[ \t]+\w+)?(?:[ \t]*,[ \t]*[\w.]+){0,99}[ \t]*"
    r"|from[ \t]+[\w.]+[ \t]+import[ \t][\w*, \t()]+)$",
    re.MULTILINE,
)
# Strings (an unclosed one extends to the end of the line, triple-quoted to the end of the text), comments, or the end
# of a program: a fence or a special token.
STRING_OR_END = re.compile(
    r"""
      \"\"\" (?:[^\\]|\\.)*? (?:\"\"\"|\\?\Z)
    | ''' (?:[^\\]|\\.)*? (?:'''|\\?\Z)
    | " (?:[^"\\\n]|\\.)* "?
    | ' (?:[^'\\\n]|\\.)* '?
    | \# (?:(?!```|<\|)[^\n])*
    | (?P<end> ``` | <\| )
    """,
    re.VERBOSE | re.DOTALL,
)

CURRENCY = r"(?:US\$|[$€£¥₹]|USD|EUR|GBP)"
NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?) \s* {CURRENCY}? \s* (?P<inner_sign>[-+]?)
    (?P<digits> (?:[0-9]{{1,3}}(?:,[0-9]{{3}})+ | [0-9]+) (?P<fraction>\.[0-9]*)? | \.[0-9]+ )
    (?P<exponent>[eE][-+]?[0-9]+)?
    \s* (?:{CURRENCY} | % | dollars? | cents? | euros? | pounds?)?
    """,
    re.VERBOSE,
)
MAX_NUMBER = 100  # characters


@dataclass(frozen=True)
class Verdict:
    """Grade of a completion."""

    right: bool
    value: float | str | None  # of the program, as in `grader.sandbox.Outcome`
    reason: Reason
    message: str = ""  # details of the reason, if any

    @property
    def explanation(self) -> str:
        """The reason with its details."""
        return f"{self.reason}: {self.message}" if self.message else self.reason


def grade(
    completions: Sequence[str],
    golds: Sequence[str | float],
    *,
    n_workers: int | None = None,
    on_done: Callable[[], object] | None = None,
) -> list[Verdict]:
    """Grade completions; verdicts in the same order.

    The gold answers are used only here, neither to extract a program nor in the sandbox.

    Args:
        completions: model output that contains a program.
        golds: the right answers, as numbers or text.
        n_workers: programs run in parallel; see `grader.sandbox.run_programs`.
        on_done: called when a completion is graded, once for each.

    Raises:
        ValueError: the lengths differ, or a gold answer is not a number.
    """
    if len(completions) != len(golds):
        raise ValueError(f"{len(completions)} completions but {len(golds)} gold answers")
    numbers = [gold_number(gold, f"gold answer {i}") for i, gold in enumerate(golds)]
    programs = {i: program for i, text in enumerate(completions) if (program := extract_program(text)) is not None}
    verdicts = [Verdict(False, None, "no program")] * len(completions)
    if on_done is not None:
        for _ in range(len(completions) - len(programs)):
            on_done()
    outcomes = run_programs(list(programs.values()), n_workers=n_workers, on_done=on_done)
    for i, outcome in zip(programs, outcomes, strict=True):
        verdicts[i] = judge(outcome, numbers[i])
    return verdicts


def judge(outcome: Outcome, gold: float) -> Verdict:
    """Compare the value that a program returned with the gold answer."""
    if outcome.status != "ok":
        return Verdict(False, None, REASON_OF_STATUS[outcome.status], outcome.message)
    number = parse_number(outcome.value)
    if number is None:
        return Verdict(False, outcome.value, "no number", outcome.message)
    is_right = equals(number, gold)
    return Verdict(is_right, outcome.value, "right" if is_right else "wrong value")


def extract_program(text: str) -> str | None:
    """Extract the program from a model's output: the first function and the text up to a fence or special token.

    Imports before the function are included; inside an open fence, all text before it is. A fence in a string does not
    count. The last lines may not compile: the sandbox removes those, because compiling hostile text can hang or crash
    an interpreter.

    Returns:
        The program, at most `grader.sandbox.MAX_PROGRAM` characters; None if the text contains no function.
    """
    text = text.replace("\r\n", "\n")
    start = FIRST_DEF.search(text)
    if start is None:
        return None
    code = text[start.start("code") :][:MAX_PROGRAM]
    for token in STRING_OR_END.finditer(code):
        if token["end"]:
            code = code[: token.start()]
            break
    program = _preamble(text[: start.start("code")]) + code
    if start["indent"]:
        program = "\n".join(line.removeprefix(start["indent"]) for line in program.split("\n"))
    return program[:MAX_PROGRAM]


def _preamble(head: str) -> str:
    """The text before the first function that belongs to the program."""
    before, *fenced = head.rsplit("```", 1)
    if fenced and before.count("```") % 2 == 0:  # the last fence opens the program
        return fenced[0].partition("\n")[2].rstrip(" \t")
    return "".join(f"{line}\n" for line in IMPORT.findall(head))


def parse_number(value: object) -> int | float | None:
    """Convert a value to a finite number; None if it is not one.

    Strings may have a sign, commas between thousands, an exponent, a currency or a percent sign: "-$1,234.50", "+3e2",
    "18 dollars". True and False are not numbers.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if isinstance(value, int) or isfinite(value) else None
    if not isinstance(value, str) or len(value) > MAX_NUMBER:
        return None
    match = NUMBER.fullmatch(value.strip().replace("\N{MINUS SIGN}", "-"))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    spelled = (match["sign"] or match["inner_sign"]) + match["digits"].replace(",", "")
    if "." not in spelled and not match["exponent"]:
        return int(spelled)
    number = float(spelled + (match["exponent"] or ""))
    return number if isfinite(number) else None


def equals(number: float, gold: float) -> bool:
    """Whether an answer is right: integers must be equal, other numbers within 1e-3."""
    if isinstance(number, int) and isinstance(gold, int):
        return number == gold
    return abs(Fraction(number) - Fraction(gold)) <= TOLERANCE  # exact: no overflow, no rounding


def gold_number(gold: object, name: str) -> int | float:
    """A gold answer as a number; ValueError uses `name` for it."""
    number = parse_number(gold)
    if number is None:
        raise ValueError(f"{name} is not a number: {gold!r:.{MAX_NUMBER}}")
    return number
