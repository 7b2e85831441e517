"""The guard around foreign input: messages, sizes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from base.reading import (
    MAX_MESSAGE,
    BadInput,
    check_archive,
    check_columns,
    check_file,
    read_json,
    read_lines,
    reading,
)


class PanicException(BaseException):
    """As libraries written in Rust raise."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no number"),
        TypeError("'int' object is not subscriptable"),
        KeyError("steps"),
        AssertionError(),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        OSError(28, "No space left on device", "file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        zipfile.BadZipFile("\x1b[31m" * 1000),
        ValueError("a\nb\r\u202e\ud800\x9b" * 1000),
        PanicException("index out of bounds"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_becomes_one_line(error):
    with pytest.raises(BadInput) as caught, reading("file \x1b[2J" + "x" * 4000, "copy it again"):
        raise error
    message = str(caught.value)
    assert len(message) <= MAX_MESSAGE
    assert message.isprintable()
    assert message.startswith(r"file \x1b[2Jxxx")
    assert message.endswith(": copy it again")
    assert caught.value.__cause__ is error


def test_the_message_names_what_why_and_the_remedy():
    with pytest.raises(BadInput, match=r"^file a cannot be read \(it lacks 'steps'\): copy it again$"):  # noqa: SIM117
        with reading("file a", "copy it again"):
            {}["steps"]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("/cache/b", r"/cache/b: No space left on device"),  # of a library, not what is read
        ("a", "No space left on device"),
        (None, "No space left on device"),
    ],
)
def test_another_file_is_named(file, reason):
    with (
        pytest.raises(BadInput, match=rf"^file a cannot be read \({reason}\): copy"),
        reading("file a", "copy it again"),
    ):
        raise OSError(28, "No space left on device", file)


def test_the_inner_of_two_messages_stays():
    with pytest.raises(BadInput, match=r"^line 3 cannot be read"), reading("file", ""), reading("line 3", ""):
        raise ValueError


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_is_no_bad_input(error):
    with pytest.raises(error), reading("file", "copy it again"):
        raise error


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "device").symlink_to("/dev/zero")
    check_file(tmp_path / "file", 5)
    check_file(tmp_path / "link")
    with pytest.raises(ValueError, match="it has 5 bytes, at most 4 are read"):
        check_file(tmp_path / "file", 4)
    for name, reason in {"pipe": "not a regular", "device": "not a regular", ".": "a folder"}.items():
        with pytest.raises(ValueError, match=reason):
            check_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "missing")


def test_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("base.reading.MAX_TEXT_BYTES", 10)
    path = tmp_path / "lines"
    path.write_bytes(b"012345678\n\n \n1\n2")
    assert list(read_lines(path)) == [(1, b"012345678\n"), (2, b"\n"), (3, b" \n"), (4, b"1\n"), (5, b"2")]
    path.write_bytes(b"1\n01234567890123")
    with pytest.raises(ValueError, match="line 2 has more than 10 bytes"):
        list(read_lines(path))


@pytest.mark.parametrize("content", ["[1]", "1", "null", "", "{", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\ud800"])
def test_json_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content, errors="surrogatepass")
    with pytest.raises(BadInput), reading("a.json", "copy it again"):
        read_json(tmp_path / "a.json")


def test_columns_that_are_missing_are_named():
    check_columns(("b", "a"), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"^it has no column \['a', 'd'\]; its columns are \['c', 'b'\]$"):
        check_columns(("d", "b", "a"), ["c", "b"])


def test_archives_hold_what_they_claim(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros(50 << 20, dtype=np.uint8))  # a thousandth of its size
    with pytest.raises(ValueError, match=r"it claims to hold 52,428,\d\d\d bytes in"):
        check_archive(path, 200)
    assert 52_428_800 <= check_archive(path, 2000) < 52_430_000
    np.savez(path, numbers=np.arange(1 << 20))
    check_archive(path, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(zipfile.BadZipFile):
        check_archive(path, 200)
    with pytest.raises(ValueError, match="folder"):
        check_archive(Path(tmp_path), 1)
