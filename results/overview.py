"""Draw the results of all tasks in one picture, and print the tables of README.md and of the page of results.

    python -m results.overview     # from the records of the experiments; runs nothing

The picture is results/overview.png. A test compares the tables with those of both pages.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from base.commands import CommandParser, ends_with_message
from report.curves import mean_and_range
from results.run import recorded_runs
from runtime.figures import COLORS, MARKERS, save_figure, set_grid
from runtime.history import ROOT
from runtime.markdown import markdown_table

METHODS = ("PUMA", "PUMA, pool of 16", "uniform masks")
AHEAD = 5.0  # percentage points to the next method from which on the best is in bold
OFFSET = 0.25  # between the methods of a task, of the distance between tasks


@dataclass(frozen=True)
class Comparison:
    """Methods that are compared on a task: the labels of their variants in one experiment."""

    task: str
    experiment: str
    labels: Sequence[str | None]  # in the order of `METHODS`; None: it was not run

    @cached_property
    def solved(self) -> list[dict[int, float]]:
        """Solved questions after the last update, in percent, by seed, for each label; empty without one."""
        found: list[dict[int, float]] = []
        runs = recorded_runs(ROOT / "results" / self.experiment / "records.json")
        for label in self.labels:
            finals = {seed: run["final"] for (variant, seed), run in sorted(runs.items()) if variant == label}
            found.append({seed: 100 * final["accuracy"] for seed, final in finals.items() if final})
        return found


TASKS = (
    Comparison(
        "medium word problems",
        "word_problems_medium",
        ("puma, shifted", "puma, shifted, pool of 16", "uniform, shifted"),
    ),
    Comparison(
        "medium ones, in three blocks",
        "word_problems_medium_block",
        (None, "puma, prefix, pool of 16", "uniform, prefix"),
    ),
    Comparison(
        "hard word problems",
        "word_problems_hard_random",
        (
            "puma, shifted, rate 1.0e-3",
            "puma, shifted, rate 1.0e-3, pool of 16",
            "uniform, shifted, rate 1.0e-3",
        ),
    ),
    Comparison(
        "hard ones, from an autoregressive model",
        "word_problems_hard",
        ("puma from AR", "puma from AR, pool of 16", "uniform from AR"),
    ),
    Comparison("the paper's Sudoku", "sudoku", ("puma, rate 3e-4", None, "uniform, rate 3e-4")),
    Comparison(
        "small Sudoku model",
        "sudoku_mini",
        ("puma as in the paper, rate 7e-4", "puma, pool of 16, tau 0.9, rate 7e-4", "uniform, rate 7e-4"),
    ),
    Comparison(
        "addition, up to 12 digits",
        "addition_rates",
        ("puma, rate 1.0e-3", "puma, pool of 16, rate 1.0e-3", "uniform, rate 1.0e-3"),
    ),
    Comparison("addition, up to 20 digits", "addition_20_digits", ("puma", "puma, pool of 16", "uniform")),
)
# What a pool of 16 changes: one batch and 16.
POOLS = (
    Comparison(
        "medium word problems from random weights, 1e-3",
        "word_problems_medium",
        ("puma, shifted", "puma, shifted, pool of 16"),
    ),
    Comparison(
        "the same without a threshold",
        "word_problems_medium",
        ("puma, shifted, no threshold", "puma, shifted, pool of 16, no threshold"),
    ),
    Comparison(
        "hard word problems from random weights, 1e-3",
        "word_problems_hard_random",
        ("puma, shifted, rate 1.0e-3", "puma, shifted, rate 1.0e-3, pool of 16"),
    ),
    Comparison(
        "hard word problems from an autoregressive model, 1e-3",
        "word_problems_hard",
        ("puma from AR", "puma from AR, pool of 16"),
    ),
    Comparison("addition, 12 digits, 2e-3", "addition", ("puma, units first", "puma, units first, pool of 16")),
    Comparison("the same at 1e-3", "addition_rates", ("puma, rate 1.0e-3", "puma, pool of 16, rate 1.0e-3")),
    Comparison("addition, 20 digits, 1e-3", "addition_20_digits", ("puma", "puma, pool of 16")),
    Comparison("small Sudoku, 2e-3, 1,000 updates", "sudoku_variants", ("K 8", "K 8, pool of 16")),
    Comparison(
        "the same, 2,000 updates, pool of 16 with tau = 0.9",
        "sudoku_mini",
        ("puma as in the paper", "puma, pool of 16, tau 0.9"),
    ),
    Comparison(
        "the same at 7e-4",
        "sudoku_mini",
        ("puma as in the paper, rate 7e-4", "puma, pool of 16, tau 0.9, rate 7e-4"),
    ),
    Comparison(
        "boards of 22 to 28 clues, 1.5e-3, pool of 16 with tau = 0.9",
        "sudoku_few_clues",
        ("puma as in the paper", "puma, pool of 16, tau 0.9"),
    ),
    Comparison("the paper's Sudoku, 1e-3", "sudoku", ("puma, rate 1e-3", "puma, rate 1e-3, pool of 16")),
)


def task_table() -> list[str]:
    """The mean of each method on each task, with the lowest and highest seed; in bold what is ahead by `AHEAD`."""
    rows = []
    for task in TASKS:
        solved = [list(each.values()) for each in task.solved]
        best, *others = sorted((statistics.mean(each) for each in solved if each), reverse=True)
        cells = []
        for each in solved:
            text = mean_and_range(each, ".1f") if each else ""
            is_ahead = each and statistics.mean(each) == best and best - others[0] > AHEAD
            cells.append(text.replace(mean := text.split(" ")[0], f"**{mean}**", 1) if is_ahead else text)
        rows.append([task.task, ", ".join(sorted({str(len(each)) for each in solved if each})), *cells])
    return markdown_table(["solved at the end, %: mean (range of seeds)", "seeds", *METHODS], rows)


def pool_table() -> list[str]:
    """What a pool of 16 batches changes, over the seeds that were run with both."""
    rows = []
    for pair in POOLS:
        one, many = pair.solved
        seeds = sorted(one.keys() & many.keys())
        means = [f"{statistics.mean(each[seed] for seed in seeds):.1f}" for each in (one, many)]
        rows.append([pair.task, *means, ", ".join(f"{many[seed] - one[seed]:+.1f}" for seed in seeds)])
    titles = ["task, learning rate", "one batch: solved, %", "pool of 16: solved, %", "difference by seed"]
    return markdown_table(titles, rows, text_columns=(0, 3))


def draw(out: Path) -> None:
    """Draw every seed of every method and task as a point, and the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    plot = figure.subplots()
    styles: list[dict[str, Any]] = [
        {"color": COLORS[number], "marker": MARKERS[number]} for number in range(len(METHODS))
    ]
    means: dict[str, Any] = {"markersize": 9, "markeredgecolor": "k", "linestyle": ""}
    for row, task in enumerate(TASKS):
        for number, (style, by_seed) in enumerate(zip(styles, task.solved, strict=True)):
            solved, height = list(by_seed.values()), row + (number - 1) * OFFSET
            plot.plot(solved, [height] * len(solved), **style, linewidth=1, alpha=0.45, markersize=5)
            plot.plot([statistics.mean(solved)] if solved else [], [height] if solved else [], **style, **means)
    for method, style in zip(METHODS, styles, strict=True):
        plot.plot([], [], **style, **means, label=method)
    plot.set_yticks(range(len(TASKS)), [task.task for task in TASKS])
    plot.set(xlabel="solved at the end, %: mean and seeds", xlim=(-2, 102), ylim=(len(TASKS) - 0.5, -0.5))
    set_grid(plot)
    plot.set_xticks(range(0, 101, 20))
    for row in range(1, len(TASKS)):
        plot.axhline(row - 0.5, color="0.85", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
    save_figure(figure, out, 110)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    CommandParser(description="Draw the results of all tasks in one picture, and print their tables.").parse_args(
        arguments
    )
    with ends_with_message():
        draw(ROOT / "results" / "overview.png")
        print("\n".join([*task_table(), "", *pool_table()]))


if __name__ == "__main__":
    main()
