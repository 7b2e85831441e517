"""The run directory belongs to one run, and all its processes share it.

A second run would truncate the records of the first and delete its unfinished saves. So the main process locks it.

It holds a POSIX record lock on the file `.lock`. The kernel releases it when the process ends for any reason, so a
killed run leaves no stale lock and a requeued job can start. Forked processes do not hold the lock.

On NFS the server keeps the lock. If a node crashes, the server releases its locks when the node's lease expires (NFSv4,
90 s by default) or when the node has rebooted (NFSv3). A file system without locks gives a warning.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
import warnings
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from base.files import HELD
from runtime.distributed import World, gather

LOOK_S = 0.5  # longer than `is_locked` holds a lock
REQUEUED_S = 180.0  # a job that SLURM has started again waits for the server to give up the lock of a crashed node
# A client of NFS that has looked for a file in vain may not look again for 60 s (its option acdirmax).
SHARED_S = 90.0

_held: int | None = None  # descriptor of the locked file; closing it releases the lock


def lock_run(run_dir: Path) -> str:
    """Lock `run_dir` until this process ends or locks another directory.

    Returns:
        Which process holds the lock since when, as it is written to the locked file: no other run writes the same.

    Raises:
        ValueError: another process holds the lock and keeps it; the message names it.
        OSError: the directory is not writable.
    """
    global _held
    if _held is not None:
        os.close(_held)
        _held = None
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    try:
        _lock(descriptor, REQUEUED_S if requeued else LOOK_S)
    except OSError as error:
        if error.errno in HELD:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{run_dir} is in use by {holder}: wait until it ends, or give another --run-dir"
            ) from None
        warnings.warn(
            f"{run_dir} cannot be locked ({error.strerror}): make sure that no other process trains there",
            RuntimeWarning,
            stacklevel=2,
        )
    holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{holder}\n".encode())
    os.fsync(descriptor)  # on NFS other nodes do not see it before, since the file stays open
    _held = descriptor
    return holder


def _lock(descriptor: int, seconds: float) -> None:
    """Lock a file, waiting up to `seconds` for another process that holds the lock; OSError if it cannot be locked."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in HELD or time.monotonic() > until:
                raise
        time.sleep(LOOK_S / 5)


def check_shared(run_dir: Path, holder: str, world: World) -> None:
    """Check that every process sees the file that the main one has locked; every rank calls this.

    All write their parts of a checkpoint into one folder, which the main process makes.

    Args:
        holder: as `lock_run` returned it on the main process.

    Raises:
        ValueError: some see another folder, or none; all ranks raise.
    """
    # Not the main process: closing the file would release its lock.
    is_seen = world.is_main or _is_seen(run_dir / ".lock", holder)
    places = gather((is_seen, f"{run_dir.absolute()} on {socket.gethostname()}"))
    others = sorted({place for is_seen, place in places if not is_seen})
    if others:
        listed = [f"  {places[0][1]} (the main process)", *(f"  {place}" for place in others)]
        raise ValueError(
            "the processes do not share the run directory: give a --run-dir on a file system that all nodes share\n"
            + "\n".join(listed)
        )


def _is_seen(path: Path, holder: str) -> bool:
    """Whether the locked file has the line of its holder, after a while at the latest."""
    until = time.monotonic() + SHARED_S
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8", errors="replace").strip() == holder:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_S / 5)


def is_locked(run_dir: Path) -> bool:
    """Whether another process holds the lock of `run_dir`, so that a run is in progress there.

    Not for the process that holds it: closing the file here would release its lock.
    """
    path = run_dir / ".lock"
    if not path.exists():
        return False
    try:
        with open(path, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once, with the file
    except OSError as error:
        return error.errno in HELD
    return False
