"""The command line: arguments, lines of output, and one message at the end of a command that cannot go on."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from typing_extensions import override

from base.reading import MAX_INTEGER, MAX_MESSAGE, BadInput
from base.text import escape, shorten

INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C, as shells have it
MAX_COMMAND = 4000  # characters of a command line in a message
MAX_LINES = 30  # of a message that lists problems


def say(line: str) -> None:
    """Print a line at once; a log on a full disk, or one that nobody reads any more, must not end the run."""
    with suppress(OSError):
        print(line, flush=True)


def fail(message: object, status: int = 2) -> NoReturn:
    """End a command with a message of at most `MAX_LINES` lines.

    Lines of an exception are shortened to `MAX_MESSAGE` characters; those of BadInput or plain text, and indented
    lines, to `MAX_COMMAND`: BadInput and items of lists are short already, and a command to copy must be whole.

    With PUMA_TRACEBACK=1 in the environment, the traceback of the exception that is handled comes first. A ValueError
    of an operation such as `int("x")`, and not of a `raise`, may be a fault in the code: the message says how to see
    where. Output that cannot be written is dropped, since Python would try again at its end and report that as well.
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
    if isinstance(message, ValueError) and not _is_raised_by_statement(message):
        lines.append("  (PUMA_TRACEBACK=1 in the environment shows where)")
    print("error:", "\n".join(lines), file=sys.stderr)
    sys.exit(status)


def _is_raised_by_statement(error: Exception) -> bool:
    """Whether a `raise` has raised the error, and not an operation such as `int("x")`; true if it is not known."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or not frames[-1].line or frames[-1].line.startswith("raise")


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

    Options cannot be abbreviated: scripts that pass them on, as job.sh does, know only the whole names. From the first
    parser on, warnings are such lines too, without the file and line of the code that gives them.
    """

    def __init__(self, **options: Any) -> None:
        """See `argparse.ArgumentParser`."""
        super().__init__(**options, allow_abbrev=False)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {escape(str(message))}\n"

    @override
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """See `argparse.ArgumentParser.add_argument`."""
        if options.get("nargs") == "*":  # without a default it is listed as missing beside those that are required
            options.setdefault("default", [])
        return super().add_argument(*names, **options)

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


def seconds(*, or_zero: bool = False) -> Callable[[str], float]:
    """The `type` of an argument: a time above 0, or 0 where that has a meaning."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf or (value == 0 and not or_zero):
            bound = "of at least 0" if or_zero else "above 0"
            raise argparse.ArgumentTypeError(f"must be a finite number {bound}, got {shorten(text, 40)}")
        return value

    return convert
