"""Commands that the user can type."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from runtime.command import shell_command


def test_the_command_runs_this_interpreter_with_its_arguments():
    code, text = "import sys; print(sys.prefix, sys.argv[1:])", 'it\'s $5 or "more"'
    printed = subprocess.run(shell_command("-c", code, text), shell=True, capture_output=True, text=True).stdout
    assert printed == f"{sys.prefix} {[text]}\n"


def test_an_interpreter_on_the_path_is_called_python(monkeypatch, tmp_path):
    (tmp_path / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert shell_command("train.py") == "python train.py"


def test_another_interpreter_is_called_by_its_path(monkeypatch, tmp_path):
    """As in a virtual environment that is not activated, although its interpreter is a link to the other one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert shutil.which("python") is not None
    monkeypatch.chdir(Path(sys.executable).parents[2])
    command, _ = shlex.split(shell_command("train.py"))
    assert command == str(Path(sys.executable).relative_to(Path.cwd()))


def test_a_file_of_the_repository_is_found_from_any_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert shlex.split(shell_command("train.py", "train.py"))[1:] == ["train.py", "train.py"]
    monkeypatch.chdir(tmp_path)
    assert shlex.split(shell_command("train.py", "a"))[1:] == [str(ROOT / "train.py"), "a"]
