"""Write files and folders atomically, with one error for any failed write; check before work that one can be written.
Walk through folders, also behind links.

Does not import torch.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from base.commands import say

HELD = (errno.EACCES, errno.EAGAIN)  # errors of a lock that another process holds
LEFTOVER_S = 24 * 3600  # after which an unfinished file or folder is taken for one of a killed process


class WriteError(OSError):
    """A file could not be written, usually because the disk is full; the previous version is intact."""


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably: temporary name, sync, rename. Raises WriteError."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for the new content of a file, which is then synced and renamed to `path`.

    Nothing is left behind if anything fails.

    Raises:
        WriteError: the file cannot be written.
    """
    with _scratch_of(path) as scratch:
        yield scratch
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, which is then renamed to `path`. Nothing is left behind if anything fails.

    Raises:
        WriteError: the folder cannot be written, or `path` holds files already, perhaps of a process that was faster.
    """
    with _scratch_of(path) as scratch:
        scratch.mkdir(parents=True)
        yield scratch
        for written in (*scratch.rglob("*"), scratch):
            sync(written)
        scratch.rename(path)
        sync(path.parent)


@contextmanager
def _scratch_of(path: Path) -> Iterator[Path]:
    """`_scratch(path)`, removed if anything fails; so are those of killed processes. Raises WriteError."""
    scratch = _scratch(path)
    try:
        with reported(path):
            for old in path.parent.glob(f".{glob.escape(path.name)}.*.incomplete"):
                with suppress(OSError):  # in containers host and process number recur, and so does the name
                    if old == scratch or time.time() - old.stat().st_mtime > LEFTOVER_S:
                        _remove(old)
            yield scratch
    except BaseException:
        with suppress(OSError):
            _remove(scratch)
        raise


def _remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, also behind links, each folder once, without hidden folders; in the order of their names."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(path)) in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield path, folders, files


@contextmanager
def alone(path: Path, remedy: str = "") -> Iterator[None]:
    """Let one process at a time write a file or folder; the others wait for its end, and say so.

    The kernel releases the lock when its process ends for any reason. Calls for the same path may not be nested.

    Args:
        remedy: as in `reported`, for a lock that cannot be written at all.

    Raises:
        ValueError: `path` is the root of the file system.
        WriteError: the lock, which lies beside `path`, cannot be written.
    """
    whole = Path(os.path.realpath(path))  # `.` has no name, and what a link names has one lock
    if not whole.name:
        raise ValueError(f"{path} is the root of the file system: name a folder in it")
    lock = whole.with_name(f".{whole.name}.lock")
    # In its name, since it may be in a folder that cannot be written, unlike `path`.
    with reported(lock, remedy):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "w", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with suppress(OSError):  # a file system without locks
                if error.errno in HELD:
                    say(f"waiting for another process that writes {path}")
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def make_once(path: Path, is_made: Callable[[], bool], make: Callable[[], None], setting: str) -> None:
    """Make a file or folder on first use; of several processes one makes it, and the others wait.

    On a file system without locks, several processes may make it at once. If `make` fails because another process has
    finished first, that process's result is used.

    Args:
        is_made: whether it is there, which must mean that it is complete.
        make: makes it by `replacing` or `making_folder`, under its name only when it is complete.
        setting: what names the parent folder, for the message if that cannot be written.

    Raises:
        WriteError: it cannot be written.
    """
    if is_made():  # without a lock, since nothing may be writable
        return
    with alone(path, f"set {setting} to another folder"):
        if is_made():  # now, by another process
            return
        try:
            make()
        except WriteError:
            if not is_made():
                raise


def check_out(path: Path, option: str, source: Path | None = None) -> None:
    """Raise ValueError, before any work is done, if `write_text` could not write `path`; leaves nothing behind.

    Args:
        option: the option that gave the path, for the message.
        source: the file that is read, which must be another one.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist")
    if source is not None and path.resolve() == source.resolve():
        raise ValueError(f"{option} {path} would overwrite the input")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} {path} is {'a folder' if path.is_dir() else 'no regular file'}: name another file")
    scratch = _scratch(path)
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}): name another file") from error


def _scratch(path: Path) -> Path:
    """Temporary name beside `path`, unique to this process, since other processes may write the same path."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.incomplete")


@contextmanager
def reported(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn any library's error on writing `path` into WriteError, which passes unchanged, so calls can be nested.

    Args:
        remedy: what the user can do, for the end of the message.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise  # the tokenizers library raises a bare Exception
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        with suppress(OSError):  # the disk may not even answer
            disk = os.statvfs(path.parent)
            reason += f"; {disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB of disk are free"
            if disk.f_files and not disk.f_favail:  # some file systems do not count files
                reason += ", but the number of files on it has reached its limit"
        raise WriteError(f"{path} cannot be written ({reason})" + (f": {remedy}" if remedy else "")) from error


def sync(path: Path) -> None:
    """Sync a file, or a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
