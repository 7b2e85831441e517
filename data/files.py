"""Write small files atomically, and raise one error for any failed write; check before work that a file can be written.

Does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class WriteError(OSError):
    """A file could not be written, usually because the disk is full; the previous version is intact."""


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably: temporary name, sync, rename. Raises WriteError."""
    scratch = _scratch(path)
    with reported(path):
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)


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
        scratch.unlink(missing_ok=True)  # other processes of the same command check too
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}): name another file") from error


def _scratch(path: Path) -> Path:
    """Where the new content is written, beside the file that it replaces."""
    return path.with_name(f".{path.name}.incomplete")


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn any library's error on writing `path` into WriteError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines()]  # of some libraries the first one is empty
        reason = getattr(error, "strerror", None) or next(filter(None, lines), type(error).__name__)
        if path.parent.exists():
            disk = os.statvfs(path.parent)
            reason += f"; {disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB of disk are free"
            if disk.f_files and not disk.f_favail:  # some file systems do not count files
                reason += ", but the number of files on it has reached its limit"
        raise WriteError(f"{path} cannot be written ({reason})") from error


def sync_folder(path: Path) -> None:
    """Sync a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
