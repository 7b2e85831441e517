"""A run's page: one HTML file with settings, curves, results, samples and history, which needs no other file.

    python -m report.page runs/sudoku_mini_puma                 # writes report.html into the run directory
    python -m report.page runs/sudoku_mini_puma --out page.html

`train.py` writes it when a run ends. The page is for a browser window of any width, and for a light or dark theme.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape as escape_html
from pathlib import Path
from typing import Any

import numpy as np

from base.commands import CommandParser, ends_with_message
from base.files import check_out, write_text
from base.text import escape, shorten
from config import Config
from data.sudoku import BOX_SHAPE, find_repeats
from report.curves import AXES, RUN_AXES, accuracy_points, can_be_drawn, plot_curves, read_curves, rules_of
from report.runs import RunSummary, summarize
from report.trace import html_fragment, read_traces
from runtime.config_file import parse_config, read_sections
from runtime.figures import COLORS, set_grid
from runtime.final import Final, load_final, rule_in_words
from runtime.history import read_history
from runtime.metrics import read_metrics, read_samples, samples_files

PAGE_FILE = "report.html"
TRACES_FILE = "traces.json"
MAX_SAMPLES = 12  # shown, the wrong ones first
MAX_POINTS = 400  # of the training loss, means of neighbouring records
MAX_TITLE = 120  # characters of a trace's title
MAX_TEXT = 2000  # characters of a sampled text
INK = "#010203"  # stands for the colour of the theme in the figures
BOARD_SIZES = {size**2: size for size in BOX_SHAPE}  # rows of boards, by number of cells


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run, into its directory or to `out`; returns the file.

    Raises:
        ValueError: the settings or the records of the run cannot be read.
        WriteError: the page cannot be written.
    """
    out = out or run_dir / PAGE_FILE
    write_text(out, build_page(run_dir))
    return out


