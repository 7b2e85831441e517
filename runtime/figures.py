"""The style of all figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from base.files import replacing
from base.text import escape, shorten

# Okabe and Ito's colours, distinguishable with colour blindness; line styles and markers distinguish them in print.
# The last is ours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B4513")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LABEL = 60  # characters


def plain_label(name: str, limit: int = MAX_LABEL) -> str:
    """A name as text of a figure: at most `limit` characters, none of them control characters, and no formula."""
    return shorten(escape(name), limit).replace("$", r"\$")  # `$` would begin a formula


def save_figure(figure: Any, out: Path, dpi: int, **options: Any) -> None:
    """Replace a picture by a figure, in the format of its suffix. Raises WriteError, and the old picture is intact."""
    with replacing(out) as scratch:
        figure.savefig(scratch, dpi=dpi, format=out.suffix[1:].lower(), **options)


def set_grid(plot: Any, *, integers: bool = False) -> None:
    """A light grid, no frame at the top and right, and numbers with thousands separators.

    Args:
        integers: ticks of the x-axis at integers only.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=integers, min_n_ticks=1))
    plot.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def set_log_axis(plot: Any) -> None:
    """A logarithmic x-axis with plain numbers at 1, 2 and 5 times the powers of ten; over two decades, at fewer."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    plot.set_xscale("log")
    low, high = plot.get_xlim()
    plot.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high <= 100 * low else (1.0, 3.0)))
    plot.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    plot.xaxis.set_minor_formatter(NullFormatter())
