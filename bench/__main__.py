"""Measure the project against plain implementations of the same science, side by side in one process.

python -m bench step --config yaml_files/sudoku_puma.yaml [--batch N] [--length N] [--vocab N] [--json FILE]
python -m bench head | sample | data | block [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.measure import publish

SUDOKU = Path("yaml_files/sudoku_puma.yaml")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line; what is common to all commands stands in `_common`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    common = _common()
    step = commands.add_parser("step", parents=[common], help="a training step by objective")
    step.add_argument("--config", type=Path, default=SUDOKU, help="YAML file of an experiment")
    step.add_argument("--batch", type=_positive, help="rows; by default the config's, at most 32 (4 on a CPU if large)")
    step.add_argument("--length", type=_positive, help="tokens per sequence")
    step.add_argument("--vocab", type=_positive, help="vocabulary")
    step.add_argument("--compile", action="store_true", help="switch on training.compile")
    step.add_argument("--graph", action="store_true", help="switch on training.cuda_graph")
    step.add_argument("--sizes", action="store_true", help="fit our step's time against batch, length and vocabulary")
    step.add_argument("--profile", action="store_true", help="shares of PyTorch's operations in our step")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    head = commands.add_parser("head", parents=[common], help="the output head")
    head.add_argument("--positions", type=_positive, default=1024, help="positions, B * L")
    head.add_argument("--width", type=_positive, default=512)
    head.add_argument("--vocab", type=_positive, default=151_645)
    head.add_argument("--scored", type=float, default=0.4, help="share of the positions that carry weight")
    sample = commands.add_parser("sample", parents=[common], help="the sampler")
    sample.add_argument("--steps", type=_positive, default=4, help="network evaluations per row")
    sample.add_argument("--rows", type=_positive, help="by default 64 boards and 8 programs")
    sample.add_argument("--only", choices=("sudoku", "tinygsm"), help="by default both")
    sample.add_argument("--small", action="store_true", help="a tiny model, to try the command")
    data = commands.add_parser("data", parents=[common], help="generator, stream, tokens, grader")
    data.add_argument(
        "--rows", type=_positive, default=2000, help="rows per round; a tenth as many puzzles, a 40th programs"
    )
    data.add_argument("--tokenizer", help="Hugging Face name or folder; by default the word problems' own")
    block = commands.add_parser("block", help="block diffusion")
    block.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.arguments = arguments
    return options


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, help="write the rows here")
    common.add_argument("--markdown", type=Path, help="write the printed text here")
    common.add_argument("--iterations", type=_positive, default=20, help="rounds at most")
    common.add_argument("--seconds", type=float, default=60.0, help="end after this, though not before three rounds")
    common.add_argument("--cpu-time", action="store_true", help="processor time: for a busy machine, with one thread")
    common.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes processes")
    common.add_argument("--memory-of", help=argparse.SUPPRESS)
    return common


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command == "block":
            from bench import block

            print(json.dumps(block.run(options.json), indent=1))
            return
        # Imported one by one: a step needs no data tools, and memory is counted from after the imports.
        if options.command == "step":
            from bench import step as benchmark
        elif options.command == "head":
            from bench import head as benchmark  # type: ignore[no-redef]
        elif options.command == "sample":
            from bench import sample as benchmark  # type: ignore[no-redef]
        else:
            from bench import pipeline as benchmark  # type: ignore[no-redef]
        report = benchmark.run(options)
        if report is not None:
            publish(report, options, benchmark.about(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
