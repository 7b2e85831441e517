"""Signals that end a run early: save after the step in hand, then leave with nothing lost.

SLURM warns a job before its time limit (SIGUSR1, see job.sh) and before it takes the nodes away (SIGTERM); a user
presses Ctrl-C (SIGINT). Each asks for a stop, which the training loop grants at its next step; a Ctrl-C after that ends
the process at once. Nothing here imports torch, so that a program can begin to listen before it does anything slow.

Handlers, not a signal mask: programs started from here would inherit a mask, and then could not be ended themselves.
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

_owner = 0  # the process that listens; one forked from it inherits the handlers, but they are not meant for it
_received = 0  # number of the last signal that asks for a stop; 0 while there is none


def listen() -> None:
    """Note SIGUSR1 and SIGTERM from now on, instead of dying of them. Call this before the slow imports.

    Until the training loop runs, Ctrl-C keeps its usual meaning: there is nothing to save.
    """
    global _owner
    if _owner != os.getpid():
        # Python drops handlers when it shuts down, and a signal sent again must not fail a run that is saved.
        for number in EARLY_SIGNALS:
            atexit.register(signal.signal, number, signal.SIG_IGN)
    _owner = os.getpid()
    for number in EARLY_SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # libraries that wait on a socket are not disturbed


def _note(number: int, _: FrameType | None) -> None:
    """Take down a signal. In a forked process, and for one Ctrl-C too many, do what it does by default: die."""
    global _received
    if os.getpid() != _owner or (number == signal.SIGINT and _received):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received = number


class StopVote:
    """Whether to stop, asked once a step by every rank, with the same answer at the same step on all of them.

    One process answers at once. Several exchange what they received about every tenth of a second, which is every step
    where steps are long: on the CPU (gloo), so that the GPU's stream is left alone, and in the background, to be read
    when the next exchange is due and this one has long arrived. So the question costs next to nothing, no rank waits
    for one that is less than a step behind, and a signal is answered within two steps or 0.2 s, whichever is longer.
    How many steps lie between two exchanges is part of what is exchanged, so that all ranks agree on it as well.

    Within `with`, Ctrl-C asks for a stop as well.
    """

    def __init__(self, world: World) -> None:
        """All ranks create theirs at the same point."""
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None  # the exchange under way and the tensor that it fills
        self._interval, self._n_asked, self._since = 1, 0, time.monotonic()  # steps between exchanges; since the last
        self._before: dict[signal.Signals, Any] = {}
        if world.n_ranks > 1:
            import torch.distributed as dist

            from runtime.distributed import COLLECTIVE_TIMEOUT

            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def __enter__(self) -> StopVote:
        self._before = {number: signal.getsignal(number) for number in (*EARLY_SIGNALS, signal.SIGINT)}
        listen()  # a second time, unless the program that called the loop does not
        signal.signal(signal.SIGINT, _note)
        return self

    def __exit__(self, error: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        global _received
        if error is None and self._pending is not None:
            self._pending[0].wait()  # so that no exchange is cut off; after an error a peer may be gone
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _received = 0  # answered

    def stop(self) -> signal.Signals | None:
        """The signal to stop for, None to go on. Every rank calls this once a step."""
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
