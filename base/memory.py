"""How much memory is left: what needs more is refused before it is allocated."""

from __future__ import annotations

import os
from pathlib import Path


class TooLittleMemory(ValueError):
    """Something needs more memory than this machine has left."""


def check_memory(n_bytes: int, what: str) -> None:
    """Raise TooLittleMemory if `what` needs more memory than this machine has left."""
    if n_bytes > (free := free_memory()):
        raise TooLittleMemory(
            f"{what}: needs {n_bytes / 2**30:,.1f} GiB of memory, but {free / 2**30:,.1f} GiB are free"
        )


def free_memory() -> int:
    """Bytes of memory that programs can still get: of the machine, or of this process's control groups if less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    machine, membership = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if machine.exists() and (kib := _read_counts(machine).get("MemAvailable:")) is not None:
        limits.append(1024 * kib)
    if membership.exists():
        lines = membership.read_text(encoding="utf-8").splitlines()
        for group in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
            limits += free_in_groups(Path("/sys/fs/cgroup") / group)
    return min(limits)


def free_in_groups(folder: Path) -> list[int]:
    """Bytes of memory that the control group (version 2) of a folder and its parents have left, if they have a limit.

    A job of SLURM has its limit in a parent. Page cache does not count as used: the kernel frees it.
    """
    free = []
    for group in (folder, *folder.parents):
        path = group / "memory.max"
        if path.exists() and (limit := path.read_text(encoding="ascii").strip()).isdigit():
            stat = group / "memory.stat"  # missing where another kernel's interface is emulated
            free.append(int(limit) - (_read_counts(stat).get("anon", 0) if stat.exists() else 0))
    return free


def _read_counts(path: Path) -> dict[str, int]:
    """The numbers in a file of the kernel with lines such as `anon 4096`, by name."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {name: int(number) for name, number, *_ in map(str.split, lines)}
