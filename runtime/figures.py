"""The style of all figures."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, distinguishable with colour blindness; line styles and markers distinguish them in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")


def set_grid(plot: Any) -> None:
    """A light grid, no frame at the top and right, and numbers with thousands separators."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.xaxis.set_major_locator(MaxNLocator(5))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
