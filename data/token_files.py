"""Tokenized rows in flat, memory-mapped files, in the format of the published PUMA code.

`labels.bin`: uint32 [N, L]: prompt, newline, completion, then EOS to the end. `prompt_mask.bin`: uint8 [N, L / 8],
eight positions per byte, the first in the lowest bit. `meta.json`, written last: number of rows, their length and other
facts. `tokenizer/`: a copy of the tokenizer, only in folders written by this code. `data/pretokenize.py` and
`data/word_problems.py` write them. The published code allocates its files for the expected number of rows and records
in meta.json how many it wrote, so its files may be longer.

Shapes: N rows, L tokens per row.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from base.files import reported, write_text
from base.reading import MAX_INTEGER, read_json, reading
from data.hashes import cached_findings, cached_hash, hash_arrays
from data.text import SEPARATOR, TOKENIZER_DIR

LABELS_FILE, PROMPT_FILE, META_FILE = "labels.bin", "prompt_mask.bin", "meta.json"
N_CHECKED = 20_000  # rows that are checked at a time
COUNTS = ("num_examples", "max_len", "max_token_id", "eos_id", "num_left_out")  # numbers in meta.json
# As the published code writes; other values are refused.
FORMAT = {"labels_dtype": "uint32", "prompt_mask_packed": True, "prompt_mask_bitorder": "little"}


@dataclass(frozen=True)
class TokenFileData:
    """Rows in memory-mapped files; a `data.dataset.SequenceData`. Use `open_token_files` to open it."""

    labels: np.ndarray  # uint32 [N, L]
    prompt_bits: np.ndarray  # uint8 [N, L / 8]
    mask_id: int
    eos_id: int
    folder: Path  # of the files

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.labels.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of these rows."""
        prompt_mask = np.unpackbits(self.prompt_bits[indices], axis=1, bitorder="little").astype(bool)
        return self.labels[indices].astype(np.int64), prompt_mask

    def hashes(self) -> dict[str, str]:
        """See `data.dataset.SequenceData`: of the whole files, also for a part of the rows."""
        return {str(path): cached_hash(path) for path in (self.folder / LABELS_FILE, self.folder / PROMPT_FILE)}

    def part(self, rows: slice) -> TokenFileData:
        """Consecutive rows."""
        return replace(self, labels=self.labels[rows], prompt_bits=self.prompt_bits[rows])


