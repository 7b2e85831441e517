"""Fixtures of the tests that run the real command line."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from forked import Forked

from data.word_problems import LEVELS, TEST_FILE, cached_word_problems

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run in as many processes as there are cores (`make test`), and models are tiny.
torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,  # examples are slow where a machine is busy
    derandomize="PUMA_FIXED_EXAMPLES" in os.environ,  # where a failure must be of the change that is tested
)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def tiny_settings(objective: dict, data_dir: Path) -> dict:
    """A run of seconds: 4x4 boards, one layer, float32, 40 rows so that a few steps cross an epoch's end."""
    return {
        "model": {
            "vocab_size": 6,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "learned_positions": 32,
        },
        "data": {
            "dataset": "sudoku",
            "data_dir": str(data_dir),
            "source": "generated",
            "size": 4,
            "n_train": 40,
            "n_test": 20,
            "min_clues": 4,
            "max_clues": 8,
        },
        "objective": objective,
        "training": {
            "batch_size": 8,
            "learning_rate": 1.0e-3,
            "warmup_steps": 2,
            "max_steps": 6,
            "ema_decay": 0.9,
            "device": "cpu",
            "precision": "float32",
            "log_every": 1,
            "eval_every": 3,
            "save_every": 3,
        },
        "validation": {"n_examples": 10, "n_loss_rows": 10, "batch_size": 8},
    }


def tiny_gsm_settings(folder: Path, n_rows: int = 60) -> dict:
    """A run of seconds on tokenized files, which are written to `folder`, with the tokenizer beside them."""
    problems = cached_word_problems(folder, n_train=n_rows, n_test=4, seed=0, max_len=128)
    settings = tiny_settings(dict(UNIFORM), folder)
    settings["model"] |= {"vocab_size": LEVELS["easy"].vocab_size, "learned_positions": None}
    settings["data"] = {
        "dataset": "tiny_gsm",
        "data_dir": str(problems),
        "max_len": 128,
        "n_held_out": 10,
        "test_source": str(problems / TEST_FILE),
    }
    settings["training"] |= {"max_steps": 2, "batch_size": 4, "eval_every": 100}
    settings["validation"] = {"n_examples": 1, "n_final_examples": 1, "n_loss_rows": 2, "tokens_per_step": [16]}
    return settings


PUMA = {"name": "puma", "k_schedule": [[3, 0], [5, 4]], "collapse_threshold": 0.9, "pool_batches": 2}
UNIFORM = {"name": "uniform"}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated boards, shared by all tests."""
    return tmp_path_factory.mktemp("boards")


@pytest.fixture
def config_file(tmp_path: Path, data_dir: Path):
    """Writes a tiny config with the given objective; returns its path."""

    def write(objective: dict = PUMA, name: str = "tiny.yaml", **changes: object) -> Path:
        settings = tiny_settings(objective, data_dir)
        for key, value in changes.items():
            section, _, setting = key.partition("__")
            settings[section][setting] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(autouse=True)
def quick_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process end without pictures and page, which take longer than the rest of a tiny run."""
    train = sys.modules.get("train")
    if train is not None and request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(train, "draw_curves", lambda *_: None)
        monkeypatch.setattr(train, "write_page", lambda run_dir: run_dir / "report.html")


# Files whose tests signal, kill, wait and fill disks: one worker runs them, one after the other, so that they do not
# disturb each other.
IN_TURN = ("test_faults", "test_grader_sandbox", "test_runtime_signals", "test_slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what one worker must run: the others have the rest meanwhile. Without a GPU skip what needs one."""
    items.sort(key=lambda item: item.path.stem not in IN_TURN)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, whose fixtures are then built once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "in turn" if Path(file).stem in IN_TURN else file

    return ByFile(config, log)


# Programs as processes of their own, on the loopback interface, with one thread each.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def started(
    *arguments: object, folder: Path = ROOT, group: bool = False, input: Path = Path(os.devnull), **environment: str
) -> Iterator[Forked]:
    """A program of the repository; at the end of the block it is killed if it still runs."""
    with Forked(*arguments, environment=ENVIRONMENT | environment, folder=folder, group=group, input=input) as process:
        yield process
        process.kill()


def run_python(
    *arguments: object,
    timeout: float = 300,
    folder: Path = ROOT,
    input: Path = Path(os.devnull),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository, or of a copy in `folder`, as its users do, and wait for its end."""
    with started(*arguments, folder=folder, input=input, **environment) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def run_fresh_python(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The same with a Python that has imported nothing: for tests of how a program starts, or of its very end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Below those that the system gives to whoever asks for any; other processes that run tests begin elsewhere.
PORTS = itertools.cycle(range(10_000, 32_000))
next(itertools.islice(PORTS, os.getpid() * 100 % 22_000, None))


def free_port() -> int:
    """A port on which nothing listens, another one at each call."""
    for port in PORTS:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("ports never end")


@contextmanager
def started_ranks(n_ranks: int, *arguments: object) -> Iterator[list[Forked]]:
    """A program as `n_ranks` processes that find each other by the environment that torchrun would give them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n_ranks)}
    with ExitStack() as stack:
        yield [
            stack.enter_context(started(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **place))
            for rank in range(n_ranks)
        ]


def run_ranks(n_ranks: int, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program as `n_ranks` processes to their end: the worst status, and what they wrote, rank after rank."""
    with started_ranks(n_ranks, *arguments) as ranks:
        written = [process.communicate(timeout) for process in ranks]
        status = max((process.wait() for process in ranks), key=abs)
        out, err = ("".join(texts) for texts in zip(*written, strict=True))
        return subprocess.CompletedProcess(ranks[0].args, status, out, err)
