"""Run untrusted Python programs and return the values of their first functions.

Each program runs in a new child process, forked from a small worker process (`grader/sandbox_worker.py`) with a clean
interpreter: it sees nothing of this process, of earlier programs or of the environment, only some modules of the
standard library, already imported. The child has

- limits on CPU time, wall time, address space, file size (0), new descriptors (0) and new processes (0);
- standard input from /dev/null, output to a pipe that fails after 64 KiB, and no other descriptor except the one for
  its result;
- on Linux (x86-64, aarch64) a system call filter that allows only memory, clocks, sleep, and reading and writing of
  open descriptors: no file can be opened, changed or removed, and no socket, process, thread or signal created;
- if this process is root, the user nobody.

A value is returned as a number or a short string in JSON of bounded size, which the worker and this process check. No
object of a program is unpickled, compared, converted or printed here.

This does not protect against:

- Bugs in the kernel, the CPU (timing side channels) or the interpreter that the allowed calls can reach. Use a virtual
  machine for programs of a hostile person; this sandbox is for programs written by a language model.
- A program that fakes its own result. It shares its process with the code that reports the result, so by walking the
  interpreter's frames it can report a value that its function did not return. This is no better than `return`: right
  answers never enter the sandbox, and each program has its own result pipe, so it cannot change the verdict of another.
  Bytes written to the pipe in any other way make the result invalid.
- Machines without the filter (other systems or CPUs, kernels that refuse it; a warning is shown). The limits still
  apply: no new descriptor or process, so no file contents and no network. But calls that need neither are possible,
  such as removing a file or sending a signal to another process of the same user. As root in a container that cannot
  change its user, the number of processes is not limited either. If a program kills its worker, the worker is replaced
  and only this program fails.
- Load: `n_workers` programs at a time may use all of their CPU time, memory and wall time.

Works on Linux, as root or not, and needs no namespace, container or system setting. It should work on macOS, without
the filter, but is not tested there.
"""

from __future__ import annotations

import json
import os
import struct
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
from typing import Literal

Status = Literal["ok", "syntax_error", "error", "timeout", "memory", "killed"]

MAX_PROGRAM = 16_000  # characters; at most 64 KB in UTF-8, which fits a pipe, so that sending a program never blocks
MAX_WORKERS = 16
WORKERS_PER_CORE = 2  # on a loaded machine sending programs takes longer than running them
WORKER = Path(__file__).resolve().with_name("sandbox_worker.py")
# Time that a worker on a loaded machine needs to answer, after a program's wall time.
GRACE_S = 20.0
START_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """Result of running a program.

    `status`: `ok` (its function returned), `syntax_error` (no part compiles and contains a function), `error` (an
    exception, including `sys.exit`), `timeout` (CPU or wall time), `memory`, or `killed` (it ended without a result).
    """

    status: Status
    value: float | str | None = None  # int, float or string; None if the function returned another type
    message: str = ""  # details, printable, at most a few hundred characters


def run_programs(
    programs: Sequence[str],
    *,
    n_workers: int | None = None,
    cpu_s: int = 2,
    wall_s: float = 5.0,
    memory_mib: int = 512,
    on_done: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Run each program and call its first top-level function without arguments; outcomes in the same order.

    Last lines of a program are removed until it compiles, and top-level statements that call nothing are skipped. The
    module `math` is available without an import, and `__name__` is "__main__".

    Args:
        n_workers: programs run in parallel; by default two per core that this process may use, at most 16.
        cpu_s, wall_s, memory_mib: limits of one program.
        on_done: called with the index of each program when it has ended.

    Raises:
        ValueError: a limit is not positive.
        RuntimeError: the worker cannot start, or cannot start processes.
    """
    for name, limit in (("n_workers", n_workers), ("cpu_s", cpu_s), ("wall_s", wall_s), ("memory_mib", memory_mib)):
        if limit is not None and limit <= 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    report = on_done or (lambda index: None)
    outcomes = [Outcome("syntax_error", message=f"more than {MAX_PROGRAM} characters")] * len(programs)
    waiting: deque[int] = deque()
    for i, program in enumerate(programs):
        if len(program) <= MAX_PROGRAM:
            waiting.append(i)
        else:
            report(i)
    n_workers = min(n_workers or min(WORKERS_PER_CORE * _n_cores(), MAX_WORKERS), len(waiting))
    limits = (cpu_s, wall_s, memory_mib << 20)
    workers: list[_Worker] = []
    try:
        workers += (_Worker(limits) for _ in range(n_workers))
        while True:
            for slot, worker in enumerate(workers):
                if worker.index is None and waiting:
                    worker = workers[slot] = worker if worker.is_alive else _Worker(limits)
                    worker.send(waiting[0], programs[waiting.popleft()])
            busy = [worker for worker in workers if worker.index is not None]
            if not busy:
                break
            left_s = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.fileno() for worker in busy], max(0.0, left_s))
            for worker in busy:
                is_ready = worker.fileno() in ready
                if is_ready or worker.deadline <= time.monotonic():
                    index, outcomes[index] = worker.receive(is_late=not is_ready)
                    report(index)
    finally:
        for worker in workers:
            worker.stop()
    return outcomes


class _Worker:
    """A worker process and the program that it runs."""

    def __init__(self, limits: tuple[int, float, int]) -> None:
        self.index: int | None = None
        self.deadline = 0.0
        self._wall_s = limits[1]
        command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(WORKER), *map(str, limits)]
        # The hash seed makes the order of sets equal in every run. Some Pythons need LD_LIBRARY_PATH to find libpython.
        environment = {"PYTHONHASHSEED": "0"} | {
            name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops its workers
        )
        self.is_alive = True
        self._is_ready = False

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is an outcome."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, index: int, program: str) -> None:
        """Send a program to the worker."""
        assert self._process.stdin is not None
        if not self._is_ready:
            self._wait_until_ready()
        self.index = index
        self.deadline = time.monotonic() + self._wall_s + GRACE_S
        text = program.encode("utf-8", "surrogatepass")
        with suppress(BrokenPipeError):  # the worker is dead, which `receive` handles
            self._process.stdin.write(struct.pack("<I", len(text)) + text)
            self._process.stdin.flush()

    def receive(self, is_late: bool) -> tuple[int, Outcome]:
        """Index and outcome of the worker's program; stops the worker if it is late or dead."""
        assert self.index is not None
        assert self._process.stdout is not None
        index, self.index = self.index, None
        answer = b"" if is_late else self._process.stdout.readline()
        if not answer:
            self.stop()
            return index, Outcome("timeout" if is_late else "killed", message="its worker stopped answering")
        content = json.loads(answer)
        if "fatal" in content:
            raise RuntimeError(f"the sandbox {content['fatal']}")
        value = _printable(content["value"]) if isinstance(content["value"], str) else content["value"]
        return index, Outcome(content["status"], value, _printable(content["message"]))

    def stop(self) -> None:
        """Kill the process; its program ends too (at once on Linux, elsewhere within its wall time)."""
        self.is_alive = False
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._process.wait()

    def _wait_until_ready(self) -> None:
        """Wait until the process has started, and warn once if a protection is missing."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline() if wait([self.fileno()], START_S) else b""
        if not line:
            raise RuntimeError("the sandbox's worker could not start; its error output is above")
        self._is_ready = True
        _warn_of_missing(frozenset(json.loads(line)["protections"]))


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


def _printable(text: str) -> str:
    """The text with `?` for unprintable characters, such as terminal control codes."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _n_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
