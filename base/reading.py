"""Read what somebody else may have written: files, settings and checkpoints.

`reading` turns any exception of such material into one line for the user. Only reading and parsing are inside
`reading`: a bug of this code anywhere else ends in a traceback. Sizes are checked before memory is allocated.
"""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from base.text import escape, shorten

MAX_MESSAGE = 300  # characters of a line
MAX_NAME = 170  # of these, characters for the name of what is read (paths may be long)
MAX_TEXT_BYTES = 1 << 24  # of a JSON or YAML file, or of a line of a .jsonl file; ours have some kilobytes
ARCHIVE_SLACK = 1 << 20  # bytes that an archive may claim beyond its limit, for small ones that compress well
# Settings and arguments are below this, so that their products with sizes stay numbers that formats can hold.
MAX_INTEGER = 1 << 63


class BadInput(ValueError):
    """Material that cannot be read: what it is, why, and a remedy, in one line of at most `MAX_MESSAGE` characters."""


@contextmanager
def reading(what: str, remedy: str, problem: str = "cannot be read") -> Iterator[None]:
    """Turn any exception inside into BadInput, which names `what`, the problem, the reason and the remedy.

    The exception stays the cause, so that its traceback is not lost. BadInput passes unchanged, so calls can be nested.

    Args:
        what: what is read, with its file or setting, e.g. `config runs/a/config.yaml`.
        remedy: what the user can do, in at most 100 characters.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library written in Rust is no Exception
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU: what is read is in order
            raise
        name, end = shorten(escape(what), MAX_NAME), f": {remedy}"
        reason = _reason(error)
        if isinstance(error, OSError) and error.strerror and Path(str(error.filename or "")).name not in what:
            reason = f"{error.filename}: {reason}"  # of what is read, or of a cache that a library keeps elsewhere
        reason = escape(" ".join(reason.split()))
        room = MAX_MESSAGE - len(f"{name} {problem} (){end}")
        raise BadInput(f"{name} {problem} ({shorten(reason, room)}){end}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return f"it needs more memory than there is: {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error}"
    if isinstance(error, ValidationError):
        first, *others = error.errors(include_url=False, include_input=False)
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" + (f", and {len(others)} more" if others else "")
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text, name = str(error), type(error).__name__
    if not text:
        return name
    # Errors of Python itself are about the code that reads; those of libraries are about what is read.
    of_python = type(error).__module__ == "builtins" and not isinstance(error, (ValueError, OSError))
    return f"{name}: {text}" if of_python else text


def may_be_on_hub(name: str) -> bool:
    """Whether a path that does not exist may be the name of a data set of the Hugging Face hub, OWNER/NAME.

    If the owner is a folder here, a path was misspelled, and nothing is asked of the hub.
    """
    owner = Path(name).parent
    return name.count("/") == 1 and not Path(name).is_absolute() and not owner.is_dir()


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise ValueError unless `path` is a regular file of at most `max_bytes`. Reads nothing, so no pipe can block."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, at most {max_bytes:,} are read")


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a text file; ValueError or OSError if it is no regular file, too large or not UTF-8."""
    check_file(path, max_bytes)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, OSError or RecursionError if there is none."""
    return parse_object(read_text(path))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` holds; ValueError or RecursionError if it does not."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1; ValueError or OSError for files as in `read_text`."""
    check_file(path)
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_TEXT_BYTES + 1):
            number += 1
            if len(line) > MAX_TEXT_BYTES:
                raise ValueError(f"line {number} has more than {MAX_TEXT_BYTES:,} bytes")
            yield number, line


def check_columns(columns: Iterable[str], present: list[str]) -> None:
    """Raise ValueError, which lists those that are `present`, unless all `columns` are among them."""
    if missing := set(columns) - set(present):
        raise ValueError(f"it has no column {sorted(missing)}; its columns are {present}")


def check_archive(path: Path, max_growth: int) -> int:
    """The bytes that the content of a zip archive claims to have.

    Raises:
        ValueError, BadZipFile: `path` is no zip archive, or claims more than `max_growth` times its size.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        n_claimed = sum(info.file_size for info in archive.infolist())
    n_bytes = path.stat().st_size
    if n_claimed > max_growth * n_bytes + ARCHIVE_SLACK:
        raise ValueError(f"it claims to hold {n_claimed:,} bytes in {n_bytes:,}")
    return n_claimed
