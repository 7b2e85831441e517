"""Loss and accuracy of runs as a figure, and what each setting needs to reach a given accuracy.

    python -m report.curves runs/puma_seed* runs/uniform_seed* --x seconds --out curves.png
    python -m report.curves runs/puma_seed* runs/uniform_seed* --target 0.9
    python -m report.curves runs/puma_seed* runs/uniform_seed* --metric validation/loss

Runs whose settings differ only in the seed are drawn as one line, the mean, with a band from the lowest to the highest
seed. The band of a single run is the 95% interval of its accuracy. Runs of different code have equal settings: with
`--by folder` runs are one line if their folders differ only in `seed` and its number. A table of the last evaluations
is printed. `--target` also prints when each setting first reaches the target, and how many times less that is than for
the last setting on the command line, by the same sampling rule. `--metric` draws another figure of the records, not
loss and accuracy, and prints its last values.

PUMA trains on each sequence for a whole trajectory, so which method is ahead can depend on the axis.
"""

from __future__ import annotations

import difflib
import os
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from base.commands import CommandParser, ends_with_message
from base.files import check_out
from base.text import escape
from runtime.config_file import read_config, setting_name
from runtime.figures import COLORS, LINES, MARKERS, plain_label, save_figure, set_grid, set_log_axis
from runtime.history import commit_name, read_history
from runtime.markdown import markdown_table
from runtime.metrics import HEADLINE, METRICS_FILE, read_metrics

SUFFIXES = (".png", ".pdf", ".svg")  # of pictures
MAX_RULES = 20  # of one run; a legend has no room for more
MIN_LOG_SPREAD = 5.0  # ratio of the ends of two curves from which on the axis is logarithmic
LOSS = "validation/loss"
MAX_DRAWN = 1e100  # larger numbers overflow in the library that draws
AXES = {
    "step": "updates",
    "sequences_distinct": "distinct sequences seen",
    "seconds": "seconds of training",
    "tokens": "tokens trained on",
}
By = Literal["settings", "folder"]  # what the runs that are drawn as one line have in common
SEED = r"[-_. ]*(seed[-_. ]*[0-9]*)?[-_. ]*$"  # at the end of a folder's name
RUN_AXES = ("step", "sequences_distinct", "seconds")  # of figures of one run, whose tokens are proportional to updates


@dataclass(frozen=True)
class Curve:
    """Accuracy of one run at its evaluations, by one sampling rule; or another figure, without a rule."""

    setting: str  # name of the setting: the same for all its seeds, and for no other setting
    rule: str  # label of the sampling rule
    # One per evaluation: a value for each of `AXES`, accuracy, and its 95% interval; or the other figure by its key in
    # the records. Older records have no tokens.
    points: list[dict[str, float]]

    def first_reaching(self, target: float, axis: str) -> float | None:
        """The value on `axis` at which accuracy `target` is first reached; None if it never is."""
        return next((point[axis] for point in self.points if point["accuracy"] >= target), None)


