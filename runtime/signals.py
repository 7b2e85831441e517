"""Signals that stop a run early: the training loop finishes its step, saves a checkpoint and exits.

SLURM sends SIGUSR1 before the time limit (see job.sh) and SIGTERM before it preempts or cancels a job; Ctrl-C sends
SIGINT. Each requests a stop after the step, or, during an evaluation, after a forward pass of the sampler. A second
Ctrl-C only prints a message, a third kills the process. This module imports torch only where it is needed, so
that a program can install the handlers before its slow imports.

Handlers are used, not a signal mask: child processes would inherit a mask and could not be terminated.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.distributed import World

EARLY_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXCHANGE_EVERY_S = 0.1
HEARD_EVERY_S = 0.5  # between two looks at what other ranks have received, during an evaluation
STOP_KEY = "puma/stop"  # in the store of the process group

_owner = 0  # process that installed the handlers; forked processes inherit them but must not use them
_received = 0  # number of the last signal that requested a stop; 0: none
_n_interrupts = 0  # Ctrl-C since training began
_has_begun = False  # whether there has been a `StopVote`


class StopRequested(Exception):
    """A signal has requested a stop; raised in work that can be repeated, such as an evaluation."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def listen() -> None:
    """Install handlers that record SIGUSR1 and SIGTERM. Call this before the slow imports.

    Until the training loop runs there is nothing to save, and a signal ends the run only then: data files that are
    being written are completed, and no rank leaves the others waiting.
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


def quit_at_interrupt() -> None:
    """Make Ctrl-C end the process with one line and status 130, for the seconds that imports take.

    No exception is raised: an import that is interrupted by one shows a traceback, or hides the exception.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # programs that a shell runs in the background ignore it
        signal.signal(signal.SIGINT, _quit)


def raise_at_interrupt() -> None:
    """End what `quit_at_interrupt` began: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(number: int, _: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        _say("interrupted before the start")
    os._exit(128 + number)  # as shells have it


def _note(number: int, _: FrameType | None) -> None:
    """Record a signal. In a forked process, and at the third Ctrl-C, kill the process."""
    global _received, _n_interrupts
    _n_interrupts += number == signal.SIGINT
    if os.getpid() != _owner or (number == signal.SIGINT and _n_interrupts > 2):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if _n_interrupts == 2 and number == signal.SIGINT:
        _say("the run is being saved; Ctrl-C again ends it without")
    if not _has_begun and not _received and os.environ.get("RANK", "0") == "0":
        _say(f"{signal.Signals(number).name}: the run stops once its data and model are ready")
    _received = number


def _say(text: str) -> None:
    """Write a line to standard error, from a signal handler: `print` may be in use by what was interrupted."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


class StopVote:
    """Whether to stop, asked once per step by every rank; all ranks get the same answer at the same step.

    Ranks exchange the signals they received about every 0.1 s, or every step if steps take longer. The exchange is an
    asynchronous all-reduce on the CPU (gloo), so it does not touch the GPU's stream; its result is read when the next
    exchange is due. A signal is answered within two steps or 0.2 s, whichever is longer. The number of steps between
    exchanges is part of the exchange, so it is equal on all ranks.

    An evaluation asks before every forward pass of the sampler (`check`), of which ranks run different numbers, so
    there a rank that has received a signal leaves a note in the store of the process group, at which the others look
    every 0.5 s.

    Inside `with`, Ctrl-C requests a stop too.
    """

    def __init__(self, world: World) -> None:
        """Every rank calls this at the same point."""
        global _has_begun
        _has_begun = True
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None  # the running exchange and its result
        self._interval = 1  # steps between exchanges
        self._n_asked, self._since = 0, time.monotonic()  # steps since the last exchange, and its time
        self._before: dict[signal.Signals, Any] = {}
        self._looked = 0.0  # when this rank last looked at the store
        self._noted = False  # whether it left its note there
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
        global _received, _n_interrupts
        if error is None and self._pending is not None:
            self._pending[0].wait()  # finish the exchange; after an error a peer may be gone
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _received = _n_interrupts = 0  # answered

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

    def check(self) -> None:
        """Raise StopRequested if this or another rank has received a signal; a rank may call this at any time.

        Raises:
            StopRequested: to be caught by `interruptible`.
        """
        if _received:
            raise StopRequested(_received)
        now = time.monotonic()
        if self._group is not None and now - self._looked >= HEARD_EVERY_S:
            from runtime.distributed import store

            self._looked = now
            if store().check([STOP_KEY]):
                raise StopRequested(int(store().get(STOP_KEY)))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that ends at the first `check` after a signal; every rank enters and leaves at the same point.

        Raises:
            StopRequested: a rank has received a signal. All ranks raise it, with the same number.
        """
        try:
            yield
        except StopRequested:
            if self._group is not None and _received and not self._noted:
                from runtime.distributed import store

                store().set(STOP_KEY, str(_received))
                self._noted = True
        number = _received
        if self._group is not None:
            import torch
            import torch.distributed as dist

            highest = torch.tensor(number)
            dist.all_reduce(highest, dist.ReduceOp.MAX, self._group)
            number = int(highest)
        if number:
            raise StopRequested(number)
