"""The picture of curves: what is drawn against what, and refusals."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny_settings
from matplotlib.figure import Figure

from base.files import WriteError
from report import curves
from report.curves import AXES, Curve, draw_curves, plot_curves, read_curves, target_table
from runtime.config_file import read_config
from runtime.metrics import METRICS_FILE


def write_run(run_dir: Path, speed: float = 1.0, share: float = 1.0) -> Path:
    """Records of 100 steps, evaluated with two ways of sampling at every 50th; `share` scales the accuracy."""
    run_dir.mkdir()
    rows = []
    for step in range(10, 101, 10):
        row = {
            "step": step,
            "seconds": step / speed,
            "sequences_distinct": 8 * step,
            "tokens": 99 * step,
            "train/loss": 100 / step,
        }
        if step % 50 == 0:
            row |= {
                "validation/loss": 120 / step,
                "validation/accuracy/top_prob_1": share * step / 200,
                "validation/accuracy/top_prob_2": share * step / 400,
                "validation/accuracy_low/top_prob_1": 0.0,
            }
        rows.append(row)
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def young(run_dir: Path) -> Path:
    """A run that has not been evaluated yet."""
    records = write_run(run_dir) / METRICS_FILE
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:3]))
    return run_dir


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, instead of its file."""
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, *_: figures.append(figure))
    return figures


def points(figure: Figure, plot: int, line: int) -> list[tuple[float, float]]:
    return [(x, y) for x, y in np.asarray(figure.axes[plot].lines[line].get_xydata()).tolist()]


