"""One run at a time in a run directory: a second one would cut the records of the first and delete what it is saving.

The main process holds a POSIX record lock on the file `.lock`. The kernel drops it when the process ends, in whatever
way, so a kill leaves nothing behind and a requeued job is not refused; nor does a process forked from it hold the lock.
On NFS the server keeps the lock and drops it when the process ends; that of a node which died, when the node's lease is
over (NFSv4, some 90 s by default) or the node is up again (NFSv3). A file system without locks costs a warning.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path

_held: int | None = None  # descriptor of the locked file; closing it would end the lock


def lock_run(run_dir: Path) -> None:
    """Keep other processes from training in `run_dir` until this one ends or locks another.

    Raises:
        ValueError: another process trains there; the message says which.
        OSError: nothing can be written there.
    """
    global _held
    if _held is not None:
        os.close(_held)
        _held = None
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{run_dir} is in use by {holder}: wait for its end, or give another --run-dir") from None
        warnings.warn(
            f"{run_dir} cannot be locked ({error.strerror}): see to it that no other process trains there",
            RuntimeWarning,
            stacklevel=2,
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held = descriptor
