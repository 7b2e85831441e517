"""Sweep the sampling rules of checkpoints: accuracy against network forward evaluations and against seconds.

    python -m eval.evaluate runs/puma runs/uniform --sweep --out sweep validation.n_final_examples=300

Each rule has one dial; the sweep goes through its values and writes `sweep.json`, `sweep.csv`, `sweep.md` (a table) and
`sweep.png`. All but the picture are written anew after every measurement, and what `sweep.json` has is not measured
again: a sweep can be stopped at any time, and the same command resumes it. What `sweep.json` has of other weights,
questions or machines is kept, in tables and plots of its own.

Shapes: n questions, L positions, S positions of a block (L without blocks).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from base.files import alone, check_out, write_text
from base.reading import read_text, reading
from config import DEFAULT_RULE, Config, SamplingRule
from data.dataset import DataSet
from data.hashes import hash_arrays
from eval.accuracy import TestQuestions, count_examples, measure_rule
from model.hub import LoadedModel
from model.transformer import Transformer
from progressive_block import block_layout
from runtime.distributed import World, autocast, autocast_dtype, main_bar, main_first, on_main
from runtime.figures import COLORS, LINES, MARKERS, MAX_LABEL, plain_label, save_figure, set_grid, set_log_axis
from runtime.machine import device_name
from runtime.markdown import markdown_table

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


SUFFIXES = (".json", ".csv", ".md", ".png")
DIGEST = 16  # characters
SHOWN = 6  # of a digest, in tables and plots


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All that a measurement depends on besides the rule: points with equal conditions can be compared."""

    checkpoint: str
    step: int | None  # updates; None for a folder of `model.hub`, which does not tell
    temperature: float
    seed: int
    n: int  # questions, the first of the test
    batch_size: int
    device: str
    precision: str  # of the forward passes
    model: str  # digest of the weights, and of the settings by which they make predictions
    questions: str  # digest of the questions, as text and as tokens, and of the right answers


@dataclass(frozen=True, kw_only=True)
class Point(Conditions):
    """One measurement, and all that it depends on."""

    rule: str  # key of `RULES`, perhaps those of other code
    dial: str  # setting of `SamplingRule`
    value: float  # of the dial
    settings: dict[str, Any]  # the whole rule, as given to `SamplingRule`
    accuracy: float
    accuracy_low: float  # 95% interval
    accuracy_high: float
    nfe: float  # mean network forward evaluations per question
    seconds: float  # of sampling per question, in batches of batch_size, without judging

    @property
    def conditions(self) -> Conditions:
        """Without the rule and its results."""
        return Conditions(**{each.name: getattr(self, each.name) for each in fields(Conditions)})

    @property
    def subject(self) -> tuple[Conditions, str, str]:
        """What was measured: equal for two measurements of the same."""
        return self.conditions, self.rule, json.dumps(self.settings, sort_keys=True)

    def measured(self, named: NamedRule) -> bool:
        """Whether this is a measurement of a rule, perhaps by code with other settings of rules.

        A setting that the other code lacked has its default. One that this code lacks must be off: null, false or 0.
        """
        defaults = DEFAULT_RULE.model_dump()
        known = {key: value for key, value in self.settings.items() if key in defaults or value}
        return self.rule == named.name and defaults | known == named.rule.model_dump()


def rule_names(points: Sequence[Point]) -> list[str]:
    """The rules of this code, then those of points by other code, in order."""
    return list(dict.fromkeys([*RULES, *(point.rule for point in points)]))


def by_conditions(points: Sequence[Point]) -> dict[Conditions, list[Point]]:
    """Points with equal conditions together, in the order of the first ones."""
    groups: dict[Conditions, list[Point]] = {}
    for point in points:
        groups.setdefault(point.conditions, []).append(point)
    return groups


