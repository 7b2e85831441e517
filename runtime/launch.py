"""Start the processes of a run on this machine: torchrun, except for how it ends.

    python -m runtime.launch --nproc-per-node=8 train.py --config yaml_files/sudoku_puma.yaml

The options are torchrun's. torchrun answers a signal with a traceback and status 1, even where every process has saved
and ended well, and adds a traceback to the message of a process that fails. Here a signal is passed on to the
processes, and the exit status is theirs.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from base.commands import INTERRUPTED, fail
from runtime.signals import EARLY_SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_forwarded = 0  # number of the last signal that was passed on; 0: none


def _processes() -> list[int]:
    """Process ids of this process's children."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    if listed.exists():
        text = listed.read_text(encoding="ascii")
    else:  # macOS
        text = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in text.split()]


def _forward(number: int, _: FrameType | None) -> None:
    """Pass a signal on to the processes; before there are any, end."""
    global _forwarded
    _forwarded = number
    pids = _processes()
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
    if not pids:
        os._exit(_status_of(number))


def _status_of(number: int) -> int:
    """The exit status of a run that stopped on request; only Ctrl-C ends a calling script too."""
    return INTERRUPTED if number == signal.SIGINT else 0


def _first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how.

    Times are whole seconds. Within one, a rank that was killed comes before those that failed because it was gone, and
    those that torchrun ended by SIGTERM come last.
    """

    def order(rank: int) -> tuple[int, bool, bool]:
        failure = failures[rank]
        by_torchrun = failure.exitcode == -signal.SIGTERM and _forwarded != signal.SIGTERM
        return failure.timestamp, by_torchrun, failure.exitcode >= 0

    first = min(failures, key=order)
    return first, failures[first]


def main() -> NoReturn:
    """Command line; the exit status is that of the first process that failed, 2 where none can be started, or 0."""
    numbers = (*EARLY_SIGNALS, signal.SIGINT)
    for number in numbers:
        signal.signal(number, _forward)

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # torchrun's own account of what the processes have said already
    options = parse_args(None)
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # torchrun would replace the handlers
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = _first_failure(error.failures)
        if _forwarded and failure.exitcode == -_forwarded:  # it was still starting
            sys.exit(_status_of(_forwarded))
        if failure.exitcode < 0:
            print(f"error: the process of rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
            sys.exit(128 - failure.exitcode)
        sys.exit(failure.exitcode)
    except (ValueError, OSError, DistError, RendezvousError) as error:
        fail(f"the processes cannot be started: {str(error).strip() or type(error).__name__}")
    sys.exit(0)


if __name__ == "__main__":
    main()
