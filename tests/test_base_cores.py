"""By how many cores the processes of a machine divide their work."""

from __future__ import annotations

import os

import pytest

from base import cores


@pytest.mark.parametrize(
    ("n_own", "n_processes", "expected"),
    [
        (64, "1", 64),
        (64, "8", 8),  # torchrun: all cores for all
        (8, "8", 8),  # SLURM: each has its own
        (64, "100", 1),
    ],
)
def test_processes_share_the_cores_unless_they_have_their_own(n_own, n_processes, expected, monkeypatch):
    monkeypatch.setattr(cores, "count_cores", lambda: n_own)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", n_processes)
    assert cores.count_own_cores() == expected
