"""Small files that are there whole or not at all, and one error for all that cannot be written. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class WriteError(OSError):
    """Something could not be written, for the most part since the disk is full; what was there before still is."""


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once and for good: temporary name, sync, rename. Raises WriteError."""
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
    """Whatever a library raises when it cannot write `path`, as one error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free_mib = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else 0
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise WriteError(f"{path} cannot be written ({reason}; {free_mib:,.0f} MiB of disk are free)") from error


def sync_folder(path: Path) -> None:
    """Make what was renamed in a folder outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