def open_token_files(data_dir: str | Path, max_len: int, mask_id: int, vocab_size: int) -> TokenFileData:
    """Memory-map the files of `data_dir`; data after the number of rows in meta.json is ignored with a warning.

    Raises:
        ValueError: a file is missing, unfinished or shorter than meta.json says, rows do not have `max_len` tokens, a
            row has nothing to predict, or a token is the mask token or outside the vocabulary.
    """
    folder = Path(data_dir)
    meta = read_meta(folder)
    n_rows, length = data_shape(folder, meta)
    if length != max_len:
        raise ValueError(f"{folder} has rows of {length} tokens, but data.max_len is {max_len}: set it to {length}")
    labels = np.memmap(folder / LABELS_FILE, dtype=np.uint32, mode="r", shape=(n_rows, length))
    prompt_bits = np.memmap(folder / PROMPT_FILE, dtype=np.uint8, mode="r", shape=(n_rows, length // 8))
    all_prompt = scan_prompts(folder / PROMPT_FILE, prompt_bits)
    if all_prompt >= 0:
        raise ValueError(f"{folder}: row {all_prompt} (from 0) is all prompt, so there is nothing to predict")
    highest, is_used = scan_labels(folder / LABELS_FILE, labels, mask_id)
    highest = max(highest, meta.get("max_token_id") or 0)
    if highest >= vocab_size:
        raise ValueError(
            f"{folder} contains token {highest}, but model.vocab_size is {vocab_size}: set at least {highest + 1}"
        )
    if is_used:
        raise ValueError(f"{folder} contains the mask token {mask_id}: set data.mask_id to a token that is in no row")
    # Every row ends in EOS, so it is known even if meta.json does not give it.
    eos_id = int(labels[0, -1]) if meta.get("eos_id") is None else meta["eos_id"]
    return TokenFileData(labels, prompt_bits, mask_id, eos_id, folder)


def scan_labels(path: Path, labels: np.ndarray, mask_id: int) -> tuple[int, bool]:
    """The highest token of all rows, and whether the mask token is in one.

    The result is cached beside the file, since a pass over tens of gigabytes takes minutes.
    """

    def scan() -> dict[str, Any]:
        highest, mask_is_used = 0, False
        starts = range(0, len(labels), N_CHECKED)
        for start in tqdm(starts, desc=f"checking {path}", unit_scale=N_CHECKED, delay=5, disable=None):
            chunk = labels[start : start + N_CHECKED]
            highest, mask_is_used = max(highest, int(chunk.max())), mask_is_used or bool((chunk == mask_id).any())
        return {"highest": highest, "mask_is_used": mask_is_used}

    cache = path.with_name(f".{path.name}.scan_{mask_id}.json")
    arguments = {"shape": list(labels.shape), "mask_id": mask_id}
    found = cached_findings(path, cache, scan, {"highest": int, "mask_is_used": bool}, arguments)
    return found["highest"], found["mask_is_used"]


def scan_prompts(path: Path, prompt_bits: np.ndarray) -> int:
    """The first row that is all prompt; -1 if there is none. Cached as in `scan_labels`."""

    def scan() -> dict[str, Any]:
        for start in range(0, len(prompt_bits), N_CHECKED):
            found = np.flatnonzero((prompt_bits[start : start + N_CHECKED] == 255).all(1))
            if len(found):
                return {"all_prompt": start + int(found[0])}
        return {"all_prompt": -1}

    cache, arguments = path.with_name(f".{path.name}.scan.json"), {"shape": list(prompt_bits.shape)}
    return int(cached_findings(path, cache, scan, {"all_prompt": int}, arguments)["all_prompt"])


def read_meta(folder: Path) -> dict[str, Any]:
    """Content of meta.json, of this or the published code; raises ValueError if it is missing or unreadable."""
    path = folder / META_FILE
    if not path.exists():
        state = "is unfinished" if (folder / LABELS_FILE).exists() else "does not exist"
        raise ValueError(
            f"{path} is missing: the tokenized data {state}. "
            f"`python data/tiny_gsm.py --out {folder}` writes it, or continues if it was interrupted; or set "
            "data.data_dir to a folder that has it"
        )
    with reading(f"{path}", f"delete {folder.name} and write it again, or copy it again"):
        meta = read_json(path)
        for key, expected in FORMAT.items():
            if meta.get(key, expected) != expected:
                raise ValueError(f"{key} is {meta[key]!r}, but only {expected!r} is supported")
        for key in COUNTS:
            if not (meta.get(key) is None or (type(meta[key]) is int and 0 <= meta[key] < MAX_INTEGER)):
                raise ValueError(f"{key} is {meta[key]!r}, not a number of this kind")
    return meta


def count_shared_rows(train: TokenFileData, test: TokenFileData) -> int:
    """Number of test rows that are also training rows; cached beside the training rows."""
    tests = [row.tobytes() for row in test.labels]

    def scan() -> dict[str, Any]:
        wanted, seen = set(tests), set()
        for start in range(0, len(train), N_CHECKED):
            seen |= wanted & {row.tobytes() for row in train.labels[start : start + N_CHECKED]}
        return {"shared": sum(row in seen for row in tests)}

    path = train.folder / LABELS_FILE
    arguments = {"n_train": len(train), "test": hash_arrays(test.labels)}
    cache = path.with_name(f".{path.name}.test.json")
    return int(cached_findings(path, cache, scan, {"shared": int}, arguments)["shared"])


def count_completions_with(token: int, data: TokenFileData, part: str) -> int:
    """Number of rows with a token after their prompt; cached beside the rows.

    Args:
        part: name of the rows, for the name of the cache: others of the same files have another.
    """

    def scan() -> dict[str, Any]:
        count = 0
        for start in range(0, len(data), N_CHECKED):
            found = start + np.flatnonzero((data.labels[start : start + N_CHECKED] == token).any(1))
            tokens, prompt_mask = data.rows(found)  # few, since unpacking prompt masks takes longer than the search
            count += int(((tokens == token) & ~prompt_mask).any(1).sum())
        return {"count": count}

    path = data.folder / LABELS_FILE
    cache, arguments = path.with_name(f".{path.name}.{part}_with_{token}.json"), {"n_rows": len(data)}
    return int(cached_findings(path, cache, scan, {"count": int}, arguments)["count"])


def write_token_files(folder: Path, labels: np.ndarray, prompt_bits: np.ndarray, facts: dict[str, Any]) -> None:
    """Write labels (uint32 [N, L]), prompt bits (uint8 [N, L / 8]) and finally meta.json with `facts` and the sizes.

    Raises:
        WriteError: one cannot be written.
    """
    for name, array in ((LABELS_FILE, labels), (PROMPT_FILE, prompt_bits)):
        with reported(folder / name):
            (folder / name).write_bytes(array.data)  # `tofile` does not notice that the last bytes do not fit
    write_meta(folder, facts | {"max_len": labels.shape[1]}, len(labels), int(labels.max()))


def write_meta(folder: Path, facts: dict[str, Any], n_rows: int, max_token_id: int) -> None:
    """Check the sizes of the files and write meta.json, which marks them as complete.

    Args:
        facts: `max_len`, `eos_id`, `tokenizer` and further facts to record.

    Raises:
        ValueError: the sizes do not match.
    """
    sizes = {"sep": SEPARATOR, "num_examples": n_rows, "max_token_id": max_token_id}
    meta = facts | {"split": "train"} | sizes | FORMAT
    data_shape(folder, meta, exact=True)  # files are longer if a second process wrote as well
    write_text(folder / META_FILE, json.dumps(meta, indent=1) + "\n")


def tokenizer_of(data_dir: str | Path) -> str:
    """Folder or name of the tokenizer that wrote the files of `data_dir`: its copy there, else as in meta.json."""
    folder = Path(data_dir)
    if (folder / TOKENIZER_DIR).is_dir():
        return str(folder / TOKENIZER_DIR)
    name = read_meta(folder).get("tokenizer")
    if not isinstance(name, str):
        raise ValueError(f"{folder / META_FILE} names no tokenizer: set data.tokenizer")
    return name


def data_shape(folder: Path, meta: dict[str, Any], *, exact: bool = False) -> tuple[int, int]:
    """Number of rows and tokens per row; if meta.json has only one of them, file sizes give the other.

    Args:
        exact: refuse files that are longer than meta.json says; otherwise warn. Always True if a number is computed
            from file sizes.

    Raises:
        ValueError: a file is missing, too short or (see `exact`) too long, or there are no rows.
    """
    sizes = {}
    for name in (LABELS_FILE, PROMPT_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        sizes[name] = (folder / name).stat().st_size
    n_tokens = sizes[LABELS_FILE] // 4
    n_rows, length = meta.get("num_examples"), meta.get("max_len")
    exact = exact or n_rows is None or length is None
    if isinstance(n_rows, int) and n_rows > 0 and length is None:
        length = n_tokens // n_rows
    if isinstance(length, int) and length > 0 and n_rows is None:
        n_rows = n_tokens // length
    if not isinstance(n_rows, int) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{folder / META_FILE} must have num_examples or max_len as integers, got {meta}")
    if length % 8:
        raise ValueError(f"{folder / META_FILE}: max_len {length} is not a multiple of 8")
    if n_rows < 1:
        raise ValueError(f"{folder} has no rows")
    for name, expected in {LABELS_FILE: n_rows * length * 4, PROMPT_FILE: n_rows * length // 8}.items():
        found = (
            f"{folder / name} has {sizes[name]} bytes, but the {n_rows} rows of {length} tokens in {META_FILE} take "
            f"{expected}"
        )
        if sizes[name] < expected or (exact and sizes[name] > expected):
            raise ValueError(found)
        if sizes[name] > expected:
            warnings.warn(f"{found}: the rest of the file is ignored", stacklevel=2)
    return n_rows, length
