"""The number of cores, by which work is divided. Here, since all other folders may import it."""

from __future__ import annotations

import os


def count_cores() -> int:
    """Number of cores that this process may use; of the machine where the system does not tell, as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
