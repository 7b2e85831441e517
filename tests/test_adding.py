"""What docs/adding.md and docs/own_data.md add works: copied into a checkout, it trains, evaluates and samples.

The experiment of docs/adding.md is read, with all of its settings; tests/test_results_run.py runs a smaller one.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_python
from docs_check import fenced_commands, small_settings
from test_data_text_pairs import write_pairs

from results import run

ADDING, OWN_DATA = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("adding.md", "own_data.md"))
TRAIN, EVALUATE, SAMPLE, TRAIN_OBJECTIVE, EVALUATE_RULE, RUN_EXPERIMENT = (
    command.words[1:] for command in fenced_commands(ADDING, "docs/adding.md")
)


SHIPPED = (
    *("SudokuSettings", "TinyGsmSettings", "AdditionSettings", "TextSettings"),
    *("UniformSettings", "PumaSettings", "BlockUniformSettings", "BlockPumaSettings", "AutoregressiveSettings"),
)


def blocks_of(page: str) -> dict[str, str]:
    """The blocks of a page whose first line says where they belong, by that line."""
    return dict(re.findall(r"```(?:python|yaml)\n# (.+)\n((?:.*\n)*?)```", page))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code with what docs/adding.md adds, and nothing else."""
    return write_checkout(ADDING, tmp_path / "puma")


def write_checkout(page: str, copy: Path) -> Path:
    """Copy the code and add what a page adds."""
    skipped = shutil.ignore_patterns(".*", "runs", "tests", "results", "docs", "__pycache__", "*.npy")
    shutil.copytree(ROOT, copy, ignore=skipped)
    (copy / "results").mkdir()
    for path in (ROOT / "results").glob("*.py"):
        shutil.copy(path, copy / "results")
    for title, block in blocks_of(page).items():
        name, _, place = title.partition(": ")
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(placed(block, place, path.read_text(encoding="utf-8")) if place else block, encoding="utf-8")
    return copy


def placed(block: str, place: str, code: str) -> str:
    """`code` with a block of the page at the place that its title names."""
    lines, own = code.splitlines(keepends=True), lines_of(place, code)
    return "".join([*lines[: own.start], block, *lines[own.stop :]])


def lines_of(place: str, code: str) -> slice:
    """The lines of a file that a block replaces; none if the block is inserted."""
    before, name = place.startswith("before "), place.split()[-1]
    if place == "at the end":
        return slice(code.count("\n"), code.count("\n"))
    for node in reversed(ast.parse(code).body):
        assert node.end_lineno is not None
        if place == "with the imports" and isinstance(node, ast.Import | ast.ImportFrom):
            return slice(node.end_lineno, node.end_lineno)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return slice(node.end_lineno - 1, node.end_lineno - 1)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return slice(node.body[0].end_lineno, node.body[0].end_lineno)  # after the docstring
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return slice(node.lineno - 1, node.lineno - 1 if before else node.end_lineno)
    raise ValueError(f"no place {place!r}")


def run_there(checkout: Path, *arguments: str) -> str:
    """Run a command of the copy; its standard output."""
    done = run_python(*arguments, folder=checkout, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("page", "union"),
    [(ADDING, "AnyDataSettings"), (ADDING, "AnyObjectiveSettings"), (OWN_DATA, "AnyDataSettings")],
    ids=["data set", "objective", "score"],
)
def test_the_unions_are_those_of_the_code_with_the_new_class(page: str, union: str):
    config = (ROOT / "config.py").read_text(encoding="utf-8")
    own = "".join(config.splitlines(keepends=True)[lines_of(union, config)])
    _, *others, new = re.findall(r"\w+Settings\b", blocks_of(page)[f"config.py: {union}"])
    shipped = [name for name in re.findall(r"\w+Settings\b", own) if name in SHIPPED]
    assert others == shipped, "a checkout may have more, of its own"
    assert f"class {new}(" in page


def test_the_data_set_trains_evaluates_and_samples(checkout: Path):
    trained = run_there(checkout, *TRAIN, "training.device=cpu", "training.precision=float32")
    solved = re.search(r"solved ([\d.]+)% of 500 test strings", trained)
    assert solved is not None, trained
    assert float(solved[1]) > 95
    assert "accuracy" in run_there(checkout, *EVALUATE)
    assert run_there(checkout, *SAMPLE).splitlines()[0] == "edcba"
    assert "left_bias 0.1: accuracy" in run_there(checkout, *EVALUATE_RULE)
    order = run_there(checkout, "-c", ORDER)
    assert order.split() == ["1", "2", "3", "4", "5"]


