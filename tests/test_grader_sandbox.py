"""Hostile programs cost themselves their result and nothing else."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

import grader.sandbox
from grader import sandbox_worker
from grader.sandbox import MAX_PROGRAM, Outcome, run_programs

HAS_FILTER = sys.platform == "linux" and os.uname().machine in sandbox_worker.SYSCALLS
needs_filter = pytest.mark.skipif(not HAS_FILTER, reason="no system call filter for this machine")
# A limit of this process's own: it stands in the command line of the workers, by which leftovers are found.
MEMORY_MIB = 384 + os.getpid() % 64


def after(body: str) -> str:
    """A program that returns 18 if it survives `body`."""
    return "def f():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n    return 18\n"


# What each program may come to; none may return 18.
HOSTILE = {
    "infinite loop": (after("while True: pass"), {"timeout"}),
    "endless power": (after("x = 10**10**10"), {"timeout", "memory"}),
    "memory bomb": (after("x = []\nwhile True: x.append('a' * 10**7)"), {"memory", "timeout"}),
    "one large block": (after("x = bytearray(10**11)"), {"memory"}),
    "fork bomb": (after("import os\nwhile True: os.fork()"), {"error"}),
    "shell": (after("import os\nassert os.system('true') == 0"), {"error"}),
    "exec": (after("import os\nos.execv('/bin/true', ['true'])"), {"error"}),
    "recursion": (after("def g(): return g()\ng()"), {"error"}),
    "recursion without limit": (
        after("import sys\nsys.setrecursionlimit(10**9)\ndef g(): return repr(g())\ng()"),
        {"killed", "memory", "timeout"},
    ),
    "gigabytes of output": (after("for _ in range(10**7): print('x' * 1000)"), {"error"}),
    "gigabytes of complaints": (after("import sys\nfor _ in range(10**7): sys.stderr.write('x' * 1000)"), {"error"}),
    "raw output": (after("import os\nwhile True: os.write(1, b'x' * 10**6)"), {"error"}),
    "_exit": (after("import os\nos._exit(0)"), {"killed"}),
    "sys.exit": (after("import sys\nsys.exit(18)"), {"error"}),
    "sys.exit above": ("import sys\ndef f():\n    return 18\nsys.exit(0)", {"error"}),
    "kill the parent": (after("import os\nos.kill(os.getppid(), 9)"), {"error"}),
    "kill the group": (after("import os\nos.kill(0, 9)"), {"error"}),
    "kill everyone": (after("import os\nos.kill(-1, 9)"), {"error"}),
    "stop the parent": (after("import os, signal\nos.kill(os.getppid(), 19)"), {"error"}),
    "outlive SIGXCPU": (after("import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)"), {"error"}),
    "raise a limit": (after("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))"), {"error"}),
    "read a file": (after("open('VICTIM').read()"), {"error"}),
    "read passwords": (after("open('/etc/passwd').read()"), {"error"}),
    "write a file": (after("open('FOLDER/new', 'w').write('x')"), {"error"}),
    "remove a file": (after("import os\nos.remove('VICTIM')"), {"error"}),
    "make a folder": (after("import os\nos.mkdir('FOLDER/sub')"), {"error"}),
    "list a folder": (after("import os\nos.listdir('/')"), {"error"}),
    "socket module": (after("import socket\nsocket.socket()"), {"error"}),
    "raw socket": (after("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0"), {"error"}),
    "environment": (after("import os\nos.environ['PATH']"), {"error"}),
    "class walk": (
        after("""
        walk = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0]
        assert walk.__init__.__globals__['system']('true') == 0
        """),
        {"error"},
    ),
    "crash": (after("import ctypes\nctypes.string_at(0)"), {"killed"}),
    "threads": (
        after(
            "import threading\nfor _ in range(9): threading.Thread(target=lambda: [0 for x in iter(int, 1)]).start()"
        ),
        {"error"},
    ),
    "bare threads": (
        after("import _thread\nfor _ in range(9): _thread.start_new_thread(lambda: [0 for x in iter(int, 1)], ())"),
        {"error"},
    ),
    "sleep": (after("import time\ntime.sleep(1000)"), {"timeout"}),
    "deadlock": (after("import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"), {"timeout"}),
    "endless exception text": (
        "def f():\n    class E(Exception):\n        def __str__(self):\n            while True: pass\n    raise E",
        {"timeout"},
    ),
    "forged result": (
        after("""import os\nos.write(3, b'["0", "ok", 18, ""]')\nos._exit(0)"""),
        {"killed"},
    ),
    "forged answers everywhere": (
        after("""
        import os
        for fd in range(64):
            try: os.write(fd, b'{"status": "ok", "value": 18, "message": ""}\\n')
            except OSError: pass
        """),
        {"killed"},
    ),
    "flooded result": (after("import os\nwhile True: os.write(3, b'x' * 1000)"), {"killed"}),
    "closed descriptors": (after("import os\nos.closerange(0, 99)"), {"killed"}),
    "closed and on": (after("import os\nos.closerange(0, 99)\nwhile True: pass"), {"killed", "timeout"}),
    "emptied interpreter": (
        after("import gc\nfor o in gc.get_objects():\n    try: o.clear()\n    except Exception: pass"),
        {"killed", "error"},
    ),
    "read input": (after("input()"), {"error"}),
    "deep parentheses": ("def f():\n    return " + "(" * 5000 + "18" + ")" * 5000, {"syntax_error"}),
    "deep signs": ("def f():\n    return " + "-" * 15000 + "18", {"syntax_error", "killed"}),
    "deep calls": ("def f():\n    return f" + "()" * 7000, {"syntax_error", "killed"}),
    "deep brackets": ("def f():\n    return " + "{" * 9000, {"syntax_error"}),
    "null character": ("def f():\n    return 18\0", {"syntax_error"}),
    "lone surrogate": ("def f():\n    return '\ud800'", {"syntax_error"}),
    "too long": ("def f():\n    return 18\n" + "#" * MAX_PROGRAM, {"syntax_error"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which anybody may do anything, with a file."""
    folder = tmp_path_factory.mktemp("open")
    folder.chmod(0o777)
    for parent in list(folder.parents)[:2]:
        parent.chmod(0o755)
    (folder / "victim").write_text("18")
    (folder / "victim").chmod(0o666)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """All hostile programs in one batch, each followed by a harmless one that must not notice."""
    programs = []
    for i, (program, _) in enumerate(HOSTILE.values()):
        program = program.replace("VICTIM", str(folder / "victim")).replace("FOLDER", str(folder))
        programs += [program, f"def f():\n    return {1000 + i}"]
    done: list[int] = []
    results = run_programs(programs, n_workers=2, cpu_s=1, wall_s=3, memory_mib=MEMORY_MIB, on_done=done.append)
    assert sorted(done) == list(range(len(programs)))
    assert results[1::2] == [Outcome("ok", 1000 + i) for i in range(len(HOSTILE))]
    return dict(zip(HOSTILE, results[::2], strict=True))


