"""Whether a file can be written, asked before work begins, and what is said where one cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from base import files
from base.files import (
    LEFTOVER_S,
    WriteError,
    alone,
    check_out,
    make_once,
    making_folder,
    replacing,
    reported,
    write_text,
)


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


def test_the_input_is_known_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_text("read")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for name in (Path("source"), tmp_path / "link"):
        with pytest.raises(ValueError, match="would overwrite the input"):
            check_out(name, "--out", tmp_path / "source")


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
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("800 requested and 0 written"), "800 requested and 0 written"),
        (RuntimeError(""), "RuntimeError"),
        (RuntimeError("\nfile in archive is not in a subdirectory\nmore"), "file in archive is not in a subdirectory"),
        (Exception("No space left on device (os error 28)"), "No space left on device (os error 28)"),  # of tokenizers
    ],
)
@pytest.mark.parametrize("disk", ["answers", "fails"])
def test_any_failed_write_is_one_error(
    error: Exception, reason: str, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    if disk == "fails":
        monkeypatch.setattr(os, "statvfs", stale)
    with pytest.raises(WriteError) as caught, reported(tmp_path), reported(tmp_path / "a"):
        raise error
    assert str(caught.value).startswith(f"{tmp_path / 'a'} cannot be written ({reason}")
    assert ("MiB of disk are free" in str(caught.value)) == (disk == "answers")


def test_an_error_that_is_not_of_a_disk_passes() -> None:
    with pytest.raises(ValueError, match="a bug"), reported(Path("a")):
        raise ValueError("a bug")


def test_each_process_has_a_name_of_its_own_for_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    with replacing(path) as ours:
        ours.write_text("ours")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # another process, which is faster
            write_text(path, "theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_goes_after_a_day(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.host.7.incomplete" for name in ("a[b]", "folder", "other")]
    for path in left:
        path.mkdir()
        (path / "part").touch()
    write_text(tmp_path / "a[b]", "text")
    assert all(path.exists() for path in left), "they may be of a process that is still writing"
    for path in left:
        os.utime(path, (0, time.time() - LEFTOVER_S - 1))
    write_text(tmp_path / "a[b]", "text")
    with making_folder(tmp_path / "folder"):
        pass
    assert [path.exists() for path in left] == [False, False, True]


@pytest.mark.parametrize("write", [replacing, making_folder])
def test_an_interrupted_write_leaves_nothing(write: Callable, tmp_path: Path) -> None:
    def interrupted(scratch: Path) -> None:
        (scratch / "b" if write is making_folder else scratch).touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), write(tmp_path / "a") as scratch:
        interrupted(scratch)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_of_the_same_name_does_not_stop_a_folder(tmp_path: Path) -> None:
    with making_folder(tmp_path / "a") as scratch:
        name = scratch.name
    (tmp_path / "a").rename(tmp_path / name)  # as a kill leaves it
    (tmp_path / name / "theirs").touch()
    with making_folder(tmp_path / "a") as scratch:
        assert scratch.name == name
        (scratch / "ours").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "ours"]


def test_a_folder_that_another_process_has_written_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "theirs").touch()
    with pytest.raises(WriteError, match="Directory not empty"), making_folder(tmp_path / "a") as scratch:
        (scratch / "ours").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


HOLD = """
import sys, time
from pathlib import Path
from base.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_process_at_a_time_writes_and_the_others_say_that_they_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "rows"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        got = threading.Event()

        def write() -> None:
            with alone(path):
                got.set()

        waiting = threading.Thread(target=write)
        waiting.start()
        assert not got.wait(0.5)
        other.stdin.write("\n")
        other.stdin.flush()
        waiting.join(30)
        assert got.is_set()
    assert capsys.readouterr().out == f"waiting for another process that writes {path}\n"


def test_this_folder_has_a_lock_and_the_root_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path / "rows")
    with alone(Path(".")):
        assert (tmp_path / ".rows.lock").exists()
    with pytest.raises(ValueError, match=r"^/ is the root of the file system: name a folder"), alone(Path("/")):
        pass


def test_a_lock_that_cannot_be_written_is_named() -> None:
    with pytest.raises(WriteError, match=r"^/proc/\.tty\.lock cannot be written"), alone(Path("/proc/tty")):
        pass


def test_what_a_folder_holds_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name.split(".")[-1]))
    with making_folder(tmp_path / "rows") as scratch:
        (scratch / "one").touch()
        assert not synced
    assert synced == ["one", "incomplete", tmp_path.name]


def test_a_folder_of_data_that_cannot_be_written_is_told_with_its_setting(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "boards"
    with pytest.raises(
        WriteError, match=r"\.boards\.lock cannot be written \(.*\): set data\.data_dir to another folder$"
    ):
        make_once(path, lambda: False, path.mkdir, "data.data_dir")


def test_what_another_process_has_made_before_the_lock_is_not_made_again(tmp_path: Path) -> None:
    made = iter((False, True))
    make_once(tmp_path / "rows", lambda: next(made), lambda: pytest.fail("made twice"), "data.data_dir")


def test_what_a_faster_process_has_made_is_taken_where_no_lock_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows"

    def make() -> None:
        with making_folder(path) as scratch:
            (scratch / "ours").touch()
            path.mkdir(exist_ok=True)
            (path / "theirs").touch()

    make_once(path, (path / "theirs").exists, make, "data.data_dir")
    with pytest.raises(WriteError, match="Directory not empty"):
        make_once(path, (path / "ours").exists, make, "data.data_dir")
    assert [each.name for each in path.iterdir()] == ["theirs"]
