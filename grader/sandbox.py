"""Run untrusted Python programs and get the values that their first functions return.

Each program runs in a fresh child of a small worker process (`grader/sandbox_worker.py`), which forks it from a clean
interpreter: nothing of this process, of earlier programs or of the environment is there, only some modules of the
standard library, already imported. The child has

- limits on CPU time, wall time, address space, file size (0), further descriptors (0) and further processes (0);
- standard input from /dev/null, output into a pipe that takes 64 KiB and then fails, and no other descriptor but the
  one for its result;
- on Linux (x86-64, aarch64) a system call filter that leaves memory, clocks, sleep, and reading and writing what is
  open: no file can be opened, changed or removed, no socket, process, thread or signal made;
- where this process is root, the user nobody in its place.

A value comes back as a number or a short string in bounded JSON, checked twice on the way; nothing a program makes is
ever unpickled, compared, converted or printed here.

What this does not protect against:

- Faults of the kernel, the CPU (timing side channels) or the interpreter reachable through the calls above. Text of a
  truly hostile person deserves a virtual machine; this is meant for what a language model writes.
- A program that fakes its own result. It shares its process with the code that reports the result, so by walking the
  interpreter's frames it can report a value that its function did not return. It gains nothing that `return` would
  not give: right answers never enter the sandbox, and the result pipe belongs to this one program, so no other's
  verdict can be touched. Bytes written to the pipe without such a walk cost the program its point.
- Machines without the filter (other systems or CPUs, kernels that refuse it; a warning says so). There the limits
  remain: no new descriptor or process, so no file contents and no network, but calls that need none, such as removing
  a file or a signal to another process of the same user, go through; as root in a container that may not change its
  user, processes are not limited either. A worker that a program kills is replaced, and only that program loses.
- Load: a program may use its CPU time, its memory and its wall time in full, `n_workers` of them at once.

Works on Linux, as root or not, and needs no namespace, no container and no setting of the machine. It should work on
macOS, without the filter, but has not been tried there.
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

MAX_PROGRAM = 16_000  # characters: as bytes they still fit a pipe, so that sending a program never blocks
MAX_WORKERS = 16
WORKERS_PER_CORE = 2  # on a loaded machine handing programs over takes longer than running them
WORKER = Path(__file__).resolve().with_name("sandbox_worker.py")
# What a worker needs beyond a program's wall time to answer, on a loaded machine.
GRACE_S = 20.0
START_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    `status`: `ok` (its function returned), `syntax_error` (no part of it compiles and holds a function), `error` (an
    exception, `sys.exit` too), `timeout` (CPU or wall time), `memory`, or `killed` (it ended without a result).
    """

    status: Status
    value: float | str | None = None  # int, float or string; None if the function returned something else
    message: str = ""  # what went wrong, printable, at most a few hundred characters


def run_programs(
    programs: Sequence[str],
    *,
    n_workers: int | None = None,
    cpu_s: int = 2,
    wall_s: float = 5.0,
    memory_mib: int = 512,
    on_done: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Run each program and call the first function of its top level without arguments; outcomes in order.

    The last lines of a program are cut until it compiles, and top-level statements that call nothing are left out.
    The module `math` is there without an import, and `__name__` is "__main__".

    Args:
        n_workers: programs at once; by default two per core that this process may use, at most 16.
        cpu_s, wall_s, memory_mib: limits of one program.
        on_done: called with the program's index as each is finished.

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
    """A worker process and the program that it is at."""

    def __init__(self, limits: tuple[int, float, int]) -> None:
        self.index: int | None = None
        self.deadline = 0.0
        self._wall_s = limits[1]
        command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(WORKER), *map(str, limits)]
        # Sets have the same order in every run. The path is for Pythons that find their own library by it.
        environment = {"PYTHONHASHSEED": "0"} | {
            name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, which then stops its workers
        )
        self.is_alive = True
        self._greeted = False

    def fileno(self) -> int:
        """What becomes readable when there is an outcome."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, index: int, program: str) -> None:
        """Give it a program."""
        assert self._process.stdin is not None
        if not self._greeted:
            self._greet()
        self.index = index
        self.deadline = time.monotonic() + self._wall_s + GRACE_S
        text = program.encode("utf-8", "surrogatepass")
        with suppress(BrokenPipeError):  # it is dead: `receive` will see
            self._process.stdin.write(struct.pack("<I", len(text)) + text)
            self._process.stdin.flush()

    def receive(self, is_late: bool) -> tuple[int, Outcome]:
        """Take the outcome of its program; a worker that is late or dead is stopped."""
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
        """End the process; the program it is at ends with it (on Linux; within its wall time elsewhere)."""
        self.is_alive = False
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._process.wait()

    def _greet(self) -> None:
        """Wait until it has started, and warn once if its protections are not complete."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline() if wait([self.fileno()], START_S) else b""
        if not line:
            raise RuntimeError("the sandbox's worker could not start; what it printed stands above")
        self._greeted = True
        _warn_of_gaps(frozenset(json.loads(line)["protections"]))


@cache
def _warn_of_gaps(protections: frozenset[str]) -> None:
    """Once per process: say what a program is not kept from here."""
    if "seccomp" not in protections:
        warnings.warn(
            "the system call filter is not available here, so model-written programs run under resource limits only: "
            "see grader/sandbox.py",
            RuntimeWarning,
            stacklevel=2,
        )


def _printable(text: str) -> str:
    """The text with a question mark for whatever could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