@needs_filter
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_loses_its_result(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].status in HOSTILE[name][1]
    assert outcomes[name].value is None
    assert outcomes[name].message


@needs_filter
def test_hostile_programs_leave_nothing_behind(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["victim"]
    assert (folder / "victim").read_text() == "18"
    assert leftovers() == []


def leftovers() -> list[str]:
    """Workers with the unusual limit, and their children, that do not go away within seconds."""
    for _ in range(50):
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        found = [command for command in commands if "sandbox_worker" in command and str(MEMORY_MIB << 20) in command]
        if not found:
            break
        time.sleep(0.1)
    return found


# Values that must arrive as plain data, whatever their class says of them.
VALUES = {
    "int": ("return 18", 18),
    "negative float": ("return -2.5", -2.5),
    "large int": ("return 10**30", 10**30),
    "huge int": ("return 10**100000", None),
    "text": ("return '$1,000'", "$1,000"),
    "long text": ("return '1' * 10**8", "1" * 200),
    "nan": ("return float('nan')", "nan"),
    "infinity": ("return 1e999", "inf"),
    "fraction": ("from fractions import Fraction\nreturn Fraction(5, 2)", 2.5),
    "decimal": ("from decimal import Decimal\nreturn Decimal('2.50')", 2.5),
    "bool": ("return True", None),
    "none": ("return None", None),
    "tuple": ("return (18,)", None),
    "generator": ("yield 18", None),
    "complex": ("return 18 + 0j", None),
    "terminal codes": ("return '\\x1b[31m18'", "?[31m18"),
    "hostile object": (
        """
        class E:
            __class__ = int
            def __eq__(self, other): return True
            def __float__(self): return 18.0
            def __int__(self): return 18
            def __index__(self): return 18
            def __str__(self): return '18'
            __repr__ = __str__
        return E()
        """,
        None,
    ),
    "hostile int": (
        """
        class E(int):
            def __eq__(self, other): return True
            def __add__(self, other): return 18
            def __str__(self): return '18'
            __repr__ = __str__
        return E(5)
        """,
        5,
    ),
    "hostile text": (
        """
        class E(str):
            def __str__(self):
                while True: pass
        return E('5')
        """,
        "5",
    ),
    "hostile metaclass": (
        """
        class M(type):
            def __instancecheck__(self, other): return True
            def __subclasscheck__(self, other): return True
            def __repr__(self): return 'x' * 10**9
        class E(metaclass=M): pass
        return E()
        """,
        None,
    ),
}


def test_values_arrive_as_plain_data() -> None:
    programs = [
        "def f():\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") for body, _ in VALUES.values()
    ]
    for (name, (_, expected)), outcome in zip(VALUES.items(), run_programs(programs, n_workers=1), strict=True):
        assert outcome.status == "ok", name
        assert outcome.value == expected, name
        assert type(outcome.value) is type(expected), name
        assert (expected is None) == bool(outcome.message), name


