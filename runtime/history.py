"""Where a run comes from: `history.json` in the run directory, a list with one entry per start of the command.

Each entry holds commit, packages, hardware, start and end, how it ended, and the seconds by phase. A resumed run adds
an entry, so the list also shows when a run was interrupted. An entry whose state is "running" belongs to a process that
runs, or that was killed.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from base.cores import count_cores
from base.files import WriteError, write_text
from base.reading import MAX_INTEGER, BadInput, parse_object, read_text, reading
from runtime.distributed import World
from runtime.machine import processor_name

HISTORY_FILE = "history.json"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "numpy", "triton", "transformers", "tokenizers", "datasets", "safetensors", "pydantic", "wandb", "numba"
)  # fmt: skip
GIT_TIMEOUT_S = 10  # on a slow file system

State = Literal["running", "complete", "stopped", "failed"]
Step = Annotated[int, Field(ge=0, lt=MAX_INTEGER)]
Seconds = Annotated[float, Field(lt=MAX_INTEGER, allow_inf_nan=False)]


class Entry(TypedDict, total=False):
    """One session in the file; entries of older versions lack some keys."""

    started: str  # UTC
    updated: str  # while it runs, then:
    ended: str
    state: str
    reason: str | None
    command: str
    commit: str | None
    modified: bool | None
    from_step: Step
    to_step: Step
    n_steps: Step
    packages: dict[str, str]
    hardware: dict[str, str | float | None]
    data_warnings: list[str]
    seconds: dict[str, Seconds]


ENTRIES = TypeAdapter(list[Entry])


@dataclass
class Session:
    """What one process records of its work on a run; every rank has one, the main process writes it."""

    started: float = field(default_factory=time.time)  # seconds since the epoch
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: data, training, evaluation, checkpoints
    data_warnings: list[str] = field(default_factory=list)  # such as test questions that are trained on
    run_dir: Path | None = None  # where it is written; None: not written
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def open(self, run_dir: Path, world: World, from_step: int, n_steps: int) -> None:
        """Add this session to the history of the run; only the main process calls this."""
        self.run_dir = run_dir
        self.facts = {
            "started": _as_text(self.started),
            "command": shlex.join(sys.orig_argv),
            "from_step": from_step,
            "n_steps": n_steps,
            "data_warnings": self.data_warnings,
            **code_version(),
            "packages": _packages(),
            "hardware": _hardware(world),
        }
        self.write("running", from_step)

    def write(self, state: State, step: int, reason: str | None = None) -> None:
        """Replace this session's entry in the history; a failure gives a warning.

        Args:
            step: last step so far.
            reason: why the session has ended, if not because the run is complete.
        """
        if self.run_dir is None:
            return
        ended = _as_text(time.time())
        facts = {"state": state, "reason": reason, "to_step": step, "updated" if state == "running" else "ended": ended}
        seconds = {name: round(value, 2) for name, value in self.seconds.items()}
        entry = self.facts | facts | {"seconds": seconds}
        earlier = [other for other in read_history(self.run_dir) if other.get("started") != entry["started"]]
        try:
            write_text(self.run_dir / HISTORY_FILE, json.dumps({"sessions": [*earlier, entry]}, indent=1) + "\n")
        except WriteError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The sessions of a run, oldest first; none if it has no history, or a damaged one, which gives a warning."""
    path = run_dir / HISTORY_FILE
    if not path.exists():
        return []
    try:
        with reading(f"{path}", "delete it; only the history of the run is lost"):
            sessions = parse_object(read_text(path))["sessions"]
            ENTRIES.validate_python(sessions, strict=True)
            return sessions
    except BadInput as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return []


def _as_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def code_version() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files differ from it; None without a repository or without git."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or None, "modified": None if changes is None or not commit else bool(changes)}


def commit_name(version: dict[str, Any]) -> str:
    """The commit of `code_version`, or of an entry of the history, in short; `-dirty` if files were modified."""
    return (version.get("commit") or "unknown")[:7] + ("-dirty" if version.get("modified") else "")


def git(*arguments: str) -> str | None:
    """Output of a git command on the checkout; None if it fails."""
    if not (ROOT / ".git").exists():  # a copy without it, perhaps inside another repository
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _packages() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _hardware(world: World) -> dict[str, Any]:
    facts = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": count_cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "processes": world.n_ranks,
        "device": world.device.type,
    }
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        facts |= {"gpu": found.name, "gpu_memory_gib": round(found.total_memory / 2**30, 1)}
    return facts
