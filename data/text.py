"""Encode prompts and completions as tokens, the same way for training data, prompts and answers.

A sequence is the prompt, a newline and the completion, padded with EOS; in TinyGSM the prompt is a question and the
completion a program. The three parts are encoded separately: in one text, "?" and the newline would merge into one
token (they do in Qwen2), and the boundary between prompt and completion would depend on the text. Outer white space of
both texts is stripped first, as in the published code, so white space around a text in its source changes neither rows
nor prompts. Text that spells a special token is encoded as text, so EOS is the only special token in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from base.reading import check_file, reading
from base.text import shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "\n"
TOKENIZER_FILE = "tokenizer.json"
# JSON files: what a tokenizer is read from.
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_TOKENIZER_BYTES = 1 << 28
TOKENIZER_REMEDY = f"name a folder or Hugging Face name with {TOKENIZER_FILE}"
TOKENIZER_DIR = "tokenizer"  # folder of a tokenizer, beside tokenized rows and in the directory of a run
EOS, MASK = "<eos>", "<mask>"  # of the tokenizers that are trained here
MIN_TRAINED_VOCAB = 256 + 2  # bytes, EOS and mask token


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json of a tokenizer: a file, in a folder, or of a Hugging Face name, downloaded on first use.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from huggingface_hub import snapshot_download  # slow to import

    with reading(f"tokenizer {name!r}", TOKENIZER_REMEDY):
        path = Path(name)
        if path.suffix == ".json":
            check_file(path, MAX_TOKENIZER_BYTES)
            return path
        folder = path if path.is_dir() else Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
        for file in folder.glob("*.json"):
            check_file(file, MAX_TOKENIZER_BYTES)
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(f"it has no fast version ({TOKENIZER_FILE}); choose one that has")
        return folder / TOKENIZER_FILE


def load_tokenizer(name: str, eos_token: str | None = None) -> Any:
    """Load a fast Hugging Face tokenizer by name, folder or tokenizer.json; the functions below take its
    `backend_tokenizer`.

    tokenizer.json is read as it is, and the special tokens from the JSON files beside it. The class is fixed, so that
    no file can cause code to be executed. `AutoTokenizer` lets tokenizer_config.json name any class of transformers,
    and if that is `AutoModel`, it executes code of the folder even with `trust_remote_code=False`.

    Args:
        eos_token: text of the token that ends a sequence, e.g. "[SEP]"; None: as the files beside tokenizer.json say.

    Raises:
        ValueError: it cannot be loaded, has no fast version, or no EOS token or not this one.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, and Sudoku runs do not need it

    file = find_tokenizer(name)
    with reading(f"tokenizer {name!r}", TOKENIZER_REMEDY):
        if Path(name).suffix == ".json":
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, trust_remote_code=False)
        tokenizer.init_kwargs.pop("auto_map", None)  # a saved copy names no code either
        # Settings of tokenizer.json that would apply to every text.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    if eos_token is not None:
        if tokenizer.backend_tokenizer.token_to_id(eos_token) is None:
            raise ValueError(f"data.eos_token {eos_token!r} is no token of tokenizer {name!r}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no EOS token, which must end and pad every sequence: choose one that has, or for "
            "`dataset: text` set data.eos_token, as in 'data.eos_token=[SEP]'"
        )
    return tokenizer


def unknown_id(tokenizer: Any) -> int | None:
    """The token that stands for what a tokenizer does not know; None if it has none.

    None too if that is EOS: GPT-2's tokenizer names it so, and knows every text; no completion may contain it.
    """
    # A tokenizer.json alone names it in its model only.
    name = getattr(tokenizer.backend_tokenizer.model, "unk_token", None) or tokenizer.unk_token
    found: int | None = None if name is None else tokenizer.backend_tokenizer.token_to_id(name)
    return None if found == tokenizer.eos_token_id else found


def differing_tokens(tokenizer: Any, other: Any) -> list[int]:
    """Tokens that stand for another text in the other tokenizer, in order, of those that both have."""
    ours, theirs = ({token: text for text, token in each.get_vocab().items()} for each in (tokenizer, other))
    return [token for token in sorted(ours.keys() & theirs.keys()) if ours[token] != theirs[token]]


