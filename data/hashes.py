"""Hashes of training data, by which a resumed run notices that the data was replaced; `data/stream.py` compares them.

They cover every byte. Rows in memory are hashed whenever a run starts. A memory-mapped file of many gigabytes is hashed
once: the hash is cached beside the file, with its size, times and inode number, and is computed again if one of them
has changed. The time of the last change (ctime) is among them. No program can set it, so a file that was changed in
place and given its old modification time is hashed again too. The cache does not notice a change that leaves all of
them as they were: a write to the device below the file system, a clock that was set back, an edited cache, or a file
system that does not keep these times.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from base.files import write_text
from base.reading import BadInput, parse_object, read_text, reading

CHUNK_BYTES = 1 << 22
CACHE_MAX_BYTES = 1 << 12
# A file may change twice within the resolution of its times, so the hash of a file that has just changed is not cached.
SETTLED_NS = 2_000_000_000


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 (hex) of the content, shapes and dtypes of arrays in memory."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file, without a cache."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with (
        open(path, "rb") as file,
        tqdm(
            total=size, desc=f"hashing {path.name}", unit="B", unit_scale=True, delay=5, leave=False, disable=None
        ) as bar,
    ):
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def cached_hash(path: Path) -> str:
    """SHA-256 (hex) of a file, cached beside it; in a folder that cannot be written it is computed on every call."""
    cache = path.with_name(f".{path.name}.sha256")
    digest: str = cached_findings(path, cache, lambda: {"sha256": hash_file(path)}, {"sha256": str})["sha256"]
    return digest


def cached_findings(
    path: Path,
    cache: Path,
    find: Callable[[], dict[str, Any]],
    kinds: dict[str, type],
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a pass over a file finds, from the file `cache` beside it; the pass is repeated if the file has changed.

    Args:
        find: makes the pass.
        kinds: names and types of what it finds; a cache that lacks one is not used.
        arguments: what else the findings depend on, as JSON values.
    """
    facts, started_ns = _facts(path) | (arguments or {}), time.time_ns()
    cached = _read_cache(cache)
    if cached | facts == cached and all(type(cached.get(name)) is kind for name, kind in kinds.items()):
        return cached
    found = find()
    unchanged = _facts(path) | (arguments or {}) == facts
    if unchanged and started_ns - facts["ctime_ns"] > SETTLED_NS:
        with suppress(OSError):  # a folder that cannot be written
            write_text(cache, json.dumps(facts | found) + "\n")
    return found


def _facts(path: Path) -> dict[str, Any]:
    """What changes with the content of a file."""
    found = path.stat()
    return {
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _read_cache(path: Path) -> dict[str, Any]:
    """Content of a cache; empty if there is none or it cannot be read."""
    with suppress(BadInput), reading(f"{path}", "it is written again"):
        return parse_object(read_text(path, CACHE_MAX_BYTES))
    return {}
