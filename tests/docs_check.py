"""Check the commands of README.md and docs/*.md, and run them.

    python -m tests.docs_check              # runs them in small, minutes: `make docs-check`
    python -m tests.docs_check --list       # shows which commands are run, and why the others are not

A command is a line of a fenced code block that has no language, or the language bash. Each must begin like an entry of
`RUN` or of `LEFT_OUT`. Commands run in a temporary copy of the checkout, unchanged except for what `RUN` and `SMALLER`
say. In the copy the YAML files are small, and local folders have the names of the Hugging Face repositories.
`tests/test_readme.py` uses the functions of this file to check all commands without running them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "runs", "generated", "sudoku_new", "tiny_gsm", "wandb", "logs", "site.sh", "slurm-*.log"
)
TIMEOUT_S = 300

# How a command that is run begins, and what is appended to make it small; in the order in which they are run.
RUN = {
    "make train": "--old-file=.venv/.installed",  # nothing is installed
    "python -m data.generate_sudoku": "",
    "python -m data.sudoku check": "",
    "python data/tiny_gsm.py": "",
    "python train.py": "",
    "python -m runtime.launch": "",
    "python -m model.hub pack": "",
    "python sampling.py": "",
    "python -m eval.evaluate": "validation.n_final_examples=8",
    "python -m eval.likelihood": "--rows 8 --draws 2",
    "python -m eval.gsm8k_eval grade": "",
    "python -m report.curves": "",
    "python -m report.runs": "",
    "python -m report.page": "",
    "python -m model.hub export": "",
    "python -m bench step": "--batch 2 --iterations 1 --seconds 0 --no-memory",
    "python -m bench head": "--batch 1 --length 32 --vocab 1000 --iterations 1 --seconds 0 --no-memory",
    "python -m bench sample": "--batch 2 --steps 2 --iterations 1 --seconds 0 --no-memory",
    "python -m bench data": "--iterations 1 --seconds 0",
    "python -m bench block": "--batch 2 --length 64 --iterations 1 --seconds 0 --no-memory",
}
# How a command that is not run begins, and why it is not.
LEFT_OUT = {
    "source .venv/bin/activate": "it changes the shell; all commands run in the environment of this program",
    "make compare": "it trains for an hour or two; the tests of results/run.py run a small experiment",
    "make test": "it would run the tests, which include the fast part of this check",
    "sbatch": "it needs SLURM; tests/test_job_script.py and tests/test_slurm.py run job.sh",
    "bash job.sh": "it needs SLURM; tests/test_job_script.py and tests/test_slurm.py run job.sh",
    "python -m results.run": "it trains for half an hour; the tests of results/run.py run a small experiment",
    "python -m model.hub pack runs/results/sudoku/puma_rate_3e_4_seed1": "the run is trained for an hour on a GPU",
    "python -m bench.gpu": "it is for a GPU; tests/test_bench_gpu.py runs all pieces with tiny sizes",
}
# Options that are replaced.
SMALLER = {"--nproc-per-node=8": "--nproc-per-node=2"}
# Commands that the pages describe in words, and that others need.
NEEDED = ["python train.py --config yaml_files/tinygsm_arm.yaml"]


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    text: str  # without its comment, continued lines joined

    @property
    def words(self) -> list[str]:
        """As the shell splits it."""
        return shlex.split(self.text)


def fenced_commands(text: str, page: str) -> list[Command]:
    """Commands of a page's fenced code blocks."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in ("", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"(^|\s)#.*", "", line).strip()
                if command:
                    found.append(Command(page, command))
    return found


def all_commands() -> list[Command]:
    """Commands of all pages, each once."""
    found: dict[str, Command] = {}
    for path in PAGES:
        if path.name == "adding.md":  # tests/test_adding.py runs its commands
            continue
        for command in fenced_commands(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()):
            found.setdefault(command.text, command)
    return list(found.values())


def rule_of(command: Command) -> str | None:
    """The entry of `RUN` or `LEFT_OUT` that the command begins with; None if there is none."""
    fitting = [start for start in (*RUN, *LEFT_OUT) if f"{command.text} ".startswith(f"{start} ")]
    return max(fitting, key=len, default=None)