class NamedRule(NamedTuple):
    """A sampling rule, and what it is called."""

    name: str  # key of `RULES`
    dial: str  # setting of `SamplingRule`
    rule: SamplingRule

    @property
    def value(self) -> float:
        """Value of the dial."""
        value: float = getattr(self.rule, self.dial)
        return value


def rules_of(config: Config, names: Sequence[str] | None) -> list[NamedRule]:
    """The rules to measure: the same for all models, in the same order; only the temperature may differ.

    Args:
        names: keys of `RULES`; None: all.

    Raises:
        ValueError: a name is unknown, or the model is causal, so that there is no choice.
    """
    unknown = [name for name in names or () if name not in RULES]
    if unknown:
        raise ValueError(f"--rules {unknown[0]}: choose from {', '.join(RULES)}")
    if config.causal:
        raise ValueError("--sweep: a causal model is sampled left to right, token by token; there is no rule to choose")
    return [
        NamedRule(name, dial, SamplingRule(**{**rest, dial: value, "temperature": config.validation.temperature}))
        for name, (dial, values, rest) in RULES.items()
        if names is None or name in names
        for value in values
    ]


def n_fixed_passes(dial: str, rule: SamplingRule, masked: np.ndarray, block_size: int) -> int:
    """Most passes that a row takes, if the rule fixes their number; 0 if the model's predictions decide it.

    Args:
        masked: bool [n, L], positions to fill.
        block_size: S; blocks are filled one after the other, so that their passes add up.
    """
    n_masked = masked.reshape(len(masked), -1, block_size).sum(2)  # [n, L / S]
    if dial == "tokens_per_step":
        passes = -(-n_masked // rule.tokens_per_step)
    elif rule.n_passes is not None:
        # Pass i leaves ceil(i * n / P) of n positions filled, which is n as soon as i is above P * (n - 1) / n.
        passes = np.where(n_masked > 0, rule.n_passes * (n_masked - 1) // n_masked.clip(1) + 1, 0)
    else:
        return 0
    return int(passes.sum(1).max())


def sweep(
    checkpoints: Sequence[LoadedModel],
    world: World,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    names: Sequence[str] | None = None,
    max_passes: int | None = None,
) -> list[Point]:
    """Measure all rules of all checkpoints and write the files `out` with the endings .json, .csv, .md and .png.

    Of the settings `validation.temperature`, `n_final_examples` (or `n_examples`) and `batch_size` apply.

    Args:
        checkpoints: named in the files by their `source`.
        overrides: with which they were loaded; see `eval.accuracy.count_examples`.
        names: see `rules_of`.
        max_passes: leave out rules that take more passes by design, see `n_fixed_passes`; None: leave out none.

    Returns:
        All points, with those that `out` had before; on the main process also those of sweeps at the same time.

    Raises:
        ValueError: see `rules_of` and `count_examples`; no rule has so few passes; a file cannot be written; or the
            .json file was not written by a sweep.
    """
    points = on_main(partial(_open_out, out))  # all ranks must agree on what is left to do
    chosen = [rules_of(checkpoint.config, names) for checkpoint in checkpoints]
    loaded, allowed = [], []  # all of them, before work begins
    for checkpoint, rules in zip(checkpoints, chosen, strict=True):
        data = main_first(world, partial(checkpoint.config.open_data().load, train=False))
        n = count_examples(checkpoint.config, overrides, data)
        if n == 0:
            raise ValueError(f"{checkpoint.source} asks no questions: give a number, validation.n_final_examples=100")
        checkpoint.model.to(world.device)
        conditions = on_main(partial(_conditions_of, checkpoint, data, n, world))
        loaded.append((checkpoint, TestQuestions(data, None, {}, n), conditions))
        allowed.append(_rules_within(max_passes, checkpoint, rules, data, n))
    # One rule after the other, so that a sweep that is stopped has compared the checkpoints.
    tasks = [
        (*one, named)
        for together in zip(*chosen, strict=True)
        for one, rules, named in zip(loaded, allowed, together, strict=True)
        if named in rules
    ]
    warm: set[Conditions] = set()
    written = points
    with main_bar(world, total=len(tasks), desc="sweep", unit="setting") as bar:
        for checkpoint, questions, conditions, named in tasks:
            bar.set_postfix_str(f"{checkpoint.source} {named.name} {named.dial} {named.value}")
            if not any(point.conditions == conditions and point.measured(named) for point in points):
                if conditions not in warm:
                    # A batch that does not count: a device is slow at first, for which one rule would pay.
                    n = min(questions.n_examples, conditions.batch_size * world.n_ranks)
                    _measure(checkpoint, replace(questions, n_examples=n), conditions, named, world=world)
                    warm.add(conditions)
                points.append(_measure(checkpoint, questions, conditions, named, world=world))
            bar.update()
            if world.is_main:
                written = write_sweep(points, out)
    if world.is_main:
        draw_sweep(written, _with_suffix(out, ".png"))
    return written


def _open_out(out: Path) -> list[Point]:
    """The points that `out` has, which can be written."""
    paths = [_with_suffix(out, suffix) for suffix in SUFFIXES]
    for path in paths:
        check_out(path, "--out")
    found = [str(path) for path in paths if path.exists()]
    if found and not paths[0].exists():
        raise ValueError(
            f"--out {out} would overwrite {' and '.join(found)}, not known to be a sweep: name another or delete them"
        )
    return read_sweep(out)


def _with_suffix(out: Path, suffix: str) -> Path:
    """A file of the sweep `out`, whose name may have a dot (`Path.with_suffix` would replace what follows it)."""
    return out.with_name(out.name + suffix)


def _rules_within(
    max_passes: int | None, checkpoint: LoadedModel, rules: list[NamedRule], data: DataSet, n: int
) -> list[NamedRule]:
    """The rules that take at most `max_passes` on the first n questions; ValueError if there is none."""
    if max_passes is None:
        return rules
    masked = data.prompts(np.arange(n)) == checkpoint.config.mask_id  # [n, L]
    block_size = block_layout(checkpoint.config.objective, masked.shape[1]).size
    n_passes = [n_fixed_passes(named.dial, named.rule, masked, block_size) for named in rules]
    if min(n_passes) > max_passes:
        raise ValueError(
            f"--max-passes {max_passes}: no rule has at most {max_passes} passes with {checkpoint.source}; the fewest "
            f"are {min(n_passes)}: give that, or more of --rules"
        )
    return [named for named, number in zip(rules, n_passes, strict=True) if number <= max_passes]


def _conditions_of(checkpoint: LoadedModel, data: DataSet, n: int, world: World) -> Conditions:
    config = checkpoint.config
    dtype = autocast_dtype(config.training.precision, world.device)
    return Conditions(
        checkpoint=checkpoint.source,
        step=checkpoint.step,
        temperature=config.validation.temperature,
        seed=config.training.seed,
        n=n,
        batch_size=config.validation.batch_size,
        device=device_name(world.device),
        precision="float32" if dtype is None else str(dtype).removeprefix("torch."),
        model=_model_digest(checkpoint.model, config),
        questions=_questions_digest(data, n),
    )


def _model_digest(model: Transformer, config: Config) -> str:
    """Digest of the weights and of the settings that predictions depend on."""
    weights = sorted(model.weights().items())
    settings = config.model.model_dump(exclude={"init_from", "shifted"})  # the latter as it is resolved
    blocks = config.objective.model_dump(include={"block_size", "block_attention"})
    facts = [settings, blocks, config.causal, config.shifted, [name for name, _ in weights]]
    return _digest(facts, *(tensor.detach().float().cpu().numpy() for _, tensor in weights))


def _questions_digest(data: DataSet, n: int) -> str:
    questions = [data.question(index) for index in range(n)]
    return _digest([(each.text, each.gold) for each in questions], data.prompts(np.arange(n)))


def _digest(facts: Any, *arrays: np.ndarray) -> str:
    return hashlib.sha256(json.dumps([facts, hash_arrays(*arrays)]).encode()).hexdigest()[:DIGEST]


def read_sweep(out: Path) -> list[Point]:
    """The points that a sweep wrote; none, if there is no file. Raises ValueError if it was not written by a sweep."""
    path = _with_suffix(out, ".json")
    if not path.exists():
        return []
    with reading(f"{path}", "name another with --out, or delete it and those beside it, .csv, .md and .png"):
        return TypeAdapter(list[Point]).validate_json(read_text(path), strict=True)


def _measure(
    checkpoint: LoadedModel, questions: TestQuestions, conditions: Conditions, named: NamedRule, *, world: World
) -> Point:
    config = checkpoint.config
    with autocast(world.device, autocast_dtype(config.training.precision, world.device)):
        measured = measure_rule(checkpoint.model, config, questions, world, rule=named.rule)
    result = measured.result
    return Point(
        **asdict(conditions),
        rule=named.name,
        dial=named.dial,
        value=named.value,
        settings=named.rule.model_dump(),
        accuracy=result.accuracy,
        accuracy_low=result.accuracy_low,
        accuracy_high=result.accuracy_high,
        nfe=result.nfe,
        seconds=measured.seconds / result.n,
    )


def pareto_front(points: Sequence[Point], cost: str) -> list[Point]:
    """The Pareto front of points with equal conditions, in order of cost.

    Args:
        cost: `nfe` or `seconds`.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (getattr(point, cost), -point.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def write_sweep(points: Sequence[Point], out: Path) -> list[Point]:
    """Write measurements as .json, .csv and .md, beside those that another sweep has added meanwhile; returns all."""
    path = _with_suffix(out, ".json")
    with alone(path):
        written = read_sweep(out)
        known = {point.subject for point in written}
        written += [point for point in points if point.subject not in known]
        write_text(path, json.dumps([asdict(point) for point in written], indent=1) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) | {"settings": json.dumps(point.settings)} for point in written)
        write_text(_with_suffix(out, ".csv"), text.getvalue())
        write_text(_with_suffix(out, ".md"), "\n".join(sweep_table(written)) + "\n")
    return written


def sweep_table(points: Sequence[Point]) -> list[str]:
    """Lines of a Markdown table for each of the conditions; a point on a Pareto front is marked in bold."""
    lines, names = [], rule_names(points)
    for conditions, own_points in by_conditions(points).items():
        own_points.sort(key=lambda point: (names.index(point.rule), point.value))
        by_nfe, by_seconds = pareto_front(own_points, "nfe"), pareto_front(own_points, "seconds")
        step = "" if conditions.step is None else f", step {conditions.step:,}"
        lines += [
            f"{conditions.checkpoint}{step}: the first {conditions.n} questions of the test, "
            f"temperature {conditions.temperature:g}, seed {conditions.seed}, batches of {conditions.batch_size}, "
            f"{conditions.device}, {conditions.precision} (model {conditions.model[:SHOWN]}, "
            f"questions {conditions.questions[:SHOWN]}). Bold: no other setting is as accurate with fewer evaluations, "
            "or in less time.",
            "",
        ]
        rows = []
        for point in own_points:
            nfe, seconds = f"{point.nfe:.1f}", f"{point.seconds:.3g}"
            nfe = f"**{nfe}**" if point in by_nfe else nfe
            seconds = f"**{seconds}**" if point in by_seconds else seconds
            interval = f"{100 * point.accuracy_low:.1f} to {100 * point.accuracy_high:.1f}"
            dial, solved = f"{point.dial} {point.value:g}", f"{100 * point.accuracy:.1f}%"
            rows.append([point.rule, dial, solved, interval, nfe, seconds])
        titles = ["rule", "dial", "solved", "95% interval", "evaluations", "seconds"]
        lines += [*markdown_table(titles, rows, text_columns=(0, 1)), ""]
    return lines[:-1]


def draw_sweep(points: Sequence[Point], out: Path) -> None:
    """A row of plots for each of the conditions, a curve per rule with 95% intervals; one more row compares several."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    groups = by_conditions(points)
    labels = labels_of(list(groups))
    several = len(groups) > 1
    n_rows = len(groups) + several
    figure = Figure(figsize=(10, 0.8 + 3.4 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, 2, squeeze=False, sharex="col", sharey=True)
    costs = {"nfe": "network forward evaluations per question", "seconds": "seconds per question"}
    names = rule_names(points)
    for row, (label, mine) in enumerate(zip(labels, groups.values(), strict=True)):
        for plot, cost in zip(grid[row], costs, strict=True):
            front = pareto_front(mine, cost)
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
                own = [point for point in mine if point.rule == name]
                # Seconds are noisy, and where two points change places a line between them would go back and forth.
                _draw_curve(plot, own, cost, names.index(name), name, joined=cost == "nfe")
            plot.set_title(label, fontsize="medium", loc="left")
    if several:
        for plot, cost in zip(grid[-1], costs, strict=True):
            for number, (label, mine) in enumerate(zip(labels, groups.values(), strict=True)):
                _draw_curve(plot, pareto_front(mine, cost), cost, number, label)
            plot.set_title("the best of each", fontsize="medium", loc="left")
        compared = grid[-1][0].get_legend_handles_labels()
        figure.legend(*compared, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    for number, row in enumerate(grid, 1):
        for plot, label in zip(row, costs.values(), strict=True):
            set_grid(plot)
            set_log_axis(plot)
            if number == n_rows:
                plot.set(xlabel=label)
        row[0].set(ylabel="solved, %", ylim=(-2, 102))
    found = {
        label: handle
        for row in grid[: len(groups)]
        for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)
    }
    ordered = [label for label in ("best", *names) if label in found]
    handles = [found[label] for label in ordered]
    figure.legend(handles, ordered, loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    save_figure(figure, out, 120)


def labels_of(groups: Sequence[Conditions]) -> list[str]:
    """A name in plots for each of several conditions: the checkpoint, and below it all else in which they differ."""
    labels = []
    for own in groups:
        parts = []
        for name in (each.name for each in fields(Conditions) if each.name != "checkpoint"):
            # A checkpoint has its own step, seed and model; other differences matter between checkpoints too.
            is_own = name in ("step", "seed", "model")
            values = {getattr(each, name) for each in groups if each.checkpoint == own.checkpoint or not is_own}
            if len(values) > 1:
                value = getattr(own, name)
                shown = value[:SHOWN] if name in ("model", "questions") else value
                parts.append(f"{name.replace('_', ' ')} {shown}")
        labels.append(
            "\n".join([plain_label(own.checkpoint), *textwrap.wrap(plain_label(", ".join(parts), 200), MAX_LABEL)])
        )
    return labels


def _draw_curve(plot: Any, points: Sequence[Point], cost: str, number: int, label: str, *, joined: bool = True) -> None:
    ordered = sorted(points, key=lambda point: getattr(point, cost))
    x, y = [getattr(point, cost) for point in ordered], [100 * point.accuracy for point in ordered]
    below = [100 * (point.accuracy - point.accuracy_low) for point in ordered]
    above = [100 * (point.accuracy_high - point.accuracy) for point in ordered]
    plot.errorbar(
        x,
        y,
        yerr=[[max(0.0, each) for each in side] for side in (below, above)],
        linestyle=LINES[number // len(MARKERS) % len(LINES)] if joined else "none",
        marker=MARKERS[number % len(MARKERS)],
        color=COLORS[number % len(COLORS)],
        markersize=4,
        linewidth=1.4,
        elinewidth=0.7,
        label=label,
    )
