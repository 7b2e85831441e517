"""The style of all figures."""

from __future__ import annotations

from typing import Any

from data.foreign import escape, shorten

# Okabe and Ito's colours, distinguishable with colour blindness; line styles and markers distinguish them in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
MAX_LABEL = 60  # characters


def plain_label(name: str, limit: int = MAX_LABEL) -> str:
    """A name as text of a figure: at most `limit` characters, none of them control characters, and no formula."""
    return shorten(escape(name), limit).replace("$", r"\$")  # `$` would begin a formula


def set_grid(plot: Any, *, integers: bool = False) -> None:
    """A light grid, no frame at the top and right, and numbers with thousands separators.

    Args:
        integers: ticks of the x-axis at integers only.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=integers, min_n_ticks=1))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
