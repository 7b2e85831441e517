"""Commands that the user can type."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def shell_command(*arguments: str | Path) -> str:
    """A command line that runs this interpreter with `arguments`; works as typed in the current directory."""
    return shlex.join([_interpreter(), *map(str, arguments)])


def _interpreter() -> str:
    """`python` if the shell finds this interpreter by that name, else its path."""
    found, own = shutil.which("python"), sys.executable
    # Not by resolved paths alone: the interpreter of a virtual environment is a link to the one that made it.
    if found and os.path.dirname(found) == os.path.dirname(own) and os.path.realpath(found) == os.path.realpath(own):
        return "python"
    relative = os.path.relpath(own)
    return own if relative.startswith(os.pardir) else relative
