"""Text of unknown origin made safe to print, and short enough."""

from __future__ import annotations


def escape(text: str, keep: str = "") -> str:
    """The text with escapes, such as `\\x1b`, for unprintable characters, such as terminal control codes.

    Args:
        keep: unprintable characters to leave as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, its middle left out."""
    if len(text) <= limit:
        return text
    n_start = (limit - 3) // 2
    return f"{text[:n_start]}...{text[len(text) - (limit - 3 - n_start) :]}"
