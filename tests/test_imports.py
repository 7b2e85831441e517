"""The layout of the code: what may import what, with no circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import project_trees

# Each layer may import those below it (above it in this list). What shares a layer imports nothing of each other.
LAYERS: list[set[str]] = [
    {"base"},
    {"unmasking", "grader"},
    {"data"},
    {"config"},
    {"runtime"},
    {"model"},
    {"objective"},
    {"progressive_block"},
    {"progressive", "baselines"},
    {"samplers", "training"},
    {"eval", "report"},
    {"sampling"},
    {"train"},
]
# Not part of the flow: these may import anything, and nothing imports them.
OUTSIDE = {"tests", "bench", "docs", "results"}
SLOW_LIBRARIES = {"wandb", "datasets", "transformers", "matplotlib"}


def modules() -> list[Path]:
    """Python files of the project, relative to its root, without those outside the flow."""
    return [path for path in project_trees() if part_of(path) not in OUTSIDE]


def part_of(path: Path) -> str:
    """`data` for data/stream.py, `train` for train.py."""
    return path.parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    """Number of a part's layer, from 0; StopIteration if it has none."""
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def imported(path: Path) -> set[str]:
    """Modules that a file imports by dotted name, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(project_trees()[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_walk_finds_imports():
    assert imported(Path("train.py")) >= {"tqdm", "config", "data.dataset", "eval.evaluate", "__future__"}
    assert "wandb" in imported(Path("runtime/metrics.py")), "inside a function"


def test_every_module_has_its_layer():
    assert {part_of(path) for path in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_go_down(path):
    own = part_of(path)
    parts = {name.split(".")[0] for name in imported(path)} - {own}
    assert parts & OUTSIDE == set()
    upward = {part for part in parts & set().union(*LAYERS) if layer_of(part) >= layer_of(own)}
    assert upward == set(), f"{path} imports what is not below it"


def test_no_files_import_each_other_in_a_circle():
    """Within a folder too, and inside functions: a circle raises CycleError, which names its files."""
    files = {".".join(path.with_suffix("").parts): path for path in modules()}
    TopologicalSorter({name: imported(path) & files.keys() for name, path in files.items()}).prepare()


def test_slow_libraries_are_imported_where_they_are_used():
    """They take seconds, and some machines lack them."""
    for path in modules():
        tree = project_trees()[path]
        at_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        at_top |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert {name for name in at_top if name and name.split(".")[0] in SLOW_LIBRARIES} == set(), path
