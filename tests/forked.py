"""Programs of the repository as processes of their own, without the seconds that Python needs to import torch.

A server, one for each process that runs tests, imports the libraries and nothing of the repository. Each program is
forked from it: it imports the repository's modules anew, and has its own arguments, environment, output and end, by
`sys.exit`, exception or signal, like `python PROGRAM` in a shell. Two things differ: libraries have read their
environment variables already, and all programs of one server share a hash seed. Where that matters, start Python.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import json
import math
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]


class Forked:
    """A program that is running: the part of `subprocess.Popen` that tests use.

    Args:
        arguments: what would follow `python` on a command line: a file, `-m` and a module, or `-c` and code.
        environment: variables beside those of this process.
        folder: where it runs; by default this checkout.
        group: the program leads a process group of its own.
        output: file for both of its outputs; without one, `communicate` returns them.
        input: file for its standard input; without one it has none.
    """

    def __init__(
        self,
        *arguments: object,
        environment: dict[str, str],
        folder: Path = ROOT,
        group: bool = False,
        output: IO[bytes] | None = None,
        input: Path = Path(os.devnull),
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        self._files = [output or tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - read after the end
        request = {
            "arguments": self.args,
            "environment": dict(os.environ) | environment,
            "folder": str(folder),
            "group": group,
            "input": str(input),
        }
        self._status, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(), [b"x"], [theirs.fileno(), *(file.fileno() for file in self._files)])
        self._lines = self._status.makefile("r", encoding="ascii")
        self._status.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        """The exit status, -n where signal n ended it; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the program (subprocess.TimeoutExpired) and return the exit status."""
        if self.returncode is None:
            deadline = time.monotonic() + (timeout if timeout is not None else math.inf)
            while not _readable(self._status, deadline - time.monotonic()):
                if time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._lines.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the program; what it wrote to its two outputs."""
        self.wait(timeout)
        return self.written()

    def written(self) -> tuple[str, str]:
        """What the program has written so far."""
        texts = []
        for file in self._files:
            content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
            texts.append(content.decode(errors="replace").replace("\r\n", "\n"))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program by SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _abort(self) -> None:
        """End the program and print what it wrote, then where its threads were: pytest shows that for a failed test."""
        self.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.wait(10)
        self.kill()
        self.wait()
        with suppress(OSError):  # a file of the test need not be readable
            print(f"python {shlex.join(self.args)} was still running. It wrote:", *self.written(), sep="\n")

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self.poll() is None:  # the test has failed, maybe because this program waits
            self._abort()
        self.wait()
        self._lines.close()
        self._status.close()


def _readable(connection: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([connection], [], [], max(0.0, min(timeout_s, 60.0)))[0])


@functools.cache
def _server() -> socket.socket:
    """The connection to this process's server, which ends with it."""
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    atexit.register(server.wait)  # after the next line, so that its processor time counts
    atexit.register(ours.close)
    return ours


# The server


def import_libraries() -> None:
    """What the repository's programs import, now or later, and what that imports in turn."""
    import matplotlib.figure  # noqa: F401
    import numba  # noqa: F401
    import pydantic  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # optimizers import it
    import torch.distributed.fsdp
    import torch.nn.attention.flex_attention
    import torch.optim.swa_utils  # noqa: F401
    import tqdm  # noqa: F401
    import transformers.optimization  # noqa: F401
    import yaml  # noqa: F401

    assert threading.active_count() == 1, "a process with threads must not fork"


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request. Returns only in the forked processes, which then run a program."""
    waiting: set[int] = set()  # processes that wait for a program each
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 3)
        waiting -= {pid for pid in waiting if os.waitpid(pid, 0 if not message else os.WNOHANG)[0]}
        if not message:
            os._exit(0)  # the tests have ended
        if (pid := os.fork()) == 0:
            requests.close()
            return start_program(*descriptors)
        waiting.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)


def start_program(status: int, out: int, err: int) -> dict[str, Any]:
    """Fork the program, tell its process id and how it ends. Returns in the program."""
    with socket.socket(fileno=status) as connection:
        with connection.makefile("r", encoding="utf-8") as file:
            request = json.loads(file.readline())
        if child := os.fork():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            connection.sendall(f"{child}\n".encode())
            _, ended = os.waitpid(child, 0)
            connection.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())
            os._exit(0)
    if request["group"]:
        os.setsid()
    for source, target in ((out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    os.dup2(os.open(request["input"], os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request


def run_program(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does, but a run ends without pictures and page unless PUMA_TESTS_DRAW is set."""
    if arguments[0] in ("-m", "-c"):
        sys.path[0] = os.getcwd()
        sys.argv = [arguments[0], *arguments[2:]]
        if arguments[0] == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = list(arguments)
        if Path(arguments[0]).name == "train.py" and "PUMA_TESTS_DRAW" not in os.environ:
            import report.curves
            import report.page

            page_file = report.page.PAGE_FILE
            setattr(report.curves, "draw_curves", lambda *_: None)  # noqa: B010 - mypy refuses another signature
            setattr(report.page, "write_page", lambda run_dir: run_dir / page_file)  # noqa: B010
        runpy.run_path(arguments[0], run_name="__main__")


def run_to_the_end(arguments: list[str]) -> NoReturn:
    """Run a program and end as Python does, except that modules are not torn down: that copies the server's memory."""
    status = 0
    faulthandler.enable()  # SIGABRT ends it with the stacks of its threads
    try:
        run_program(arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # or the collector would copy all memory that is shared with the server
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_to_the_end(serve(socket.socket(fileno=int(sys.argv[1])))["arguments"])
