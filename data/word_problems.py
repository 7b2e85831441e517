"""A small replacement for TinyGSM and GSM8K that needs no network: word problems with programs, from templates.

Names, things and numbers vary; a problem takes one or two operations. The program does the arithmetic, so a model has
to find the right numbers and write the right expression. The files have the format of the real data (tokenized rows, a
tokenizer, a test.jsonl like GSM8K's), so that all other code is the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.text import encode_programs, encode_prompts, encode_rows
from data.token_files import META_FILE, TOKENIZER_DIR, write_token_files

TEST_FILE = "test.jsonl"
VERSION = 3  # of the templates; part of the folder's name, so that files of older versions are not used
# Large enough that every number and nearly every word of the templates is one token. First token EOS, last the mask.
VOCAB_SIZE = 512
EOS, MASK = "<eos>", "<mask>"
# A token spans at most: two digits (numbers are at most 30, so a small model copies each as one token, from a position
# that the template fixes); a newline and an indent without its last space; a word or identifier with the space before
# it (so that a word is the same token in the question and at the start of a line); signs; spaces.
PIECES = r"[0-9]{1,2}|\n {0,3}| ?[A-Za-z_]+| ?[^A-Za-z_0-9\s]+|\s+"
N_TOKENIZER_ROWS = 5000

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
class WordProblem:
    """A question, a program that computes the answer, in the format of TinyGSM, and the answer."""

    question: str
    code: str
    answer: int


def generate_problems(n_problems: int, seed: int) -> list[WordProblem]:
    """Distinct problems in random order; the first k do not depend on `n_problems`."""
    generator = random.Random(f"word problems {seed}")
    problems: dict[str, WordProblem] = {}
    while len(problems) < n_problems:
        problem = _draw_problem(generator)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def _draw_problem(generator: random.Random) -> WordProblem:
    template = generator.choice(TEMPLATES)
    name = generator.choice(sorted(NAMES))
    words = {"name": name, "he": NAMES[name], "things": generator.choice(THINGS)}
    while True:
        numbers = {key: generator.randint(*bounds) for key, bounds in template.numbers.items()}
        if template.allowed(**numbers):
            break
    body = template.program.format(**words, **numbers) + "\nreturn result"
    code = "def simple_math_problem() -> int:\n" + "\n".join(f"    {line}" for line in body.split("\n"))
    return WordProblem(template.question.format(**words, **numbers), code, template.answer(**numbers))


def train_tokenizer() -> Any:
    """Train a byte-pair tokenizer of `VOCAB_SIZE` tokens on such problems; the result is deterministic."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # slow to import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded
        show_progress=False,
    )
    texts = [text for problem in generate_problems(N_TOKENIZER_ROWS, 0) for text in (problem.question, problem.code)]
    tokenizer.train_from_iterator(texts, trainer)
    # The templates may have too few words to fill the vocabulary.
    n_unused = VOCAB_SIZE - 1 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<unused_{number}>" for number in range(n_unused)])
    tokenizer.add_special_tokens([MASK])  # the last token, as `data.mask_id: null` expects
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.token_to_id(MASK) == VOCAB_SIZE - 1
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK)


def cached_word_problems(data_dir: str | Path, n_train: int, n_test: int, seed: int, max_len: int) -> Path:
    """The folder of these problems in `data_dir`, written atomically on first use.

    It contains the files that `data/pretokenize.py` writes, with `n_train` rows, and `test.jsonl` with `n_test` other
    problems.

    Raises:
        ValueError: a problem does not fit `max_len` tokens.
    """
    folder = Path(data_dir) / f"word_problems_v{VERSION}_{n_train}_{n_test}_seed{seed}_len{max_len}"
    if (folder / META_FILE).exists():
        return folder
    print(f"writing {n_train + n_test:,} word problems to {folder}", flush=True)
    problems = generate_problems(n_train + n_test, seed)
    tokenizer = train_tokenizer()
    questions, codes = [problem.question for problem in problems], [problem.code for problem in problems]
    longest = _longest(tokenizer, questions, codes)
    if longest > max_len:
        raise ValueError(
            f"data.max_len {max_len} is too short for the word problems: set it to {longest + -longest % 8}"
        )
    labels, prompt_bits, _ = encode_rows(
        tokenizer.backend_tokenizer, tokenizer.eos_token_id, questions[:n_train], codes[:n_train], max_len
    )
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer.save_pretrained(scratch / TOKENIZER_DIR)
    with open(scratch / TEST_FILE, "w", encoding="utf-8") as file:
        for problem in problems[n_train:]:
            row = {"question": problem.question, "answer": f"{problem.code}\n#### {problem.answer}"}
            file.write(json.dumps(row) + "\n")
    facts = {"dataset": "word problems", "tokenizer": TOKENIZER_DIR, "eos_id": tokenizer.eos_token_id}
    write_token_files(scratch, labels, prompt_bits, facts)
    assert len(labels) == n_train  # all fit
    try:
        scratch.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(scratch)
        if not (folder / META_FILE).exists():
            raise
    return folder


def _longest(tokenizer: Any, questions: list[str], codes: list[str]) -> int:
    """Length of the longest row in tokens, including EOS."""
    prompts = encode_prompts(tokenizer.backend_tokenizer, questions)
    programs = encode_programs(tokenizer.backend_tokenizer, codes)
    return max(len(prompt) + len(program) for prompt, program in zip(prompts, programs, strict=True)) + 1
