"""The picture and the tables of all tasks agree with the records, and the pages with the tables."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT

from results import overview
from results.experiments import EXPERIMENTS
from results.overview import METHODS, POOLS, TASKS, Comparison, pool_table, task_table

MEDIUM = ROOT / "results" / "word_problems_medium" / "records.json"


def plain_rows(page: str) -> list[list[str]]:
    """Rows of the tables of a page, links as their text."""
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell.strip()) for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(("page", "table"), [("README.md", task_table), ("results/README.md", pool_table)])
def test_a_page_has_the_table_of_the_records(page, table):
    rows = plain_rows(page)
    _, _, *expected = table()
    for line in expected:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells in rows, f"{page} lacks the row of `python -m results.overview`: {line}"


def test_every_label_is_one_of_its_experiment():
    for comparison in (*TASKS, *POOLS):
        known = {variant.label for variant in EXPERIMENTS[comparison.experiment].variants}
        assert set(comparison.labels) - {None} <= known, comparison.task
    assert all(len(task.labels) == len(METHODS) for task in TASKS)
    assert all(len(pair.labels) == 2 for pair in POOLS)


def test_solved_is_that_of_complete_runs_by_seed():
    runs = json.loads(MEDIUM.read_text(encoding="utf-8"))["runs"]
    label = "uniform, shifted"
    expected = {run["seed"]: 100 * run["final"]["accuracy"] for run in runs if run["variant"] == label}
    assert len(expected) == 5
    assert Comparison("", "word_problems_medium", (None, label)).solved == [{}, expected]
    line = next(line for line in task_table() if line.startswith("| medium word problems "))
    assert f" {statistics.mean(expected.values()):.1f} ({min(expected.values()):.1f} to " in line


def test_the_picture_has_every_seed(tmp_path: Path, monkeypatch):
    drawn: list[list[float]] = []

    def keep(figure, out, dpi):
        drawn.extend(list(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_alpha())

    monkeypatch.setattr(overview, "save_figure", keep)
    overview.draw(tmp_path / "overview.png")
    expected = [list(each.values()) for task in TASKS for each in task.solved]
    assert drawn == expected
