"""The number of cores, by which work is divided."""

from __future__ import annotations

import os


def count_own_cores() -> int:
    """Number of cores for this process if several of its kind share the machine (LOCAL_WORLD_SIZE); at least 1.

    SLURM gives each process its own cores, torchrun all of them to all.
    """
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(count_cores(), (os.cpu_count() or 1) // n_processes))


def count_cores() -> int:
    """Number of cores that this process may use; of the machine where the system does not tell, as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