# -- The fast part: programs, files and options ----------------------------------------------------------------------


class _Parsed(BaseException):
    """Ends a program once its command line is read."""


@contextmanager
def _ending_after_parsing() -> Iterator[None]:
    """Programs that read their command line here end with `_Parsed`, which holds the options."""

    def wrap(original: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> None:
            raise _Parsed(original(self, *arguments, **keywords))

        return parse

    parser = argparse.ArgumentParser
    with (
        mock.patch.object(parser, "parse_args", wrap(parser.parse_args)),
        mock.patch.object(parser, "parse_intermixed_args", wrap(parser.parse_intermixed_args)),
    ):
        yield


def check_command(command: Command) -> None:
    """Raise ValueError if the command's program or a file that it names is missing, or if an option is unknown."""
    words = [word.replace("%a", "1") for word in command.words]
    for word in words:
        if re.fullmatch(r"[\w/]+\.(py|sh|ya?ml)", word) and not (ROOT / word).exists():
            raise ValueError(f"{command.text}: {word} does not exist")
    program, arguments = words[0], words[1:]
    if arguments[:2] == ["-m", "runtime.launch"]:
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(arguments[2:])
        program, arguments = "python", [options.training_script, *options.training_script_args]
    elif "job.sh" in words:  # sbatch's own options are not checked
        separated = words[0] == "bash" and "--" in words
        program = "python"
        arguments = ["train.py", *words[words.index("--" if separated else "job.sh") + 1 :]]
    if program == "python":
        _check_python(command, arguments)
    elif program == "make":
        done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{command.text}: {done.stderr.strip()}")
    elif program not in ("source", "conda"):
        raise ValueError(f"{command.text}: {program} is not a program that this check knows")


def _check_python(command: Command, arguments: list[str]) -> None:
    """Let the program's own parser read the options, and check the settings if it takes a YAML file."""
    from runtime.config_file import read_config

    if arguments[0] == "-m":
        name, arguments = arguments[1], arguments[2:]
    else:
        name, arguments = arguments[0].removesuffix(".py").replace("/", "."), arguments[1:]
    module = importlib.import_module(module_of(name))
    try:
        with _ending_after_parsing(), mock.patch.object(sys, "argv", [name, *arguments]):
            module.main()
    except _Parsed as parsed:
        (options,) = parsed.args
    except SystemExit:  # the parser's message is on stderr
        raise ValueError(f"{command.text}: the program refuses its options") from None
    for config in (word for before, word in pairwise(arguments) if before == "--config"):
        read_config(ROOT / config, options.overrides)


def module_of(name: str) -> str:
    """The module that `python -m name` runs; ValueError if there is none."""
    try:
        found = importlib.util.find_spec(f"{name}.__main__") if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:
        found = None
    if found is not None:
        return f"{name}.__main__"
    if not (ROOT / f"{name.replace('.', '/')}.py").exists():
        raise ValueError(f"there is no module {name}")
    return name


# -- Running them ----------------------------------------------------------------------------------------------------


def small_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file for a run of seconds: one small layer, four updates, few rows."""
    small = json.loads(json.dumps(settings))
    small["model"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["training"] |= {"batch_size": 8, "max_steps": 4, "warmup_steps": 1, "device": "cpu"}
    small["training"] |= {"log_every": 1, "eval_every": 2, "save_every": 2}
    small["validation"] |= {"n_examples": 2, "n_final_examples": 2, "n_loss_rows": 4, "batch_size": 2}
    small["wandb"] = {"mode": "disabled"}
    data = small["data"]
    if data["dataset"] in ("sudoku", "addition"):
        data |= {"n_train": 64, "n_test": 8}
    elif data["dataset"] == "text":
        data["n_held_out"] = 20
    elif data["dataset"] != "tiny_gsm":  # one that was added
        data |= {key: n for key, n in (("n_train", 64), ("n_test", 8)) if key in data}
    elif data["source"] == "word_problems":
        data |= {"n_train": 100, "n_held_out": 20, "n_test": 4}
    else:
        small["model"]["vocab_size"] = 512  # of the stand-in for Qwen2's tokenizer
        data |= {"mask_id": 511, "n_held_out": 20, "test_source": "gsm8k.jsonl"}
    return small


def write_small_qwen2(folder: Path) -> None:
    """What stands for a Hugging Face model: random weights of the shape of `small_settings`, and a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from data.word_problems import train_tokenizer

    (yaml_file,) = (ROOT / "yaml_files").glob("text_qwen2_*.yaml")
    shape = small_settings(yaml.safe_load(yaml_file.read_text()))["model"] | {"vocab_size": 512}
    del shape["init_from"]
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)


