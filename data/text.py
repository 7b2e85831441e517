"""Encode questions and programs as tokens, the same way for training data, prompts and answers.

A sequence is the question, a newline and the program, padded with EOS. The three parts are encoded separately: in one
text, "?" and the newline would merge into one token (they do in Qwen2), and the boundary between prompt and program
would depend on the text. Outer white space of questions and programs is stripped first, as in the published code, so
white space around a text in its source changes neither rows nor prompts. Text that spells a special token is encoded as
text, so EOS is the only special token in a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.foreign import check_file, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "\n"
TOKENIZER_FILE = "tokenizer.json"
# JSON files: what a tokenizer is read from.
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_TOKENIZER_BYTES = 1 << 28


def load_tokenizer(name: str) -> Any:
    """Load a fast Hugging Face tokenizer by name or folder; the functions below take its `backend_tokenizer`.

    tokenizer.json is read as it is, and the special tokens from the JSON files beside it. The class is fixed, so that
    no file can cause code to be executed. `AutoTokenizer` lets tokenizer_config.json name any class of transformers,
    and if that is `AutoModel`, it executes code of the folder even with `trust_remote_code=False`.

    Raises:
        ValueError: it cannot be loaded, has no fast version or no EOS token.
    """
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedTokenizerFast  # slow to import, and Sudoku runs do not need it

    with reading(f"tokenizer {name!r}", f"name a folder or Hugging Face name with {TOKENIZER_FILE}"):
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
        for file in folder.glob("*.json"):
            check_file(file, MAX_TOKENIZER_BYTES)
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(f"it has no fast version ({TOKENIZER_FILE}); choose one that has")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        tokenizer.init_kwargs.pop("auto_map", None)  # a saved copy names no code either
        # Settings of tokenizer.json that would apply to every text.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no EOS token, which must end and pad every sequence: choose one that has"
        )
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added or stripped."""
    tokenizer.encode_special_tokens = True  # special tokens as plain text
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompts(tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of each question, with outer white space stripped, and the separator."""
    separator = encode_texts(tokenizer, [SEPARATOR])[0]
    return [ids + separator for ids in encode_texts(tokenizer, [question.strip() for question in questions])]


def encode_programs(tokenizer: Tokenizer, codes: Sequence[str]) -> list[list[int]]:
    """Token ids of each program, with outer white space stripped."""
    return encode_texts(tokenizer, [code.strip() for code in codes])


def check_tokens(ids: Sequence[int], mask_id: int, vocab_size: int | None, source: str) -> None:
    """Raise ValueError if tokens are not in the model's vocabulary (None: not checked) or are the mask token."""
    if mask_id in ids:
        raise ValueError(f"the mask token {mask_id} occurs in {source}")
    highest = max(ids, default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"token {highest} occurs in {source}, but model.vocab_size is {vocab_size}: set at least {highest + 1}, or "
            "data.tokenizer to the tokenizer of the rows"
        )


def prompt_fits(n_tokens: int, max_len: int) -> bool:
    """Whether a prompt leaves room for one token of a program and EOS."""
    return n_tokens <= max_len - 2


def encode_rows(
    tokenizer: Tokenizer, eos_id: int, questions: Sequence[str], codes: Sequence[str], max_len: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows in the format of `data/token_files.py`: stripped texts, truncated to max_len - 1 tokens, padded with EOS.

    Returns:
        labels uint32 [n, L], prompt bits uint8 [n, L / 8], and the number of rows left out because their question
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
        n_tokens = min(len(ids), max_len - 1)  # the last token is EOS
        row[:n_tokens] = ids[:n_tokens]
    n_prompt = np.array([len(prompt) for prompt, _ in kept], dtype=np.int64).reshape(-1, 1)
    prompt_bits = np.packbits(np.arange(max_len) < n_prompt, axis=1, bitorder="little")
    return labels, prompt_bits, len(questions) - len(kept)


def decode_programs(tokenizer: Any, tokens: np.ndarray, prompt_mask: np.ndarray) -> list[str]:
    """The text after each prompt, up to the first EOS.

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
