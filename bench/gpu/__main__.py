"""Run one piece of the work that needs a GPU; docs/gpu.md has the order and the goals.

    python -m bench.gpu speed --out gpu_results          # or tests, block, ranks, experiments
    python -m bench.gpu speed --out gpu_results --tiny   # tiny sizes, also on a CPU: tries the program, not the machine

Each piece ends before --deadline-s, prints a table last, and writes PIECE.json to the folder --out. The output of all
programs that it starts is appended to log.txt there. A piece that was stopped has written what it measured so far.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path

from base.commands import CommandParser, ends_with_message, seconds, whole_number
from bench.gpu.report import Report
from bench.inputs import refuse_unread

PIECES = ("speed", "tests", "block", "ranks", "experiments")
# Options that not all pieces read.
READ_BY: dict[str, tuple[str, ...]] = {
    "tiny": ("speed", "block", "ranks", "experiments"),
    "runs": ("experiments",),
    "jobs": ("experiments",),
    "names": ("experiments",),
    "overrides": ("speed", "block", "ranks", "experiments"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = CommandParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("piece", choices=PIECES)
    add("--out", type=Path, required=True, help="folder of the results")
    add("--tiny", action="store_true", help="tiny sizes, to try the program")
    add("--deadline-s", type=seconds(), default=540.0, help="seconds after which the piece ends with what it has")
    add("--jobs", type=whole_number(1), help="experiments: number of parallel runs on the card, by default 12")
    add("--names", help="experiments: names of results/experiments.py with commas between")
    add("--runs", type=Path, help="experiments: folder of the run directories, by default runs/gpu")
    add("overrides", nargs="*", metavar="key=value", help="settings to change")
    options = parser.parse_intermixed_args(arguments)
    refuse_unread(parser, options, options.piece, READ_BY)
    if options.piece == "experiments" and not options.names:
        parser.error("experiments needs --names")
    options.arguments = arguments
    return options


def main(arguments: list[str] | None = None) -> None:
    """Command line; exit status 1 if a part of the piece failed, 2 after bad input."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with ends_with_message():
        report = Report(options.piece, options.arguments, options.out, time.monotonic() + options.deadline_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally` here and in the pieces
    try:
        with ends_with_message():
            importlib.import_module(f"bench.gpu.{options.piece}").run(options, report)
    finally:
        report.show()
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