def train_byte_pairs(texts: Iterable[str], pieces: str, vocab_size: int) -> Any:
    """Train a byte-pair tokenizer, a Hugging Face tokenizer that can encode any text; the result is deterministic.

    The first token is EOS, the last the mask token, as `data.mask_id: null` expects. If the texts have too few words to
    fill the vocabulary, the tokens before the mask token are unused.

    Args:
        pieces: regular expression; a token never extends beyond one match.
        vocab_size: number of tokens, at least `MIN_TRAINED_VOCAB`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # slow to import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    n_unused = vocab_size - 1 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<unused_{number}>" for number in range(n_unused)])
    tokenizer.add_special_tokens([MASK])
    assert tokenizer.get_vocab_size() == vocab_size
    assert tokenizer.token_to_id(MASK) == vocab_size - 1
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added or stripped."""
    tokenizer.encode_special_tokens = True  # special tokens as plain text
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, with outer white space stripped, and the separator."""
    separator = encode_texts(tokenizer, [SEPARATOR])[0]
    return [ids + separator for ids in encode_texts(tokenizer, [prompt.strip() for prompt in prompts])]


def encode_completions(tokenizer: Tokenizer, completions: Sequence[str]) -> list[list[int]]:
    """Token ids of each completion, with outer white space stripped."""
    return encode_texts(tokenizer, [completion.strip() for completion in completions])


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
    """Whether a prompt leaves room for one token of a completion and EOS."""
    return n_tokens <= max_len - 2


def prompt_row(ids: list[int], mask_id: int, max_len: int) -> np.ndarray:
    """A prompt as a row to fill, int64 [L]: its tokens, then mask tokens."""
    return np.array(ids + [mask_id] * (max_len - len(ids)), dtype=np.int64)


def encode_rows(
    tokenizer: Tokenizer,
    eos_id: int,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_len: int,
    *,
    truncate: bool = True,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows in the format of `data/token_files.py`: stripped texts, at most max_len - 1 tokens, padded with EOS.

    Args:
        truncate: truncate longer rows; else they are left out.

    Returns:
        labels uint32 [n, L], prompt bits uint8 [n, L / 8], and the number of rows left out because they are too long,
        or because their prompt leaves no room for a completion.
    """
    prompt_ids = encode_prompts(tokenizer, prompts)
    completion_ids = encode_completions(tokenizer, completions)
    for text, ids in zip(completions, completion_ids, strict=True):
        if eos_id in ids:  # answers would be cut there
            raise ValueError(f"the EOS token {eos_id} occurs in {shorten(text, 60)!r}: choose another EOS token")
    kept = [
        (prompt, prompt + completion)
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        if prompt_fits(len(prompt), max_len) and (truncate or len(prompt) + len(completion) < max_len)
    ]
    labels = np.full((len(kept), max_len), eos_id, dtype=np.uint32)
    for row, (_, ids) in zip(labels, kept, strict=True):
        n_tokens = min(len(ids), max_len - 1)  # the last token is EOS
        row[:n_tokens] = ids[:n_tokens]
    n_prompt = np.array([len(prompt) for prompt, _ in kept], dtype=np.int64).reshape(-1, 1)
    prompt_bits = np.packbits(np.arange(max_len) < n_prompt, axis=1, bitorder="little")
    return labels, prompt_bits, len(prompts) - len(kept)


def completion_tokens(eos_id: int, tokens: np.ndarray, prompt_mask: np.ndarray) -> list[np.ndarray]:
    """The tokens after each prompt, up to the first EOS: int64, of different lengths.

    Args:
        tokens: int64 [B, L].
        prompt_mask: bool [B, L].
    """
    completions = []
    for row, given in zip(tokens, prompt_mask, strict=True):
        answer = row[~given]
        ends = np.flatnonzero(answer == eos_id)
        completions.append(answer[: ends[0]] if len(ends) else answer)
    return completions


def decode_completions(tokenizer: Any, tokens: np.ndarray, prompt_mask: np.ndarray) -> list[str]:
    """The text of `completion_tokens`; `decode_whole` keeps all of a row."""
    completions = completion_tokens(tokenizer.eos_token_id, tokens, prompt_mask)
    return [tokenizer.decode(completion, skip_special_tokens=False) for completion in completions]


def decode_whole(tokenizer: Any, row: np.ndarray) -> str:
    """The text of a row (int64 [L]) without the EOS tokens at its end."""
    text = np.flatnonzero(row != tokenizer.eos_token_id)
    return str(tokenizer.decode(row[: text[-1] + 1] if len(text) else row[:0], skip_special_tokens=False))
