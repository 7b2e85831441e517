"""The lock of a run directory, held by another process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_ranks

from runtime import lock
from runtime.distributed import World
from runtime.lock import check_shared, is_locked, lock_run

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


# Several nodes

OTHER_NODE = World(1, 2, torch.device("cpu"))


def test_what_the_main_process_writes_may_arrive_late(tmp_path):
    """On a network file system another node sees a new folder after a while."""
    run_dir = tmp_path / "run"

    def arrive() -> None:
        run_dir.mkdir()
        (run_dir / ".lock").write_text("process 1 on a\n")

    threading.Timer(2 * lock.LOOK_S, arrive).start()
    check_shared(run_dir, "process 1 on a", OTHER_NODE)


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "the folder of an earlier start"])
def test_a_folder_of_another_node_is_refused_with_its_place(there, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SHARED_S", 0.1)
    run_dir = tmp_path / "run"
    if there != "nothing":
        run_dir.mkdir()
    if "earlier" in there:
        (run_dir / ".lock").write_text("process 1 on a since 2026-01-01\n")
    with pytest.raises(ValueError, match="do not share the run directory") as caught:
        check_shared(run_dir, "process 1 on a since 2026-01-02", OTHER_NODE)
    assert f"{run_dir} on {os.uname().nodename}" in str(caught.value)


def test_a_run_whose_processes_have_folders_of_their_own_ends_before_any_step(config_file, tmp_path):
    code = f"""
import os, sys, train, runtime.lock
runtime.lock.SHARED_S = 1.0
train.main(["--config", sys.argv[1], "--run-dir", {str(tmp_path)!r} + "/node" + os.environ["RANK"]])
"""
    result = run_ranks(2, "-c", code, config_file())
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert f"{tmp_path}/node1 on " in result.stderr
    assert not (tmp_path / "node0" / "checkpoints").exists()
