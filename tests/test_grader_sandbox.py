"""Hostile programs cost themselves their result and nothing else."""

from __future__ import annotations

import os
import select
import signal
import sys
import textwrap
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import grader.sandbox
from grader import sandbox_worker
from grader.sandbox import MAX_PROGRAM, Outcome, run_programs
from grader.sandbox_worker import MAX_TEXT, SYSCALLS

HAS_FILTER = sys.platform == "linux" and os.uname().machine in SYSCALLS
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
            try: os.write(fd, b'{"in_time": true, "signal": null, "cpu_s": 0.0}\\n')
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
    # Time.
    "block every signal": (
        after("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"),
        {"timeout"},
    ),
    "many short sleeps": (after("import time\nwhile True: time.sleep(0.01)"), {"timeout"}),
    "yield the core": (after("import time\nwhile True: time.sleep(0)"), {"timeout"}),
    "interval timer": (after("import signal\nsignal.setitimer(signal.ITIMER_REAL, 1)"), {"error"}),
    "higher priority": (after("import os\nos.nice(-20)"), {"error"}),
    "raise the hard limit": (
        after("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))"),
        {"error"},
    ),
    "limit the worker": (
        after("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))"),
        {"error"},
    ),
    # Other processes.
    "daemon": (
        after("import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(60)"),
        {"error"},
    ),
    "stop itself": (after("import os\nos.kill(os.getpid(), 19)"), {"error"}),
    "raise a stop": (after("import signal\nsignal.raise_signal(signal.SIGSTOP)"), {"error"}),
    "abort": (after("import os\nos.abort()"), {"killed"}),
    "trace the worker": (
        after("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), None, None) == 0"),
        {"error"},
    ),
    "read the worker's memory": (
        after("""
        import ctypes, os
        here = ctypes.create_string_buffer(64)
        pieces = [(ctypes.c_size_t * 2)(address, 64) for address in (ctypes.addressof(here), id(os))]
        assert ctypes.CDLL(None).process_vm_readv(os.getppid(), pieces[0], 1, pieces[1], 1, 0) == 64
        """),
        {"error"},
    ),
    "memory of the worker": (after("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')"), {"error"}),
    "command line of the worker": (after("import os\nopen(f'/proc/{os.getppid()}/cmdline')"), {"error"}),
    "environment of the worker": (after("import os\nopen(f'/proc/{os.getppid()}/environ')"), {"error"}),
    "descriptors of the worker": (after("import os\nos.listdir(f'/proc/{os.getppid()}/fd')"), {"error"}),
    "own memory map": (after("open('/proc/self/maps')"), {"error"}),
    "other programs": (after("import os\nos.listdir('/proc')"), {"error"}),
    # Descriptors and files.
    "reopened descriptor": (after("import os\nos.close(0)\nopen('/proc/self/fd/1')"), {"error"}),
    "copied descriptor": (after("import os\nos.dup(3)"), {"error"}),
    "pipe": (after("import os\nos.pipe()"), {"error"}),
    "descriptor flags": (after("import os\nos.set_blocking(1, True)"), {"error"}),
    "temporary file": (after("open('/tmp/sandbox-neighbour', 'w')"), {"error"}),
    "shared memory": (after("open('/dev/shm/sandbox-neighbour', 'w')"), {"error"}),
    "socket of the worker": (
        after("""
        import gc, os, socket
        gc.unfreeze()
        for control in [each for each in gc.get_objects() if type(each) is socket.socket]:
            control.sendall(b'{"in_time": true, "signal": null, "cpu_s": 0.0}\\n')
        """),
        {"error"},
    ),
    # The code that reports the result.
    "exit in a finalizer": (
        after("import os\nclass E:\n    def __del__(self): os._exit(0)\nx = E()"),
        {"killed"},
    ),
    "exit in an exception": (
        "import os\ndef f():\n    class E(Exception):\n        def __str__(self): os._exit(0)\n    raise E",
        {"killed"},
    ),
    "exception whose class has no name": (
        """
def f():
    class M(type):
        @property
        def __name__(cls): raise SystemExit(18)
    class E(Exception, metaclass=M): pass
    raise E(18)
""",
        {"killed"},
    ),
    "exception whose class has a strange name": (
        """
def f():
    class M(type):
        __name__ = 18
    class E(Exception, metaclass=M):
        def __str__(self): return '18'
    raise E
""",
        {"error"},
    ),
    "large exception": (after("raise ValueError('x' * 10**8)"), {"error", "timeout"}),  # the latter on a busy machine
    "exception that is no exception": (after("raise KeyboardInterrupt"), {"error"}),
    "closed generator": (after("raise GeneratorExit"), {"error"}),
    "second interpreter": (
        after("""
        try: import _xxsubinterpreters as interpreters
        except ImportError: import _interpreters as interpreters
        interpreters.run_string(interpreters.create(), 'import os; os.write(3, b"18"); os.kill(os.getppid(), 9)')
        """),
        {"killed", "error"},
    ),
    "delayed traceback": (after("import faulthandler\nfaulthandler.dump_traceback_later(1, exit=True)"), {"error"}),
    "crash of the interpreter": (after("import faulthandler\nfaulthandler._read_null()"), {"killed"}),
    "wild write": (after("import ctypes\nctypes.memset(id(int), 0xFF, 400)\nint('18')"), {"killed"}),
    "unloaded module": (after("import numpy"), {"error"}),
}


