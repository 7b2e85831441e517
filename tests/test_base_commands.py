"""How commands read their arguments and end: messages, exit status."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT, run_python

from base.commands import MAX_LINES, CommandParser, ends_with_message, whole_number
from base.reading import MAX_MESSAGE, reading


@pytest.mark.parametrize("error", [TypeError("bug"), AssertionError("bug"), KeyError("bug")])
def test_a_bug_outside_of_the_guard_is_a_traceback(error):
    with pytest.raises(type(error)), ends_with_message():
        raise error


def test_ctrl_c_ends_a_command_with_one_line_and_the_status_of_shells(capsys):
    with pytest.raises(SystemExit) as stop, ends_with_message():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


PRINTS = "from base.commands import ends_with_message\nwith ends_with_message():\n    print('done')"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("output", "reason"), [("full", "No space left on device"), ("pipe", "Broken pipe")])
def test_output_that_cannot_be_written_ends_with_one_message(output, reason, unbuffered):
    """Whether the line is written when it is printed or from the buffer."""
    if output == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, descriptor = os.pipe()
        os.close(read_end)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", PRINTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=descriptor, stderr=subprocess.PIPE, text=True)
    os.close(descriptor)
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno ")
    assert done.stderr.endswith(f"] {reason}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("", False), ("0", False)])
def test_a_variable_shows_the_traceback(value, expected, monkeypatch, capsys):
    monkeypatch.setenv("PUMA_TRACEBACK", value)
    with pytest.raises(SystemExit) as end, ends_with_message(), reading("file", "copy it again"):
        json.loads("{")
    written = capsys.readouterr().err
    assert end.value.code == 2
    assert ("JSONDecodeError" in written and "Traceback" in written) == expected
    assert written.splitlines()[-1].startswith("error: file cannot be read (it is not JSON: Expecting property name")


def test_the_variable_works_for_a_program(tmp_path):
    (tmp_path / "bad.yaml").write_text("{")
    arguments = ("train.py", "--config", tmp_path / "bad.yaml")
    quiet, loud = run_python(*arguments), run_python(*arguments, PUMA_TRACEBACK="1")
    assert quiet.returncode == loud.returncode == 2
    assert len(quiet.stderr.splitlines()) == 1
    assert "compose_node" in loud.stderr
    assert loud.stderr.endswith(quiet.stderr)


def test_a_list_of_problems_is_bounded(capsys):
    with pytest.raises(SystemExit), ends_with_message():
        raise ValueError("\n".join("y" * 1000 for _ in range(1000)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_LINES
    assert max(map(len, lines)) <= MAX_MESSAGE + len("error: ")
    assert lines[-1] == f"  and {1000 - MAX_LINES + 1} more lines"


def test_arguments_are_bounded(capsys):
    parser = CommandParser()
    parser.add_argument("--count", type=whole_number(1, 10))
    assert parser.parse_args(["--count", "10"]).count == 10
    with pytest.raises(SystemExit):
        parser.parse_args(["--coun", "10"])  # which a script that reads its options would not know
    capsys.readouterr()
    for wrong in ("0", "11", "-3", "9" * 5000, "1e3", "٣", "", "--\x1b[31m"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"--count={wrong}"])
        assert end.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "must be an integer from 1 to 10" in message
        assert message.isprintable()
        assert len(message) < 300
    with pytest.raises(SystemExit):
        parser.parse_args(["--" + "z\x1b" * 5000])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.isprintable()
    assert len(message) <= MAX_MESSAGE + 50
    with pytest.raises(argparse.ArgumentTypeError):
        whole_number(-5)("-6")
    assert whole_number(-5)("-5") == -5


def test_arguments_that_may_be_left_out_are_not_listed_as_required(capsys):
    parser = CommandParser()
    parser.add_argument("command")
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(SystemExit):
        parser.parse_intermixed_args([])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: command\n")
    assert parser.parse_intermixed_args(["a"]).overrides == []
    assert parser.parse_intermixed_args(["a", "b"]).overrides == ["b"]


def test_a_warning_of_a_command_is_one_line_without_the_code_that_gives_it(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    CommandParser()
    assert warnings.formatwarning("a\x1b", RuntimeWarning, "file.py", 3) == "warning: a\\x1b\n"


def no_word() -> None:
    raise ValueError("no word")


@pytest.mark.parametrize(("work", "is_told"), [(lambda: int("x"), True), (no_word, False)])
def test_a_message_that_no_statement_has_raised_says_how_to_see_where(work, is_told, capsys):
    with pytest.raises(SystemExit), ends_with_message():
        work()
    assert ("PUMA_TRACEBACK=1 in the environment shows where" in capsys.readouterr().err) == is_told
