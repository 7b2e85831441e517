"""Sweep the sampling rules of checkpoints: accuracy against network forward evaluations and against seconds.

    python -m eval.evaluate runs/puma runs/uniform --sweep --out sweep validation.n_final_examples=300

Each rule has one dial; the sweep goes through its values and writes `sweep.json`, `sweep.csv`, `sweep.md` (a table) and
`sweep.png`. All but the picture are written anew after every measurement, and what `sweep.json` has is not measured
again: a sweep can be stopped at any time, and the same command resumes it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from tqdm import tqdm

from config import Config, SamplingRule
from data.files import write_text
from data.foreign import escape, read_text, reading, shorten
from eval.accuracy import Questions, measure_rule
from model.hub import load_model, n_updates
from model.transformer import Transformer
from runtime.distributed import World, autocast, autocast_dtype, main_first
from runtime.figures import COLORS, LINES, MARKERS, set_grid
from runtime.machine import device_name

KL_BOUND = 0.01  # of `stable`, whose dial is the threshold
PROBABILITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
PASSES = (4, 8, 16, 32, 64)
# By name: the dial, its values, and the rest of the rule.
RULES: dict[str, tuple[str, Sequence[float], dict[str, Any]]] = {
    "top_prob": ("tokens_per_step", (1, 2, 4, 8, 16, 32), {}),
    "top_prob_margin": ("tokens_per_step", (1, 2, 4, 8, 16, 32), {"confidence": "top_prob_margin"}),
    "threshold": ("threshold", PROBABILITIES, {}),
    "stable": ("threshold", PROBABILITIES, {"kl_bound": KL_BOUND}),
    "entropy_bound": ("entropy_bound", (0.01, 0.1, 0.3, 1.0, 3.0, 10.0), {"confidence": "neg_entropy"}),
    "remask": ("n_passes", PASSES, {"revise": "remask"}),
    "plan": ("n_passes", PASSES, {"revise": "plan"}),
    "running_confidence": ("n_passes", PASSES, {"revise": "running_confidence"}),
}


@dataclass(frozen=True)
class Point:
    """One measurement, and all that it depends on."""

    checkpoint: str
    step: int | None  # updates; None for a folder of `model.hub`, which does not tell
    rule: str  # key of `RULES`
    dial: str  # setting of `SamplingRule`
    value: float  # of the dial
    settings: dict[str, Any]  # the whole rule, as given to `SamplingRule`
    temperature: float
    seed: int
    n: int  # questions, the first of the test
    accuracy: float
    accuracy_low: float  # 95% interval
    accuracy_high: float
    nfe: float  # mean network forward evaluations per question
    seconds: float  # of sampling per question, in batches of batch_size, without judging
    batch_size: int
    device: str


def rules_of(
    config: Config, names: Sequence[str] | None, n_masked: int, max_passes: int | None
) -> list[tuple[str, str, SamplingRule]]:
    """The rules to measure, each with its name in `RULES` and its dial.

    Args:
        names: keys of `RULES`; None: all.
        n_masked: most masked positions of a question.
        max_passes: leave out rules that fix a number of passes, if it is larger than this; None: leave out none.

    Raises:
        ValueError: a name is unknown, or the model is causal, so that there is no choice.
    """
    unknown = [name for name in names or () if name not in RULES]
    if unknown:
        raise ValueError(f"--rules {unknown[0]}: choose from {', '.join(RULES)}")
    if config.causal:
        raise ValueError("--sweep: a causal model is sampled left to right, token by token; there is no rule to choose")
    found = [
        (name, dial, SamplingRule(**{**rest, dial: value, "temperature": config.validation.temperature}))
        for name, (dial, values, rest) in RULES.items()
        if names is None or name in names
        for value in values
    ]
    return [each for each in found if max_passes is None or _n_fixed_passes(each[1], each[2], n_masked) <= max_passes]


def _n_fixed_passes(dial: str, rule: SamplingRule, n_masked: int) -> int:
    """Passes that a rule takes on `n_masked` positions, whatever the model predicts; 0 if that decides."""
    if dial == "tokens_per_step":
        return -(-n_masked // rule.tokens_per_step)
    return rule.n_passes or 0


@dataclass(frozen=True)
class Swept:
    """A checkpoint whose rules are measured."""

    name: str  # the checkpoint as given
    step: int | None
    model: Transformer
    config: Config


def load_swept(checkpoint: str, overrides: list[str]) -> Swept:
    """Load a checkpoint; `overrides` are settings that replace the run's. Raises ValueError as `load_model`."""
    model, config = load_model(checkpoint, overrides=overrides)
    return Swept(checkpoint, n_updates(checkpoint), model.eval(), config)


