"""Run an experiment, every setting with every seed, and write its table and figure.

    python -m results.run sudoku_mini                  # two runs at a time, one thread each
    python -m results.run sudoku_mini --budget-s 1800  # stops after 1800 s; the same command continues
    python -m results.run sudoku_mini --draw           # only the table and figure, from existing records
    python -m results.run runs/my_ablation.py          # an experiment of your own (docs/adding.md)

The output is records.json, README.md and curves.png in results/EXPERIMENT/. Table and figure are made only from the
records; what is written by hand is in note.md there. Run directories are in runs/results/EXPERIMENT/. Interrupted runs
are resumed. Runs that are complete, in a run directory or in the records, are not repeated, so an experiment can be
continued on another machine.

A Python file defines `EXPERIMENT = Experiment(...)`, whose name is that of the file. It looks for YAML files in its own
folder, then in yaml_files/. Its output is in runs/results/EXPERIMENT/, beside the run directories.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from base.commands import CommandParser, ends_with_message, seconds, whole_number
from base.files import write_text
from report.curves import RUN_AXES, Curve, accuracy_points, mean_and_range, plot_curves, rules_of, target_table
from results.experiments import EXPERIMENTS, Experiment, Variant
from results.records import Number, Text, check_folder, read_note, read_records
from runtime.config_file import changed_settings, format_changes, read_config
from runtime.figures import save_figure
from runtime.final import Count, Share, is_complete, load_final
from runtime.history import ROOT, commit_name, read_history
from runtime.markdown import markdown_table
from runtime.metrics import read_metrics

POLL_S = 0.5
N_COLUMNS = 10  # at most, in the table of accuracy by update
WIDTH = 12.0  # of the figure, inches
LEGEND_LINE, LEGEND_LETTER = 0.8, 0.08  # inches that a label needs in the legend, besides and for each letter


class Point(TypedDict):
    """One evaluation of a run."""

    step: Number
    sequences_distinct: Number
    seconds: Number
    tokens: NotRequired[Number]
    accuracy: Share
    low: Share  # 95% interval
    high: Share


class Group(TypedDict):
    """Accuracy on questions of one difficulty."""

    by: Text  # measure of difficulty
    value: float
    n: Count
    accuracy: Share


class RuleResult(TypedDict):
    """Accuracy by one sampling rule."""

    rule: Text
    accuracy: Share


class RecordedResult(TypedDict):
    """The last evaluation of a complete run, by its first sampling rule; `rules` if it has several."""

    accuracy: Share
    low: Share
    high: Share
    n: Count
    groups: list[Group]
    rules: NotRequired[list[RuleResult]]


class RecordedRun(TypedDict):
    """One run in the records."""

    variant: Annotated[str, Field(max_length=200)]
    seed: int
    settings: Text
    commit: Text
    date: Text
    machine: Text
    points: Annotated[list[Point], Field(min_length=1)]
    final: RecordedResult | None


class Records(TypedDict):
    """Content of records.json."""

    command: Text
    runs: Annotated[list[RecordedRun], Field(min_length=1)]


@dataclass(frozen=True)
class Task:
    """One run of an experiment."""

    variant: Variant
    seed: int
    run_dir: Path
    config: Path
    overrides: list[str]
    needs: Path | None  # run directory of the run whose weights this one starts from

    @property
    def key(self) -> tuple[str, int]:
        """Label and seed, by which records name a run."""
        return self.variant.label, self.seed

    @property
    def all_overrides(self) -> list[str]:
        """The overrides, and the weights to start from."""
        return [*self.overrides, *([f"model.init_from={self.needs}"] if self.needs else [])]

    @property
    def command(self) -> list[str]:
        """The command that starts or resumes the run."""
        words = ["train.py", "--config", str(self.config), "--run-dir", str(self.run_dir)]
        return [sys.executable, *words, *self.all_overrides]

    @property
    def settings(self) -> str:
        """What identifies the run in the records: its YAML file, overrides and the run that it starts from."""
        start = [f"model.init_from=RUN of {self.variant.starts_from!r}"] if self.needs else []
        config = self.config.relative_to(ROOT) if self.config.is_relative_to(ROOT) else self.config
        return " ".join([f"--config {config}", *self.overrides, *start])

    @property
    def is_complete(self) -> bool:
        """Whether the run directory holds the complete run."""
        return is_complete(self.run_dir)


def read_experiment(name: str) -> tuple[str, Experiment]:
    """An experiment and its name, from its name in `EXPERIMENTS` or the path of a Python file that defines it.

    Raises:
        ValueError: there is no such experiment or file, the file has an error or no `EXPERIMENT`, or a YAML file that
            it names is missing.
    """
    if not name.endswith(".py"):
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment {name!r}: give a Python file, or one of {', '.join(EXPERIMENTS)}")
        return name, EXPERIMENTS[name]
    file = Path(name).resolve()
    if file.stem in EXPERIMENTS:
        raise ValueError(f"{name}: {file.stem!r} is the name of an experiment in results/experiments.py; rename it")
    if not file.is_file():
        raise ValueError(f"{name} is no file: give a Python file that defines EXPERIMENT = Experiment(...)")
    try:
        experiment = runpy.run_path(str(file)).get("EXPERIMENT")
    except Exception as error:  # whatever the file raises
        raise ValueError(f"{name} cannot be run ({type(error).__name__}: {error})") from error
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{name} defines no EXPERIMENT: add EXPERIMENT = Experiment(...), see docs/adding.md")
    variants = []
    for variant in experiment.variants:
        places = [folder / variant.config for folder in (file.parent, ROOT / "yaml_files")]
        config = next((path for path in places if path.exists()), None)
        if config is None:
            raise ValueError(f"{name}: config {variant.config!r} is neither in {file.parent} nor in yaml_files/")
        variants.append(replace(variant, config=str(config)))
    return file.stem, replace(experiment, variants=tuple(variants))


def tasks_of(experiment: Experiment, folder: Path, run_overrides: list[str]) -> list[Task]:
    """All runs, ordered by seed, so that an interrupted experiment has complete comparisons for some seeds.

    Variants that have seeds of their own, of a sweep, come last.

    Args:
        folder: parent of the run directories.
        run_overrides: overrides for all runs.
    """

    by_label = {variant.label: variant for variant in experiment.variants}

    def run_dir(label: str, seed: int) -> Path:
        return folder.resolve() / f"{by_label[label].folder_name}_seed{seed}"

    runs = [(variant, seed) for variant in experiment.variants for seed in experiment.seeds_of(variant)]
    tasks = []
    for variant, seed in sorted(runs, key=lambda run: (run[0].seeds is not None, run[1])):
        overrides = [*experiment.overrides, *variant.overrides, f"training.seed={seed}", *run_overrides]
        needs = run_dir(variant.starts_from, seed) if variant.starts_from else None
        tasks.append(
            Task(variant, seed, run_dir(variant.label, seed), ROOT / "yaml_files" / variant.config, overrides, needs)
        )
    return tasks


def check_settings(tasks: list[Task], recorded: dict[tuple[str, int], dict[str, Any]], records_file: Path) -> None:
    """Read the settings of all runs.

    Args:
        recorded: runs in the records, by label and seed.

    Raises:
        ValueError: a setting is wrong or overrides the seeds, runs would ask no questions, or an existing run directory
            or record has other settings.
    """
    for task in tasks:
        config, run_config = read_config(task.config, task.all_overrides), task.run_dir / "config.yaml"
        if config.training.seed != task.seed:
            raise ValueError(
                f"training.seed={config.training.seed}: would replace seed {task.seed} of {task.variant.label!r}; "
                "leave it out, or change the seeds of the experiment in results/experiments.py"
            )
        if not config.validation.n_last_examples:
            raise ValueError(
                f"validation.n_examples=0: {task.variant.label!r} would have no accuracy to compare; leave it out"
            )
        if run_config.exists() and (changes := changed_settings(read_config(run_config), config)):
            raise ValueError(
                f"{task.run_dir} has other settings: delete it or choose another --runs\n{format_changes(changes)}"
            )
        record = recorded.get(task.key)
        if record and record["settings"] != task.settings:
            raise ValueError(
                f"{records_file} has {task.variant.label!r}, seed {task.seed}, with other settings: delete that entry "
                f"or choose another --out\n  {record['settings']}\n  {task.settings}"
            )


def tasks_to_run(tasks: list[Task], recorded: dict[tuple[str, int], dict[str, Any]]) -> list[Task]:
    """Tasks that neither a run directory nor a record completes, and those whose weights they start from."""
    missing = [task for task in tasks if not task.is_complete and not recorded.get(task.key, {}).get("final")]
    needed = {task.needs for task in missing}
    return [task for task in tasks if task in missing or (task.run_dir in needed and not task.is_complete)]


def run_all(tasks: list[Task], n_jobs: int, budget_s: float | None) -> bool:
    """Run tasks; returns whether all are complete at the end, and no run failed.

    Args:
        n_jobs: number of parallel runs, one thread each.
        budget_s: seconds after which runs are told to save and stop.
    """
    waiting = list(tasks)
    running: dict[subprocess.Popen[bytes], Task] = {}
    deadline = time.monotonic() + budget_s if budget_s is not None else float("inf")
    failed: list[Task] = []
    with tqdm(total=len(tasks), unit="run") as bar:
        try:
            while running or (waiting and time.monotonic() < deadline):
                while len(running) < n_jobs and time.monotonic() < deadline:
                    task = next((task for task in waiting if _can_start(task, tasks)), None)
                    if task is None:
                        break
                    waiting.remove(task)
                    running[start(task)] = task
                    bar.set_postfix_str(", ".join(f"{each.variant.label} {each.seed}" for each in running.values()))
                if not running:  # what is left starts from runs that failed
                    break
                time.sleep(POLL_S)
                if time.monotonic() >= deadline:
                    for process in running:
                        process.send_signal(signal.SIGTERM)
                    deadline = float("inf")
                    waiting = []
                for process in [process for process in running if process.poll() is not None]:
                    task = running.pop(process)
                    bar.update(task.is_complete)
                    if process.returncode:
                        failed.append(task)
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()
    for task in failed:
        print(f"failed: {task.run_dir}, see {task.run_dir}.log", file=sys.stderr)
    return not failed and all(task.is_complete for task in tasks)


def _can_start(task: Task, tasks: list[Task]) -> bool:
    """Whether the run that `task` starts from is complete."""
    return task.needs is None or all(other.is_complete for other in tasks if other.run_dir == task.needs)


def start(task: Task) -> subprocess.Popen[bytes]:
    """Start a run with one thread; its output goes to a file beside its directory."""
    task.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{task.run_dir}.log", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(task.command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def key_of(run: dict[str, Any]) -> tuple[str, int]:
    """Label and seed of a run in the records, as `Task.key`."""
    return run["variant"], run["seed"]


def named_runs(experiment: Experiment, runs: list[dict[str, Any]], records_file: Path) -> list[dict[str, Any]]:
    """The runs of the records whose label and seed the experiment names; a line tells of others."""
    keys = {(variant.label, seed) for variant in experiment.variants for seed in experiment.seeds_of(variant)}
    others = [f"{run['variant']!r}, seed {run['seed']}" for run in runs if key_of(run) not in keys]
    if others:
        print(f"{records_file} keeps runs that the experiment does not name, which are not shown: {'; '.join(others)}")
    return [run for run in runs if key_of(run) in keys]


def recorded_runs(records_file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs in a records file by label and seed; empty if there is no file."""
    if not records_file.exists():
        return {}
    return {key_of(run): run for run in read_records(records_file, Records)["runs"]}