def test_each_program_finds_a_fresh_process() -> None:
    spoil = """
        import builtins, math, os, random, sys
        builtins.leaked = math.leaked = 1
        math.pi = 3
        sys.setrecursionlimit(50)
        os.environ['leaked'] = '1'
        del sys.modules['json']
        return random.random()
    """
    look = """
        import builtins, json, math, os, random, sys
        assert not hasattr(builtins, 'leaked') and not hasattr(math, 'leaked')
        assert math.pi > 3.1 and sys.getrecursionlimit() == 1000 and not os.environ
        return random.random()
    """
    programs = ["def f():\n" + textwrap.indent(textwrap.dedent(body), "    ") for body in (spoil, look)]
    spoiled, looked = run_programs(programs, n_workers=1)
    assert looked.status == "ok", looked
    assert spoiled.value == looked.value  # chance falls the same way in every program


@needs_filter
def test_a_program_holds_no_descriptor_but_its_own() -> None:
    program = """
    def f():
        import os
        def is_open(fd):
            for call in (lambda: os.read(fd, 0), lambda: os.write(fd, b'')):
                try: return call() is not None
                except OSError: pass
            return False
        return ' '.join(str(fd) for fd in range(1000) if is_open(fd))
    """
    assert run_programs([textwrap.dedent(program)])[0] == Outcome("ok", "0 1 2 3")


@needs_filter
def test_system_calls_are_refused_by_the_kernel() -> None:
    # Called past Python: what a program with control of its whole process could do.
    program = """
    def f():
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            'open': lambda: libc.open(b'/etc/passwd', 0),
            'socket': lambda: libc.socket(2, 1, 0),
            'pipe': lambda: libc.pipe((ctypes.c_int * 2)()),
            'fork': lambda: libc.fork(),
            'execv': lambda: libc.execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true', None)),
            'kill': lambda: libc.kill(libc.getppid(), 9),
            'unlink': lambda: libc.unlink(b'/etc/passwd'),
            'ptrace': lambda: libc.ptrace(16, libc.getppid(), None, None),
            'prctl': lambda: libc.prctl(22, 0, 0, 0, 0),
            'unshare': lambda: libc.unshare(0x10000000),
            'setuid': lambda: libc.setuid(0),
            'memfd_create': lambda: libc.memfd_create(b'x', 0),
            'io_uring_setup': lambda: libc.syscall(425, 1, None),
            'shmget': lambda: libc.shmget(0, 4096, 0o1600),
        }
        return ' '.join(name for name, call in calls.items() if call() != -1 or ctypes.get_errno() != 1)
    """
    outcome = run_programs([textwrap.dedent(program)])[0]
    assert outcome == Outcome("ok", "")


