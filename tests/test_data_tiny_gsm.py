"""TinyGSM as a data set: what it shows of a model's text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.tiny_gsm import TinyGsmSettings
from data.word_problems import LEVELS


def test_what_a_model_wrote_cannot_control_a_terminal(tmp_path: Path) -> None:
    sizes = {"n_train": 30, "n_test": 5, "n_held_out": 5, "seed": 0, "max_len": 160}
    settings = TinyGsmSettings(dataset="tiny_gsm", source="word_problems", data_dir=str(tmp_path), **sizes)
    data = settings.open(LEVELS["easy"].vocab_size)
    prompt = data.encode("How many apples?")
    program = "def f():\n\treturn '\x1b[2J18\x07' # \x1b]0;title\x07\u202e"
    ids = data.tokenizer(program, add_special_tokens=False).input_ids
    tokens = prompt.copy()
    free = np.flatnonzero(prompt == data.mask_id)
    assert len(ids) < len(free)
    tokens[free] = data.eos_id
    tokens[free[: len(ids)]] = ids
    shown = data.show(prompt, tokens, np.zeros_like(tokens))
    assert shown == "def f():\n\treturn '\\x1b[2J18\\x07' # \\x1b]0;title\\x07\\u202e"
    assert data.verdicts(prompt[None], tokens[None])[0].reason == "returns \\x1b[2J18\\x07; no number"
    tokens[free[: len(ids)]] = data.eos_id
    escape = data.tokenizer("\x1b[2J", add_special_tokens=False).input_ids
    tokens[free[: len(escape)]] = escape
    assert data.show(prompt, tokens, np.zeros_like(tokens)) == "\\x1b[2J"
    assert data.verdicts(prompt[None], tokens[None])[0].reason == "no program"


def test_verdicts_with_and_without_the_right_answer(tmp_path: Path) -> None:
    sizes = {"n_train": 30, "n_test": 5, "n_held_out": 5, "seed": 0, "max_len": 160}
    data = TinyGsmSettings(dataset="tiny_gsm", source="word_problems", data_dir=str(tmp_path), **sizes).open(512)
    prompt = data.encode("How many apples?")
    free = np.flatnonzero(prompt == data.mask_id)

    def written(program: str) -> np.ndarray:
        tokens = prompt.copy()
        tokens[free] = data.eos_id
        ids = data.tokenizer(program, add_special_tokens=False).input_ids
        tokens[free[: len(ids)]] = ids
        return tokens

    rows = np.stack([written("def f():\n    return 18"), written("def f():\n    return 1 / 0")])
    prompts = np.stack([prompt] * 2)
    expected = {
        None: [(None, "returns 18"), (False, "failed to run: ZeroDivisionError: division by zero")],
        "18": [
            (True, "returns 18; right"),
            (False, "failed to run: ZeroDivisionError: division by zero; the answer is 18"),
        ],
        "17": [(False, "returns 18; wrong value; the answer is 17")],
    }
    for gold, verdicts in expected.items():
        found = data.verdicts(prompts, rows, [gold] * 2)
        assert [(each.right, each.reason) for each in found][: len(verdicts)] == verdicts
        assert found[0].facts == {"value": 18, "gold": gold}
    assert data.check_gold("She buys them all.\n#### 1,018") == "1018"
    with pytest.raises(ValueError, match="the gold answer is not a number: 'many'"):
        data.check_gold("many")


def test_questions_that_do_not_fit_are_warned_about(tmp_path: Path) -> None:
    sizes = {"n_train": 30, "n_test": 5, "n_held_out": 5, "seed": 0, "max_len": 160}
    data = TinyGsmSettings(dataset="tiny_gsm", source="word_problems", data_dir=str(tmp_path), **sizes).open(512)
    assert list(data.warnings()) == []
    fitting = data.test_prompts
    data.test_prompts = replace(fitting, problems=fitting.problems[:3], xt=fitting.xt[:3], n_left_out=2)
    (warning,) = data.warnings()
    assert warning == "2 of 5 questions are left out: they leave no room for a program in data.max_len 160"
