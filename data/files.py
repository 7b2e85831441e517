"""Write small files atomically, and raise one error for any failed write. Does not import torch."""

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
    scratch = path.with_name(f".{path.name}.incomplete")
    with reported(path):
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn any library's error on writing `path` into WriteError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
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