def sweep(
    checkpoints: Sequence[Swept],
    world: World,
    out: Path,
    names: Sequence[str] | None = None,
    max_passes: int | None = None,
) -> list[Point]:
    """Measure all rules of all checkpoints and write the files `out` with the endings .json, .csv, .md and .png.

    Of the settings `validation.temperature`, `n_final_examples` (or `n_examples`) and `batch_size` apply.

    Args:
        names, max_passes: see `rules_of`.

    Returns:
        All points, with those that `out` had before.

    Raises:
        ValueError: see `rules_of`; or the file `out` with the ending .json is none of a sweep.
    """
    points = read_sweep(out)
    rules, loaded = [], []  # all of them, before work begins
    for each in checkpoints:
        data = main_first(world, partial(each.config.open_data().load, train=False))
        n = min(each.config.validation.n_final_examples or each.config.validation.n_examples, data.n_questions)
        each.model.to(world.device)
        loaded.append(Questions(data, None, {}, n))
        n_masked = int((data.prompts(np.arange(n)) == each.config.mask_id).sum(1).max())
        rules.append(rules_of(each.config, names, n_masked, max_passes))
    # One rule after the other, so that a sweep that is stopped has compared the checkpoints.
    tasks = [
        (each, questions, own[number])
        for number in range(len(rules[0]))
        for each, questions, own in zip(checkpoints, loaded, rules, strict=True)
    ]
    # None: no bar where standard error is no terminal
    with tqdm(total=len(tasks), desc="sweep", unit="setting", disable=None if world.is_main else True) as bar:
        for each, questions, (name, dial, rule) in tasks:
            bar.set_postfix_str(f"{each.name} {name} {dial} {getattr(rule, dial)}")
            if not any(_is_same(point, each, rule, questions.n_examples) for point in points):
                points.append(_measure(each, questions, name, dial, rule, world))
            bar.update()
            if world.is_main:
                write_sweep(points, out)
    if world.is_main:
        draw_sweep(points, out.with_suffix(".png"))
    return points


def _is_same(point: Point, each: Swept, rule: SamplingRule, n: int) -> bool:
    """Whether a point tells what a rule gives on the first n questions."""
    return (point.checkpoint, point.step, point.settings, point.seed, point.n) == (
        each.name,
        each.step,
        rule.model_dump(),
        each.config.training.seed,
        n,
    )


def read_sweep(out: Path) -> list[Point]:
    """The points that a sweep wrote; none, if there is no file. Raises ValueError if the file is none of a sweep."""
    path = out.with_suffix(".json")
    if not path.exists():
        return []
    with reading(f"{path}", "name another file with --out, or delete it"):
        return TypeAdapter(list[Point]).validate_json(read_text(path), strict=True)


def _measure(each: Swept, questions: Questions, name: str, dial: str, rule: SamplingRule, world: World) -> Point:
    config = each.config
    with (
        autocast(world.device, autocast_dtype(config.training.precision, world.device)),
        tqdm(disable=True) as bar,
    ):
        result, _, seconds = measure_rule(each.model, config, questions, world, rule, bar, None)
    return Point(
        checkpoint=each.name,
        step=each.step,
        rule=name,
        dial=dial,
        value=getattr(rule, dial),
        settings=rule.model_dump(),
        temperature=rule.temperature,
        seed=config.training.seed,
        n=result.n,
        accuracy=result.accuracy,
        accuracy_low=result.accuracy_low,
        accuracy_high=result.accuracy_high,
        nfe=result.nfe,
        seconds=seconds / result.n,
        batch_size=config.validation.batch_size,
        device=device_name(world.device),
    )


