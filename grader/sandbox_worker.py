"""The process from which untrusted programs are forked, each into a confined child. It is started by
`grader/sandbox.py`, which documents what it protects against.

    python sandbox_worker.py CPU_S WALL_S MEMORY_BYTES

Standard input is a Unix socket. The worker first sends a line of JSON with the active protections. Each message that it
then receives carries two descriptors: a pipe from which the child reads its program, and a pipe to which the child
writes its result. The worker uses neither, so its memory, of which every child gets a copy, contains no program and no
result. When the child has ended, the worker sends a line of JSON that says how. It imports only the standard library,
so that a fork is cheap and contains nothing of the caller.
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
import socket
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

SOURCE_FD, OUTPUT_FDS, RESULT_FD = 0, (1, 2), 3
HEADER = struct.Struct("<16sI")  # before a program: nonce, number of bytes
MAX_RESULT = 4000  # bytes of a child's answer; fits a pipe, so that writing it never blocks
MAX_TEXT = 200  # characters of a returned string or of a message
MAX_INT_BITS = 1024
MAX_WAITING = 20  # a program ends after this many times its wall time, however long it has waited for a core
NOBODY = 65534
CHILD_STATUSES = ("ok", "syntax_error", "error", "memory")

# System calls that a child may make, by machine: memory, clocks, random bytes, sleep, and reading and writing of open
# descriptors. All others fail with EPERM: no open, no socket, no fork, clone or exec, no kill, no ptrace, no ioctl.
# Python 3.10 sleeps in select, which the C library may turn into pselect6.
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
            "brk": 12, "rt_sigprocmask": 14, "rt_sigreturn": 15, "select": 23, "sched_yield": 24, "mremap": 25,
            "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "getuid": 102, "getgid": 104,
            "geteuid": 107, "getegid": 108, "getppid": 110, "gettid": 186, "time": 201, "futex": 202,
            "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
            "exit_group": 231, "pselect6": 270, "getrandom": 318, "rseq": 334,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "close": 57, "lseek": 62, "read": 63, "write": 64, "pselect6": 72, "exit": 93, "exit_group": 94,
            "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
            "sched_yield": 124, "restart_syscall": 128, "rt_sigprocmask": 135, "rt_sigreturn": 139,
            "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
            "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
            "madvise": 233, "getrandom": 278, "rseq": 293,
        },
    ),
}  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL, SECCOMP_ERRNO_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000


class FilterProgram(ctypes.Structure):
    """A system call filter for the kernel, `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


class Confinement(NamedTuple):
    """How each child is confined; built once, before the first fork."""

    cpu_s: int
    wall_s: float
    memory_bytes: int  # address space
    worker_pid: int  # of this process
    prctl: Any  # the function of the C library; None if the system has none
    filter: FilterProgram | None


def main() -> None:
    """Serve until the caller closes the socket."""
    cpu_s, wall_s, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    for name in MODULES:
        importlib.import_module(name)
    sys.path.clear()
    os.environ.clear()
    warnings.simplefilter("ignore")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the kernel kills a program, not a training run
    prctl = load_prctl()
    if prctl is not None:
        prctl(PR_SET_DUMPABLE, 0, None, 0, 0)  # no process of this user can read or trace this one
    control = socket.socket(fileno=0)
    confinement = Confinement(cpu_s, wall_s, memory_bytes, os.getpid(), prctl, build_filter())
    gc.collect()
    gc.freeze()  # otherwise the collector would write to, and so copy, pages shared with children
    reply(control, {"protections": probe(control, confinement)})
    while len(descriptors := socket.recv_fds(control, 1, 2)[1]) == 2:
        reply(control, run(control, descriptors[0], descriptors[1], confinement))


def reply(control: socket.socket, content: dict[str, Any]) -> None:
    """Send one line to the caller."""
    control.sendall(json.dumps(content).encode() + b"\n")


def run(control: socket.socket, source: int, result: int, confinement: Confinement) -> dict[str, Any]:
    """Run a program in a child, which reads it from one descriptor and writes its result to another.

    Returns:
        `in_time`: whether the child ended, or closed its output, within the wall time. `signal`: the signal that ended
        it, or None. `cpu_s`: its CPU time.
    """
    output_read, output_write = os.pipe()
    # The output is not read: once the pipe is full, writing raises BlockingIOError.
    os.set_blocking(output_write, False)
    pid = fork(control)
    if pid == 0:
        try:
            os.dup2(source, SOURCE_FD)
            for target in OUTPUT_FDS:
                os.dup2(output_write, target)
            os.dup2(result, RESULT_FD)  # last: the source may have had this number
            os.closerange(RESULT_FD + 1, 64)  # the worker never has so many open
            # In case this process, which measures the wall time, is killed and the system has no PR_SET_PDEATHSIG.
            signal.alarm(math.ceil(MAX_WAITING * confinement.wall_s) + 1)
            confine(confinement)
            nonce, program = read_program()
            os.write(RESULT_FD, json.dumps([nonce, *execute(program)]).encode())
        finally:
            os._exit(1)
    for descriptor in (source, result, output_write):
        os.close(descriptor)
    in_time = wait_for_end(output_read, pid, confinement.wall_s)
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, wait_status, usage = os.wait4(pid, 0)
    os.close(output_read)
    signal_number = os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else None
    return {"in_time": in_time, "signal": signal_number, "cpu_s": usage.ru_utime + usage.ru_stime}


def fork(control: socket.socket) -> int:
    """`os.fork`, retried for a few seconds if processes or memory are short."""
    for pause_s in (0.1, 0.5, 2.0):
        try:
            return os.fork()
        except OSError:
            time.sleep(pause_s)
    try:
        return os.fork()
    except OSError as error:
        reply(control, {"fatal": f"cannot start a process: {error}"})
        sys.exit(1)


def wait_for_end(output: int, pid: int, wall_s: float) -> bool:
    """Wait until a child has closed its output, as it does when it ends; False if its wall time is over first.

    The time in which the child was ready to run and waited for a core does not count, up to MAX_WAITING times the wall
    time in all.
    """
    poll = select.poll()
    poll.register(output, select.POLLHUP)  # which Linux always reports, macOS only if asked for
    start = time.monotonic()
    left_s = wall_s
    while left_s > 0:
        if poll.poll(1000 * left_s):
            return True
        time.sleep(0.01)  # macOS returns at once, with nothing, while the pipe holds output
        allowed_s = min(wall_s + waited_s(pid), MAX_WAITING * wall_s)
        left_s = start + allowed_s - time.monotonic()
    return False


def waited_s(pid: int) -> float:
    """Seconds that a process was ready to run and waited for a core; 0 if this system does not tell."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


# Everything below runs in the child.


def read_program() -> tuple[str, str]:
    """Nonce and program, from the caller."""
    with open(SOURCE_FD, "rb", closefd=False) as file:
        nonce, n_bytes = HEADER.unpack(file.read(HEADER.size))
        return nonce.decode(), file.read(n_bytes).decode("utf-8", "surrogatepass")


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
    if kind is Decimal or kind is Fraction:  # `in` would compare with a method of the program's metaclass
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
        # SIGKILL on Linux: SIGXCPU, at a smaller soft limit, can be blocked. macOS has SIGXCPU at both.
        "CPU": (confinement.cpu_s, confinement.cpu_s),
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


def probe(control: socket.socket, confinement: Confinement) -> list[str]:
    """The protections that are active in a child, found by confining one."""
    read_end, write_end = os.pipe()
    pid = fork(control)
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