# Attempts that the system refuses without an error in the program, or that concern this program alone: each returns 18.
HARMLESS = {
    "another json": after("import json\njson.dumps = lambda content: '[]'"),
    "another write": after("import os\nos.write = lambda descriptor, content: None"),
    "no exit": after("import os\nos._exit = lambda status: None"),
    "no kill": after("import os\nos.kill = os.killpg = os.wait4 = lambda *a: None"),
    "exit handler": after("import atexit, os\natexit.register(os.write, 3, b'18')"),
    "exit in an exit handler": after("import atexit, sys\natexit.register(sys.exit, 1)"),
    "cancelled alarm": after("import signal\nsignal.alarm(0)"),
    "blocked signals": after("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"),
    "trace function": after("import sys\nsys.settrace(lambda *a: None)"),
    "terminal codes in the output": after("print('\\x1bc')"),
    "bytes to all descriptors but the result": after(
        """
        import os
        for fd in {*range(64)} - {3}:
            try: os.write(fd, b'{"in_time": true, "signal": null, "cpu_s": 0.0}\\n')
            except OSError: pass
        """
    ),
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
    """All hostile programs, each followed by a harmless one that must not notice.

    Those that may run until their time is up have little of it; the others must reach their end on a busy machine.
    """
    outcomes: dict[str, Outcome] = {}
    done: list[None] = []
    for is_endless, wall_s in ((True, 2), (False, 20)):
        names = [name for name, (_, statuses) in HOSTILE.items() if ("timeout" in statuses) == is_endless]
        programs = []
        for i, name in enumerate(names):
            program = HOSTILE[name][0].replace("VICTIM", str(folder / "victim")).replace("FOLDER", str(folder))
            programs += [program, f"def f():\n    return {1000 + i}"]
        done.clear()
        results = run_programs(
            programs,
            n_workers=2,
            cpu_s=1,
            wall_s=wall_s,
            memory_mib=MEMORY_MIB,
            on_done=lambda: done.append(None),
        )
        assert len(done) == len(programs)
        assert results[1::2] == [Outcome("ok", 1000 + i) for i in range(len(names))]
        outcomes |= dict(zip(names, results[::2], strict=True))
    return outcomes


@needs_filter
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_loses_its_result(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].status in HOSTILE[name][1]
    assert outcomes[name].value is None
    assert outcomes[name].message
    assert outcomes[name].message.isprintable()
    assert len(outcomes[name].message) <= MAX_TEXT


@needs_filter
def test_hostile_programs_leave_nothing_behind(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["victim"]
    assert (folder / "victim").read_text() == "18"
    assert leftovers() == []


def test_a_program_cannot_spoil_the_next() -> None:
    programs = [program for pair in zip(HARMLESS.values(), HARMLESS.values(), strict=True) for program in pair]
    for program, outcome in zip(programs, run_programs(programs, n_workers=1), strict=True):
        assert outcome == Outcome("ok", 18), program


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
    "terminal codes": ("return '\\x1b[31m18\\n\\u202e'", "\\x1b[31m18\\n\\u202e"),
    "lone surrogate": ("return chr(0xd800)", "\\ud800"),
    "1,024 bits": ("return 2**1024 - 1", 2**1024 - 1),
    "1,025 bits": ("return -2**1024", None),
    "largest float": ("return 1.7976931348623157e308", sys.float_info.max),
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
    "lying index": (
        """
        class E(int):
            def __index__(self): return 18
            def __int__(self): return 18
            def bit_length(self): return 1
            __class__ = str
        return E(5)
        """,
        5,
    ),
    "lying float": (
        """
        class E(float):
            def __float__(self): return 18.0
            def __radd__(self, other): return 18.0
        return E(5)
        """,
        5.0,
    ),
    "class that equals Fraction": (
        """
        class M(type):
            def __eq__(self, other): return True
            __hash__ = type.__hash__
        class E(metaclass=M):
            def __float__(self): return 18.0
        return E()
        """,
        None,
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


# Returns every marker that the memory of the process contains. It starts at all Python objects, the end of the heap and
# the environment, and walks over pages in both directions; a system call with a wrong argument tells whether a page is
# mapped (22, EINVAL) or not (14, EFAULT).
SCAN = """
def f():
    import ctypes, gc, re
    libc = ctypes.CDLL(None, use_errno=True)
    def is_mapped(page):
        libc.syscall(RT_SIGPROCMASK, 99, ctypes.c_void_p(page << 12), None, ctypes.c_size_t(8))
        return ctypes.get_errno() == 22
    libc.sbrk.restype = ctypes.c_void_p
    gc.unfreeze()
    starts = [libc.sbrk(0) - 1, ctypes.c_void_p.in_dll(libc, 'environ').value, ctypes.addressof(libc.getpid)]
    for each in gc.get_objects():
        starts += [id(each), *map(id, gc.get_referents(each))]
    own = '-'.join(['MARKER', str(100000 + 23)])
    seen = set()
    found = set()
    for start in {address >> 12 for address in starts}:
        if start in seen or not is_mapped(start):
            continue
        first = last = start
        while first - 1 not in seen and is_mapped(first - 1):
            first -= 1
        while last + 1 not in seen and is_mapped(last + 1):
            last += 1
        seen.update(range(first, last + 1))
        for page in range(first, last + 1, 256):
            n_bytes = min(257, last + 1 - page) << 12
            found.update(re.findall(rb'MARKER-[0-9]{6}', ctypes.string_at(page << 12, n_bytes)))
    return ' '.join(sorted(each.decode() for each in found)) + f' in {len(seen) >> 8} MiB'
"""


@needs_filter
def test_a_program_finds_nothing_of_others_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLD", "MARKER-999999")
    ours = bytearray(b"MARKER-888888")  # in the memory of the process that knows the answers
    scan = SCAN.replace("RT_SIGPROCMASK", str(SYSCALLS[os.uname().machine][1]["rt_sigprocmask"]))
    neighbours = [
        "def f():\n    return 'MARKER-000001'",
        "def f():\n    x = 'MARKER-000002'\n    raise ValueError('MARKER-000003')",
        "def f():\n    print('MARKER-000004')\n    return float('MARKER-000005'[7:])",
        "def f():\n    return (MARKER-000006",
        "def f():\n    return ['MARKER-000007'] * 10**12",
    ]
    outcomes = run_programs([*neighbours, scan, "def f(): return 'MARKER-000008'"], n_workers=1, cpu_s=20, wall_s=60)
    assert ours
    assert [outcome.status for outcome in outcomes] == ["ok", "error", "ok", "syntax_error", "memory", "ok", "ok"]
    markers, _, size = str(outcomes[-2].value).partition(" in ")
    assert markers == "MARKER-100023"  # its own, so the search works
    assert int(size.split()[0]) >= 8


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


# What a program that fakes its own result may write, and the value that the caller accepts. It walks the frames to find
# the nonce.
FAKED = {
    "18": 18,  # no better than `return 18`
    "18.5": 18.5,
    "'18'": "18",
    "None": None,
    "float('nan')": None,
    "float('inf')": None,
    "2**1024 - 1": 2**1024 - 1,
    "2**1024": None,
    "'1' * 200": "1" * 200,
    "'1' * 201": None,
    "True": None,
    "[18]": None,
    "{'value': 18}": None,
}


@needs_filter
def test_faked_results_are_checked_by_the_caller() -> None:
    program = """
def f():
    import json, os, sys
    frame = sys._getframe()
    while 'nonce' not in frame.f_locals:
        frame = frame.f_back
    nonce = frame.f_locals['nonce']
    os.write(3, CONTENT)
    os._exit(0)
"""
    contents = [f"json.dumps([nonce, 'ok', {value}, '']).encode()" for value in FAKED]
    outcomes = run_programs([program.replace("CONTENT", content) for content in contents], n_workers=1)
    for (value, expected), outcome in zip(FAKED.items(), outcomes, strict=True):
        assert outcome.value == expected, value
        assert type(outcome.value) is type(expected), value
        assert outcome.status == ("ok" if expected is not None or value == "None" else "killed"), value
    broken = [
        'f\'["{nonce}", "ok", 1e999, ""]\'.encode()',
        "json.dumps([nonce, 'ok', 18, '']).encode() * 2",
        "json.dumps([nonce, 'ok', 18, ''] ).encode() + b' ' * 4000",
        "json.dumps([nonce, 'timeout', None, '']).encode()",
        "json.dumps([nonce, 'error', 18, '']).encode()",
        "json.dumps([nonce, ['ok'], 18, '']).encode()",
        "json.dumps([nonce, 'ok', 18]).encode()",
        "json.dumps([nonce, 'ok', 18, 18]).encode()",
        "json.dumps([nonce, 'ok', 18, 'x' * 201]).encode()",
        "json.dumps({'nonce': nonce}).encode()",
        "b'[' * 3000",
        "b'\\xff\\xfe' + nonce.encode()",
        "b'1' * 3999",
    ]
    outcomes = run_programs([program.replace("CONTENT", content) for content in broken], n_workers=1)
    assert outcomes == [Outcome("killed", message="no valid result")] * len(broken)


def test_messages_cannot_control_a_terminal() -> None:
    program = "def f():\n    raise ValueError('\\x1b]0;title\\x07\\r\\x9b2J\\u202e\\ud800')"
    message = "ValueError: \\x1b]0;title\\x07\\r\\x9b2J\\u202e\\ud800"
    assert run_programs([program.replace("\\\\", "\\")])[0] == Outcome("error", message=message)


@pytest.fixture
def one_core():
    """Pins this process, and so the workers that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell waiting times")
def test_time_spent_waiting_for_a_core_does_not_count(one_core) -> None:
    # Together they need 4 s of the core, so each takes at least twice its wall time.
    program = "def f():\n    import time\n    while time.process_time() < 0.5: pass\n    return 18"
    start = time.monotonic()
    outcomes = run_programs([program] * 8, n_workers=8, cpu_s=1, wall_s=2)
    assert outcomes == [Outcome("ok", 18)] * 8
    assert time.monotonic() - start > 3.5


class ApplePoll:
    """`select.poll` as macOS has it: a hang-up counts only if asked for, and output ends the waiting at once."""

    def register(self, descriptor: int, mask: int) -> None:
        self.descriptor, self.mask = descriptor, mask

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        found = poll.poll(timeout_ms) if self.mask else []
        return [(self.descriptor, select.POLLHUP)] if any(event & select.POLLHUP for _, event in found) else []


def test_the_end_of_a_program_is_seen_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"output")
    monkeypatch.setattr(sandbox_worker, "select", SimpleNamespace(poll=ApplePoll, POLLHUP=select.POLLHUP))
    started = time.process_time()
    assert not sandbox_worker.wait_for_end(read_end, os.getpid(), wall_s=0.5)
    assert time.process_time() - started < 0.4  # it does not wait in a busy loop
    os.close(write_end)
    assert sandbox_worker.wait_for_end(read_end, os.getpid(), wall_s=20)
    os.close(read_end)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])  # of Linux and of macOS
def test_the_signal_at_the_limit_of_cpu_time_is_known(number: int) -> None:
    worker = SimpleNamespace(_cpu_s=2)
    outcome = grader.sandbox._Worker._outcome(worker, b"", in_time=True, signal=number, cpu_s=2.0)
    assert outcome == Outcome("timeout", message="CPU time")


@needs_filter
def test_the_limit_on_cpu_time_holds_against_blocked_signals() -> None:
    before = os.times()
    outcome = run_programs([HOSTILE["block every signal"][0]], cpu_s=1, wall_s=30)[0]
    after = os.times()
    assert outcome == Outcome("timeout", message="CPU time")
    used_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert used_s < 1.6  # with the worker's own


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
            'process_vm_readv': lambda: libc.process_vm_readv(libc.getppid(), None, 0, None, 0, 0),
            'prlimit': lambda: libc.prlimit(libc.getppid(), 0, None, None),
            'setpriority': lambda: libc.setpriority(0, 0, 0),
            'getrusage': lambda: libc.getrusage(0, None),
            'sigaction': lambda: libc.sigaction(14, None, None),
            'tgkill': lambda: getattr(libc, 'raise')(19),
            'sigqueue': lambda: libc.sigqueue(libc.getppid(), 19, None),
            'pidfd_open': lambda: libc.syscall(434, libc.getppid(), 0),
            'pidfd_getfd': lambda: libc.syscall(438, 0, 0, 0),
            'clone3': lambda: libc.syscall(435, None, 0),
            'openat2': lambda: libc.syscall(437, 0, None, None, 0),
            'open_tree': lambda: libc.syscall(428, 0, None, 0),
            'process_madvise': lambda: libc.syscall(440, 0, None, 0, 0, 0),
            'dup': lambda: libc.dup(3),
            'fcntl': lambda: libc.fcntl(1, 3),
            'ioctl': lambda: libc.ioctl(0, 0x5412, b'x'),
            'socketpair': lambda: libc.socketpair(1, 1, 0, (ctypes.c_int * 2)()),
            'recvmsg': lambda: libc.recvmsg(0, None, 0),
            'setsid': lambda: libc.setsid(),
            'personality': lambda: libc.personality(0xFFFFFFFF),
            'mlock': lambda: libc.mlock(None, 0),
            'mount': lambda: libc.mount(None, b'/', None, 0, None),
            'chroot': lambda: libc.chroot(b'/'),
            'eventfd': lambda: libc.eventfd(0, 0),
            'inotify_init': lambda: libc.inotify_init(),
        }
        return ' '.join(name for name, call in calls.items() if call() != -1 or ctypes.get_errno() != 1)
    """
    outcome = run_programs([textwrap.dedent(program)])[0]
    assert outcome == Outcome("ok", "")


@pytest.fixture
def changed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a changed copy of the worker in its place."""

    def change(*changes: tuple[str, str]) -> None:
        text = Path(sandbox_worker.__file__).read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = tmp_path / "sandbox_worker.py"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(grader.sandbox, "WORKER", path)

    grader.sandbox._warn_of_missing.cache_clear()
    yield change
    grader.sandbox._warn_of_missing.cache_clear()


NO_FILTER = ("machine not in SYSCALLS", "True")
# Held by a limit or by the kernel's rules for users, also without the filter.
HELD_WITHOUT_FILTER = (
    "fork bomb", "daemon", "bare threads", "threads", "read a file", "write a file", "raw socket", "exec",
    "memory bomb", "trace the worker", "read the worker's memory", "memory of the worker", "command line of the worker",
    "environment of the worker", "descriptors of the worker", "other programs", "reopened descriptor",
    "copied descriptor", "pipe", "temporary file", "shared memory", "raise the hard limit", "block every signal",
    "socket of the worker",
)  # fmt: skip


def test_without_the_filter_limits_remain(changed_worker, folder: Path) -> None:
    changed_worker(NO_FILTER)
    names = HELD_WITHOUT_FILTER
    programs = [HOSTILE[name][0].replace("VICTIM", str(folder / "victim")) for name in names]
    programs = [program.replace("FOLDER", str(folder)) for program in programs]
    with pytest.warns(RuntimeWarning, match="filter is not available"):
        outcomes = run_programs([*programs, "def f():\n    return 18"], n_workers=1, cpu_s=1, wall_s=2)
    assert outcomes[-1] == Outcome("ok", 18)
    assert {name: outcome for name, outcome in zip(names, outcomes, strict=False) if outcome.status == "ok"} == {}
    assert [path.name for path in folder.iterdir()] == ["victim"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("has_filter", [pytest.param(True, marks=needs_filter), False])
def test_without_root_a_worker_cannot_be_read_nor_with_the_filter_killed(changed_worker, has_filter: bool) -> None:
    # The kernel resets the attribute when the user changes, so it is set again to what it is for an ordinary user.
    become = "    os.setgroups([])\n    os.setgid(NOBODY)\n    os.setuid(NOBODY)\n"
    start = "    prctl = load_prctl()\n"
    as_user = (start, f"{become}{start}    prctl(PR_SET_DUMPABLE, 1, None, 0, 0)\n")
    changed_worker(*([] if has_filter else [NO_FILTER]), as_user)
    names = ["trace the worker", "read the worker's memory", "memory of the worker", "fork bomb", "kill the parent"]
    harmless = "def f():\n    return 18"
    warned = nullcontext() if has_filter else pytest.warns(RuntimeWarning, match="filter is not available")
    with warned:
        outcomes = run_programs([*(HOSTILE[name][0] for name in names), harmless], n_workers=1)
    assert [outcome.status for outcome in outcomes] == ["error"] * 4 + ["error" if has_filter else "killed", "ok"]


def test_a_dead_or_silent_worker_costs_one_program(changed_worker, monkeypatch: pytest.MonkeyPatch) -> None:
    # The worker does not see programs, so the number of the child decides.
    start = "    output_read, output_write = os.pipe()\n"
    count = "    global n_children\n    n_children = globals().get('n_children', 0) + 1\n"
    changed_worker((start, f"{count}    if n_children == 2: ACTION\n{start}"))
    text = grader.sandbox.WORKER.read_text(encoding="utf-8")
    programs = [f"def f():\n    return {i}" for i in range(4)]
    for action, status, n_programs, wall_s, grace_s in (
        ("os._exit(1)", "killed", 4, 20, 15.0),
        ("time.sleep(1000)", "timeout", 2, 1, 3.0),
    ):
        grader.sandbox.WORKER.write_text(text.replace("ACTION", action), encoding="utf-8")
        monkeypatch.setattr(grader.sandbox, "GRACE_S", grace_s)
        monkeypatch.setattr(grader.sandbox, "MAX_WAITING", 1)
        outcomes = run_programs(programs[:n_programs], n_workers=1, wall_s=wall_s)
        assert [outcome.status for outcome in outcomes] == ["ok", status, "ok", status][:n_programs]
        assert [outcome.value for outcome in outcomes] == [0, None, 2, None][:n_programs]


def test_a_worker_that_cannot_start_is_an_error(changed_worker, capfd: pytest.CaptureFixture[str]) -> None:
    changed_worker(("import ctypes\n", "raise SystemExit('no luck')\n"))
    with pytest.raises(RuntimeError, match="could not start"):
        run_programs(["def f():\n    return 18"])
    assert "no luck" in capfd.readouterr().err


def test_processes_that_cannot_start_are_an_error(changed_worker) -> None:
    # An empty result would be a verdict on the model.
    for start in ("    os.set_blocking(output_write, False)\n", "    read_end, write_end = os.pipe()\n"):
        changed_worker((start, f'{start}    os.fork = lambda: (_ for _ in ()).throw(OSError("none left"))\n'))
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


@pytest.mark.parametrize(("n_workers", "highest", "n_started"), [(100, 3, 3), (None, 16, 2)])
def test_the_number_of_workers_is_bounded(
    n_workers: int | None, highest: int, n_started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a maximum, and by default by the share of a process that does not have the machine to itself."""
    started: list[Any] = []

    class Counted(grader.sandbox._Worker):
        def __init__(self, limits: tuple[int, float, int]) -> None:
            started.append(limits)
            super().__init__(limits)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one core for each process
    monkeypatch.setattr(grader.sandbox, "MAX_WORKERS", highest)
    monkeypatch.setattr(grader.sandbox, "_Worker", Counted)
    assert run_programs(["def f():\n    return 18"] * 4, n_workers=n_workers, wall_s=20) == [Outcome("ok", 18)] * 4
    assert len(started) == n_started


@needs_filter
def test_an_interrupt_stops_the_workers() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    programs = ["def f():\n    return 18", *["def f():\n    while True: pass"] * 2]
    with pytest.raises(KeyboardInterrupt):
        run_programs(programs, n_workers=3, cpu_s=50, wall_s=60, memory_mib=MEMORY_MIB, on_done=interrupt)
    assert leftovers() == []
