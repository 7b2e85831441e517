"""How the launcher finds the processes that get its signals; test_faults.py runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import launch


@pytest.mark.parametrize("with_proc", [True, False], ids=["Linux", "macOS"])
def test_children_are_found_and_get_the_signal(with_proc, monkeypatch):
    if not with_proc:
        monkeypatch.setattr(launch, "Path", lambda _: Path("nowhere"))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as child:
        assert child.pid in launch._processes()
        monkeypatch.setattr(launch, "_processes", lambda: [child.pid])  # pytest may have others
        launch._forward(signal.SIGTERM, None)
        assert child.wait(60) == -signal.SIGTERM
    monkeypatch.setattr(launch, "_forwarded", 0)


def test_a_child_that_has_just_ended_is_passed_over(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    monkeypatch.setattr(launch, "_processes", lambda: [child.pid])
    launch._forward(signal.SIGTERM, None)
    monkeypatch.setattr(launch, "_forwarded", 0)