def prepare(folder: Path) -> None:
    """Copy the checkout to `folder`, make its YAML files small, and write what stands for downloads and user files."""
    from data.word_problems import generate_problems

    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    (folder / ".venv").symlink_to(sys.prefix)
    (write_pairs,) = re.findall(
        r"```python\n(import json.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL
    )
    subprocess.run([sys.executable, "-c", write_pairs.replace("20_000", "100")], cwd=folder, check=True)
    for path in (folder / "yaml_files").glob("*.yaml"):
        path.write_text(yaml.safe_dump(small_settings(yaml.safe_load(path.read_text()))))
    write_small_qwen2(folder / "Qwen" / "Qwen2-0.5B")
    problems = generate_problems(104, seed=0)
    rows = [{"question": problem.question, "code": problem.code} for problem in problems[:100]]
    questions = [{"question": problem.question, "answer": f"#### {problem.answer}"} for problem in problems[100:]]
    completions = [{"completion": problem.code, "gold": problem.answer} for problem in problems[100:]]
    files: dict[str, list[dict[str, Any]]] = {
        "TinyGSM/TinyGSM/rows": rows,
        "gsm8k": questions,
        "completions": completions,
    }
    for name, lines in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_command(command: Command, folder: Path) -> tuple[bool, str]:
    """Run one command in the prepared folder; whether it succeeded, and its output."""
    line = f"{command.text} {RUN[rule_of(command) or '']}".strip()
    for option, smaller in SMALLER.items():
        line = line.replace(option, smaller)
    environment = os.environ | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return False, f"it takes more than {TIMEOUT_S} s"
    return done.returncode == 0, done.stdout


def main(arguments: list[str] | None = None) -> None:
    """Command line; exit status 1 if a command fails or has no rule."""
    parser = argparse.ArgumentParser(description="Run the commands of README.md and docs/*.md in small.")
    parser.add_argument("--list", action="store_true", help="run nothing; list the commands")
    options = parser.parse_args(arguments)
    commands = [*(Command("needed", text) for text in NEEDED), *all_commands()]
    unknown = [command for command in commands if rule_of(command) is None]
    left_out = [command for command in commands if rule_of(command) in LEFT_OUT]
    order = list(RUN)
    to_run = sorted(
        (command for command in commands if rule_of(command) in RUN),
        key=lambda command: order.index(rule_of(command) or ""),
    )
    failed = []
    for command in left_out:
        print(f"not run   {command.text}\n          {LEFT_OUT[rule_of(command) or '']}")
    for command in unknown:
        print(f"NO RULE   {command.text}\n          add it to RUN or LEFT_OUT in tests/docs_check.py ({command.page})")
    if options.list:
        print("\n".join(f"run       {command.text}" for command in to_run))
    else:
        with tempfile.TemporaryDirectory(prefix="docs-check-") as scratch:
            folder = Path(scratch) / "puma"
            prepare(folder)
            for command in to_run:
                start = time.monotonic()
                good, output = run_command(command, folder)
                print(f"{'ok' if good else 'FAILED':<6}{time.monotonic() - start:5.0f} s  {command.text}", flush=True)
                if not good:
                    failed.append(command)
                    print(output)
        print(f"{len(to_run) - len(failed)} of {len(to_run)} commands succeeded, {len(left_out)} were not run")
    sys.exit(1 if failed or unknown else 0)


if __name__ == "__main__":
    main()
