"""Run untrusted Python programs and return the values of their first functions.

Each program runs in its own process, forked from a small worker process (`grader/sandbox_worker.py`) that starts with a
clean interpreter and never sees a program: the child reads its program from a pipe of this process after the fork, and
writes its result to another. What a program must not do is held by

- the separation of processes: a child's memory contains its own program and some modules of the standard library,
  nothing of this process, and of other programs only what the worker knows (process id, CPU time, how it ended). Its
  environment is empty but for PYTHONHASHSEED and, if set here, LD_LIBRARY_PATH;
- its descriptors: standard input, the pipe of its program, at its end; an output pipe that fails after 64 KiB; and the
  pipe for its result;
- resource limits, soft equal to hard: CPU time (Linux kills the process, which no signal mask prevents), address
  space, file size (0), new descriptors (0) and new processes and threads (0);
- a wall time for programs that sleep or wait, measured by the worker;
- on Linux (x86-64, aarch64) a system call filter (seccomp) that allows only memory, clocks, sleep, and reading and
  writing of open descriptors: no file can be opened, changed or removed, no socket, process or thread created, no
  signal sent or handled, no limit changed, no process traced or read;
- if this process is root, the user nobody; if not, the worker's refusal to be traced (PR_SET_DUMPABLE).

The result is JSON, which only this process parses and checks: a finite float, an integer of at most 1,024 bits or a
string of at most 200 characters. No object of a program is unpickled, compared or converted here. Strings and messages
have escapes for unprintable characters.

This does not protect against:

- Bugs in the kernel, the CPU (timing side channels) or the interpreter that the allowed calls can reach. Use a virtual
  machine for programs of a hostile person; this sandbox is for programs written by a language model.
- A program that fakes its own result. It shares its process with the code that reports the result, so by walking the
  interpreter's frames it can report a value that its function did not return. This is no better than `return`: right
  answers never enter the sandbox, and each program has its own result pipe, so it cannot change the verdict of another.
  Bytes written to the pipe without the nonce, which is in the child's memory, make the result invalid.
- Machines without the filter (other systems or CPUs, kernels that refuse it; a warning is shown). The limits still
  apply: no new descriptor or process, so no file contents and no network. But calls that need neither are possible,
  such as removing a file, sending a signal to another process of the same user or, where the system allows it, reading
  the memory of one, this process included. As root in a container that cannot change its user, the number of processes
  is not limited either. If a program kills its worker, the worker is replaced and only this program fails.
- Load: `n_workers` programs at a time may use all of their CPU time, memory and wall time.

Works on Linux, as root or not, and needs no namespace, container or system setting. It should work on macOS, without
the filter, but is not tested there.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from typing import Any, Literal

from base.cores import count_own_cores
from base.text import escape
from grader.sandbox_worker import CHILD_STATUSES, HEADER, MAX_INT_BITS, MAX_RESULT, MAX_TEXT, MAX_WAITING

Status = Literal["ok", "syntax_error", "error", "timeout", "memory", "killed"]

MAX_PROGRAM = 16_000  # characters; at most 64 KB in UTF-8, which fits a pipe, so that sending a program does not block
MAX_WORKERS = 16
WORKERS_PER_CORE = 2  # on a loaded machine sending programs takes longer than running them
WORKER = Path(__file__).resolve().with_name("sandbox_worker.py")
# Time that a worker on a loaded machine needs to answer, after the end of a program.
GRACE_S = 20.0
# A child that was killed after this share of its CPU time has used it up: for the limit the kernel counts clock ticks,
# on a loaded machine up to a fifth more than the time that it reports.
CPU_SHARE = 0.5
START_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """Result of running a program.

    `status`: `ok` (its function returned), `syntax_error` (no part compiles and contains a function), `error` (an
    exception, including `sys.exit`), `timeout` (CPU or wall time), `memory`, or `killed` (it ended without a valid
    result).
    """

    status: Status
    # Finite float, int of at most 1,024 bits, or string of at most 200 characters (before unprintable ones were
    # replaced by escapes). Other floats are strings ("nan"); other types and larger integers are None.
    value: float | str | None = None
    message: str = ""  # details, with escapes for unprintable characters


NO_VALID_RESULT = Outcome("killed", message="no valid result")


def run_programs(
    programs: Sequence[str],
    *,
    n_workers: int | None = None,
    cpu_s: int = 2,
    wall_s: float = 5.0,
    memory_mib: int = 512,
    on_done: Callable[[], object] | None = None,
) -> list[Outcome]:
    """Run each program and call its first top-level function without arguments; outcomes in the same order.

    Last lines of a program are removed until it compiles, and top-level statements that call nothing are skipped. The
    module `math` is available without an import, and `__name__` is "__main__".

    Args:
        n_workers: programs run in parallel, at most 16; by default two per core of this process, see
            `base.cores.count_own_cores`.
        cpu_s, wall_s, memory_mib: limits of one program. On Linux, time in which a program was ready to run and waited
            for a core does not count as wall time, up to 20 times `wall_s` in all.
        on_done: called when a program has ended, once for each.

    Raises:
        ValueError: a limit is not positive.
        RuntimeError: the worker cannot start, or cannot start processes.
    """
    for name, limit in (("n_workers", n_workers), ("cpu_s", cpu_s), ("wall_s", wall_s), ("memory_mib", memory_mib)):
        if limit is not None and limit <= 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    report = on_done or (lambda: None)
    outcomes = [Outcome("syntax_error", message=f"more than {MAX_PROGRAM} characters")] * len(programs)
    waiting: deque[int] = deque()
    for i, program in enumerate(programs):
        if len(program) <= MAX_PROGRAM:
            waiting.append(i)
        else:
            report()
    n_workers = min(n_workers or WORKERS_PER_CORE * count_own_cores(), MAX_WORKERS, len(waiting))
    limits = (cpu_s, wall_s, memory_mib << 20)
    workers: list[_Worker] = []
    try:
        for _ in range(n_workers):
            workers.append(_Worker(limits))  # one by one: if a start fails, the others are stopped
        while True:
            for slot, worker in enumerate(workers):
                if worker.index is None and waiting:
                    if not worker.is_alive:
                        workers[slot] = _Worker(limits)
                    index = waiting.popleft()
                    workers[slot].send(index, programs[index])
            busy = [worker for worker in workers if worker.index is not None]
            if not busy:
                break
            left_s = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.fileno() for worker in busy], max(0.0, left_s))
            for worker in busy:
                is_ready = worker.fileno() in ready
                if is_ready or worker.deadline <= time.monotonic():
                    index, outcome = worker.receive(is_late=not is_ready)
                    outcomes[index] = outcome
                    report()
    finally:
        for worker in workers:
            worker.stop()
    return outcomes


class _Worker:
    """A worker process and the program that it runs."""

    def __init__(self, limits: tuple[int, float, int]) -> None:
        self.index: int | None = None
        self.deadline = 0.0
        self._cpu_s, self._wall_s, _ = limits
        command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(WORKER), *map(str, limits)]
        # The hash seed makes the order of sets equal in every run. Some Pythons need LD_LIBRARY_PATH to find libpython.
        environment = {"PYTHONHASHSEED": "0"} | {
            name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
        }
        self._control, remote = socket.socketpair()
        with remote:
            self._process = subprocess.Popen(
                command,
                stdin=remote.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops its workers
            )
        self._replies = self._control.makefile("rb")
        self._result: int | None = None  # the reading end of the program's pipe
        self._nonce = ""
        self.is_alive = True
        self._is_ready = False

    def fileno(self) -> int:
        """The descriptor that becomes readable when a program has ended."""
        return self._control.fileno()

    def send(self, index: int, program: str) -> None:
        """Give a program to a new child of the worker."""
        if not self._is_ready:
            self._wait_until_ready()
        self.index = index
        self.deadline = time.monotonic() + MAX_WAITING * self._wall_s + GRACE_S
        self._nonce = secrets.token_hex(8)
        self._result, result_write = os.pipe()
        source_read, source_write = os.pipe()
        for descriptor in (self._result, result_write):
            os.set_blocking(descriptor, False)  # neither side waits for the other
        with suppress(BrokenPipeError):  # the worker is dead, which `receive` handles
            socket.send_fds(self._control, [b"p"], [source_read, result_write])
        for descriptor in (source_read, result_write):
            os.close(descriptor)
        text = program.encode("utf-8", "surrogatepass")
        with suppress(BrokenPipeError), open(source_write, "wb") as source:
            source.write(HEADER.pack(self._nonce.encode(), len(text)) + text)

    def receive(self, is_late: bool) -> tuple[int, Outcome]:
        """Index and outcome of the worker's program; stops the worker if it is late or dead."""
        assert self.index is not None
        assert self._result is not None
        index, self.index = self.index, None
        end = None if is_late else self._read_reply()
        if end is None:
            self.stop()
            return index, Outcome("timeout" if is_late else "killed", message="its worker stopped answering")
        try:
            raw = os.read(self._result, MAX_RESULT + 1)
        except BlockingIOError:  # nothing written, and another process holds a copy of the pipe
            raw = b""
        os.close(self._result)
        self._result = None
        return index, self._outcome(raw, **end)

    def _outcome(self, raw: bytes, in_time: bool, signal: int | None, cpu_s: float) -> Outcome:
        """The outcome of a child: what it wrote, whether and by which signal it ended, and its CPU time."""
        if not in_time:
            return Outcome("timeout", message="wall time")
        if raw:
            return parse_result(raw, self._nonce)
        if signal in (SIGKILL, SIGXCPU) and cpu_s >= CPU_SHARE * self._cpu_s:
            return Outcome("timeout", message="CPU time")
        if signal in (None, SIGKILL):  # SIGKILL may be from the worker, if the program closed its descriptors
            return Outcome("killed", message="ended without a result")
        return Outcome("killed", message=f"ended by signal {signal}")

    def stop(self) -> None:
        """Kill the process; its program ends too (at once on Linux, elsewhere at its wall or CPU limit)."""
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        self._replies.close()
        self._control.close()
        if self._result is not None:
            os.close(self._result)
            self._result = None

    def _wait_until_ready(self) -> None:
        """Wait until the process has started, and warn once if a protection is missing."""
        content = self._read_reply() if wait([self.fileno()], START_S) else None
        if content is None:
            raise RuntimeError("the sandbox's worker could not start; its error output is above")
        self._is_ready = True
        _warn_of_missing(frozenset(content["protections"]))

    def _read_reply(self) -> dict[str, Any] | None:
        """The next line of the worker; None if it is dead. Raises RuntimeError if it cannot start processes."""
        try:
            line = self._replies.readline()
        except ConnectionError:
            return None
        if not line:
            return None
        content: dict[str, Any] = json.loads(line)
        if "fatal" in content:
            raise RuntimeError(f"the sandbox {content['fatal']}")
        return content


