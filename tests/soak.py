"""Kill a training run again and again: its result must be that of a run left alone, bit for bit.

    python -m tests.soak --kills 30 --damaged 24 --out results/soak.md     # at random moments
    python -m tests.soak --stages                                          # before each file operation of a save

Each life of the run is a process of its own, forked from this one, which has done the imports, and ended by SIGKILL.
It tells through shared memory what it was doing, so that the table can say where each kill struck. `--damaged` damages
the newest checkpoint after as many of the kills, so that the next life must continue from the one before it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import mmap
import os
import platform
import random
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - these are imported where they are used, which each life would pay for
import torch._dynamo  # noqa: F401
import transformers.optimization  # noqa: F401
import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_settings  # the tests' own settings

import train
from results.records import commit
from runtime.checkpoint import latest_checkpoint, step_folders
from runtime.machine import processor_name
from training.update import Updater

WORK = ("starting", "training", "evaluating", "saving", "finishing")
MOST_LIVES = 500
LIFE_S = 300.0  # a life takes a few seconds, with other programs on the machine some more
Kill = dict[str, Any]


class Progress:
    """What a life is doing, in memory that outlives it: an index into WORK and the number of updates."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 12)

    def set(self, work: str, step: int) -> None:
        self.memory[:] = struct.pack("=iq", WORK.index(work), step)

    def get(self) -> tuple[str, int]:
        work, step = struct.unpack("=iq", self.memory[:])
        return WORK[work], step

    def has_reached(self, n_updates: int) -> bool:
        """Whether so many updates are made, or all of them."""
        work, step = self.get()
        return work == "finishing" or (work != "starting" and step >= n_updates)

    def waits_at(self, n_updates: int) -> bool:
        """Whether a life with `wait_at(n_updates)` has come to its end: what it had to save by then is saved."""
        work, step = self.get()
        return work == "finishing" or (work == "training" and step >= n_updates)


def watch(progress: Progress) -> None:
    """Make the training command tell what it does."""

    def wrap(owner: Any, name: str, work: str, step_of: Callable[..., int], after: str | None) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            progress.set(work, step_of(*arguments))
            result = original(*arguments, **options)
            if after:
                progress.set(after, step_of(*arguments))
            return result

        setattr(owner, name, wrapped)

    wrap(Updater, "step", "training", lambda updater: updater.run.step, None)
    wrap(train, "save_run", "saving", lambda run, _: run.step, "training")
    wrap(train, "score_run", "saving", lambda run, _: run.step, "training")
    wrap(train, "evaluate", "evaluating", lambda *_: progress.get()[1], "training")
    wrap(train, "write_result", "finishing", lambda run, *_: run.step, None)