def build_page(run_dir: Path) -> str:
    """The HTML of a run's page; ValueError if its settings or records cannot be read."""
    raw = read_sections(run_dir / "config.yaml")  # unchecked
    data = raw.get("data")
    on_boards = isinstance(data, dict) and data.get("dataset") == "sudoku"
    summary = summarize(run_dir)
    rows = list(read_metrics(run_dir))
    final, sessions = load_final(run_dir), read_history(run_dir)
    name = run_dir.resolve().name
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    parts = [
        f"<h1>{text(name)}</h1>",
        f"<p class=faint>{text(summary.data or '')}</p>",
        _facts(summary, rows, final),
        "<h2>Curves</h2>",
        _figures(run_dir, rows),
        *_results(final, sessions[-1].get("data_warnings", []) if sessions else []),
        *_traces(run_dir),
        *_samples(run_dir, final, on_boards=on_boards),
        "<h2>Settings that differ from the defaults</h2>",
        _settings(raw),
        *_history(sessions),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(name)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def text(value: object) -> str:
    """A value as HTML text, control characters but line breaks and tabs as escapes."""
    return escape_html(escape(str(value), keep="\n\t"))


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], n_left: int = 1) -> str:
    """An HTML table; columns after the first `n_left` hold numbers. Cells are text, not HTML."""

    def line(kind: str, cells: Sequence[object]) -> str:
        shown = (
            f"<{kind}{' class=n' if number >= n_left else ''}>{text(cell)}</{kind}>"
            for number, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=wide><table><thead>{line('th', titles)}</thead><tbody>{body}</tbody></table></div>"


def _facts(summary: RunSummary, rows: list[dict[str, Any]], final: Final | None) -> str:
    """The figures at the top."""
    last = {key: value for key, value in rows[-1].items() if can_be_drawn(value)} if rows else {}
    facts = {
        "state": summary.state,
        "objective": summary.objective or "",
        "updates": f"{summary.step:,}"
        + (f" of {summary.n_steps:,}" if summary.n_steps not in (None, summary.step) else ""),
        "distinct sequences": f"{last.get('sequences_distinct', 0):,}",
        "training": duration(last.get("seconds", 0.0)),
    }
    if final is not None and final.accuracy is not None:
        facts["final accuracy"] = f"{100 * final.accuracy:.1f}% of {final.n:,}"
    elif final is not None:
        facts["final validation loss"] = f"{final.evaluation.loss:.4f}"
    if summary.accuracy is not None:
        facts["best accuracy"] = f"{100 * summary.accuracy:.1f}% at {summary.accuracy_step:,}"
    elif summary.loss is not None:
        facts["lowest validation loss"] = f"{summary.loss:.4f} at {summary.loss_step:,}"
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f"<dl class=facts>{cells}</dl>"


def duration(seconds: float) -> str:
    """A time in the two largest units, e.g. 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _figures(run_dir: Path, rows: list[dict[str, Any]]) -> str:
    """Loss against updates, and accuracy against each axis, as inline SVG in the colours of the theme."""
    if not rows:
        return "<p class=faint>No records yet.</p>"
    figures = [_draw(lambda plot: _plot_loss(plot, rows))]
    if accuracy_points(rows, next(iter(rules_of(rows)), "")):
        curves = read_curves([run_dir])
        figures += [_draw(lambda plot, axis=axis: plot_curves(plot, curves, axis), legend=True) for axis in RUN_AXES]
    return f"<div class=figures>{''.join(figures)}</div>"


def _plot_loss(plot: Any, rows: list[dict[str, Any]]) -> None:
    for key, label, style in (
        ("train/loss", "training", {"color": COLORS[0], "linewidth": 1.2}),
        ("validation/loss", "validation", {"color": COLORS[1], "marker": "o", "markersize": 3.5, "linewidth": 1.6}),
    ):
        shown = [row for row in rows if can_be_drawn(row["step"]) and can_be_drawn(row.get(key)) and row[key] > 0]
        found = [(row["step"], row[key]) for row in shown]
        found = list(_thinned(found, MAX_POINTS))
        plot.plot([x for x, _ in found], [y for _, y in found], label=label, **style)
    plot.set(xlabel=AXES["step"], ylabel="loss", yscale="log")
    plot.legend(frameon=False, fontsize="small")
    set_grid(plot, integers=True)


def _thinned(points: list[tuple[float, float]], n: int) -> Iterator[tuple[float, float]]:
    """At most about `n` points: the last step and the mean of each group of neighbours."""
    size = -(-len(points) // n) or 1
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield group[-1][0], sum(y for _, y in group) / len(group)


def _draw(plot_into: Any, *, legend: bool = False) -> str:
    """A small figure as an SVG element whose ink has the colour of the page's text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    options: dict[Any, Any] = dict.fromkeys(keys, INK) | {"svg.fonttype": "none", "font.family": "sans-serif"}
    with rc_context(options), io.StringIO() as file:
        figure = Figure(figsize=(5, 3.4))
        plot = figure.add_axes((0.18, 0.14, 0.77, 0.83))  # a computed layout takes twice as long
        plot_into(plot)
        if legend and len(plot.get_legend_handles_labels()[1]) > 1:
            plot.legend(frameon=False, fontsize="small", loc="best")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    # Without the names of groups, which are the same in each figure; the shapes that figures refer to have their own.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = svg.replace(INK, "currentColor").replace(COLORS[0].lower(), "var(--curve)")
    return re.sub(r'<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"', r'<svg role="img" \1', svg, count=1)


def _results(final: Final | None, data_warnings: Sequence[str]) -> Iterator[str]:
    """Tables of the last evaluation: by sampling rule, and by difficulty for the first rule."""
    if final is None:
        return
    evaluation, reference = final.evaluation, final.evaluation.reference
    yield "<h2>Final evaluation</h2>"
    for warning in data_warnings:
        yield f"<p class=bad>Warning: {text(warning)}</p>"
    if not evaluation.samplers:
        yield f"<p>Validation loss {evaluation.loss:.4f}; no questions were asked.</p>"
        return
    first = evaluation.samplers[0]
    yield f"<p>{first.n:,} questions of the test, validation loss {evaluation.loss:.4f}</p>"
    shown = [name.replace("_", " ") for name in (*first.details, *first.numbers)]
    titles = ["sampling rule", "accuracy", "95% interval", *shown, "passes"]
    yield table(
        titles,
        (
            [
                each.rule,
                percent(each.accuracy),
                f"{percent(each.accuracy_low)} to {percent(each.accuracy_high)}",
                *(percent(each.details.get(name)) for name in first.details),
                *(f"{each.numbers[name]:.4g}" if name in each.numbers else "-" for name in first.numbers),
                f"{each.nfe:.1f}",
            ]
            for each in evaluation.samplers
        ),
    )
    if reference:
        yield f"<p class=faint>For comparison, {text(reference.name)}: {percent(reference.accuracy)}.</p>"
    for measure in dict.fromkeys(group.by for group in first.groups):
        yield f"<h3>By {text(measure.replace('_', ' '))}</h3>"
        groups = [group for group in first.groups if group.by == measure]
        others = [reference.name] if reference and groups[0].reference is not None else []
        yield table(
            [f"{measure.replace('_', ' ')}, from", "questions", "accuracy", "95% interval", *others],
            (
                [
                    f"{group.value:g}",
                    f"{group.n:,}",
                    percent(group.accuracy),
                    f"{percent(group.accuracy_low)} to {percent(group.accuracy_high)}",
                    *([percent(group.reference)] if others else []),
                ]
                for group in groups
            ),
        )


def percent(share: float | None) -> str:
    """A share as a percentage; - if it is unknown."""
    return "-" if share is None else f"{100 * share:.1f}%"


def _traces(run_dir: Path) -> Iterator[str]:
    """How the first answers of the samples came about."""
    traces = read_traces(run_dir / TRACES_FILE)
    if traces:
        yield "<h2>How answers came about</h2>"
        yield "<p class=faint>Play, or press the arrow keys. Point at a position to see what was likely there.</p>"
    for number, trace in enumerate(traces):
        title = text(shorten(trace.verdict.reason or trace.verdict.answer, MAX_TITLE))
        is_open = "" if number else " open"
        yield f"<details class=trace{is_open}><summary>{title}</summary>{html_fragment(trace)}</details>"


def _samples(run_dir: Path, final: Final | None, *, on_boards: bool) -> Iterator[str]:
    """Some answers of the last evaluation by its first rule, wrong ones first."""
    steps = samples_files(run_dir)
    if not steps:
        return
    step = max(steps)
    samples = read_samples(run_dir, step)
    if not samples:
        return

    def rule_of(facts: dict[str, Any]) -> tuple[object, object]:
        return facts.get("confidence"), facts.get("tokens_per_step")

    rule, known = rule_of(samples[0]), final.evaluation.samplers if final else []
    # Samples do not name the options of their rule, the last evaluation does.
    names = (each.rule for each in known if (each.confidence, each.tokens_per_step) == rule)
    name = next(names, rule_in_words(*rule, {}))
    samples = [each for each in samples if rule_of(each) == rule]
    wrong, right = ([each for each in samples if bool(each.get("right")) is is_right] for is_right in (False, True))
    shown = (wrong[: max(MAX_SAMPLES // 2, MAX_SAMPLES - len(right))] + right)[:MAX_SAMPLES]
    yield (
        f"<h2>Samples</h2><p>{len(samples) - len(wrong)} of the first {len(samples)} answers at update {step:,} are "
        f"right ({text(name)}); {'wrong ones first' if wrong else 'the first ones'}.</p>"
    )
    yield f"<div class=samples>{''.join(_sample(each, on_boards) for each in shown)}</div>"


def _sample(sample: dict[str, Any], on_boards: bool) -> str:
    """One answer: its board if it has one, else its texts by name."""
    right = bool(sample.get("right"))
    verdict = str(sample.get("verdict") or ("right" if right else "wrong"))
    parts = [f"<p class={'good' if right else 'bad'}>{text(verdict)}</p>"]
    puzzle, answer = sample.get("puzzle"), sample.get("answer")
    if on_boards and isinstance(puzzle, str) and isinstance(answer, str) and len(puzzle) == len(answer) in BOARD_SIZES:
        parts.append(_board(puzzle, answer))
    else:
        rows = []
        hidden = ("verdict", "confidence", "tokens_per_step", "row", "right")
        for key, value in sample.items():
            if key not in hidden:
                shown = text(shorten(str(value), MAX_TEXT))
                shown = f"<pre>{shown}</pre>" if "\n" in str(value) else shown
                rows.append(f"<dt>{text(key)}</dt><dd>{shown}</dd>")
        parts.append(f"<dl>{''.join(rows)}</dl>")
    return f"<article>{''.join(parts)}</article>"


def _board(puzzle: str, answer: str) -> str:
    """A filled board as a table: clues shaded, cells with no digit, a repeated one or a changed clue outlined."""
    size = BOARD_SIZES[len(puzzle)]
    box_rows, box_columns = BOX_SHAPE[size]
    digits = np.array(["123456789"[:size].find(digit) + 1 for digit in answer])  # 0: no digit
    bad = {cell for _, _, cells in find_repeats(digits, size) for cell in cells}
    bad |= {cell for cell, clue in enumerate(puzzle) if clue not in (".", answer[cell]) or not digits[cell]}
    lines = []
    for row in range(size):
        cells = []
        for column in range(size):
            cell = row * size + column
            classes = [
                *(["clue"] if puzzle[cell] != "." else []),
                *(["bad"] if cell in bad else []),
                *(["right"] if (column + 1) % box_columns == 0 and column + 1 < size else []),
            ]
            cells.append(f'<td class="{" ".join(classes)}">{text(answer[cell])}</td>')
        below = " class=below" if (row + 1) % box_rows == 0 and row + 1 < size else ""
        lines.append(f"<tr{below}>{''.join(cells)}</tr>")
    return f"<table class=board>{''.join(lines)}</table>"


def _settings(raw: dict[str, Any]) -> str:
    """Settings with another value than the default; all of them if the file is of another version."""
    try:
        config = parse_config(raw, "config.yaml")
    except ValueError:
        return f"<pre>{text(json.dumps(raw, indent=1, default=str))}</pre>"
    rows = []
    for section in Config.model_fields:
        settings = getattr(config, section)
        for key, field in type(settings).model_fields.items():
            if field.is_required() or not settings.is_default(key):
                value = json.dumps(settings.model_dump(mode="json")[key])
                default = "" if field.is_required() else json.dumps(field.default)
                rows.append((f"{section}.{key}", value, default))
    return table(("setting", "value", "default"), rows, n_left=3)


def _outcome(session: dict[str, Any], *, is_newest: bool) -> str:
    """Why a session ended. One that another has followed, and that has not said why, was killed."""
    state = str(session.get("state", ""))
    return str(session.get("reason") or ("killed" if state == "running" and not is_newest else state))


def _history(sessions: list[dict[str, Any]]) -> Iterator[str]:
    """Commit, machine and time of each session."""
    if not sessions:
        return
    last = sessions[-1]
    commit = str(last.get("commit") or "unknown")
    yield "<h2>Environment</h2>"
    yield f"<p>Commit <code>{text(commit)}</code>{', with changes' if last.get('modified') else ''}</p>"
    yield f"<pre>{text(last.get('command', ''))}</pre>"
    facts = (last.get("hardware") or {}) | (last.get("packages") or {})
    yield table(("", ""), facts.items(), n_left=2)
    phases = list(dict.fromkeys(name for session in sessions for name in session.get("seconds", {})))
    yield "<h3>Sessions</h3>"
    yield table(
        ("started (UTC)", "ended because", "updates", *phases),
        (
            (
                str(session.get("started", ""))[:19].replace("T", " "),
                _outcome(session, is_newest=session is last),
                f"{session.get('from_step', 0):,} to {session.get('to_step', 0):,}",
                *(duration(session.get("seconds", {}).get(name, 0)) for name in phases),
            )
            for session in sessions
        ),
        n_left=2,
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Write the page of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help=f"file to write; by default {PAGE_FILE} in the run directory")
    options = parser.parse_args(arguments)
    with ends_with_message():
        if options.out or options.run_dir.is_dir():
            check_out(options.out or options.run_dir / PAGE_FILE, "--out")
        print(f"wrote {write_page(options.run_dir, options.out)}")


if __name__ == "__main__":
    main()
