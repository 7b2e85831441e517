"""TinyGSM as a data set: what it shows of a model's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.tiny_gsm import TinyGsmSettings
from data.word_problems import VOCAB_SIZE


def test_what_a_model_wrote_cannot_control_a_terminal(tmp_path: Path) -> None:
    sizes = {"n_train": 30, "n_test": 5, "n_held_out": 5, "seed": 0, "max_len": 160}
    settings = TinyGsmSettings(dataset="tiny_gsm", source="word_problems", data_dir=str(tmp_path), **sizes)
    data = settings.open(VOCAB_SIZE["easy"])
    prompt = data.encode("How many apples?")
    program = "def f():\n\treturn '\x1b[2J18\x07' # \x1b]0;title\x07\u202e"
    ids = data.tokenizer(program, add_special_tokens=False).input_ids
    tokens = prompt.copy()
    free = np.flatnonzero(prompt == data.mask_id)
    assert len(ids) < len(free)
    tokens[free] = data.eos_id
    tokens[free[: len(ids)]] = ids
    shown = data.show(prompt, tokens, np.zeros_like(tokens))
    assert shown == ("def f():\n\treturn '\\x1b[2J18\\x07' # \\x1b]0;title\\x07\\u202e\n\nreturns \\x1b[2J18\\x07")
    tokens[free[: len(ids)]] = data.eos_id
    escape = data.tokenizer("\x1b[2J", add_special_tokens=False).input_ids
    tokens[free[: len(escape)]] = escape
    assert data.show(prompt, tokens, np.zeros_like(tokens)) == "\\x1b[2J\n\nno program"
