"""docs/adding.md works: its data set and its objective, copied into a checkout, train, evaluate and sample."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from docs_check import fenced_commands

PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"```(?:python|yaml)\n# (.+)\n((?:.*\n)*?)```", PAGE))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code with what the page adds, and nothing else."""
    copy = tmp_path / "puma"
    skipped = shutil.ignore_patterns(".*", "runs", "tests", "results", "docs", "__pycache__", "*.npy")
    shutil.copytree(ROOT, copy, ignore=skipped)
    for title, block in BLOCKS.items():
        name, _, place = title.partition(": ")
        path = copy / name
        path.write_text(placed(block, place, path.read_text(encoding="utf-8")) if place else block, encoding="utf-8")
    return copy


def placed(block: str, place: str, code: str) -> str:
    """`code` with a block of the page at the place that its title names."""
    lines, own = code.splitlines(keepends=True), lines_of(place, code)
    return "".join([*lines[: own.start], block, *lines[own.stop :]])


def lines_of(place: str, code: str) -> slice:
    """The lines of a file that a block replaces; none if the block is inserted."""
    before, name = place.startswith("before "), place.split()[-1]
    for node in reversed(ast.parse(code).body):
        assert node.end_lineno is not None
        if place == "with the imports" and isinstance(node, ast.Import | ast.ImportFrom):
            return slice(node.end_lineno, node.end_lineno)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return slice(node.end_lineno - 1, node.end_lineno - 1)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return slice(node.lineno - 1, node.lineno - 1 if before else node.end_lineno)
    raise ValueError(f"no place {place!r}")


def run_there(checkout: Path, *arguments: str) -> str:
    """Run a command of the copy; its standard output."""
    done = run_python(*arguments, folder=checkout, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("union", ["AnyDataSettings", "AnyObjectiveSettings"])
def test_the_unions_are_those_of_the_code_with_the_new_class(union: str):
    config = (ROOT / "config.py").read_text(encoding="utf-8")
    own = "".join(config.splitlines(keepends=True)[lines_of(union, config)])
    *others, new = re.findall(r"\w+Settings\b", BLOCKS[f"config.py: {union}"])
    assert others == re.findall(r"\w+Settings\b", own)
    assert f"class {new}(" in PAGE


def test_the_data_set_trains_evaluates_and_samples(checkout: Path):
    train, evaluate, sample = (command.words[1:] for command in fenced_commands(PAGE, "docs/adding.md"))
    trained = run_there(checkout, *train, "training.device=cpu", "training.precision=float32")
    solved = re.search(r"solved ([\d.]+)% of 500 unseen strings", trained)
    assert solved is not None, trained
    assert float(solved[1]) > 95
    assert "accuracy" in run_there(checkout, *evaluate)
    assert run_there(checkout, *sample).splitlines()[0] == "edcba"


def test_the_objective_trains(checkout: Path):
    changes = ["objective.name=fixed_share", "objective.share=0.4", "training.max_steps=5", "validation.n_examples=8"]
    out = run_there(checkout, "train.py", "--config", "yaml_files/reversed_strings.yaml", *changes)
    assert "fixed_share" in out
