"""What the pieces share: rows of the table, files, and the parts of a piece, each in a process of its own.

A part that fails, hangs or loses the GPU costs the piece one row.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import torch

from base.files import write_text
from bench.__main__ import main as bench
from bench.measure import machine, table
from runtime.distributed import autocast_dtype
from runtime.history import ROOT

LOG_FILE = "log.txt"
STOP_S = 20.0  # for a program to save and end after SIGTERM
# Forks of a server that has imported the libraries and has not touched the GPU, whose state a fork cannot use.
CONTEXT = multiprocessing.get_context("forkserver")

Goal = tuple[Literal["<=", ">="], float]
T = TypeVar("T")


@dataclass
class Report:
    """The results of a piece: `rows` of the table, and `details` by name, in PIECE.json."""

    piece: str
    arguments: list[str]
    out: Path
    deadline: float  # of time.monotonic
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    machine: str = ""
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = machine(device, autocast_dtype("auto", device))
        self.save()

    @property
    def log(self) -> Path:
        """The file to which the programs of all pieces write."""
        return self.out / LOG_FILE

    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, name: str, value: float | str, unit: str = "", goal: Goal | None = None) -> None:
        """Add a row to the table, and write the results so far."""
        row: dict[str, Any] = {"measured": name, "value": value, "unit": unit, "goal": "", "reached": ""}
        if goal is not None:
            sign, limit = goal
            row |= {"goal": f"{sign} {limit:g}"}
            if not isinstance(value, str):
                row["reached"] = "yes" if (value <= limit if sign == "<=" else value >= limit) else "NO"
        self.rows.append(row)
        self.save()

    def fail(self, name: str, reason: str) -> None:
        """Add a row for a part that gave no result."""
        self.failures.append(f"{name}: {reason}")
        self.add(name, f"FAILED: {reason[:100]}")

    def measure(self, name: str, function: Callable[..., T], *arguments: Any, limit_s: float = 180.0) -> T | None:
        """The result of a function, called in a new process; None, after `fail`, if it gives none in time.

        Args:
            function: of a module, so that it can be named to another process; what it prints goes to the log.
            limit_s: seconds at most; the deadline may leave fewer.
        """
        seconds = min(limit_s, self.remaining_s())
        if seconds < 1:
            self.fail(name, "no time left")
            return None
        self._head(name)
        CONTEXT.set_forkserver_preload(["bench.step", "bench.block"])
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_call, args=(sender, self.log, function, arguments))
        process.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                self.fail(name, f"no result after {seconds:.0f} s")
                return None
            good, value = receiver.recv()
        except EOFError:
            process.join()
            self.fail(name, f"its process ended with status {process.exitcode}")
            return None
        finally:
            process.kill()
            process.join()
            receiver.close()
        if not good:
            self.fail(name, value)
            return None
        result: T = value
        return result

    def run(self, name: str, *words: object, limit_s: float = 180.0, environment: dict[str, str] | None = None) -> bool:
        """Run `python WORDS...` in the checkout with its output in the log; False, after `fail`, if it fails.

        At the limit it gets SIGTERM and `STOP_S` seconds to end.
        """
        seconds = min(limit_s, self.remaining_s() - STOP_S)
        if seconds < 1:
            self.fail(name, "no time left")
            return False
        self._head(name)
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its own processes can be ended with it
            )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.fail(name, f"not finished after {seconds:.0f} s")
            return False
        finally:
            _end(process)
        if status:
            self.fail(name, f"exit status {status}, see {self.log}")
        return status == 0

    def save(self) -> None:
        """Write PIECE.json."""
        results = {
            "piece": self.piece,
            "command": " ".join(["python -m bench.gpu", *self.arguments]),
            "machine": self.machine,
            "seconds": round(time.monotonic() - self.start, 1),
            "rows": self.rows,
            "failures": self.failures,
            "details": self.details,
        }
        write_text(self.out / f"{self.piece}.json", json.dumps(results, indent=1) + "\n")

    def show(self) -> None:
        """Print the table."""
        self.save()
        lines = table(self.rows) if self.rows else ["nothing was measured"]
        print(f"# {self.piece}: {self.machine}, {time.monotonic() - self.start:.0f} s\n", *lines, sep="\n")
        for failure in self.failures:
            print(f"- failed: {failure}")
        print(f"wrote {self.out / self.piece}.json", flush=True)

    def _head(self, name: str) -> None:
        """A line in the log and on the terminal, so that both tell where the time goes."""
        line = f"== {self.piece}: {name}, after {time.monotonic() - self.start:.0f} s"
        print(line, flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(line + "\n")


def bench_rows(arguments: list[str]) -> list[dict[str, Any]]:
    """Rows of `python -m bench ARGUMENTS`."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        bench([*arguments, "--json", str(file)])
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return rows


def _call(sender: Connection, log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the new process: send (True, result) or (False, reason)."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        message = True, function(*arguments)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = False, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    sys.stdout.flush()
    sender.send(message)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started; the program first, so that it can save."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
