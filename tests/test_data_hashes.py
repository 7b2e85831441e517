"""Hashes of training data: every byte counts, and the cache never gives the hash of other content."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from data import hashes
from data.hashes import cached_hash, hash_arrays, hash_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "labels.bin"
    path.write_bytes(os.urandom(100_000))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests count as unchanged for long enough."""
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)


def cache_of(path: Path) -> Path:
    return path.parent / f".{path.name}.sha256"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_arrays_differ_in_any_value_shape_or_dtype():
    array = np.arange(6, dtype=np.int64)
    others = [array[::-1], array.reshape(2, 3), array.astype(np.uint64), np.append(array, 0), array[:0]]
    assert hash_arrays(array) == hash_arrays(array.copy())
    assert hash_arrays(array.reshape(2, 3).T) == hash_arrays(array.reshape(2, 3).T.copy())
    assert len({hash_arrays(array), *map(hash_arrays, others), hash_arrays(array[:3], array[3:])}) == 7


def test_the_hash_of_a_file_is_its_sha256(file):
    assert hash_file(file) == cached_hash(file) == sha256(file)


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once(file, monkeypatch):
    assert cached_hash(file) == sha256(file)
    monkeypatch.setattr(hashes, "hash_file", lambda path: pytest.fail("the file is read again"))
    assert cached_hash(file) == sha256(file)


def wait_for_tick(file: Path) -> None:
    """Wait until a change to the file would get a later time: many kernels advance it every few milliseconds only."""
    clock = file.with_name("clock")
    clock.touch()
    while clock.stat().st_ctime_ns <= file.stat().st_ctime_ns:
        time.sleep(0.001)
        os.utime(clock)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("where", [0, 12_345, 99_999])
def test_a_changed_byte_is_noticed_though_size_and_time_are_as_before(where, file):
    before, first = file.stat(), cached_hash(file)
    wait_for_tick(file)
    with open(file, "r+b") as opened:
        opened.seek(where)
        byte = opened.read(1)[0]
        opened.seek(where)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert cached_hash(file) == sha256(file) != first


@pytest.mark.usefixtures("settled")
def test_a_file_put_in_place_of_another_is_noticed(file):
    first, other = cached_hash(file), file.with_name("other")
    other.write_bytes(os.urandom(100_000))
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)
    assert cached_hash(file) == sha256(file) != first


def test_a_file_that_has_just_changed_gets_no_cache(file):
    """A second change within the resolution of the file's times would not be noticed."""
    cached_hash(file)
    assert not cache_of(file).exists()


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_read_gets_no_cache(file, monkeypatch):
    def hash_and_change(path: Path) -> str:
        digest = hash_file(path)
        with open(path, "ab") as opened:
            opened.write(b"x")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "hash_file", hash_and_change)
        cached_hash(file)
    assert not cache_of(file).exists()
    assert cached_hash(file) == sha256(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b"{}" + b" " * 5000, b"digest"]
)
def test_a_cache_that_cannot_be_used_is_written_again(content, file):
    cached_hash(file)
    if content == b"digest":
        content = json.dumps(json.loads(cache_of(file).read_text()) | {"sha256": 5}).encode()
    cache_of(file).write_bytes(content)
    assert cached_hash(file) == sha256(file)
    assert json.loads(cache_of(file).read_text())["sha256"] == sha256(file)


@pytest.mark.usefixtures("settled")
def test_where_no_cache_can_be_written_the_file_is_hashed_each_time(file):
    (cache_of(file) / "in the way").mkdir(parents=True)  # permissions do not stop root, a folder does
    first = cached_hash(file)
    assert first == sha256(file)
    file.write_bytes(os.urandom(100_000))
    assert cached_hash(file) == sha256(file) != first
