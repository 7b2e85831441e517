"""Tables of pages and reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Collection[int] = (0,)
) -> list[str]:
    """Lines of a Markdown table; its columns are numbers, aligned to the right, except `text_columns`."""
    marks = ["---" if number in text_columns else "---:" for number in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, marks, *rows)]
