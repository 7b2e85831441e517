"""Measure the project compared with plain implementations of the same computation, in one process.

python -m bench step --config yaml_files/tinygsm_puma.yaml --batch 4    # or head, sample, data, block; --help
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from base.commands import CommandParser, ends_with_message, seconds, whole_number
from base.files import check_out
from bench.inputs import refuse_unread
from bench.measure import measure, profile

WITH_MODEL = ("step", "head", "sample", "block")
# Options that not all commands read.
READ_BY: dict[str, tuple[str, ...]] = {"steps": ("sample",), "compile": ("step",), "graph": ("step",)}
READ_BY |= dict.fromkeys(["config", "length", "vocab", "overrides"], WITH_MODEL)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = CommandParser(prog="python -m bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=(*WITH_MODEL, "data"))
    add("--config", type=Path, help="YAML file of an experiment; by default Sudoku (step, sample) or TinyGSM")
    add("--batch", type=whole_number(1), help="rows of a batch; data: rows per round")
    add("--length", type=whole_number(1), help="tokens per row; by default as in the data set")
    add("--vocab", type=whole_number(1), help="vocabulary size; the mask token of TinyGSM is the last")
    add("--steps", type=whole_number(1), help="sample: network evaluations per row, by default 4")
    add("--compile", action="store_true", help="step: set training.compile")
    add("--graph", action="store_true", help="step: set training.cuda_graph")
    add("--iterations", type=whole_number(1), default=20, help="rounds at most")
    limit = "start no further round after this, but run at least three"
    add("--seconds", type=seconds(or_zero=True), default=60.0, help=limit)
    add("--no-memory", action="store_true", help="skip peak memory, which starts a process per path")
    add("--profile", action="store_true", help="print the operations of our path by their time instead of a report")
    add("--json", type=Path, help="also write the rows of the report to this file")
    add("overrides", nargs="*", metavar="key=value", help="settings to change")
    options = parser.parse_intermixed_args(arguments)
    refuse_unread(parser, options, options.command, READ_BY)
    if options.profile and options.json:
        parser.error("--json: not with --profile, which prints no report")
    options.arguments, options.only = arguments, None
    # Calls before a path is timed: for the optimizer's state, compilation, and the recording of a graph. The last of
    # them, which says how many calls are timed in a row, comes after these.
    options.n_warmup = 5 if options.graph else 3 if options.compile else 2
    return options


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with ends_with_message():
        if options.json:
            check_out(options.json, "--json")
        benchmark = importlib.import_module(f"bench.{options.command}").build(options)
        (profile if options.profile else measure)(options, benchmark)


if __name__ == "__main__":
    main()
