"""The picture of curves: what is drawn against what, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from report import curves
from report.curves import AXES, draw_curves
from runtime.metrics import METRICS_FILE


def write_run(run_dir: Path, speed: float = 1.0) -> Path:
    """Records of 100 steps, evaluated with two ways of sampling at every 50th."""
    run_dir.mkdir()
    rows = []
    for step in range(10, 101, 10):
        row = {"step": step, "seconds": step / speed, "sequences_distinct": 8 * step, "train/loss": 100 / step}
        if step % 50 == 0:
            row |= {
                "validation/loss": 120 / step,
                "validation/accuracy/top_prob_1": step / 200,
                "validation/accuracy/top_prob_2": step / 400,
                "validation/accuracy_low/top_prob_1": 0.0,
            }
        rows.append(row)
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, instead of its file."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def points(figure: Figure, plot: int, line: int) -> list[tuple[float, float]]:
    return [(x, y) for x, y in np.asarray(figure.axes[plot].lines[line].get_xydata()).tolist()]


@pytest.mark.parametrize(
    ("axis", "at_50", "at_100"), [("step", 50, 100), ("seconds", 25, 50), ("sequences_distinct", 400, 800)]
)
def test_each_axis(axis, at_50, at_100, tmp_path, drawn):
    draw_curves([write_run(tmp_path / "run", speed=2.0)], axis, tmp_path / "out.png")
    (figure,) = drawn
    assert len(points(figure, 0, 0)) == 10
    assert points(figure, 0, 0)[-1] == (at_100, 1.0)
    assert points(figure, 0, 1) == [(at_50, 2.4), (at_100, 1.2)]
    assert points(figure, 1, 0) == [(at_50, 25), (at_100, 50)]
    assert points(figure, 1, 1) == [(at_50, 12.5), (at_100, 25)]
    assert len(figure.axes[1].lines) == 2, "the bounds of the interval are no curves"
    assert figure.axes[0].get_xlabel() == figure.axes[1].get_xlabel() == AXES[axis]


def test_several_runs_are_told_apart(tmp_path, drawn):
    draw_curves([write_run(tmp_path / "puma"), write_run(tmp_path / "baseline")], "step", tmp_path / "out.png")
    loss, accuracy = drawn[0].axes
    assert loss.get_legend_handles_labels()[1] == ["puma", "baseline"]
    assert accuracy.get_legend_handles_labels()[1] == [
        "puma: top_prob_1",
        "puma: top_prob_2",
        "baseline: top_prob_1",
        "baseline: top_prob_2",
    ]
    colors = [line.get_color() for line in accuracy.lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    styles = [line.get_linestyle() for line in accuracy.lines]
    assert styles[0] == styles[2] != styles[1] == styles[3]


def test_a_run_that_has_not_been_evaluated_yet(tmp_path, drawn):
    run_dir = write_run(tmp_path / "young")
    lines = (run_dir / METRICS_FILE).read_text().splitlines(keepends=True)
    (run_dir / METRICS_FILE).write_text("".join(lines[:3]))
    draw_curves([run_dir], "step", tmp_path / "out.png")
    assert [len(points(drawn[0], 0, line)) for line in (0, 1)] == [3, 0]
    assert not drawn[0].axes[1].lines


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_command_writes_a_picture(suffix, tmp_path, capsys):
    out = tmp_path / f"curves.{suffix}"
    curves.main([str(write_run(tmp_path / "run")), "--x", "seconds", "--out", str(out)])
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/nonexistent"], "/nonexistent holds no metrics.jsonl"),
        (["RUN", "--out", "/nonexistent/out.png"], "/nonexistent"),
        (["RUN", "--out", "curves.docx"], "docx"),
        (["RUN", "--x", "hours"], "--x"),
    ],
)
def test_bad_input_ends_with_one_message(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        curves.main([word.replace("RUN", str(run_dir)) for word in words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