@pytest.fixture
def changed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a changed copy of the worker in its place."""

    def change(old: str, new: str) -> None:
        text = Path(sandbox_worker.__file__).read_text(encoding="utf-8")
        assert text.count(old) == 1
        path = tmp_path / "sandbox_worker.py"
        path.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(grader.sandbox, "WORKER", path)

    grader.sandbox._warn_of_missing.cache_clear()
    yield change
    grader.sandbox._warn_of_missing.cache_clear()


def test_without_the_filter_limits_remain(changed_worker, folder: Path) -> None:
    changed_worker("machine not in SYSCALLS", "True")
    names = ["fork bomb", "bare threads", "read a file", "write a file", "raw socket", "exec", "memory bomb", "threads"]
    programs = [HOSTILE[name][0].replace("VICTIM", str(folder / "victim")) for name in names]
    programs = [program.replace("FOLDER", str(folder)) for program in programs]
    with pytest.warns(RuntimeWarning, match="filter is not available"):
        outcomes = run_programs([*programs, "def f():\n    return 18"], n_workers=1)
    assert outcomes[-1] == Outcome("ok", 18)
    assert [outcome.value for outcome in outcomes[:-1]] == [None] * len(names)
    assert [path.name for path in folder.iterdir()] == ["victim"]


def test_a_dead_or_silent_worker_costs_one_program(changed_worker, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_worker(
        "        reply(run(source, null",
        "        if 'DIE' in source: os._exit(1)\n"
        "        if 'HANG' in source: time.sleep(1000)\n"
        "        reply(run(source, null",
    )
    monkeypatch.setattr(grader.sandbox, "GRACE_S", 3.0)
    programs = [
        "def f():\n    return 'DIE'",
        "def f():\n    return 1",
        "def f():\n    return 'HANG'",
        "def f():\n    return 2",
    ]
    outcomes = run_programs(programs * 2, n_workers=2, wall_s=1)
    assert [outcome.status for outcome in outcomes] == ["killed", "ok", "timeout", "ok"] * 2
    assert [outcome.value for outcome in outcomes[1::2]] == [1, 2, 1, 2]


def test_a_worker_that_cannot_start_is_an_error(changed_worker, capfd: pytest.CaptureFixture[str]) -> None:
    changed_worker("import ctypes\n", "raise SystemExit('no luck')\n")
    with pytest.raises(RuntimeError, match="could not start"):
        run_programs(["def f():\n    return 18"])
    assert "no luck" in capfd.readouterr().err


def test_processes_that_cannot_start_are_an_error(changed_worker) -> None:
    # An empty result would be a verdict on the model.
    changed_worker(
        "    pid = fork()\n    if pid == 0:\n        try:\n            for",
        '    os.fork = lambda: (_ for _ in ()).throw(OSError("none left"))\n'
        "    pid = fork()\n    if pid == 0:\n        try:\n            for",
    )
    with pytest.raises(RuntimeError, match="cannot start a process: none left"):
        run_programs(["def f():\n    return 18"])


# Text that is, or is not, a program with something behind it.
TRIMMED = {
    "def f():\n    return 18\n\nThe answer is 18.": 18,
    "def f():\n    return 18\nIt's 18, don't you think": 18,
    "def f():\n    return 18\n    so the result is 18": 18,
    "def f():\n    x = (17 +\n        1)\n    return x\n    y = (3 +": 18,
    "def f():\n    return 18\n'''unclosed": 18,
    "def f():\n    return 18\nDone\n": 18,  # a word is an expression
    "def f():\n    return 18\nAnswer: eighteen": 18,  # and this an annotation
    "def f():\n    return 18\nreturn result": 18,
    "def f():\n    return 18\nprint(f())\n": 18,
    "def f():\n    return g()\ndef g():\n    return 18": 18,
    "def f():\n    return 18\nif __name__ == '__main__':\n    print(f())": 18,
    "from math import ceil\ndef f():\n    return ceil(17.5)": 18,
    "def f():\n    return math.ceil(17.5)": 18,  # as models write it
    "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int\ndef f():\n    return C(18).x": 18,
    "def f():\r\n    return 18\r\n": 18,
    "def f():\r    return 18\r\f\rrubbish here": 18,
    "def f():\n    piñata = 18\n    return piñata": 18,
    "def f():\n    return 18\nprint(undefined())": None,
    "def f(x):\n    return x": None,
    "def f(:\n    return 18": None,
    "x = 18": None,
    "": None,
}


def test_a_program_is_cut_until_it_compiles() -> None:
    outcomes = run_programs(list(TRIMMED), n_workers=1)
    for (program, expected), outcome in zip(TRIMMED.items(), outcomes, strict=True):
        assert outcome.value == expected, (program, outcome)
        assert (outcome.status == "ok") == (expected is not None), (program, outcome)


def test_statuses_say_what_happened() -> None:
    programs = ["def f():\n    return 1 / 0", "def f(:", "def f():\n    x = bytearray(10**12)", "no function"]
    outcomes = run_programs(programs, n_workers=1)
    assert [outcome.status for outcome in outcomes] == ["error", "syntax_error", "memory", "syntax_error"]
    assert outcomes[0].message == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("limit", ["n_workers", "cpu_s", "wall_s", "memory_mib"])
def test_limits_must_be_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} must be positive, got 0"):
        run_programs(["def f():\n    return 18"], **{limit: 0})


def test_no_programs_take_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader.sandbox.subprocess, "Popen", None)
    assert run_programs([]) == []


@needs_filter
def test_an_interrupt_stops_the_workers() -> None:
    def interrupt(index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    programs = ["def f():\n    return 18", *["def f():\n    while True: pass"] * 2]
    with pytest.raises(KeyboardInterrupt):
        run_programs(programs, n_workers=3, cpu_s=50, wall_s=60, memory_mib=MEMORY_MIB, on_done=interrupt)
    assert leftovers() == []
