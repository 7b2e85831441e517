"""The process that runs untrusted programs, each in a confined child. It is started by `grader/sandbox.py`, which
documents what it protects against.

    python sandbox_worker.py CPU_S WALL_S MEMORY_BYTES

It reads programs from standard input (4 bytes of length, then UTF-8). On standard output it first writes a line of JSON
with the active protections, then one line for each program. It imports only the standard library, so that a fork is
cheap and contains nothing of the caller.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import json
import math
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import types
import warnings
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

# Modules that programs may import: loaded before the first fork, because a child cannot open files.
MODULES = (
    "abc", "bisect", "calendar", "cmath", "collections", "collections.abc", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "random",
    "re", "statistics", "string", "textwrap", "time", "typing", "unicodedata", "_strptime",
)  # fmt: skip

RESULT_FD = 3
MAX_RESULT = 4000  # bytes of a child's answer; fits a pipe, so that writing it never blocks
MAX_TEXT = 200  # characters of a returned string or of a message
MAX_INT_BITS = 1024
NOBODY = 65534
CHILD_STATUSES = ("ok", "syntax_error", "error", "memory")

# System calls that a child may make, by machine: memory, clocks, random bytes, sleep, and reading and writing of open
# descriptors. All others fail with EPERM: no open, no socket, no fork, clone or exec, no kill, no ptrace, no ioctl.
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
            "brk": 12, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28,
            "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "getuid": 102, "getgid": 104,
            "geteuid": 107, "getegid": 108, "getppid": 110, "gettid": 186, "time": 201, "futex": 202,
            "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
            "exit_group": 231, "getrandom": 318, "rseq": 334,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "close": 57, "lseek": 62, "read": 63, "write": 64, "exit": 93, "exit_group": 94, "futex": 98,
            "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
            "sched_yield": 124, "restart_syscall": 128, "rt_sigprocmask": 135, "rt_sigreturn": 139,
            "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
            "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
            "madvise": 233, "getrandom": 278, "rseq": 293,
        },
    ),
}  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL, SECCOMP_ERRNO_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000


class FilterProgram(ctypes.Structure):
    """A system call filter for the kernel, `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


class Confinement(NamedTuple):
    """How each child is confined; built once, before the first fork."""

    cpu_s: int
    memory_bytes: int  # address space
    worker_pid: int  # of this process
    prctl: Any  # the function of the C library; None if the system has none
    filter: FilterProgram | None


def main() -> None:
    """Serve until standard input closes."""
    cpu_s, wall_s, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    for name in MODULES:
        importlib.import_module(name)
    sys.path.clear()
    os.environ.clear()
    warnings.simplefilter("ignore")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the kernel kills a program, not a training run
    null = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(null, True)
    confinement = Confinement(cpu_s, memory_bytes, os.getpid(), load_prctl(), build_filter())
    gc.collect()
    gc.freeze()  # otherwise the collector would write to, and so copy, pages shared with children
    reply({"protections": probe(confinement)})
    while (source := read_program()) is not None:
        reply(run(source, null, wall_s, confinement))


def read_program() -> str | None:
    """The next program; None at the end of input."""
    header = sys.stdin.buffer.read(4)
    if len(header) < 4:
        return None
    return sys.stdin.buffer.read(struct.unpack("<I", header)[0]).decode("utf-8", "surrogatepass")


def reply(content: dict[str, Any]) -> None:
    """Write one line to the caller."""
    os.write(1, json.dumps(content).encode() + b"\n")


def run(source: str, null: int, wall_s: float, confinement: Confinement) -> dict[str, Any]:
    """Run a program in a child; returns `status`, `value` and `message`."""
    # The child returns this with its result, so bytes that a program writes to all descriptors are not a result.
    nonce = os.urandom(8).hex()
    result_read, result_write = os.pipe()
    output_read, output_write = os.pipe()
    # The output is not read: once the pipe is full, writing raises BlockingIOError.
    os.set_blocking(output_write, False)
    deadline = time.monotonic() + wall_s
    pid = fork()
    if pid == 0:
        try:
            for source_fd, target in ((null, 0), (output_write, 1), (output_write, 2), (result_write, RESULT_FD)):
                os.dup2(source_fd, target)
            os.closerange(RESULT_FD + 1, 64)  # the worker never has so many open
            signal.alarm(math.ceil(wall_s) + 1)  # in case this process, which measures the wall time, is killed
            confine(confinement)
            os.write(RESULT_FD, json.dumps([nonce, *execute(source)]).encode())
        finally:
            os._exit(1)
    os.close(result_write)
    raw, in_time = read_result(result_read, deadline)
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, wait_status, usage = os.wait4(pid, 0)
    for descriptor in (result_read, output_read, output_write):
        os.close(descriptor)
    if not in_time:
        return outcome("timeout", message="wall time")
    if raw:
        return parse_result(raw, nonce)
    signal_number = os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else None
    if signal_number == signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= confinement.cpu_s:
        return outcome("timeout", message="CPU time")
    if signal_number in (None, signal.SIGKILL):  # SIGKILL may be from above, if the program closed its descriptors
        return outcome("killed", message="ended without a result")
    return outcome("killed", message=f"ended by signal {signal_number}")


def fork() -> int:
    """`os.fork`, retried for a few seconds if processes or memory are short."""
    for pause_s in (0.1, 0.5, 2.0):
        try:
            return os.fork()
        except OSError:
            time.sleep(pause_s)
    try:
        return os.fork()
    except OSError as error:
        reply({"fatal": f"cannot start a process: {error}"})
        sys.exit(1)


def read_result(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """What the child wrote until it closed the pipe, truncated if too long, and whether it did so in time."""
    raw = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(raw) <= MAX_RESULT:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(1000 * left_s):
            return raw, False
        chunk = os.read(descriptor, MAX_RESULT + 1)
        if not chunk:
            break
        raw += chunk
    return raw, True


def parse_result(raw: bytes, nonce: str) -> dict[str, Any]:
    """Parse and check a child's answer; anything but exactly one valid answer counts as no result."""
    try:
        child_nonce, status, value, message = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        return outcome("killed", message="no valid result")
    good_value = value is None or type(value) in (int, float, str)
    if child_nonce != nonce or status not in CHILD_STATUSES or not good_value or type(message) is not str:
        return outcome("killed", message="no valid result")
    return outcome(status, value, message)


def outcome(status: str, value: float | str | None = None, message: str = "") -> dict[str, Any]:
    """The answer to the caller."""
    return {"status": status, "value": value, "message": message}


# Everything below runs in the child.


def execute(source: str) -> tuple[str, float | str | None, str]:
    """Run a program and call its first function; returns status, value and message."""
    try:
        code, name = compile_program(source)
    except Exception as error:
        return "syntax_error", None, describe(error)
    module = types.ModuleType("__main__")
    module.__dict__["math"] = math  # models often use it without an import
    sys.modules["__main__"] = module
    random.seed(0)
    try:
        exec(code, module.__dict__)
        value, message = to_plain(module.__dict__[name]())
    except MemoryError:
        return "memory", None, "MemoryError"
    except BaseException as error:
        return "error", None, describe(error)
    return "ok", value, message


def compile_program(source: str) -> tuple[types.CodeType, str]:
    """Compile the longest prefix of lines that compiles and contains a function; returns code and function name.

    Statements that are only words or numbers are left out: `Done` after a program must not raise NameError.

    Raises:
        SyntaxError, ValueError, MemoryError, RecursionError: no prefix works; the error of the whole program.
    """
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first_error: Exception | None = None
    while lines:
        try:
            tree = ast.parse("\n".join(lines), "<program>")
            code = compile(tree, "<program>", "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            first_error = first_error or error
            # A syntax error in a line is also in every longer prefix, so continue before that line.
            del lines[min(len(lines), getattr(error, "lineno", None) or len(lines)) - 1 :]
            continue
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if not names:
            break
        kept = [node for node in tree.body if not is_idle(node)]
        if len(kept) < len(tree.body):
            code = compile(ast.Module(kept, []), "<program>", "exec")
        return code, names[0]
    raise first_error or SyntaxError("no function at the top level")


def is_idle(node: ast.stmt) -> bool:
    """Whether a statement does nothing or fails: an expression or annotation without a call."""
    is_expression = isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and node.value is None)
    return is_expression and not any(isinstance(part, ast.Call) for part in ast.walk(node))


def to_plain(value: Any) -> tuple[float | str | None, str]:
    """Convert a returned value to a number or string, or None with the reason; calls no method of the program."""
    kind = type(value)
    if kind in (Decimal, Fraction):
        kind, value = float, float(value)
    if issubclass(kind, float):
        number = float.__add__(value, 0.0)  # a plain float, also for a subclass
        return (number, "") if math.isfinite(number) else (float.__repr__(number), "")
    if issubclass(kind, int) and kind is not bool:
        if int.bit_length(value) > MAX_INT_BITS:
            return None, f"returned an integer of more than {MAX_INT_BITS} bits"
        return int.__add__(value, 0), ""
    if issubclass(kind, str):
        return str.__str__(value)[:MAX_TEXT], ""
    return None, f"returned a value of type {type.__repr__(kind)[8:-2]}"[:MAX_TEXT]


def describe(error: BaseException) -> str:
    """Type and, if it can be printed, text of an exception."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"[:MAX_TEXT]
    except BaseException:
        return name


def confine(confinement: Confinement) -> list[str]:
    """Irrevocably drop all rights that a program does not need; returns the active protections.

    A protection that fails is skipped: a container may forbid changing the user, another system may lack a limit.
    """
    active = []
    os.setsid()
    limits = {
        "CPU": (confinement.cpu_s, confinement.cpu_s + 1),  # SIGXCPU, then SIGKILL
        "AS": (confinement.memory_bytes, confinement.memory_bytes),
        "FSIZE": (0, 0),
        "CORE": (0, 0),
        "NOFILE": (0, 0),  # no new descriptor: no file, socket or pipe
        "NPROC": (0, 0),  # no process or thread (no effect for root)
    }
    for name, limit in limits.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
            active.append(name)
    if os.geteuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            active.append("user")
    if confinement.prctl is not None:
        confinement.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, None, 0, 0)  # after setuid, which clears it
        if os.getppid() != confinement.worker_pid:
            os._exit(1)  # the worker has ended meanwhile
        confinement.prctl(PR_SET_NO_NEW_PRIVS, 1, None, 0, 0)
        if confinement.filter is not None:
            program = ctypes.byref(confinement.filter)
            if confinement.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0:
                active.append("seccomp")
    return active


def load_prctl() -> Any:
    """`prctl` on Linux; None on other systems."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    return prctl


def build_filter() -> FilterProgram | None:
    """The system call filter in classic BPF; None if the call numbers of this machine are not known."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in SYSCALLS or sys.maxsize < 2**32:
        return None
    architecture, numbers = SYSCALLS[machine]
    load, jump_if_equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    allowed = sorted(numbers.values())
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_if_equal, 1, 0, architecture),
        (give, 0, 0, SECCOMP_KILL),
        (load, 0, 0, 0),  # seccomp_data.nr
        *((jump_if_equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)),
        (give, 0, 0, SECCOMP_ERRNO_EPERM),
        (give, 0, 0, SECCOMP_ALLOW),
    ]
    return FilterProgram(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))


def probe(confinement: Confinement) -> list[str]:
    """The protections that are active in a child, found by confining one."""
    read_end, write_end = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            os.write(write_end, " ".join(confine(confinement)).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        active = file.read().decode().split()
    os.waitpid(pid, 0)
    return active


if __name__ == "__main__":
    main()