def die_at(n_calls: int) -> None:
    """End this process by SIGKILL before its n-th file operation (counted from 1) while it saves."""
    left, saving = n_calls, False

    def counted(original: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= saving
            if saving and left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return wrapped

    def watched(save: Any) -> Any:
        def wrapped(*arguments: Any) -> None:
            nonlocal saving
            saving = True
            save(*arguments)
            saving = False

        return wrapped

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("save_run", "score_run"):
        vars(train)[name] = watched(vars(train)[name])


def wait_at(n_updates: int) -> None:
    """Have this process wait for its kill before it makes another update than so many, and before it ends."""
    step, write_result = Updater.step, train.write_result

    def waiting_step(updater: Updater) -> None:
        while updater.run.step >= n_updates:
            time.sleep(60)
        step(updater)

    def waiting_write_result(*arguments: Any) -> None:
        write_result(*arguments)
        while True:
            time.sleep(60)

    vars(train)["write_result"] = waiting_write_result
    setattr(Updater, "step", waiting_step)  # noqa: B010 - mypy knows it as a method


def log_file(run_dir: Path) -> Path:
    """What the lives of a run have printed."""
    return Path(f"{run_dir}.log")


def begin(config: Path, run_dir: Path, progress: Progress, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a life of the run; its process id. One that hangs ends after LIFE_S with its stack in the log."""
    progress.set("starting", 0)
    assert threading.active_count() == 1, "a process with threads must not fork"
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        log = os.open(log_file(run_dir), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(LIFE_S, exit=True, file=log)
        prepare()
        watch(progress)
        train.main(["--config", str(config), "--run-dir", str(run_dir)])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, run_dir: Path, deadline: float, far_enough: Callable[[], bool] = lambda: False) -> bool:
    """Wait until a life ends, `deadline` (time.monotonic) or `far_enough`; whether it has ended, which must be well."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status:
                raise SystemExit(bad_end(run_dir, status))
            return True
        if time.monotonic() >= deadline or far_enough():
            return False
        time.sleep(0.001)


def bad_end(run_dir: Path, status: int) -> str:
    """The message for a life that has ended by itself with a wait status other than 0."""
    last_lines = log_file(run_dir).read_text(errors="replace").splitlines()[-60:]
    return "\n".join([f"a life ended with status {os.waitstatus_to_exitcode(status)}; it wrote", *last_lines])


def leave_alone(config: Path, run_dir: Path) -> tuple[float, float]:
    """Run to the end; seconds until the first update, and from there to the end."""
    progress, start = Progress(), time.monotonic()
    child, started = begin(config, run_dir, progress), start
    while not ended(child, run_dir, time.monotonic() + 0.01):
        if progress.get()[0] == "starting":
            started = time.monotonic()
    return started - start, time.monotonic() - started


def kill_at_random(
    config: Path,
    run_dir: Path,
    *,
    n_kills: int,
    n_damaged: int,
    n_steps: int,
    save_every: int,
    start_s: float,
    work_s: float,
    seed: int,
) -> list[Kill]:
    """Let the run live until random moments, then to its end.

    Every fifth life ends within `start_s` seconds, mostly before its first update; the others within `work_s` of a
    random update, or when they have left `save_every` updates to each kill that is still to come. There a life saves
    and waits for its kill, so that a kill there finds a new checkpoint to damage, and the run does not end before the
    last one, however fast or busy the machine. That one strikes while the run finishes. After a kill before that the
    newest checkpoint is damaged if it is not the only one, `n_damaged` times in all.

    Returns:
        At least `n_kills` kills, more where too few of them left a checkpoint to damage.
    """
    rng, progress = random.Random(seed), Progress()
    kills: list[Kill] = []
    n_left = n_damaged
    is_last = False
    while not is_last:
        if len(kills) > MOST_LIVES:
            raise SystemExit("too many lives")
        n_kills_left = max(n_kills - len(kills), n_left + 1)  # the last one may leave nothing to damage
        is_last = n_kills_left == 1
        most = n_steps + 1 if is_last else n_steps - save_every * (n_kills_left - 1)
        aim = most if is_last else min(most, rng.randint(0, n_steps * (len(kills) + 1) // n_kills))
        start = time.monotonic()
        child = begin(config, run_dir, progress, partial(wait_at, most))
        if len(kills) % 5 == 3 and not is_last:
            ended(child, run_dir, start + rng.uniform(0, start_s), partial(progress.waits_at, most))
        else:
            ended(child, run_dir, float("inf"), partial(progress.has_reached, aim))
            ended(child, run_dir, time.monotonic() + rng.uniform(0, work_s), partial(progress.waits_at, most))
        os.kill(child, signal.SIGKILL)
        moment = time.monotonic() - start
        os.waitpid(child, 0)
        kills.append(record(run_dir, moment, progress))
        newest = step_folders(run_dir)
        if n_left and len(newest) > 1:
            kills[-1]["damage"] = damage(newest[0], n_left, rng)
            n_left -= 1
    if not (run_dir / train.FINAL_FILE).exists():
        ended(begin(config, run_dir, progress), run_dir, float("inf"))
    return kills


def kill_at_each_stage(config: Path, run_dir: Path) -> list[Kill]:
    """End the run before the first file operation of its saves, then before the second, until a life has no more."""
    progress = Progress()
    kills: list[Kill] = []
    for n_calls in range(1, MOST_LIVES):
        start = time.monotonic()
        child = begin(config, run_dir, progress, lambda n=n_calls: die_at(n))  # type: ignore[misc]
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(bad_end(run_dir, status))
            return kills
        kills.append(record(run_dir, time.monotonic() - start, progress))
    raise SystemExit("the run never came to its end")


def record(run_dir: Path, moment_s: float, progress: Progress) -> Kill:
    """A line of the table; the newest checkpoint must be whole."""
    (work, step), newest = progress.get(), latest_checkpoint(run_dir)
    saved = newest.step if newest else 0
    return {"moment_s": moment_s, "step": step, "work": work, "saved": saved, "damage": None}


def damage(checkpoint: Path, number: int, rng: random.Random) -> str:
    """Damage a checkpoint, in a way that depends on `number`; says what was done."""
    file = sorted(checkpoint.iterdir())[number % len(list(checkpoint.iterdir()))]
    way = ("a bit of {} flipped", "{} cut short", "{} deleted")[number % 3]
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if "flipped" in way:
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif "short" in way:
        file.write_bytes(content[:place])
    else:
        file.unlink()
    return way.format(file.name)


def compare(ours: Path, theirs: Path) -> list[str]:
    """What differs between two finished runs: weights and average by their digests, losses and counts by value."""
    differences, digests, rows = [], [], []
    for run_dir in (ours, theirs):
        checkpoint = latest_checkpoint(run_dir)
        assert checkpoint is not None
        files = json.loads((checkpoint.path / "manifest.json").read_text())["files"]
        digests.append({name: files[name]["sha256"] for name in ("model.safetensors", "ema.safetensors")})
        timed = ("seconds", "train/step_ms", "train/tokens_per_s", "train/peak_memory_gib")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        rows.append([{key: value for key, value in line.items() if key not in timed} for line in lines])
    differences += [name for name in digests[0] if digests[0][name] != digests[1][name]]
    if rows[0] != rows[1]:
        differences.append("metrics.jsonl")
    return differences


def table(kills: list[Kill], n_steps: int, differences: list[str], version: str) -> str:
    """The report as Markdown."""
    n_damaged = sum(kill["damage"] is not None for kill in kills)
    processor = processor_name()
    result = "differs in " + ", ".join(differences) if differences else "equals that of a run left alone, bit for bit"
    lines = [
        "# A run killed again and again",
        "",
        f"{date.today()}, {processor}, {os.cpu_count()} CPUs, Python {platform.python_version()}, commit {version}.",
        f"Made by `python -m tests.soak {shlex.join(sys.argv[1:])}`.",
        "",
        f"A tiny Sudoku run of {n_steps} updates, killed {len(kills)} times by SIGKILL; after {n_damaged} of the kills",
        "its newest checkpoint was damaged, so that it went on from the one before. Its end (weights, average,",
        f"records) {result}.",
        "",
        "| kill | seconds after the start | at update | while | newest whole checkpoint | then damaged |",
        "| ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for number, kill in enumerate(kills, start=1):
        step = "" if kill["work"] == "starting" else kill["step"]
        damaged = kill["damage"] or ""
        lines.append(f"| {number} | {kill['moment_s']:.2f} | {step} | {kill['work']} | {kill['saved']} | {damaged} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line; exit status 1 where the results differ or too few kills struck."""
    parser = argparse.ArgumentParser(description="Kill a training run again and again and compare its result.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--damaged", type=int, default=0, help="kills after which the newest checkpoint is damaged")
    parser.add_argument("--stages", action="store_true", help="before each file operation of a save, instead")
    parser.add_argument("--steps", type=int, default=600, help="updates of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args(arguments)
    version = commit()  # of the code that runs, whatever happens to the checkout meanwhile
    gc.freeze()  # or each life's collector would copy all memory
    # tqdm's own lock is one for all lives, and a life that is killed while it holds it would stop all that follow; its
    # monitor is a thread, and a process with threads must not fork.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    settings = tiny_settings({"name": "puma", "n_stages": 5, "collapse_threshold": 0.9}, folder / "boards")
    settings["training"] |= {"max_steps": options.steps, "log_every": 3}  # so that saves fall between records
    save_every = max(1, options.steps // 60)
    settings["training"] |= {"save_every": save_every, "eval_every": 50}
    if options.stages:
        settings["training"] |= {"save_every": 2, "eval_every": options.steps}
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    start_s, work_s = leave_alone(config, folder / "alone")
    if options.stages:
        kills = kill_at_each_stage(config, folder / "killed")
    else:
        kills = kill_at_random(
            config,
            folder / "killed",
            n_kills=options.kills,
            n_damaged=options.damaged,
            n_steps=options.steps,
            save_every=save_every,
            start_s=start_s,
            work_s=work_s / options.kills,
            seed=options.seed,
        )
    differences = compare(folder / "alone", folder / "killed")
    report = table(kills, options.steps, differences, version)
    print(report)
    if options.out:
        options.out.write_text(report, encoding="utf-8")
    n_damaged = sum(kill["damage"] is not None for kill in kills)
    if differences or (not options.stages and (len(kills) < options.kills or n_damaged < options.damaged)):
        raise SystemExit(f"{len(kills)} kills, {n_damaged} damaged, differences: {differences}; see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
