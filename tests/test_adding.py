"""docs/adding.md works: its data set and its objective, copied into a checkout, train, evaluate and sample."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from docs_check import fenced_commands

PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```(?:python|yaml)\n# (.+)\n((?:.*\n)*?)```", PAGE))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code with what the page adds."""
    copy = tmp_path / "puma"
    skipped = shutil.ignore_patterns(".*", "runs", "tests", "results", "docs", "__pycache__", "*.npy")
    shutil.copytree(ROOT, copy, ignore=skipped)
    for name in ("data/reversed_strings.py", "yaml_files/reversed_strings.yaml", "fixed_share.py"):
        (copy / name).write_text(BLOCKS[name], encoding="utf-8")
    config = (copy / "config.py").read_text(encoding="utf-8")
    old = re.search(r"^AnyDataSettings = .*\n", config, re.MULTILINE)
    assert old is not None
    new = BLOCKS["config.py: AnyDataSettings"]
    config = config.replace(old[0], f"from data.reversed_strings import ReversedStringsSettings\n\n{new}")
    settings = BLOCKS["config.py: before AnyObjectiveSettings"]
    config = config.replace(
        "\nAnyObjectiveSettings = (\n", f"\n{settings}\n\nAnyObjectiveSettings = (\n    FixedShareSettings |"
    )
    (copy / "config.py").write_text(config, encoding="utf-8")
    run = (copy / "training" / "run.py").read_text(encoding="utf-8")
    last = "    return UniformObjective("
    assert run.count(last) == 1
    branch = BLOCKS["training/run.py: before the last line of build_objective"]
    imports = "from config import FixedShareSettings\nfrom fixed_share import FixedShareObjective\n"
    run = run.replace(last, branch + last).replace("from baselines import", imports + "from baselines import", 1)
    (copy / "training" / "run.py").write_text(run, encoding="utf-8")
    return copy


def run_there(checkout: Path, *arguments: str) -> str:
    """Run a command of the copy; its standard output."""
    done = run_python(*arguments, folder=checkout, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
