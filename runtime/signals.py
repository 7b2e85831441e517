"""Signals that stop a run early: the training loop finishes its step, saves a checkpoint and exits.

SLURM sends SIGUSR1 before the time limit (see job.sh) and SIGTERM before it preempts or cancels a job; Ctrl-C sends
SIGINT. Each requests a stop at the next step; a Ctrl-C after that kills the process. This module imports torch only
where it is needed, so that a program can install the handlers before its slow imports.

Handlers are used, not a signal mask: child processes would inherit a mask and could not be terminated.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.distributed import World

EARLY_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXCHANGE_EVERY_S = 0.1

_owner = 0  # process that installed the handlers; forked processes inherit them but must not use them
_received = 0  # number of the last signal that requested a stop; 0: none


def listen() -> None:
    """Install handlers that record SIGUSR1 and SIGTERM. Call this before the slow imports.

    Ctrl-C keeps its default until the training loop runs: there is nothing to save.
    """
    global _owner
    if _owner != os.getpid():
        # Python removes handlers at shutdown; a repeated signal must not kill a process that has saved its run.
        for number in EARLY_SIGNALS:
            atexit.register(signal.signal, number, signal.SIG_IGN)
    _owner = os.getpid()
    for number in EARLY_SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # restart system calls of libraries that wait on a socket


def _note(number: int, _: FrameType | None) -> None:
    """Record a signal. In a forked process, and at Ctrl-C after another signal, kill the process."""
    global _received
    if os.getpid() != _owner or (number == signal.SIGINT and _received):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received = number


class StopVote:
    """Whether to stop, asked once per step by every rank; all ranks get the same answer at the same step.

    Ranks exchange the signals they received about every 0.1 s, or every step if steps take longer. The exchange is an
    asynchronous all-reduce on the CPU (gloo), so it does not touch the GPU's stream; its result is read when the next
    exchange is due. A signal is answered within two steps or 0.2 s, whichever is longer. The number of steps between
    exchanges is part of the exchange, so it is equal on all ranks.

    Inside `with`, Ctrl-C requests a stop too.
    """

    def __init__(self, world: World) -> None:
        """Every rank calls this at the same point."""
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None  # the running exchange and its result
        self._interval, self._n_asked, self._since = (
            1,
            0,
            time.monotonic(),
        )  # steps between exchanges; steps since the last
        self._before: dict[signal.Signals, Any] = {}
        if world.n_ranks > 1:
            import torch.distributed as dist

            from runtime.distributed import COLLECTIVE_TIMEOUT

            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def __enter__(self) -> StopVote:
        self._before = {number: signal.getsignal(number) for number in (*EARLY_SIGNALS, signal.SIGINT)}
        listen()  # no-op if the program has called it already
        signal.signal(signal.SIGINT, _note)
        return self

    def __exit__(self, error: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        global _received
        if error is None and self._pending is not None:
            self._pending[0].wait()  # finish the exchange; after an error a peer may be gone
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _received = 0  # answered

    def stop(self) -> signal.Signals | None:
        """The signal to stop for, or None. Every rank calls this once per step."""
        if self._group is None:
            return signal.Signals(_received) if _received else None
        self._n_asked += 1
        if self._n_asked < self._interval:
            return None
        import torch
        import torch.distributed as dist

        if self._pending is not None:
            exchange, highest = self._pending
            exchange.wait()
            self._pending = None
            number, self._interval = highest.tolist()
            if number:
                return signal.Signals(number)
        now = time.monotonic()
        in_time = int(self._n_asked * EXCHANGE_EVERY_S / max(now - self._since, 1e-6))
        own = torch.tensor([_received, max(1, min(in_time, 2 * self._interval))])  # int64 [2] on the CPU
        self._pending = dist.all_reduce(own, dist.ReduceOp.MAX, self._group, async_op=True), own
        self._n_asked, self._since = 0, now
        return None
