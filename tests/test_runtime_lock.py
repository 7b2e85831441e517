"""The lock of a run directory, held by another process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from runtime import lock
from runtime.lock import is_locked, lock_run

HOLD = """
import sys
from pathlib import Path
from runtime.lock import lock_run
lock_run(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it gets a line."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_is_held_is_refused_with_the_name_of_its_holder(holder, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert is_locked(tmp_path)
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on "):
        lock_run(tmp_path)


def test_a_requeued_job_waits_for_the_lock_of_a_crashed_node(holder, tmp_path, monkeypatch):
    """Which the server of the file system keeps for a while."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(2 * lock.LOOK_S, holder.kill).start()
    lock_run(tmp_path)
    assert holder.wait(30) != 0, "the lock was held until then"


def test_a_requeued_job_does_not_wait_for_ever(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "REQUEUED_S", 0.3)
    with pytest.raises(ValueError, match="is in use by"):
        lock_run(tmp_path)


def test_a_look_at_a_free_lock_finds_it_free(tmp_path):
    assert not is_locked(tmp_path)
    (tmp_path / ".lock").touch()
    assert not is_locked(tmp_path)
