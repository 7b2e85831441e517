"""Commands that the user can type."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from runtime.history import ROOT


def shell_command(script: str, *arguments: str | Path) -> str:
    """A command line that runs this interpreter; works as typed in the current directory.

    Args:
        script: a file of the repository, by its path there, or an option of the interpreter.
    """
    file = ROOT / script
    return shlex.join([_interpreter(), _from_here(file) if file.is_file() else script, *map(str, arguments)])


def _interpreter() -> str:
    """`python` if the shell finds this interpreter by that name, else its path."""
    found, own = shutil.which("python"), sys.executable
    # Not by resolved paths alone: the interpreter of a virtual environment is a link to the one that made it.
    if found and os.path.dirname(found) == os.path.dirname(own) and os.path.realpath(found) == os.path.realpath(own):
        return "python"
    return _from_here(own)


def _from_here(path: str | Path) -> str:
    """A path relative to the current directory if it is below it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