def best(points: Sequence[Point], cost: str) -> list[Point]:
    """Points that no point of the same checkpoint beats: none is as accurate at a lower cost; by cost.

    Args:
        cost: `nfe` or `seconds`.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), -point.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def write_sweep(points: Sequence[Point], out: Path) -> None:
    """Write the measurements as .json, .csv and .md."""
    write_text(out.with_suffix(".json"), json.dumps([asdict(point) for point in points], indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) | {"settings": json.dumps(point.settings)} for point in points)
    write_text(out.with_suffix(".csv"), text.getvalue())
    write_text(out.with_suffix(".md"), "\n".join(sweep_table(points)) + "\n")


def sweep_table(points: Sequence[Point]) -> list[str]:
    """Lines of a Markdown table for each checkpoint; a point on the curve of the best is marked in bold."""
    lines = []
    for checkpoint in dict.fromkeys(point.checkpoint for point in points):
        mine = [point for point in points if point.checkpoint == checkpoint]
        mine.sort(key=lambda point: (list(RULES).index(point.rule), point.value))
        by_nfe, by_seconds = best(mine, "nfe"), best(mine, "seconds")
        first = mine[0]
        step = "" if first.step is None else f", step {first.step:,}"
        lines += [
            f"{checkpoint}{step}: the first {first.n} questions of the test, temperature {first.temperature:g}, seed "
            f"{first.seed}, batches of {first.batch_size}, {first.device}. Bold: no other "
            "setting is as accurate with fewer evaluations, or in less time.",
            "",
            "| rule | dial | solved | 95% interval | evaluations | seconds |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for point in mine:
            nfe, seconds = f"{point.nfe:.1f}", f"{point.seconds:.3g}"
            nfe = f"**{nfe}**" if point in by_nfe else nfe
            seconds = f"**{seconds}**" if point in by_seconds else seconds
            lines.append(
                f"| {point.rule} | {point.dial} {point.value:g} | {100 * point.accuracy:.1f}% | "
                f"{100 * point.accuracy_low:.1f} to {100 * point.accuracy_high:.1f} | {nfe} | {seconds} |"
            )
        lines.append("")
    return lines[:-1]


def draw_sweep(points: Sequence[Point], out: Path) -> None:
    """A row of plots per checkpoint, one curve per rule with its 95% intervals; with several, a row that compares."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    checkpoints = list(dict.fromkeys(point.checkpoint for point in points))
    several = len(checkpoints) > 1
    n_rows = len(checkpoints) + several
    figure = Figure(figsize=(10, 0.8 + 3.4 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, 2, squeeze=False, sharex="col", sharey=True)
    costs = {"nfe": "network forward evaluations per question", "seconds": "seconds per question"}
    names = list(RULES)
    for row, checkpoint in enumerate(checkpoints):
        mine = [point for point in points if point.checkpoint == checkpoint]
        for plot, cost in zip(grid[row], costs, strict=True):
            front = best(mine, cost)
            plot.plot(
                [getattr(point, cost) for point in front],
                [100 * point.accuracy for point in front],
                color="0.75",
                linewidth=7,
                solid_capstyle="round",
                zorder=0,
                label="best",
            )
            for name in dict.fromkeys(point.rule for point in mine):
                _draw_curve(plot, [point for point in mine if point.rule == name], cost, names.index(name), name)
            plot.set_title(_plain(checkpoint), fontsize="medium", loc="left")
        if row == 0:
            handles, labels = grid[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    if several:
        for plot, cost in zip(grid[-1], costs, strict=True):
            for number, checkpoint in enumerate(checkpoints):
                front = best([point for point in points if point.checkpoint == checkpoint], cost)
                _draw_curve(plot, front, cost, number, _plain(checkpoint))
            plot.set_title("the best of each", fontsize="medium", loc="left")
            plot.legend(frameon=False, fontsize="small", loc="lower right")
    for number, row in enumerate(grid, 1):
        for plot, (cost, label) in zip(row, costs.items(), strict=True):
            plot.set_xscale("log")
            set_grid(plot)
            _label_log_axis(plot, whole=cost == "nfe")
            if number == n_rows:
                plot.set(xlabel=label)
        row[0].set(ylabel="solved, %", ylim=(-2, 102))
    figure.savefig(out, dpi=120)


def _draw_curve(plot: Any, points: Sequence[Point], cost: str, number: int, label: str) -> None:
    ordered = sorted(points, key=lambda point: getattr(point, cost))
    x, y = [getattr(point, cost) for point in ordered], [100 * point.accuracy for point in ordered]
    below = [100 * (point.accuracy - point.accuracy_low) for point in ordered]
    above = [100 * (point.accuracy_high - point.accuracy) for point in ordered]
    plot.errorbar(
        x,
        y,
        yerr=[[max(0.0, each) for each in side] for side in (below, above)],
        linestyle=LINES[number // len(MARKERS) % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        color=COLORS[number % len(COLORS)],
        markersize=4,
        linewidth=1.4,
        elinewidth=0.7,
        label=label,
    )


def _label_log_axis(plot: Any, *, whole: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plot.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if whole else f"{x:g}"))
    plot.xaxis.set_minor_formatter(NullFormatter())


def _plain(name: str) -> str:
    return shorten(escape(name), 60).replace("$", r"\$")  # `$` would begin a formula
