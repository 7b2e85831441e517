"""Text that is printed is printable, and short."""

from __future__ import annotations

import pytest

from base.text import escape, shorten


def test_what_does_not_print_is_escaped():
    assert escape("\x1b[31m\u202e\x9b\ud800\n\u2028 é ☃") == r"\x1b[31m\u202e\x9b\ud800\n\u2028 é ☃"


@pytest.mark.parametrize("length", range(20))
def test_short_text_keeps_both_ends(length):
    text = "abcdefghijklmnopqrst"[:length]
    short = shorten(text, 10)
    assert short == (text if length <= 10 else f"abc...{text[-4:]}")
