"""Whether a file can be written, asked before work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.files import WriteError, check_out, reported, write_text


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "none" / "a", "--out PATH: the folder FOLDER/none does not exist"),
        (lambda folder: folder / "source", "--out PATH would overwrite the input"),
        (lambda folder: folder, "--out PATH is a folder: name another file"),
        (lambda folder: Path("/dev/null"), "--out PATH is no regular file: name another file"),
        (lambda folder: folder / ("a" * 250), "--out PATH cannot be written (File name too long): name another file"),
        (lambda folder: Path("/proc/a"), "--out PATH cannot be written (No such file or directory): name another"),
    ],
)
def test_what_cannot_be_written_is_refused(make: Callable[[Path], Path], expected: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "source").write_text("read")
    with pytest.raises(ValueError) as caught:
        check_out(path, "--out", tmp_path / "source")
    assert expected.replace("PATH", str(path)).replace("FOLDER", str(tmp_path)) in str(caught.value)


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    check_out(tmp_path / "new", "--out")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "old", "text")
    check_out(tmp_path / "old", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "text"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("\n  Some tensors share memory:\n a, b\n"), "Some tensors share memory:"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n \n"), "RuntimeError"),
        (OSError(), "OSError"),
    ],
)
def test_a_failed_write_gives_a_reason_whatever_the_library_says(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, reported(tmp_path / "file"):
        raise error
    assert str(caught.value).startswith(f"{tmp_path / 'file'} cannot be written ({reason}; ")