def parse_result(raw: bytes, nonce: str) -> Outcome:
    """The outcome that a child has written. Anything but one valid result counts as none.

    Args:
        raw: bytes from a process that a program may control; JSON of [nonce, status, value, message].
        nonce: what the child was given.
    """
    try:
        child_nonce, status, value, message = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        return NO_VALID_RESULT
    is_valid = (
        len(raw) <= MAX_RESULT
        and child_nonce == nonce
        and status in CHILD_STATUSES
        and (value is None or (status == "ok" and _is_plain(value)))
        and type(message) is str
        and len(message) <= MAX_TEXT
    )
    if not is_valid:
        return NO_VALID_RESULT
    return Outcome(status, escape(value) if isinstance(value, str) else value, escape(message))


def _is_plain(value: object) -> bool:
    """Whether a value is a finite float, an integer of at most 1,024 bits or a string of at most 200 characters."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return value.bit_length() <= MAX_INT_BITS
    return type(value) is str and len(value) <= MAX_TEXT


@cache
def _warn_of_missing(protections: frozenset[str]) -> None:
    """Warn, once per process, that the system call filter is missing."""
    if "seccomp" not in protections:
        warnings.warn(
            "the system call filter is not available, so programs written by a model run with resource limits only, "
            "see grader/sandbox.py",
            RuntimeWarning,
            stacklevel=2,
        )
