"""Questions and programs as tokens, the same way in training data, prompts and answers.

A sequence is the question, a newline and the program, padded with EOS. The three parts are encoded one by one: encoded
together, "?" and the newline would become one token (in Qwen2 they do), and the boundary between prompt and program
would depend on the text. Question and program are first stripped of outer white space, as in the published code, so
that what surrounds a text in its source changes neither rows nor prompts. Text that spells a special token stays text,
so a sequence holds no special token but EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "\n"


def load_tokenizer(name: str) -> Any:
    """A fast Hugging Face tokenizer by name or folder; its `backend_tokenizer` is what encodes below.

    Raises:
        ValueError: it cannot be loaded, has no fast version or no EOS token.
    """
    from transformers import AutoTokenizer  # slow to import, and a Sudoku run needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises a dozen kinds for what is one problem to the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {first_line}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token, which ends and pads every sequence")
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it is, nothing added or stripped."""
    tokenizer.encode_special_tokens = True  # as the text that they are
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompts(tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of each question, stripped of outer white space, and the separator."""
    separator = encode_texts(tokenizer, [SEPARATOR])[0]
    return [ids + separator for ids in encode_texts(tokenizer, [question.strip() for question in questions])]


def encode_programs(tokenizer: Tokenizer, codes: Sequence[str]) -> list[list[int]]:
    """Token ids of each program, stripped of outer white space."""
    return encode_texts(tokenizer, [code.strip() for code in codes])


def prompt_fits(n_tokens: int, max_len: int) -> bool:
    """Whether a prompt leaves room for a token of a program and the EOS behind it."""
    return n_tokens <= max_len - 2


def encode_rows(
    tokenizer: Tokenizer, eos_id: int, questions: Sequence[str], codes: Sequence[str], max_len: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows as `data/token_files.py` keeps them: stripped texts, cut to max_len - 1 tokens, padded with EOS.

    Returns:
        labels uint32 [n, L], prompt bits uint8 [n, L / 8], and how many rows were left out because their question
        leaves no room for a program.
    """
    prompts = encode_prompts(tokenizer, questions)
    programs = encode_programs(tokenizer, codes)
    kept = [
        (prompt, prompt + program)
        for prompt, program in zip(prompts, programs, strict=True)
        if prompt_fits(len(prompt), max_len)
    ]
    labels = np.full((len(kept), max_len), eos_id, dtype=np.uint32)
    for row, (_, ids) in zip(labels, kept, strict=True):
        n_tokens = min(len(ids), max_len - 1)  # the last place is EOS's
        row[:n_tokens] = ids[:n_tokens]
    n_prompt = np.array([len(prompt) for prompt, _ in kept], dtype=np.int64).reshape(-1, 1)
    prompt_bits = np.packbits(np.arange(max_len) < n_prompt, axis=1, bitorder="little")
    return labels, prompt_bits, len(questions) - len(kept)


def decode_programs(tokenizer: Any, tokens: np.ndarray, prompt_mask: np.ndarray) -> list[str]:
    """What stands behind each prompt up to the first EOS.

    Args:
        tokens: int64 [B, L].
        prompt_mask: bool [B, L].
    """
    programs = []
    for row, given in zip(tokens, prompt_mask, strict=True):
        answer = row[~given]
        ends = np.flatnonzero(answer == tokenizer.eos_token_id)
        programs.append(tokenizer.decode(answer[: ends[0]] if len(ends) else answer, skip_special_tokens=False))
    return programs
