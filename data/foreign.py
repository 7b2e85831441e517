"""Read what somebody else may have written: files, settings, checkpoints and the arguments of commands.

`reading` turns any exception of such material into one line for the user, and `ends_with_message` ends every command
with it. Only reading and parsing are inside `reading`: a bug of this code anywhere else ends in a traceback. Sizes are
checked before memory is allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from typing_extensions import override

from grader.text import escape

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C, as shells have it
MAX_MESSAGE = 300  # characters of a line
MAX_NAME = 170  # of these, characters for the name of what is read (paths may be long)
MAX_COMMAND = 4000  # characters of a command line in a message
MAX_LINES = 30  # of a message that lists problems
MAX_TEXT_BYTES = 1 << 24  # of a JSON or YAML file, or of a line of a .jsonl file; ours have some kilobytes
ARCHIVE_SLACK = 1 << 20  # bytes that an archive may claim beyond its limit, for small ones that compress well
# Settings and arguments are below this, so that their products with sizes stay numbers that formats can hold.
MAX_INTEGER = 1 << 63


class BadInput(ValueError):
    """Material that cannot be read: what it is, why, and a remedy, in one line of at most `MAX_MESSAGE` characters."""


class TooLittleMemory(ValueError):
    """Something needs more memory than this machine has left."""


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
        reason = escape(" ".join(_reason(error).split()))
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


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, its middle left out."""
    if len(text) <= limit:
        return text
    n_start = (limit - 3) // 2
    return f"{text[:n_start]}...{text[len(text) - (limit - 3 - n_start) :]}"


def fail(message: object, status: int = 2) -> NoReturn:
    """End a command with a message of at most `MAX_LINES` lines.

    Lines of an exception are shortened to `MAX_MESSAGE` characters; those of BadInput or plain text, and indented
    lines, to `MAX_COMMAND`: BadInput and items of lists are short already, and a command to copy must be whole.

    With PUMA_TRACEBACK=1 in the environment, the traceback of the exception that is handled comes first. Output that
    cannot be written is dropped, since Python would try again at its end and report that as well.
    """
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if os.environ.get("PUMA_TRACEBACK") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    limit = MAX_MESSAGE if isinstance(message, Exception) and not isinstance(message, BadInput) else MAX_COMMAND
    lines = [
        shorten(escape(line), MAX_COMMAND if line.startswith("  ") else limit) for line in str(message).split("\n")
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = [f"  and {len(lines) - MAX_LINES + 1} more lines"]
    print("error:", "\n".join(lines), file=sys.stderr)
    sys.exit(status)


@contextmanager
def ends_with_message(
    interrupted: str = "interrupted", end: Callable[[object, int], NoReturn] = fail
) -> Iterator[None]:
    """End a command with one message: status 2 for ValueError and OSError, which bad input raises, 130 for Ctrl-C.

    What is printed inside is also written inside, so a full disk or a closed pipe ends with a message too.

    Args:
        interrupted: the message for Ctrl-C.
        end: prints a message and exits with a status.
    """
    try:
        yield
        print(end="", flush=True)
    except (ValueError, OSError) as error:
        end(error, 2)
    except KeyboardInterrupt:
        end(interrupted, INTERRUPTED)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose messages are one line without control characters, whatever the arguments are.

    Options cannot be abbreviated: scripts that pass them on, as job.sh does, know only the whole names.
    """

    def __init__(self, **options: Any) -> None:
        """See `argparse.ArgumentParser`."""
        super().__init__(**options, allow_abbrev=False)

    @override
    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        super().error(shorten(escape(message), MAX_MESSAGE))


def whole_number(lowest: int, highest: int = MAX_INTEGER - 1) -> Callable[[str], int]:
    """A `type` of an argument: an integer in this range."""

    def convert(text: str) -> int:
        digits = len(text) <= 20 and text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
        if not digits or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be an integer from {lowest} to {highest}, got {shorten(text, 40)}")
        return int(text)

    return convert


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


def check_archive(path: Path, max_growth: int) -> None:
    """Raise ValueError or BadZipFile unless `path` is a zip archive that claims at most `max_growth` times its size."""
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        n_claimed = sum(info.file_size for info in archive.infolist())
    n_bytes = path.stat().st_size
    if n_claimed > max_growth * n_bytes + ARCHIVE_SLACK:
        raise ValueError(f"it claims to hold {n_claimed:,} bytes in {n_bytes:,}")
    check_memory(n_claimed, "its content")


def check_memory(n_bytes: int, what: str) -> None:
    """Raise TooLittleMemory if `what` needs more memory than this machine has left."""
    if n_bytes > (free := free_memory()):
        raise TooLittleMemory(
            f"{what}: needs {n_bytes / 2**30:,.1f} GiB of memory, but {free / 2**30:,.1f} GiB are free"
        )


def free_memory() -> int:
    """Bytes of memory that programs can still get: of the machine, or of this process's control groups if less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    machine, membership = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if machine.exists() and (kib := _read_counts(machine).get("MemAvailable:")) is not None:
        limits.append(1024 * kib)
    if membership.exists():
        lines = membership.read_text(encoding="utf-8").splitlines()
        for group in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
            limits += free_in_groups(Path("/sys/fs/cgroup") / group)
    return min(limits)


def free_in_groups(folder: Path) -> list[int]:
    """Bytes of memory that the control group (version 2) of a folder and its parents have left, if they have a limit.

    A job of SLURM has its limit in a parent. Page cache does not count as used: the kernel frees it.
    """
    free = []
    for group in (folder, *folder.parents):
        path = group / "memory.max"
        if path.exists() and (limit := path.read_text(encoding="ascii").strip()).isdigit():
            stat = group / "memory.stat"  # missing where another kernel's interface is emulated
            free.append(int(limit) - (_read_counts(stat).get("anon", 0) if stat.exists() else 0))
    return free


def _read_counts(path: Path) -> dict[str, int]:
    """The numbers in a file of the kernel with lines such as `anon 4096`, by name."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {name: int(number) for name, number, *_ in map(str.split, lines)}