@pytest.mark.parametrize(
    ("axis", "at_50", "at_100"),
    [("step", 50, 100), ("seconds", 25, 50), ("sequences_distinct", 400, 800), ("tokens", 4950, 9900)],
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


@pytest.mark.parametrize(("factor", "scale"), [(4, "linear"), (10, "log")])
def test_the_axis_of_distinct_sequences_is_logarithmic_where_runs_end_far_apart(factor, scale, tmp_path, drawn):
    runs = [write_run(tmp_path / "puma"), write_run(tmp_path / "uniform")]
    records = runs[1] / METRICS_FILE
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows = [row | {"sequences_distinct": factor * row["sequences_distinct"]} for row in rows]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for axis in ("sequences_distinct", "step"):
        draw_curves(runs, axis, tmp_path / "out.png")
    assert [plot.get_xscale() for plot in drawn[0].axes] == [scale] * 2
    assert [plot.get_xscale() for plot in drawn[1].axes] == ["linear"] * 2


def test_several_runs_are_told_apart(tmp_path, drawn):
    draw_curves([write_run(tmp_path / "puma"), write_run(tmp_path / "baseline")], "step", tmp_path / "out.png")
    (accuracy,) = drawn[0].axes[1:]
    assert accuracy.get_legend_handles_labels()[1] == [
        "puma: top_prob_1",
        "puma: top_prob_2",
        "baseline: top_prob_1",
        "baseline: top_prob_2",
    ]
    colors = [line.get_color() for line in accuracy.lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    styles = [(line.get_linestyle(), line.get_marker()) for line in accuracy.lines]
    assert styles[0] == styles[2] != styles[1] == styles[3]


def configured(run_dir: Path, seed: int, **objective: object) -> Path:
    """Add the settings to a run directory."""
    config = tiny_settings(objective, run_dir)
    config["training"] |= {"seed": seed, "log_every": 1 + seed}  # may differ, as all that does not change the result
    config["wandb"] = {"name": f"run {seed}"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def test_seeds_of_a_setting_are_one_line_with_a_band(tmp_path, drawn):
    runs = [
        configured(write_run(tmp_path / f"puma_seed{seed}", share=share), seed, name="puma", n_stages=2)
        for seed, share in ((0, 1.0), (1, 0.5), (2, 0.9))
    ]
    runs.append(configured(write_run(tmp_path / "uniform"), 0, name="uniform"))
    draw_curves(runs, "step", tmp_path / "out.png", rule="top_prob_1")
    (accuracy,) = drawn[0].axes[1:]
    assert accuracy.get_legend_handles_labels()[1] == ["puma, 3 seeds", "uniform"]
    assert points(drawn[0], 1, 0) == [(50, pytest.approx(20)), (100, pytest.approx(40))]
    band = accuracy.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (12.5, 50), "the lowest and the highest seed"
    assert {curve.setting for curve in read_curves(runs)} == {"puma", "uniform"}


def test_runs_of_one_folder_name_are_named_with_their_parents(tmp_path):
    runs = []
    for number, parent in enumerate(("monday", "tuesday")):
        (tmp_path / parent).mkdir()
        runs.append(configured(write_run(tmp_path / parent / "run"), 0, name="puma", n_stages=2 + number))
    assert [curve.setting for curve in read_curves(runs, "top_prob_1")] == ["monday/run", "tuesday/run"]


def test_settings_of_one_name_are_not_averaged(tmp_path, drawn):
    """However long the part of their paths is that they share, and even if all of it is."""
    runs = []
    for number, name in enumerate(("a/runs/puma", "b/runs/puma", "c/puma_x1", "c/puma_y1", "c/puma_x2", "c/puma_y2")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        settings = {"name": "puma", "n_stages": 2 + min(number, 2) + number // 4}
        runs.append(configured(write_run(tmp_path / name, share=1 / (1 + number)), number % 2, **settings))
    found = draw_curves(runs, "step", tmp_path / "out.png", rule="top_prob_1")
    names = [curve.setting for curve in found]
    assert names[:2] == ["a/runs/puma", "b/runs/puma"]
    assert names[2] == names[3] != names[4] == names[5]
    assert {name.rpartition("_")[0] for name in names[2:]} == {"puma (sudoku_puma"}
    assert len(drawn[0].axes[1].lines) == 4
    assert points(drawn[0], 1, 1) == [(50, 12.5), (100, 25)]


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (("puma_seed1", "puma_seed10"), "puma"),
        (("puma_k8_1", "puma_k8_10"), "puma_k8"),
        (("puma_k8/seed0", "puma_k8/seed1"), "puma_k8"),
        (("0/puma_k8", "1/puma_k8"), "puma_k8"),
        (("puma_seed3",), "puma_seed3"),
    ],
)
def test_the_name_of_a_setting_lacks_the_seed(folders, name, tmp_path):
    runs = []
    for seed, folder in enumerate(folders):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        runs.append(configured(write_run(tmp_path / folder), seed, name="puma", n_stages=2))
    assert {curve.setting for curve in read_curves(runs)} == {name}


def test_a_run_that_is_named_twice_is_one_run(tmp_path, drawn, monkeypatch, capsys):
    """By whatever paths; the place where it is named last counts, as the last one is what --target compares with."""
    for name in ("uniform", "puma"):
        write_run(tmp_path / name)
    configured(tmp_path / "uniform", 0, name="uniform")
    (tmp_path / "link").symlink_to(tmp_path / "uniform")
    monkeypatch.chdir(tmp_path)
    words = ["uniform", "puma", "./puma/", str(tmp_path / "uniform"), "link"]
    assert len(read_curves(list(map(Path, words)), "top_prob_1")) == 2
    curves.main([*words, "--rule", "top_prob_1", "--target", "0.5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| puma | 1 | 100 | 50.0 | 1.2000 |", "| uniform | 1 | 100 | 50.0 | 1.2000 |"]
    assert [line.split(" | ")[:4] for line in lines[7:9]] == [
        ["| puma", "1 of 1", "100", "1.0"],
        ["| uniform", "1 of 1", "100", "1"],
    ]


def test_two_runs_of_one_seed_are_warned_about(tmp_path):
    runs = [
        configured(write_run(tmp_path / f"puma_{number}"), seed, name="puma", n_stages=2)
        for number, seed in enumerate((0, 3, 3))
    ]
    with pytest.warns(
        RuntimeWarning, match=r"puma_1 and .*puma_2 are runs of one setting and the same seed 3"
    ) as found:
        read_curves(runs)
    assert len(found) == 1


def patched_runs(folder: Path) -> list[Path]:
    """Runs of the same settings and seeds, before and after a change of the code."""
    runs = []
    for name, share in (("puma", 1.0), ("puma_patched", 0.5)):
        for seed in (0, 1):
            run_dir = configured(write_run(folder / f"{name}_seed{seed}", share=share), seed, name="puma", n_stages=2)
            code = {"commit": f"{name:x<40}", "modified": name != "puma"}
            (run_dir / "history.json").write_text(json.dumps({"sessions": [code]}))
            runs.append(run_dir)
    return runs


def test_runs_of_different_code_are_told_apart_by_their_folders(tmp_path, drawn, capsys, recwarn):
    runs = patched_runs(tmp_path)
    curves.main([*map(str, runs), "--rule", "top_prob_1", "--by", "folder", "--out", str(tmp_path / "out.png")])
    assert drawn[0].axes[1].get_legend_handles_labels()[1] == ["puma, 2 seeds", "puma_patched, 2 seeds"]
    printed = capsys.readouterr().out
    assert "| puma | 2 | 100 | 50.0 | 1.2000 |" in printed
    assert "| puma_patched | 2 | 100 | 25.0 | 1.2000 |" in printed
    assert not recwarn.list


def test_the_warning_about_one_seed_names_different_code(tmp_path):
    runs = patched_runs(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"different code \(commits pumaxxx and puma_pa-dirty\)") as found:
        read_curves(runs)
    assert len(found) == 2
    assert all("--by folder" in str(each.message) for each in found)


def test_runs_of_one_folder_name_and_different_settings_are_warned_about(tmp_path, drawn):
    runs = [
        configured(write_run(tmp_path / f"puma_seed{seed}"), seed, name="puma", n_stages=2 + seed) for seed in (0, 1)
    ]
    with pytest.warns(RuntimeWarning, match="their settings differ"):
        curves.main([*map(str, runs), "--by", "folder", "--out", str(tmp_path / "out.png")])


def test_the_last_evaluations_are_listed_with_their_range(tmp_path, drawn, capsys):
    shares = (1.0, 0.5)
    runs = [
        configured(write_run(tmp_path / f"puma_seed{seed}", share=share), seed, name="puma", n_stages=2)
        for seed, share in enumerate(shares)
    ]
    curves.main([*map(str, [*runs, young(tmp_path / "young")]), "--out", str(tmp_path / "out.png")])
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "| puma: top_prob_1 | 2 | 100 | 37.5 (25.0 to 50.0) | 1.2000 |",
        "| puma: top_prob_2 | 2 | 100 | 18.8 (12.5 to 25.0) | 1.2000 |",
        "| young | 0 | - | - | - |",
    ]


def test_settings_are_read_once(tmp_path, drawn, monkeypatch):
    run_dir, n_read, read = configured(write_run(tmp_path / "run"), 0, name="puma", n_stages=2), count(), read_config
    monkeypatch.setattr(curves, "read_config", lambda path: (next(n_read), read(path))[1])
    draw_curves([run_dir], "step", tmp_path / "out.png")
    assert next(n_read) == 1


def test_names_are_text_of_a_figure_and_of_a_table(tmp_path, drawn):
    found = draw_curves([write_run(tmp_path / "a$b$\x1b")], "step", tmp_path / "out.png", rule="top_prob_1")
    assert drawn[0].axes[1].get_legend_handles_labels()[1] == [r"a\$b\$\x1b"]
    assert target_table(found, 0.5, found[0].setting)[2].startswith(r"| a$b$\x1b |")


@pytest.mark.parametrize(
    ("steps", "axis", "expected"),
    [
        ((10, 20), "step", [10, 15, 20]),
        ((1, 3), "step", [1, 2, 3]),
        ((1, 3), "sequences_distinct", [1, 2, 3]),
        ((1,), "step", [1]),
        ((1, 3), "seconds", [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_integers_where_the_axis_is(steps, axis, expected):
    plot = Figure().subplots()
    plot_curves(
        plot, [Curve("puma", "", [{"step": x, axis: x, "accuracy": 0.5, "low": 0, "high": 1} for x in steps])], axis
    )
    low, high = plot.get_xlim()
    assert [x for x in plot.get_xticks() if low <= x <= high] == expected
    form = plot.xaxis.get_major_formatter()
    assert [form(x, 0) for x in (12.5, 0.1 + 0.2, 1234567)] == ["12.5", "0.3", "1,234,567"]


def curve(setting: str, *accuracies: float) -> Curve:
    """Evaluations at every 100th update, at half as many seconds, and four sequences per update."""
    steps = range(100, 100 * len(accuracies) + 1, 100)
    points = [
        {"step": step, "seconds": step / 2, "sequences_distinct": 4 * step, "accuracy": accuracy}
        for step, accuracy in zip(steps, accuracies, strict=True)
    ]
    return Curve(setting, "", points)


def test_the_table_of_a_target_gives_ratios_with_their_spread():
    curves = [curve("puma", 0.95, 0.2, 0.9), curve("puma", 0.5, 0.9, 1.0)]
    curves += [curve("uniform", 0.1, 0.5, 0.9), curve("uniform", 0.1, 0.9, 0.9)]
    first, _, puma, uniform = target_table(curves, 0.9, "uniform")
    assert first.startswith("| first at 90% | seeds | updates | ratio | distinct sequences | ratio | seconds | ratio |")
    assert puma == (
        "| puma | 2 of 2 | 150 (100 to 200) | 1.7 (1.0 to 3.0) | 600 (400 to 800) | 1.7 (1.0 to 3.0) "
        "| 75 (50 to 100) | 1.7 (1.0 to 3.0) |"
    )
    assert uniform.startswith("| uniform | 2 of 2 | 250 (200 to 300) | 1 | 1,000 (800 to 1,200) | 1 |")


def test_a_seed_that_never_reaches_the_target_gives_a_bound():
    late, never = curve("late", 0.1, 0.1, 0.9), curve("late", 0.1, 0.1, 0.2)
    fast = curve("fast", 0.9, 0.9, 0.9)
    table = target_table([fast, late, never], 0.9, "late")
    assert table[2].startswith("| fast | 1 of 1 | 100 | > 3.0 |")
    assert table[3].startswith("| late | 1 of 2 | > 300 | 1 |")
    assert target_table([fast, never], 0.9, "fast")[3].startswith("| late | 0 of 1 | > 300 | - |")
    assert "| < 0.3 |" in target_table([fast, late, never], 0.9, "fast")[3]


@pytest.mark.parametrize(
    ("setting", "baseline", "needed", "ratio"),
    [
        # first evaluation at the target, or -n: not in n evaluations
        ((1, 2), (2, -3), "150 (100 to 200)", "> 1.7 (1.0 to ?)"),
        ((1, 2), (3, -2), "150 (100 to 200)", "> 1.7"),  # from 1.5, or less if the second seed of uniform comes soon
        ((1, 2), (-3, -3), "150 (100 to 200)", "> 2.0"),
        ((1, -3), (2, 3), "> 200 (100 to not reached)", "< 1.2 (? to 3.0)"),
        ((3, -1), (2, 3), "> 200", "< 1.2"),  # the second seed may need fewer updates than the first, or more
        ((-2, -3), (2, 3), "> 250", "-"),
        ((1, -3), (2, -3), "> 200 (100 to not reached)", "-"),
    ],
)
def test_ends_of_a_range_that_seeds_leave_unknown_are_not_given(setting, baseline, needed, ratio):
    found = [
        curve(name, *[0.1] * (n - 1 if n > 0 else -n), *[0.9] * (n > 0))
        for name, seeds in (("puma", setting), ("uniform", baseline))
        for n in seeds
    ]
    assert target_table(found, 0.9, "uniform", ["step"])[2].split(" | ")[2:] == [needed, f"{ratio} |"]


def test_each_rule_is_compared_with_the_same_rule():
    found = [curve("puma", 0.9), curve("puma", 0.5, 0.9), curve("uniform", 0.1, 0.9), curve("uniform", 0.5, 0.5, 0.9)]
    found = [replace(each, rule=f"top_prob_{1 + number % 2}") for number, each in enumerate(found)]
    found.append(replace(curve("puma", 0.9), rule="entropy_1"))  # which the baseline lacks
    lines = target_table(found, 0.9, "uniform")[2:]
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| puma: top_prob_1", "1 of 1", "100", "2.0"],
        ["| puma: top_prob_2", "1 of 1", "200", "1.5"],
        ["| uniform: top_prob_1", "1 of 1", "200", "1"],
        ["| uniform: top_prob_2", "1 of 1", "300", "1"],
        ["| puma: entropy_1", "1 of 1", "100", "-"],
    ]


@pytest.mark.parametrize(("target", "shown"), [(0.9, "90%"), (0.975, "97.5%"), (0.995, "99.5%"), (0.57, "57%")])
def test_the_target_is_not_rounded(target, shown):
    assert f"first at {shown} |" in target_table([curve("puma", 1.0)], target, "puma")[0]


def test_the_target_is_printed_and_marked(tmp_path, drawn, capsys):
    runs = [write_run(tmp_path / "puma", share=2.0), write_run(tmp_path / "uniform")]
    curves.main([*map(str, runs), "--rule", "top_prob_1", "--target", "0.5", "--out", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out
    assert "| puma | 1 of 1 | 50 | 2.0 |" in printed
    assert "| uniform | 1 of 1 | 100 | 1 |" in printed
    marked = [line for line in drawn[0].axes[1].lines if line.get_markersize() == 8]
    assert [np.asarray(line.get_xydata()).tolist() for line in marked] == [[[50, 50]], [[100, 50]]]


def test_a_run_that_has_not_been_evaluated_yet(tmp_path, drawn):
    draw_curves([young(tmp_path / "young")], "step", tmp_path / "out.png")
    assert [len(points(drawn[0], 0, line)) for line in (0, 1)] == [3, 0]
    assert not drawn[0].axes[1].lines


def test_colors_are_those_of_the_legend_if_a_run_has_not_been_evaluated(tmp_path, drawn):
    runs = [young(tmp_path / "young"), write_run(tmp_path / "puma"), write_run(tmp_path / "uniform")]
    draw_curves(runs, "step", tmp_path / "out.png", rule="top_prob_1")
    loss, accuracy = ([line.get_color() for line in plot.lines] for plot in drawn[0].axes)
    assert loss[2::2] == accuracy
    assert len(set(loss)) == 3


@pytest.mark.parametrize(("rule", "by"), [((), ""), (("--rule", "top_prob_1"), " by top_prob_1")])
def test_a_target_is_not_compared_with_another_setting_than_the_last(rule, by, tmp_path, drawn, capsys):
    runs = [write_run(tmp_path / "puma"), young(tmp_path / "uniform")]
    with pytest.raises(SystemExit) as stop:
        curves.main([*map(str, runs), *rule, "--target", "0.5", "--out", str(tmp_path / "out.png")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --target: {runs[1]}, the last one named, is what the others are compared with")
    assert error.endswith(f"but it has no accuracy{by} yet: name another run last\n")
    assert not drawn


def test_runs_without_accuracy_are_in_the_legend_and_the_table(tmp_path, drawn, capsys):
    runs = [write_run(tmp_path / name) for name in ("sampled", "loss_only")]
    records = runs[1] / METRICS_FILE
    records.write_text(re.sub(r', "validation/accuracy[^,}]*', "", records.read_text()))
    curves.main([*map(str, runs), "--rule", "top_prob_1", "--out", str(tmp_path / "out.png")])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["sampled", "loss_only"]
    assert "| loss_only | 1 | 100 | - | 1.2000 |" in capsys.readouterr().out


def test_another_figure_of_the_records_is_drawn_and_printed(tmp_path, drawn, capsys):
    """As accuracy: a mean with a band, at the updates that all seeds have."""
    runs = [
        configured(write_run(tmp_path / f"puma_seed{seed}", speed=1 + seed), seed, name="puma", n_stages=2)
        for seed in (0, 1)
    ]
    records = runs[1] / METRICS_FILE
    records.write_text(re.sub('"train/loss": ', '"train/loss": 1', records.read_text()))  # 1.0 is 11.0, at the end
    words = [*map(str, [*runs, write_run(tmp_path / "uniform")]), "--out", str(tmp_path / "out.png"), "--x", "seconds"]
    curves.main([*words, "--metric", "train/loss"])
    (plot,) = drawn[0].axes
    assert plot.get_ylabel() == "train/loss"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["puma, 2 seeds", "uniform"]
    assert len(points(drawn[0], 0, 0)) == 10
    assert points(drawn[0], 0, 0)[-1] == (75, 6)
    band = plot.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 110)
    assert capsys.readouterr().out.splitlines()[:4] == [
        "| last record | runs | updates | train/loss |",
        "| --- | ---: | ---: | ---: |",
        "| puma | 2 | 100 | 6 (1 to 11) |",
        "| uniform | 1 | 100 | 1 |",
    ]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """Half of it was written when the disk was full."""

    def fill_the_disk(figure, path, **_):
        Path(path).write_text("half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    out = tmp_path / "curves.png"
    out.write_text("the old picture")
    with pytest.raises(WriteError, match=r"curves\.png cannot be written \(No space left on device"):
        draw_curves([write_run(tmp_path / "run")], "step", out)
    assert out.read_text() == "the old picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run"]


def test_a_figure_that_only_some_runs_record(tmp_path, drawn, capsys):
    runs = [write_run(tmp_path / "run"), young(tmp_path / "young")]
    curves.main([*map(str, runs), "--metric", "validation/loss", "--out", str(tmp_path / "out.png")])
    assert capsys.readouterr().out.splitlines()[2:4] == ["| run | 1 | 100 | 1.2 |", "| young | 0 | - | - |"]


def test_a_target_with_records_that_lack_an_axis(tmp_path, drawn, capsys):
    """Of one run of two: it cannot be compared."""
    runs = [write_run(tmp_path / "old"), write_run(tmp_path / "uniform")]
    records = runs[0] / METRICS_FILE
    records.write_text(re.sub(r'"seconds": [\d.]+, ', "", records.read_text()))
    curves.main([*map(str, runs), "--rule", "top_prob_1", "--target", "0.5", "--out", str(tmp_path / "out.png")])
    printed = capsys.readouterr().out.partition("first at")[2]
    assert "| uniform | 1 of 1 | 100 | 1 |" in printed
    assert "old" not in printed


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_command_writes_a_picture(suffix, tmp_path, capsys):
    out = tmp_path / f"curves.{suffix}"
    (tmp_path / "run.log").touch()
    curves.main([str(write_run(tmp_path / "run")), str(tmp_path / "run.log"), "--x", "seconds", "--out", str(out)])
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/nonexistent"], "/nonexistent holds no metrics.jsonl"),
        (
            ["RUN", "--out", "/nonexistent/out.png"],
            "--out /nonexistent/out.png: the folder /nonexistent does not exist",
        ),
        (["RUN", "--out", "curves.docx"], "--out curves.docx: the suffix must be .png, .pdf or .svg"),
        (["RUN", "--out", "curves"], "--out curves: the suffix must be .png, .pdf or .svg"),
        (["RUN", "--out", "RUN"], "run: the suffix must be .png, .pdf or .svg"),
        (["RUN", "--x", "hours"], "--x"),
        (["OLD", "--x", "tokens"], "old/metrics.jsonl does not record it; choose another axis"),
        (["RUN", "--rule", "entropy_1"], "the runs were evaluated by top_prob_1, top_prob_2"),
        (
            ["RUN", "--metric", "loss"],
            "no run records it; choose from\n  seconds, sequences_distinct, step, tokens, train/",
        ),
        (["RUN", "--metric", "train/los"], "no run records it; did you mean train/loss? Otherwise choose from\n  s"),
        (
            ["RUN", "--metric", "validation/accuracy"],
            "did you mean validation/accuracy/top_prob_1 or validation/accuracy/top_prob_2? Otherwise",
        ),
        (["RUN", "--metric", "train/loss", "--rule", "top_prob_1"], "--metric: not with --rule or --target"),
        (["RUN", "--target", "90"], "--target 90.0: give an accuracy above 0 and at most 1"),
    ],
)
def test_bad_input_ends_with_one_message(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir, old = write_run(tmp_path / "run"), write_run(tmp_path / "old")
    records = old / METRICS_FILE
    records.write_text(re.sub(r'"tokens": \d+, ', "", records.read_text()))
    with pytest.raises(SystemExit) as stop:
        curves.main([word.replace("RUN", str(run_dir)).replace("OLD", str(old)) for word in words])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