def collect(tasks: list[Task], recorded: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the runs of `tasks`: from the run directory if it has evaluations, else from earlier records.

    A record names the settings, commit, date and machine of the run. Those of an unchanged record are kept, and so are
    records of runs that are none of `tasks`, which may be the only ones.
    """
    keys = [task.key for task in tasks]
    runs = [run for key, run in recorded.items() if key not in keys]
    for task in tasks:
        old = recorded.get(task.key)
        rows = list(read_metrics(task.run_dir))
        rules = rules_of(rows)
        points = accuracy_points(rows, rules[0]) if rules else []  # the first rule is the headline
        final = _final(task.run_dir) if task.is_complete else None
        if old and (not points or (old["final"] and not final) or (old["points"], old["final"]) == (points, final)):
            runs.append(old)
        elif points:
            facts = {"variant": task.variant.label, "seed": task.seed, "settings": task.settings}
            runs.append(facts | _origin(task.run_dir) | {"final": final, "points": points})
    return runs


def _origin(run_dir: Path) -> dict[str, str]:
    """Commit, date and machine of the last process that worked on a run."""
    last = (read_history(run_dir) or [{}])[-1]
    hardware = last.get("hardware") or {}
    return {
        "commit": commit_name(last),
        "date": str(last.get("ended") or last.get("updated") or "unknown")[:10],
        "machine": f"{hardware.get('gpu') or hardware.get('processor', 'unknown')}, {hardware.get('cores', '?')} cores",
    }


def _final(run_dir: Path) -> dict[str, Any] | None:
    """The `RecordedResult` of a complete run; None if it asked no questions."""
    final = load_final(run_dir)
    if final is None or not final.evaluation.samplers:
        return None
    samplers = final.evaluation.samplers
    result = samplers[0]
    groups = [{"by": each.by, "value": each.value, "n": each.n, "accuracy": each.accuracy} for each in result.groups]
    figures = {"accuracy": result.accuracy, "low": result.accuracy_low, "high": result.accuracy_high}
    rules = [{"rule": each.rule, "accuracy": each.accuracy} for each in samplers]
    return figures | {"n": result.n, "groups": groups} | ({"rules": rules} if len(rules) > 1 else {})


def runs_by_variant(records: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs by the label of their variant, in order: the complete ones, or all if none is complete."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for run in records["runs"]:
        variants.setdefault(run["variant"], []).append(run)
    return {label: [run for run in runs if run["final"]] or runs for label, runs in variants.items()}


def curves_of(records: dict[str, Any]) -> list[Curve]:
    """A curve per run of `runs_by_variant`."""
    return [Curve(label, "", run["points"]) for label, runs in runs_by_variant(records).items() for run in runs]


def axes_of(experiment: Experiment) -> tuple[str, ...]:
    """The axes on which the runs are compared."""
    return tuple(axis for axis in RUN_AXES if axis != "seconds" or experiment.seconds_comparable)


def report(experiment: Experiment, records: dict[str, Any], note: list[str]) -> str:
    """README.md of the experiment, from its records and a note (`read_note`)."""
    lines = [f"# {experiment.question}", "", *note]
    lines += ["![Accuracy of each setting](curves.png)", ""]
    lines += [*_final_table(records), ""]
    for target in experiment.targets:
        if any(curve.first_reaching(target, "step") is not None for curve in curves_of(records)):
            lines += [*target_table(curves_of(records), target, experiment.baseline, axes_of(experiment)), ""]
    lines += [
        "Means over seeds, with the lowest and highest. A ratio of 2 means half of what "
        f"'{experiment.baseline}' needs. The target is reached at the first evaluation at or above it.",
        "",
        *_progress_table(records),
        *_rule_table(records),
        *_difficulty_table(records),
        "",
        f"`{records['command']}`; the runs:",
        "",
        *_run_table(records),
    ]
    return "\n".join(lines) + "\n"


def _final_table(records: dict[str, Any]) -> list[str]:
    """Accuracy after the last update, and what it took."""
    titles = ["at the end", "seeds", "solved, %", "of", "updates", "distinct sequences", "seconds"]
    rows = []
    for label, runs in runs_by_variant(records).items():
        complete = [run for run in runs if run["final"]]
        solved = mean_and_range([100 * run["final"]["accuracy"] for run in complete], ".1f")
        n = ", ".join(sorted({f"{run['final']['n']:,}" for run in complete})) or "-"
        cells = [
            mean_and_range([run["points"][-1][axis] for run in complete], ",.0f")
            for axis in ("step", "sequences_distinct", "seconds")
        ]
        rows.append([label, str(len(complete)), solved, n, *cells])
    return markdown_table(titles, rows)


def _progress_table(records: dict[str, Any]) -> list[str]:
    """Accuracy by update; as in the figure, only updates that all seeds have."""
    steps = sorted({point["step"] for run in records["runs"] for point in run["points"]})
    steps = steps[:: -max(1, math.ceil(len(steps) / N_COLUMNS))][::-1]  # the last one included
    rows = []
    for label, runs in runs_by_variant(records).items():
        by_step = [{point["step"]: 100 * point["accuracy"] for point in run["points"]} for run in runs]
        cells = [
            mean_and_range([seed[step] for seed in by_step] if all(step in seed for seed in by_step) else [], ".0f")
            for step in steps
        ]
        rows.append([label, *cells])
    return markdown_table(["solved, %, after updates", *(f"{step:,}" for step in steps)], rows)


def _rule_table(records: dict[str, Any]) -> list[str]:
    """Accuracy after the last update by each sampling rule; empty if all runs have one rule."""
    finals = [run["final"] for run in records["runs"] if run["final"]]
    rules = list(dict.fromkeys(each["rule"] for final in finals for each in final.get("rules", [])))
    rows = []
    for label, runs in runs_by_variant(records).items():
        by_rule = [
            {each["rule"]: 100 * each["accuracy"] for each in run["final"].get("rules", [])}
            for run in runs
            if run["final"]
        ]
        cells = [
            mean_and_range([seed[rule] for seed in by_rule] if all(rule in seed for seed in by_rule) else [], ".1f")
            for rule in rules
        ]
        rows.append([label, *cells])
    return ["", *markdown_table(["solved, %, sampled by", *rules], rows)] if rules else []


def _difficulty_table(records: dict[str, Any]) -> list[str]:
    """Accuracy by difficulty after the last update, for each measure of difficulty; empty if there is none.

    A cell is empty unless all complete runs of the variant have that group.
    """
    lines: list[str] = []
    groups = [group for run in records["runs"] if run["final"] for group in run["final"]["groups"]]
    for by in dict.fromkeys(group["by"] for group in groups):
        values = sorted({group["value"] for group in groups if group["by"] == by})
        n = {
            value: sorted({group["n"] for group in groups if (group["by"], group["value"]) == (by, value)})
            for value in values
        }
        rows = [["questions", *(" or ".join(f"{count:,}" for count in n[value]) for value in values)]]
        for label, runs in runs_by_variant(records).items():
            finals = [run["final"] for run in runs if run["final"]]
            cells = []
            for value in values:
                found = [
                    100 * group["accuracy"]
                    for final in finals
                    for group in final["groups"]
                    if (group["by"], group["value"]) == (by, value)
                ]
                cells.append(mean_and_range(found if len(found) == len(finals) else [], ".0f"))
            rows.append([label, *cells])
        titles = [f"solved, %, by {by.replace('_', ' ')}, from", *(f"{value:g}" for value in values)]
        lines += ["", *markdown_table(titles, rows)]
    return lines


def _run_table(records: dict[str, Any]) -> list[str]:
    """Settings, commit, date and machine of every run."""
    titles = ["setting", "seed", "solved, % (95% interval)", "of", "seconds", "settings", "commit", "date", "machine"]
    rows = []
    for run in records["runs"]:
        final, solved, n = run["final"], "not finished", "-"
        if final:
            n = f"{final['n']:,}"
            solved = f"{100 * final['accuracy']:.1f} ({100 * final['low']:.1f} to {100 * final['high']:.1f})"
        figures = [str(run["seed"]), solved, n, f"{run['points'][-1]['seconds']:,.0f}"]
        rows.append([run["variant"], *figures, f"`{run['settings']}`", run["commit"], run["date"], run["machine"]])
    return markdown_table(titles, rows, text_columns=(0, 5, 6, 7, 8))


def draw(experiment: Experiment, records: dict[str, Any], out: Path) -> None:
    """Draw the accuracy of each variant against each axis: the mean over seeds and the lowest and highest."""
    from matplotlib.figure import Figure

    axes = axes_of(experiment)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    plots = figure.subplots(1, len(axes), sharey=True)
    curves = curves_of(records)
    shown = [curve for curve in curves if curve.setting in experiment.shown] or curves
    for plot, axis in zip(plots, axes, strict=True):
        plot_curves(plot, shown, axis, experiment.targets[-1:])
        plot.label_outer()
    handles, labels = plots[0].get_legend_handles_labels()
    longest = max(len(label) for label in labels)
    n_columns = max(1, min(4, int(WIDTH / (LEGEND_LINE + LEGEND_LETTER * longest))))
    figure.legend(handles, labels, loc="outside upper center", ncols=n_columns, frameon=False)
    save_figure(figure, out, 110)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandParser(description="Run an experiment and write its table and figure.")
    parser.add_argument("experiment", help=f"a Python file that defines EXPERIMENT, or one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all runs")
    parser.add_argument(
        "--jobs", type=whole_number(1, 1024), default=2, help="number of parallel runs, one thread each"
    )
    parser.add_argument("--budget-s", type=seconds(), help="seconds after which runs are told to save and stop")
    parser.add_argument(
        "--draw", action="store_true", help="run nothing; write the table and figure of existing records"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "results", help="parent folder of the run directories"
    )
    parser.add_argument(
        "--out", type=Path, help="parent folder of the output folder; by default results/, with a file that of --runs"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.draw and options.overrides:
        parser.error(f"{' '.join(options.overrides)}: not with --draw, which runs nothing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`, which stops the runs
    with ends_with_message("interrupted; the same command continues"):
        name, experiment = read_experiment(options.experiment)
        out = options.out or (ROOT / "results" if name in EXPERIMENTS else options.runs)
        folder, complete = out / name, True
        records_file = folder / "records.json"
        if not options.draw:
            tasks = tasks_of(experiment, options.runs / name, options.overrides)
            recorded = recorded_runs(records_file)
            check_settings(tasks, recorded, records_file)
            check_folder(options.runs, "--runs")
            check_folder(out, "--out")
            complete = run_all(tasks_to_run(tasks, recorded), options.jobs, options.budget_s)
            runs = collect(tasks, recorded)
            if not {key_of(run) for run in runs} & {task.key for task in tasks}:
                sys.exit("no run has been evaluated yet")
            command = shlex.join(["python", "-m", "results.run", options.experiment, *options.overrides])
            folder.mkdir(parents=True, exist_ok=True)
            write_text(records_file, json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
        records = read_records(records_file, Records)
        records["runs"] = named_runs(experiment, records["runs"], records_file)
        if not records["runs"]:
            raise ValueError(f"{records_file} has no run that the experiment names: run the experiment without --draw")
        write_text(folder / "README.md", report(experiment, records, read_note(folder)))
        draw(experiment, records, folder / "curves.png")
        print(f"wrote {folder}/README.md" + ("" if complete else "; incomplete: the same command continues"))
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
