"""From text to verdict."""

from __future__ import annotations

import json
import textwrap
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grader.grade import FAILURES, REASONS, STRING_OR_END, Verdict, equals, extract_program, grade, judge, parse_number
from grader.sandbox import MAX_PROGRAM, Outcome
from tests.conftest import SHARED
from tests.grader_disagreements import DISAGREEMENTS

CASES = SHARED / "verdicts" / "grader_cases.jsonl"
PROGRAM = "def f():\n    return 18\n"

# What models write, and the program in it; None stands for PROGRAM, give or take white space.
EXTRACTED: dict[str, tuple[str, str | None]] = {
    "bare": (PROGRAM, None),
    "fenced": (f"```python\n{PROGRAM}```\n", None),
    "fenced without a language": (f"```\n{PROGRAM}```", None),
    "text around": (f"Let's think.\n\n```python\n{PROGRAM}```\nSo it's 18.\n```\nx\n```", None),
    "fence never opened": (f"{PROGRAM}```\nThe answer is 18.", None),
    "fence never closed": (f"Sure:\n```python\n{PROGRAM}", None),
    "fence in the middle of a line": ("Sure: ```python\ndef f():\n    return 18```The answer is 18", None),
    "function right after the fence": (f"```python {PROGRAM}```", None),
    "fence in a comment": ("def f():\n    return 18\n    # done ```\nmore", "def f():\n    return 18\n    # done "),
    "other blocks first": (f"```\n17 + 1\n```\nand so\n```python\n{PROGRAM}```", None),
    "indented in a list": ("1. Code:\n   ```python\n   def f():\n       return 18\n   ```", None),
    "indented with imports": (
        "- Code:\n  ```python\n  import math\n\n  def f():\n      return 18\n  ```",
        f"import math\n\n{PROGRAM}",
    ),
    "windows lines": (PROGRAM.replace("\n", "\r\n"), None),
    "special token": (f"{PROGRAM}<|endoftext|>def g(): pass", None),
    "imports in the block": (f"```python\nimport math\nX = 1\n\n{PROGRAM}```", f"import math\nX = 1\n\n{PROGRAM}"),
    "imports without a block": (
        f"We import fees.\nimport math\nfrom math import ceil, floor\n{PROGRAM}",
        f"import math\nfrom math import ceil, floor\n{PROGRAM}",
    ),
    "print behind": (f"{PROGRAM}\nprint(f())", f"{PROGRAM}\nprint(f())"),
    "fences in a docstring": (
        'def f():\n    """\n    Call\n    ```python\n    f()\n    ```\n    """\n    return 18\n```\nmore',
        'def f():\n    """\n    Call\n    ```python\n    f()\n    ```\n    """\n    return 18\n',
    ),
    "fence in a docstring of other quotes": (
        "def f():\n    '''a \"\"\" ``` b'''\n    return 18\n```",
        "def f():\n    '''a \"\"\" ``` b'''\n    return 18\n",
    ),
    "fence in a string": ("def f():\n    x = '```'\n    return 18\n```", "def f():\n    x = '```'\n    return 18\n"),
    "open string": ("def f():\n    return 18\nThat's it.\n```", "def f():\n    return 18\nThat's it.\n"),
    "quotes in comments": ('def f():  # it\'s """\n    return 18\n```', 'def f():  # it\'s """\n    return 18\n'),
    "two functions": (
        "def f():\n    return 1\n\ndef g():\n    return 2",
        "def f():\n    return 1\n\ndef g():\n    return 2",
    ),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_the_program_is_found(name: str) -> None:
    text, expected = EXTRACTED[name]
    program = extract_program(text)
    assert program is not None
    if expected is None:
        assert program.strip() == PROGRAM.strip()
    else:
        assert program == expected


@pytest.mark.parametrize("text", ["", "The answer is 18.", "```python\nx = 18\n```", "define f(x)", "return 18", "def"])
def test_text_without_a_function_is_no_program(text: str) -> None:
    assert extract_program(text) is None


@pytest.mark.parametrize(
    "unit",
    [
        '"""\\',
        "'''\\",
        "```",
        "``",
        '"',
        '"\\',
        "'\\",
        "#",
        "<|",
        " ",
        "\t",
        "def ",
        "import a,",
        "import  a",
        "a,",
        "x\n",
    ],
)
def test_hostile_text_is_searched_in_linear_time(unit: str) -> None:
    # Each of these makes some careless pattern quadratic, which would take minutes.
    started = time.process_time()
    for start in ("", "from a import ", "import a", "import a as "):
        text = f"{start}{unit * 50_000}!"
        extract_program(text)
        for whole in (f"{text}\n{PROGRAM}", f"```\n{text}\n{PROGRAM}", f"{PROGRAM}{text}", f"def f():\n  '{text}"):
            program = extract_program(whole)
            assert program is not None
            assert len(program) <= MAX_PROGRAM
    assert time.process_time() - started < 20


@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_an_unclosed_string_ends_only_with_the_text(quotes: str) -> None:
    # A last backslash escapes nothing. If it ended the search, each of the quotes would start another one.
    text = f"{quotes}\n" + f"\\{quotes}\n" * 3180 + "\\"
    assert [match.span() for match in STRING_OR_END.finditer(text)] == [(0, len(text))]
    assert extract_program(f"def f():\n{text}") == f"def f():\n{text}"[:MAX_PROGRAM]


# Text of a given size that makes a careless search slow or large.
LARGE: dict[str, Callable[[int], str]] = {
    "indent": lambda n: " " * n + PROGRAM,
    "indent in a fence": lambda n: "```python\n" + " \t" * (n // 2) + PROGRAM,
    "indent of every line": lambda n: (" " * 1000 + "x\n") * (n // 1000) + " " * 1000 + PROGRAM,
    "indented program": lambda n: " " * (n // 2) + "def f():\n" + " " * (n // 2) + "    return 18\n",
    "import of many names": lambda n: "import a" + ",a" * (n // 2) + "!\n" + PROGRAM,
    "space in a line": lambda n: "def" + " " * n + "\n" + PROGRAM,
}


@pytest.mark.parametrize("name", LARGE)
def test_ten_times_the_text_takes_ten_times_the_work(name: str) -> None:
    seconds = []
    for n in (4 * 10**5, 4 * 10**6):
        text = LARGE[name](n)
        times = []
        for _ in range(3):
            start = time.process_time()
            program = extract_program(text)
            times.append(time.process_time() - start)
        seconds.append(min(times))
        assert program is not None
        assert program.startswith("def f():\n")
    assert seconds[1] < 40 * seconds[0] + 0.02  # a quadratic search takes a hundred times as long
    tracemalloc.start()
    try:
        extract_program(text)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 * len(text)


NUMBERS: dict[object, int | float | None] = {
    18: 18,
    -2.5: -2.5,
    "18": 18,
    " +18 ": 18,
    "-18": -18,
    "\N{MINUS SIGN}18": -18,
    "1,234,567": 1234567,
    "1,234.50": 1234.5,
    "18.": 18.0,
    ".5": 0.5,
    "1e3": 1000.0,
    "-1.5E-2": -0.015,
    "$18": 18,
    "-$1,234.50": -1234.5,
    "$-18": -18,
    "$ 18.00": 18.0,
    "US$18": 18,
    "18 USD": 18,
    "18€": 18,
    "£3": 3,
    "18 dollars": 18,
    "1 dollar": 1,
    "50%": 50,
    "18.0": 18.0,
    "": None,
    "eighteen": None,
    "18 apples": None,
    "17 18": None,
    "18 or 19": None,
    "1,2": None,
    "12,34": None,
    "1,234,56": None,
    "1,2345": None,
    "--18": None,
    "-$-18": None,
    "1e": None,
    "1e999": None,
    "nan": None,
    "inf": None,
    "0x12": None,
    "1_000": None,
    "٣": None,
    "9" * 101: None,
    "(160, 300)": None,
    float("nan"): None,
    float("inf"): None,
    None: None,
    True: None,
}


@pytest.mark.parametrize("value", [value for value in NUMBERS if value is not True])
def test_numbers_are_read(value: object) -> None:
    number = parse_number(value)
    assert number == NUMBERS[value]
    assert type(number) is type(NUMBERS[value])


def test_truth_is_no_number() -> None:
    assert parse_number(True) is None
    assert parse_number(False) is None


@given(st.integers(-(10**30), 10**30))
def test_integers_survive_being_written_out(number: int) -> None:
    for text in (f"{number}", f"{number:,}", f"{number:+,}", f"${number:,}"):
        read = parse_number(text)
        assert read == number
        assert type(read) is int


@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_floats_survive_being_written_out(number: float) -> None:
    assert parse_number(repr(number)) == number
    assert parse_number(f"{number:.17e}") == number


@pytest.mark.parametrize(
    ("number", "gold", "expected"),
    [
        (18, 18, True),
        (18, 18.0, True),
        (18.0005, 18, True),
        (17.9995, 18, True),
        (18.002, 18, False),
        (-18, 18, False),
        (19, 18, False),
        (299.99999999999994, 300, True),
        (10**20, 10**20, True),
        (10**20 + 1, 10**20, False),  # equal as floats
        (1e20, 10**20, True),
        (10**400, 18.5, False),  # no float is that large
        (0.3333, 1 / 3, True),
    ],
)
def test_integers_compare_exactly_and_floats_within_the_tolerance(number: float, gold: float, expected: bool) -> None:
    assert equals(number, gold) is expected


def test_verdicts_name_their_reasons() -> None:
    texts = {
        "right": PROGRAM,
        "wrong value": "def f():\n    return 19",
        "no number": "def f():\n    return 'eighteen'",
        "no program": "The answer is 18.",
        "syntax error": "def f(:\n    return 18",
        "failed to run": "def f():\n    return 1 / 0",
        "out of time": "def f():\n    while True: pass",
        "out of memory": "def f():\n    return [0] * 10**12",
    }
    assert list(texts) == list(REASONS)
    done: list[None] = []
    verdicts = grade(list(texts.values()), ["18"] * len(texts), n_workers=2, on_done=lambda: done.append(None))
    assert [verdict.reason for verdict in verdicts] == list(texts)
    assert [verdict.right for verdict in verdicts] == [reason == "right" for reason in texts]
    assert len(done) == len(texts)
    assert verdicts[5].message == "ZeroDivisionError: division by zero"
    counted = [reason for reasons in FAILURES.values() for reason in reasons]
    assert sorted(counted) == sorted(set(REASONS) - {"right", "wrong value", "no number"}), "each in one group"


@pytest.mark.parametrize("status", ["syntax_error", "error", "timeout", "memory", "killed"])
def test_no_value_counts_unless_the_program_ended_well(status: str) -> None:
    verdict = judge(Outcome(status, 18, "?"), 18)
    assert not verdict.right
    assert verdict.value is None


def test_values_that_claim_to_equal_everything_are_wrong() -> None:
    claim = """
    def f():
        class E{base}:
            def __eq__(self, other): return True
            def __sub__(self, other): return 0
            def __abs__(self): return 0
            def __le__(self, other): return True
            def __float__(self): return 18.0
            def __str__(self): return '18'
        return E({value})
    """
    texts = [
        textwrap.dedent(claim.format(base=base, value=value))
        for base, value in [("", ""), ("(int)", "5"), ("(float)", "5.0"), ("(str)", "'5'")]
    ]
    assert [verdict.right for verdict in grade([*texts, PROGRAM], ["18"] * 5)] == [False] * 4 + [True]


def test_the_gold_answer_does_not_steer_the_choice() -> None:
    # Two programs and a printed answer: the first function counts, whichever would be right.
    text = "def f():\n    return 1\n\nprint(2)\n```\n\n```python\ndef g():\n    return 2\n```"
    assert [verdict.right for verdict in grade([text, text], ["1", "2"])] == [True, False]


def test_gold_answers_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="gold answer 1 is not a number: 'x'"):
        grade([PROGRAM, PROGRAM], ["18", "x"])
    with pytest.raises(ValueError, match="2 completions but 1 gold answers"):
        grade([PROGRAM, PROGRAM], ["18"])
    assert grade([PROGRAM] * 3, ["18", 18.0, "$18.00"]) == [Verdict(True, 18, "right")] * 3
    assert grade([], []) == []


@pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not here")
def test_agreement_with_a_third_party() -> None:
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    verdicts = grade([row["completion"] for row in rows], [row["gold"] for row in rows])
    differ = {i for i, row in enumerate(rows) if verdicts[i].right != row["third_verdict"]}
    assert 1 - len(differ) / len(rows) >= 0.993
    assert differ == set(DISAGREEMENTS)