def by_setting_and_rule(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """The seeds of each setting and sampling rule, in order."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.setting, curve.rule), []).append(curve)
    return groups


def accuracy_points(rows: Iterable[dict[str, Any]], rule: str) -> list[dict[str, float]]:
    """Points of a `Curve` from the records of a run: the evaluations by one sampling rule."""
    key = HEADLINE + rule
    points = []
    for row, at in _rows_with(rows, key):
        low, high = (row.get(f"validation/accuracy_{end}/{rule}", row[key]) for end in ("low", "high"))
        points.append(at | {"accuracy": row[key], "low": low, "high": high})
    return points


def metric_points(rows: Iterable[dict[str, Any]], key: str) -> list[dict[str, float]]:
    """Points of a `Curve` from the records of a run: the figure `key`."""
    return [at | {key: row[key]} for row, at in _rows_with(rows, key)]


def _rows_with(rows: Iterable[dict[str, Any]], key: str) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """The records that have the figure `key`, and their values on `AXES`."""
    for row in rows:
        if all(can_be_drawn(row.get(name)) for name in (*RUN_AXES, key)):
            yield row, {axis: row[axis] for axis in AXES if can_be_drawn(row.get(axis))}


def rules_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Labels of the sampling rules in the records of a run; the first is the headline."""
    found = (key.removeprefix(HEADLINE) for row in rows for key in row if key.startswith(HEADLINE))
    return list(dict.fromkeys(found))[:MAX_RULES]


def plot_curves(
    plot: Any, curves: Sequence[Curve], axis: str, targets: Sequence[float] = (), metric: str = "accuracy"
) -> None:
    """Draw the accuracy of each setting against `axis` into matplotlib axes, with its legend labels.

    Seeds of a setting are averaged at equal updates, in accuracy and on `axis`. Updates that some seed lacks are left
    out. The axis of distinct sequences is logarithmic if some curve ends at `MIN_LOG_SPREAD` times the end of another:
    PUMA's curves would otherwise be squeezed.

    Args:
        targets: accuracies to mark.
        metric: the key of another figure that is drawn instead; its points are `metric_points`.
    """
    is_accuracy = metric == "accuracy"
    scale = 100 if is_accuracy else 1
    settings = list(dict.fromkeys(curve.setting for curve in curves))
    rules = list(dict.fromkeys(curve.rule for curve in curves))
    for (setting, rule), group in by_setting_and_rule(curves).items():
        number = settings.index(setting) if len(rules) == 1 else rules.index(rule)
        color = COLORS[settings.index(setting) % len(COLORS)]
        style, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        by_step = [{point["step"]: point for point in curve.points} for curve in group]
        steps = sorted(set.intersection(*(set(points) for points in by_step)))
        at = [[points[step] for points in by_step] for step in steps]  # evaluations of all seeds
        x = [statistics.mean(point[axis] for point in seeds) for seeds in at]
        mean = [scale * statistics.mean(point[metric] for point in seeds) for seeds in at]
        ends = ("low", "high") if is_accuracy and len(group) == 1 else (metric, metric)
        low, high = (
            [scale * choose(point[end] for point in seeds) for seeds in at]
            for choose, end in zip((min, max), ends, strict=True)
        )
        name = plain_label(setting if len(rules) == 1 else f"{setting}: {rule}")
        name = f"{name}, {len(group)} seeds" if len(group) > 1 else name
        plot.plot(x, mean, style, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=name)
        plot.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for target in targets:
            needed, missed = _needed(group, target, axis)
            if not missed:
                plot.plot(statistics.mean(needed), 100 * target, marker, color=color, markersize=8, markeredgecolor="k")
    for target in targets:
        plot.axhline(100 * target, color="0.6", linewidth=0.8)
    plot.set(xlabel=AXES[axis], ylabel="solved, %" if is_accuracy else plain_label(metric))
    if is_accuracy:
        plot.set_ylim(-2, 102)
    set_grid(plot, integers=axis != "seconds")
    last = [curve.points[-1][axis] for curve in curves if curve.points] if axis == "sequences_distinct" else []
    if last and max(last) >= MIN_LOG_SPREAD * min(last) > 0:
        set_log_axis(plot)


def target_table(curves: Sequence[Curve], target: float, baseline: str, axes: Sequence[str] = RUN_AXES) -> list[str]:
    """Lines of a Markdown table: when each setting first reaches accuracy `target`, and the ratio to a baseline.

    Values are means over seeds with the lowest and highest. A ratio of 2 means half of what the baseline needs; its
    spread is over all pairs of seeds. A seed that never reaches the target counts with its last evaluation, which is a
    lower bound: the mean is then marked with >, and the ratio with > or <. The ends of a ratio's range that such a seed
    leaves unknown are printed as ?.

    Args:
        baseline: the setting to compare with, for each sampling rule by that rule.
        axes: what is compared, some of `RUN_AXES`.
    """
    groups = by_setting_and_rule(curves)
    several = len({curve.rule for curve in curves}) > 1
    names = {"step": "updates", "sequences_distinct": "distinct sequences", "seconds": "seconds"}
    titles = [f"first at {100 * target:g}%", "seeds"]
    for axis in axes:
        titles += [names[axis], "ratio"]
    rows = []
    for (setting, rule), group in groups.items():
        n_reached = sum(curve.first_reaching(target, "step") is not None for curve in group)
        cells = [f"{n_reached} of {len(group)}"]
        for axis in axes:
            values, missed = _needed(group, target, axis)
            others, others_missed = _needed(groups.get((baseline, rule), []), target, axis)
            cells.append(mean_and_range(values, ",.0f", missed))
            if setting == baseline:
                cells.append("1")
            elif not values or not (others or others_missed) or (missed and others_missed):  # no bound can be given
                cells.append("-")
            else:
                ratios = [other / value for other in others for value in values]
                bounds = [other / value for other in others for value in missed]  # upper ones
                bounds += [other / value for other in others_missed for value in values]  # or lower ones
                sign = "> " if others_missed else "< " if missed else ""
                center = statistics.mean([*others, *others_missed]) / statistics.mean([*values, *missed])
                low, high = _ends(ratios, bounds, ".1f", are_lower=not missed)
                cells.append(f"{sign}{center:.1f}" + (f" ({low or '?'} to {high or '?'})" if low or high else ""))
        label = f"{setting}: {rule}" if several else setting
        rows.append([escape(label), *cells])
    return markdown_table(titles, rows)


def last_table(curves: Sequence[Curve], losses: dict[str, list[dict[str, float]]]) -> list[str]:
    """Lines of a Markdown table: the last evaluation of each setting, means over runs with the lowest and highest.

    Args:
        losses: the last of the `metric_points` of the validation loss of each run, by setting. A setting without curves
            has no accuracy.
    """
    groups = by_setting_and_rule(curves)
    several = len({curve.rule for curve in curves}) > 1
    rows = []
    for setting, own in losses.items():
        found = {rule: group for (name, rule), group in groups.items() if name == setting} or {"": []}
        for rule, group in found.items():
            last = [curve.points[-1] for curve in group]
            rows.append(
                [
                    escape(f"{setting}: {rule}" if several and rule else setting),
                    str(len(last) or len(own)),
                    mean_and_range([point["step"] for point in last or own], ",.0f"),
                    mean_and_range([100 * point["accuracy"] for point in last], ".1f"),
                    mean_and_range([point[LOSS] for point in own], ".4f"),
                ]
            )
    return markdown_table(["last evaluation", "runs", "updates", "accuracy, %", "validation loss"], rows)


def metric_table(curves: Sequence[Curve], settings: Iterable[str], metric: str) -> list[str]:
    """Lines of a Markdown table: the last value of a figure in each setting, mean over runs and range."""
    rows = []
    for setting in dict.fromkeys(settings):
        last = [curve.points[-1] for curve in curves if curve.setting == setting]
        steps = mean_and_range([point["step"] for point in last], ",.0f")
        rows.append([escape(setting), str(len(last)), steps, mean_and_range([point[metric] for point in last], ",.6g")])
    return markdown_table(["last record", "runs", "updates", escape(metric)], rows)


def _needed(group: Sequence[Curve], target: float, axis: str) -> tuple[list[float], list[float]]:
    """The values on `axis` at which seeds reach the target, and the last ones of the seeds that never do."""
    found = [(curve.first_reaching(target, axis), curve.points[-1][axis]) for curve in group]
    return [value for value, _ in found if value is not None], [last for value, last in found if value is None]


def mean_and_range(values: Sequence[float], form: str, missed: Sequence[float] = ()) -> str:
    """Mean of the values, with the lowest and highest if they differ and the lowest is known; - if there is none.

    Args:
        form: format of a number.
        missed: lower bounds of further values, which were not reached.
    """
    every = [*values, *missed]
    if not every:
        return "-"
    mean = ("> " if missed else "") + format(statistics.mean(every), form)
    low, high = _ends(values, missed, form, are_lower=True)
    return f"{mean} ({low} to {high or 'not reached'})" if low else mean


def _ends(
    values: Sequence[float], bounds: Sequence[float], form: str, *, are_lower: bool
) -> tuple[str | None, str | None]:
    """The lowest and highest of some values as text, None where it is unknown; both are None if all values are equal.

    Args:
        bounds: of further values, lower ones or upper ones. On the side from which they bound, an end is known only if
            a value is as far out as all of them.
    """
    every = [*values, *bounds]
    low, high = format(min(every), form), format(max(every), form)
    if low == high:
        return None, None
    if bounds and are_lower:
        return (low if min(every) in values else None), None
    if bounds:
        return None, (high if max(every) in values else None)
    return low, high


class _Runs(NamedTuple):
    """What is drawn of runs, by run directory."""

    settings: dict[Path, str]  # names, see `_setting_names`
    records: dict[Path, list[dict[str, Any]]]


def _read_runs(run_dirs: Sequence[Path], by: By = "settings") -> _Runs:
    """Read runs. One that is named twice, perhaps by two paths, is one run, where it is named last."""
    places = {os.path.realpath(run_dir): run_dir for run_dir in reversed(run_dirs)}
    distinct = list(places.values())[::-1]
    return _Runs(_setting_names(distinct, by), {run_dir: _records(run_dir) for run_dir in distinct})


def read_curves(run_dirs: Sequence[Path], rule: str | None = None) -> list[Curve]:
    """The curves of runs: one per run and sampling rule by which it was evaluated, or only those by `rule`.

    Raises:
        ValueError: a run directory holds no records, or no run was evaluated by `rule`.
    """
    return _curves(_read_runs(run_dirs), rule)


def _curves(runs: _Runs, rule: str | None) -> list[Curve]:
    """`read_curves` of runs that have been read."""
    curves = [
        Curve(setting, name, points)
        for run_dir, setting in runs.settings.items()
        for name in rules_of(runs.records[run_dir])
        if (points := accuracy_points(runs.records[run_dir], name))
    ]
    known = dict.fromkeys(curve.rule for curve in curves)
    if rule is not None and rule not in known:
        raise ValueError(f"--rule {rule}: the runs were evaluated by {', '.join(known) or 'no rule yet'}")
    return [curve for curve in curves if rule in (None, curve.rule)]


def _metric_curves(runs: _Runs, metric: str) -> list[Curve]:
    """One curve per run whose records have the figure `metric`; ValueError if none has."""
    curves = [
        Curve(setting, "", points)
        for run_dir, setting in runs.settings.items()
        if (points := metric_points(runs.records[run_dir], metric))
    ]
    if not curves:
        numbers = {key for rows in runs.records.values() for row in rows for key in row if can_be_drawn(row[key])}
        near = sorted(key for key in numbers if key.startswith(f"{metric}/")) or difflib.get_close_matches(
            metric, numbers
        )
        hint = f"did you mean {' or '.join(near[:3])}? Otherwise " if near else ""
        raise ValueError(f"--metric {metric}: no run records it; {hint}choose from\n  {', '.join(sorted(numbers))}")
    return curves


def draw_curves(
    run_dirs: Sequence[Path], axis: str, out: Path, *, rule: str | None = None, targets: Sequence[float] = ()
) -> list[Curve]:
    """Write a figure of loss and accuracy against one of `AXES`; returns the curves of accuracy.

    Args:
        rule: label of the only sampling rule to draw; None: all.
        targets: accuracies to mark.

    Raises:
        ValueError: a run directory holds no records, or no run was evaluated by `rule`.
    """
    runs = _read_runs(run_dirs)
    curves = _curves(runs, rule)
    _draw(runs, curves, axis, out, targets)
    return curves


def _draw(runs: _Runs, curves: Sequence[Curve], axis: str, out: Path, targets: Sequence[float]) -> None:
    """`draw_curves` of runs that have been read."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    loss_plot, accuracy_plot = figure.subplots(1, 2)
    # Settings without a curve of accuracy come last, since `plot_curves` numbers the others.
    settings = list(dict.fromkeys([*(curve.setting for curve in curves), *runs.settings.values()]))
    _check_axis(runs, axis)
    # Those of the others are in the legend by their curve of accuracy.
    unnamed = dict.fromkeys(settings[len({curve.setting for curve in curves}) :])
    for run_dir, setting in runs.settings.items():
        rows, color = runs.records[run_dir], COLORS[settings.index(setting) % len(COLORS)]
        for key, style in (("train/loss", {"alpha": 0.3}), (LOSS, {"marker": "."})):
            found = [
                (row[axis], row[key]) for row in rows if can_be_drawn(row.get(axis)) and can_be_drawn(row.get(key))
            ]
            label = plain_label(setting) if setting in unnamed else None
            unnamed.pop(setting, None)
            loss_plot.plot([x for x, _ in found], [y for _, y in found], color=color, label=label, **style)
    loss_plot.set(xlabel=AXES[axis], ylabel="loss (faint: training, dots: validation)", yscale="log")
    set_grid(loss_plot, integers=axis != "seconds")
    plot_curves(accuracy_plot, curves, axis, targets)
    if accuracy_plot.get_xscale() == "log":
        set_log_axis(loss_plot)
    handles = [line for plot in (accuracy_plot, loss_plot) for line in plot.get_legend_handles_labels()[0]]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, out, 120)


def _draw_metric(runs: _Runs, curves: Sequence[Curve], axis: str, out: Path, metric: str) -> None:
    """Write a figure of the curves of `metric`."""
    from matplotlib.figure import Figure

    _check_axis(runs, axis)
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    plot = figure.subplots()
    plot_curves(plot, curves, axis, metric=metric)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, out, 120)


def _check_axis(runs: _Runs, axis: str) -> None:
    """Raise ValueError if the records of a run lack an axis."""
    for run_dir, rows in runs.records.items():
        if not all(axis in row for row in rows):
            raise ValueError(f"--x {axis}: {run_dir / METRICS_FILE} does not record it; choose another axis")


def can_be_drawn(value: object) -> bool:
    """Whether a value of a record is a number that the library can draw."""
    return isinstance(value, (int, float)) and abs(value) < MAX_DRAWN


def _records(run_dir: Path) -> list[dict[str, Any]]:
    rows = list(read_metrics(run_dir))
    if not rows:
        raise ValueError(f"{run_dir} holds no {METRICS_FILE} with records: name a run directory")
    return rows


def _last_losses(runs: _Runs) -> dict[str, list[dict[str, float]]]:
    """The last validation loss of each run that has one, by setting; see `last_table`."""
    losses: dict[str, list[dict[str, float]]] = {}
    for run_dir, setting in runs.settings.items():
        losses.setdefault(setting, []).extend(metric_points(runs.records[run_dir], LOSS)[-1:])
    return losses


def _setting_names(run_dirs: Sequence[Path], by: By) -> dict[Path, str]:
    """The name of each run's setting, the same for all its seeds and for no other setting.

    That is the run's folder, or what is common to the folders of all seeds, without `seed` and its number, with as many
    parents as distinguish it from the other settings.
    """
    found = {run_dir: _setting(run_dir) for run_dir in run_dirs}
    settings = {run_dir: setting if by == "settings" else _seedless(run_dir) for run_dir, (setting, _) in found.items()}
    _warn_of_mixtures(found, settings, by)
    groups: dict[str, list[Path]] = {}
    for run_dir, setting in settings.items():
        groups.setdefault(setting, []).append(Path(os.path.abspath(run_dir)))
    paths = {setting: _common_parts(folders) for setting, folders in groups.items()}
    names = {}
    for setting, parts in paths.items():
        lengths = range(1, len(parts) + 1)
        alone = (n for n in lengths if sum(other[-n:] == parts[-n:] for other in paths.values()) == 1)
        n = next(alone, None)
        names[setting] = f"{parts[-1]} ({setting})" if n is None else "/".join(parts[-n:])
    return {run_dir: names[setting] for run_dir, setting in settings.items()}


def _warn_of_mixtures(found: dict[Path, tuple[str, int | None]], lines: dict[Path, str], by: By) -> None:
    """Warn where a line has runs of different settings, or two runs of one seed.

    Args:
        found: the settings and the seed of each run, see `_setting`.
        lines: what runs of one line have in common.
    """
    first: dict[tuple[str, int | None], Path] = {}
    alike: dict[str, Path] = {}
    for run_dir, (setting, seed) in found.items():
        if seed is None:  # no settings to compare
            continue
        line = lines[run_dir]
        other, same_seed = alike.setdefault(line, run_dir), first.setdefault((line, seed), run_dir)
        if found[other][0] != setting:
            warnings.warn(
                f"{other} and {run_dir} are one line by their folders, but their settings differ in more than the seed",
                RuntimeWarning,
                stacklevel=2,
            )
        elif same_seed != run_dir:
            codes = [commit_name((read_history(each) or [{}])[-1]) for each in (same_seed, run_dir)]
            of_codes = "" if codes[0] == codes[1] else f", and of different code (commits {' and '.join(codes)})"
            remedy = "" if by == "folder" else "; --by folder tells runs apart by the names of their folders"
            warnings.warn(
                f"{same_seed} and {run_dir} are runs of one setting and the same seed {seed}{of_codes}: as two seeds "
                f"they make the band too narrow{remedy}",
                RuntimeWarning,
                stacklevel=2,
            )


def _common_parts(folders: Sequence[Path]) -> tuple[str, ...]:
    """Parts of a path that stands for the folders of all seeds of a setting."""
    names = [folder.name for folder in folders]
    if len(folders) == 1:
        return folders[0].parts
    common = os.path.commonprefix(names)  # noqa: RUF071, of names, not paths
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # of `run_1` and `run_10`
    common = re.sub(SEED, "", common)
    return (*folders[0].parent.parts, common) if common else Path(os.path.commonpath(folders)).parts


def _seedless(run_dir: Path) -> str:
    """The path of a run without `seed` and its number at the end."""
    folder = Path(os.path.abspath(run_dir))
    name = re.sub(SEED, "", folder.name)
    return str(folder.parent / name if name else folder.parent)


def _setting(run_dir: Path) -> tuple[str, int | None]:
    """What seeds of a setting have in common, and the seed; the folder if it holds no settings of this code."""
    try:
        config = read_config(run_dir / "config.yaml")
        return setting_name(config), config.training.seed
    except ValueError:
        return str(run_dir), None


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Draw loss and accuracy of runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--x", choices=AXES, default="step", help="x-axis")
    parser.add_argument(
        "--by", choices=get_args(By), default="settings", help="what the runs of one line share, apart from the seed"
    )
    parser.add_argument("--rule", help="the only sampling rule to draw, for example top_prob_1")
    parser.add_argument(
        "--target", type=float, help="accuracy from 0 to 1: mark and print when each setting first reaches it"
    )
    parser.add_argument(
        "--metric", metavar="KEY", help="draw and print a figure of the records instead, for example validation/loss"
    )
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help=f"picture file ({', '.join(SUFFIXES)})")
    options = parser.parse_args(arguments)
    with ends_with_message():
        if options.out.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out {options.out}: the suffix must be {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        check_out(options.out, "--out")
        if options.target is not None and not 0 < options.target <= 1:
            raise ValueError(f"--target {options.target}: give an accuracy above 0 and at most 1")
        if options.metric is not None and (options.rule is not None or options.target is not None):
            raise ValueError("--metric: not with --rule or --target, which are about accuracy")
        targets = [] if options.target is None else [options.target]
        # `runs/puma*` also names the logs beside the run directories
        run_dirs = [path for path in options.run_dirs if not path.is_file()] or options.run_dirs
        runs = _read_runs(run_dirs, options.by)
        if options.metric is not None:
            curves = _metric_curves(runs, options.metric)
            _draw_metric(runs, curves, options.x, options.out, options.metric)
            print("\n".join(metric_table(curves, runs.settings.values(), options.metric)))
            print(f"wrote {options.out}")
            return
        curves, last = _curves(runs, options.rule), list(runs.settings)[-1]
        baseline = runs.settings[last]
        if targets and all(curve.setting != baseline for curve in curves):
            rule = f" by {options.rule}" if options.rule else ""
            raise ValueError(
                f"--target: {last}, the last one named, is what the others are compared with, but it has no accuracy"
                f"{rule} yet: name another run last"
            )
        _draw(runs, curves, options.x, options.out, targets)
        print("\n".join(last_table(curves, _last_losses(runs))))
        if targets:
            print()
            print("\n".join(target_table(curves, options.target, baseline)))
            print(f"\nA ratio of 2 means half of what {escape(baseline)!r} needs, the setting named last.")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
