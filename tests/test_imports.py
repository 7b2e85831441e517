"""The house keeps its order: data flows one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SETTINGS = {"config", "config_data", "config_objective"}
SAMPLERS = SETTINGS | {"model", "sampling_step", "unmasking"}
# Which of the project's modules (a file or a folder at the root) each of them may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "config_data": set(),
    "config_objective": {"config_data"},
    "config": {"config_data", "config_objective"},
    "runtime": SETTINGS,
    "model": SETTINGS,
    "data": SETTINGS | {"runtime"},
    "unmasking": set(),
    "microbatch": set(),
    "autoregressive": {"data", "microbatch", "runtime"},
    "progressive": {"data", "runtime", "unmasking"},
    "progressive_block": SETTINGS | {"microbatch", "runtime", "unmasking"},
    "objective": SETTINGS
    | {"autoregressive", "data", "microbatch", "progressive", "progressive_block", "runtime", "unmasking"},
    "elastic": {"data", "runtime"},
    "sampling_step": SETTINGS | {"model", "unmasking"},
    "sampling_block": SAMPLERS,
    "sampling_causal": SAMPLERS,
    "sampling": SAMPLERS | {"data", "runtime", "sampling_block", "sampling_causal"},
    "eval": SETTINGS
    | {"autoregressive", "data", "model", "progressive_block", "runtime", "sampling", "sampling_step", "unmasking"},
    "pretrained": SETTINGS | {"data", "model", "runtime", "sampling"},
    "run_state": SETTINGS | {"data", "elastic", "microbatch", "model", "objective", "pretrained", "runtime"},
    "update": SETTINGS | {"model", "run_state", "runtime"},
    "train": SETTINGS | {"data", "eval", "run_state", "runtime", "update"},
}
# What a file's command line alone may also use, inside a function: it shows results, the module serves other modules.
COMMANDS = {"sampling.py": {"eval"}}
# Not part of the flow: they may import anything, and nothing imports them.
OUTSIDE = {"tests", "bench", "docs", "results"}


def modules() -> list[Path]:
    """Python files of the project, relative to its root, without those outside the flow."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in paths if not path.parts[0].startswith(".") and part_of(path) not in OUTSIDE)


def part_of(path: Path) -> str:
    """`data` for data/stream.py, `train` for train.py."""
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First names of what a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def test_the_walk_finds_imports():
    assert imported(Path("train.py")) >= {"tqdm", "config", "data", "eval", "runtime", "__future__"}
    assert "wandb" in imported(Path("runtime/metrics.py")), "inside a function"


def test_every_module_has_its_place():
    assert {part_of(path) for path in modules()} <= ALLOWED.keys()


@pytest.mark.parametrize("path", modules(), ids=str)
def test_data_flows_one_way(path):
    part = part_of(path)
    ours = imported(path) & (ALLOWED.keys() | OUTSIDE)
    assert ours - ALLOWED[part] - {part} == COMMANDS.get(str(path), set())


def test_nothing_imports_train():
    assert all("train" not in allowed for allowed in ALLOWED.values())
    assert [path for path in modules() if "train" in imported(path)] == []


def test_slow_libraries_are_imported_where_they_are_used():
    """wandb, datasets, transformers and matplotlib take seconds, and some machines lack them."""
    for path in modules():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        at_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        at_top |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        slow = {
            name
            for name in at_top
            if name and name.split(".")[0] in ("wandb", "datasets", "transformers", "matplotlib")
        }
        assert slow == set(), path
