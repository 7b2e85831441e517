"""Plot loss and accuracy of one or more runs against steps, distinct sequences or seconds.

    python -m report.curves runs/sudoku_puma runs/sudoku_baseline --x seconds --out curves.png

PUMA trains on each sequence for a whole trajectory, so which method is ahead can depend on the axis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.metrics import METRICS_FILE, read_metrics

AXES = {
    "step": "updates",
    "sequences_distinct": "distinct sequences seen",
    "seconds": "seconds of training",
}


def draw_curves(run_dirs: Sequence[Path], axis: str, out: Path) -> None:
    """Write a plot of loss and accuracy against one of `AXES`.

    Raises:
        ValueError: a run directory holds no records.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_plot, accuracy_plot = figure.subplots(1, 2)
    for number, run_dir in enumerate(run_dirs):
        rows = list(read_metrics(run_dir))
        if not rows:
            raise ValueError(f"{run_dir} holds no {METRICS_FILE} with records: name a run directory")
        color = f"C{number}"
        loss_plot.plot(*_curve(rows, axis, "train/loss"), color=color, alpha=0.35)
        loss_plot.plot(*_curve(rows, axis, "validation/loss"), color=color, marker=".", label=run_dir.name)
        keys = [key for key in rows[-1] | _last_evaluation(rows) if key.startswith("validation/accuracy/")]
        for line, key in zip(("-", "--", ":", "-.") * len(keys), keys, strict=False):
            label = f"{run_dir.name}: {key.removeprefix('validation/accuracy/')}"
            x, y = _curve(rows, axis, key)
            accuracy_plot.plot(x, [100 * value for value in y], line, color=color, marker=".", label=label)
    loss_plot.set(xlabel=AXES[axis], ylabel="loss (faint: training, dots: validation)", yscale="log")
    accuracy_plot.set(xlabel=AXES[axis], ylabel="solved, %", ylim=(-2, 102))
    for plot in (loss_plot, accuracy_plot):
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend(fontsize="small")
    figure.savefig(out, dpi=120)


def _curve(rows: list[dict[str, Any]], axis: str, key: str) -> tuple[list[float], list[float]]:
    points = [(row[axis], row[key]) for row in rows if key in row]
    return [x for x, _ in points], [y for _, y in points]


def _last_evaluation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next((row for row in reversed(rows) if "validation/loss" in row), {})


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description="Draw loss and accuracy of runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--x", choices=AXES, default="step", help="x-axis")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture file (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    try:
        draw_curves(options.run_dirs, options.x, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
