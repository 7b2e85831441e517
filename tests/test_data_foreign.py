"""The guard around foreign input: messages, exit status, sizes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python

from data.foreign import (
    MAX_LINES,
    MAX_MESSAGE,
    BadInput,
    CommandParser,
    check_archive,
    check_file,
    check_memory,
    ends_with_message,
    escape,
    free_in_groups,
    free_memory,
    read_json,
    read_lines,
    reading,
    shorten,
    whole_number,
)


class PanicException(BaseException):
    """As libraries written in Rust raise."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no number"),
        TypeError("'int' object is not subscriptable"),
        KeyError("steps"),
        AssertionError(),
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        OSError(28, "No space left on device", "file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        zipfile.BadZipFile("\x1b[31m" * 1000),
        ValueError("a\nb\r\u202e\ud800\x9b" * 1000),
        PanicException("index out of bounds"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_becomes_one_line(error):
    with pytest.raises(BadInput) as caught, reading("file \x1b[2J" + "x" * 4000, "copy it again"):
        raise error
    message = str(caught.value)
    assert len(message) <= MAX_MESSAGE
    assert message.isprintable()
    assert message.startswith(r"file \x1b[2Jxxx")
    assert message.endswith(": copy it again")
    assert caught.value.__cause__ is error


def test_the_message_names_what_why_and_the_remedy():
    with pytest.raises(BadInput, match=r"^file a cannot be read \(it lacks 'steps'\): copy it again$"):  # noqa: SIM117
        with reading("file a", "copy it again"):
            {}["steps"]


def test_the_inner_of_two_messages_stays():
    with pytest.raises(BadInput, match=r"^line 3 cannot be read"), reading("file", ""), reading("line 3", ""):
        raise ValueError


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_is_no_bad_input(error):
    with pytest.raises(error), reading("file", "copy it again"):
        raise error


@pytest.mark.parametrize("error", [TypeError("bug"), AssertionError("bug"), KeyError("bug")])
def test_a_bug_outside_of_the_guard_is_a_traceback(error):
    with pytest.raises(type(error)), ends_with_message():
        raise error


def test_ctrl_c_ends_a_command_with_one_line_and_the_status_of_shells(capsys):
    with pytest.raises(SystemExit) as stop, ends_with_message():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


PRINTS = "from data.foreign import ends_with_message\nwith ends_with_message():\n    print('done')"


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


def test_what_does_not_print_is_escaped():
    assert escape("\x1b[31m\u202e\x9b\ud800\n\u2028 é ☃") == r"\x1b[31m\u202e\x9b\ud800\n\u2028 é ☃"


@pytest.mark.parametrize("length", range(20))
def test_short_text_keeps_both_ends(length):
    text = "abcdefghijklmnopqrst"[:length]
    short = shorten(text, 10)
    assert short == (text if length <= 10 else f"abc...{text[-4:]}")


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


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "device").symlink_to("/dev/zero")
    check_file(tmp_path / "file", 5)
    check_file(tmp_path / "link")
    with pytest.raises(ValueError, match="it has 5 bytes, at most 4 are read"):
        check_file(tmp_path / "file", 4)
    for name, reason in {"pipe": "not a regular", "device": "not a regular", ".": "a folder"}.items():
        with pytest.raises(ValueError, match=reason):
            check_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "missing")


def test_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("data.foreign.MAX_TEXT_BYTES", 10)
    path = tmp_path / "lines"
    path.write_bytes(b"012345678\n\n \n1\n2")
    assert list(read_lines(path)) == [(1, b"012345678\n"), (2, b"\n"), (3, b" \n"), (4, b"1\n"), (5, b"2")]
    path.write_bytes(b"1\n01234567890123")
    with pytest.raises(ValueError, match="line 2 has more than 10 bytes"):
        list(read_lines(path))


@pytest.mark.parametrize("content", ["[1]", "1", "null", "", "{", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\ud800"])
def test_json_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content, errors="surrogatepass")
    with pytest.raises(BadInput), reading("a.json", "copy it again"):
        read_json(tmp_path / "a.json")


def test_memory_is_bounded_by_the_machine():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= physical
    check_memory(1000, "a list")
    with pytest.raises(ValueError, match=r"a list: needs [\d,]+\.\d GiB of memory, but [\d,]+\.\d GiB are free"):
        check_memory(2 * physical, "a list")


def test_the_memory_of_a_job_is_what_its_control_groups_have_left(tmp_path):
    job = tmp_path / "slurm" / "job_7"
    step = job / "step_0" / "task_0"
    step.mkdir(parents=True)
    for group, limit, anon in (
        (tmp_path / "slurm", "1000", 100),
        (job, "500", 300),
        (job / "step_0", "max", 300),
        (step, "max", 10),
    ):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.stat").write_text(f"anon {anon}\nfile 10000\n")
    assert free_in_groups(step) == [200, 900]
    assert free_in_groups(tmp_path / "of another namespace") == []


def test_archives_hold_what_they_claim(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros(50 << 20, dtype=np.uint8))  # a thousandth of its size
    with pytest.raises(ValueError, match=r"it claims to hold 52,428,\d\d\d bytes in"):
        check_archive(path, 200)
    check_archive(path, 2000)
    np.savez(path, numbers=np.arange(1 << 20))
    check_archive(path, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(zipfile.BadZipFile):
        check_archive(path, 200)
    with pytest.raises(ValueError, match="folder"):
        check_archive(Path(tmp_path), 1)