def test_the_score_of_own_text_is_recorded(tmp_path: Path):
    checkout = write_checkout(OWN_DATA, tmp_path / "puma")
    settings = small_settings(yaml.safe_load((ROOT / "yaml_files" / "text_sorting_puma.yaml").read_text()))
    write_pairs(checkout / "pairs.jsonl", 60)
    settings["data"] |= {"dataset": "word_f1", "source": "pairs.jsonl"}
    (checkout / "run.yaml").write_text(yaml.safe_dump(settings))
    run_there(checkout, "train.py", "--config", "run.yaml", "--run-dir", "run")
    (sampler,) = json.loads((checkout / "run" / "final.json").read_text())["evaluation"]["samplers"]
    assert 0 <= sampler["details"]["f1"] <= 1
    scores = "from data.word_f1 import word_f1; print(*(word_f1(each, 'a b b') for each in ('b a b', 'b c', '')))"
    assert run_there(checkout, "-c", scores).split() == ["1.0", "0.4", "0.0"]


def test_the_objective_trains(checkout: Path):
    out = run_there(
        checkout, *TRAIN_OBJECTIVE, "training.max_steps=5", "training.log_every=1", "validation.n_examples=8"
    )
    assert "cosine" in out
    records = (checkout / "runs" / "cosine" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(0 < json.loads(record)["train/masked_fraction"] <= 1 for record in records)
    run_there(checkout, "-m", "results.mask_distance", "runs/cosine", "--rows", "100", "--out", "masks")
    (measured,) = json.loads((checkout / "masks" / "records.json").read_text(encoding="utf-8"))["runs"]
    assert measured["masks"].startswith("cosine, elbo True")
    n_rows = [stage["n"] for stage in measured["points"][-1]["stages"]]
    assert sum(n_rows) == 100
    assert n_rows[0] > sum(n_rows[4:]), "cosine masks are more often many than few"


# The pass in which each letter of the answer is written.
ORDER = """
from config import SamplingRule
from sampling import load
print(*load("runs/reversed_strings").complete("abcde", SamplingRule(left_bias=1000.0)).order[5:])
"""


def test_the_experiment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my_ablation.py").write_text(blocks_of(ADDING)["runs/my_ablation.py"], encoding="utf-8")
    tasks = []
    monkeypatch.setattr(run, "run_all", lambda todo, *_: tasks.extend(todo))
    with pytest.raises(SystemExit, match="no run has been evaluated yet"):
        run.main([*RUN_EXPERIMENT[2:], "--runs", str(tmp_path)])
    assert [task.run_dir.name for task in tasks[:5]] == [
        *("uniform_seed0", "pool_of_1_seed0", "pool_of_4_seed0", "pool_of_16_seed0"),
        "uniform_seed1",
    ]
    assert len(tasks) == 12


# Of 5 letters n are masked: the share of such rows, and the sum of their weights, for n = 1 to 5; letter by letter,
# once as one block and once as a second block after one that is all prompt.
WEIGHTS_BY_N = """
import torch
from config import CosineSettings
from cosine import CosineObjective
from data.reversed_strings import ReversedStringsSettings
from data.row_queue import RowQueue
from data.stream import SequenceStream
from progressive_block import BlockLayout

data = ReversedStringsSettings(dataset="reversed_strings").open(27).train
for elbo in False, True:
    for size in 10, 5:
        queue = RowQueue(SequenceStream(data, 0), 20_000, torch.device("cpu"))
        settings, generator = CosineSettings(name="cosine", elbo=elbo), torch.Generator().manual_seed(0)
        objective = CosineObjective(
            settings, queue, BlockLayout(10, size, "prefix"), n_rows=20_000, micro_rows=20_000, generator=generator
        )
        xt, x0, weight = objective.draw(0)
        assert weight.dtype == torch.float32 and bool((xt[weight == 0] == x0[weight == 0]).all())
        n_masked = (xt == 26).sum(1)
        print(*((n_masked == n).double().mean().item() for n in range(6)))
        print(*(weight[n_masked == n].sum().item() for n in range(6)))
"""


def test_the_weights_of_the_objective_make_the_bound_of_the_likelihood(checkout: Path):
    """With them every number of masked positions has the same part of the loss, as it has with uniform masks."""
    lines = run_there(checkout, "-c", WEIGHTS_BY_N).splitlines()
    chance = [2 / math.pi * (math.asin(n / 5) - math.asin((n - 1) / 5)) for n in range(1, 6)]
    expected = [chance, chance, chance, chance, chance, [1 / 5] * 5, chance, [1 / 5] * 5]
    for line, values in zip(lines, expected, strict=True):
        assert [float(each) for each in line.split()] == pytest.approx([0, *values], abs=0.01)
