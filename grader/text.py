"""Text of unknown origin made safe to print."""

from __future__ import annotations


def escape(text: str, keep: str = "") -> str:
    """The text with escapes, such as `\\x1b`, for unprintable characters, such as terminal control codes.

    Args:
        keep: unprintable characters to leave as they are.
    """
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )
