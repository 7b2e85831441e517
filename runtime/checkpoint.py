"""Checkpoints that stay valid if the process is killed at any moment.

A checkpoint is a folder `checkpoints/step_00001000` of the run directory. It holds the weights (and their average) as
safetensors, the settings, the optimizer's state, one file per rank with the state of objective, stream and generator,
and a manifest with size and SHA-256 of every file. It is written under a temporary name, synced and renamed, so it is
either complete or absent. Reading a checkpoint never executes code from it.

A checkpoint is deleted only after those that are kept have been read in full. Of these, one that is damaged is renamed
to `step_00001000.damaged`, which every reader ignores, and one that cannot be read just now, for want of memory,
permissions or the network, stays under its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from base.files import WriteError, reported, sync, write_text
from base.memory import TooLittleMemory, check_memory
from base.reading import MAX_INTEGER, BadInput, check_archive, read_json, reading
from config import Config
from data.hashes import hash_file
from runtime.config_file import dump_config, read_config
from runtime.distributed import World, gather

MANIFEST = "manifest.json"
FORMAT = 3
STEP_NAME = re.compile(r"step_[0-9]{8,}")
CHOICE = re.compile("best|[0-9]{1,18}")  # of a run's checkpoints, after an @
DAMAGE_REMEDY = "delete the checkpoint, or copy it again"
# Of a checkpoint that is in order: its files match its manifest.
MISFIT_REMEDY = "restore the code that wrote it, or give another --run-dir (PUMA_TRACEBACK=1 shows the line)"
# Errors of reading that come of the checkpoint itself: a file is missing or of another kind, or a block unreadable.
DAMAGED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
# Messages of RuntimeErrors that torch raises for host memory and CUDA libraries.
NO_MEMORY = re.compile("can(?:'|no)t allocate memory", re.IGNORECASE)
CUDA_ERROR = re.compile("CUDA error|CUDNN_STATUS")

T = TypeVar("T")


class OtherVersion(BadInput):
    """A checkpoint in the format of another version of this code."""


class FileFacts(TypedDict):
    """What the manifest holds of a file."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """What a reader relies on in the manifest; it also holds its format and its own digest."""

    step: Annotated[int, Field(ge=0, lt=MAX_INTEGER)]
    n_ranks: Annotated[int, Field(ge=1)]
    score: float | None
    files: dict[str, FileFacts]


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files match its manifest."""

    path: Path
    step: int
    n_ranks: int
    score: float | None  # higher is better; None if it was not evaluated

    def weights(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of `model` or `ema`; None if the file does not exist. Raises as `reading_checkpoint`."""
        file = self.path / f"{name}.safetensors"
        with reading_checkpoint(self.path, file.name):
            return load_file(file) if file.exists() else None

    def state(self, name: str, *, mapped: bool = False) -> dict[str, Any]:
        """State saved as `train` or `rank_<r>`: plain data and tensors. Raises as `reading_checkpoint`.

        Args:
            mapped: tensors are read from the file when they are used, and only then take memory. They must be copied
                before the checkpoint can be deleted.
        """
        file = self.path / f"{name}.pt"
        with reading_checkpoint(self.path, file.name):
            n_bytes = check_archive(file, max_growth=1)
            if not mapped:
                check_memory(n_bytes, "its content")
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            return state

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """Settings of the run when it was saved, with `section.key=value` overrides and the tokenizer of the run.

        Raises:
            ValueError: a setting is wrong, or the tokenizer is missing; see `data.dataset.DataSettings.in_run`.
        """
        config = read_config(self.path / "config.yaml", overrides)
        if any(text.startswith("data.tokenizer=") for text in overrides):
            return config
        return config.model_copy(update={"data": config.data.in_run(run_dir_of(self.path))})


def run_dir_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint's folder, by its place."""
    return Path(os.path.normpath(checkpoint / ".." / ".."))


@contextmanager
def reading_checkpoint(path: Path, file: str) -> Iterator[None]:
    """Tell damage of a file of a checkpoint from errors of the machine, after which it may be in order.

    Only what reads files and checks their content belongs inside. Calls can be nested.

    Raises:
        BadInput: the file is damaged; the remedy is to delete the checkpoint.
        OSError: it cannot be read now, or there is too little memory. Other errors of the machine (device, ranks) pass
            unchanged too.
    """
    with _except_of_machine(f"checkpoint {path}: {file}", DAMAGE_REMEDY, "cannot be read"):
        yield


@contextmanager
def loading_checkpoint(path: Path) -> Iterator[None]:
    """The same for the code that takes up what was read: if that fails, the fault is not the checkpoint's.

    The usual cause is an objective or a model whose state has changed since.

    Raises:
        BadInput: the state does not fit this code; the message never proposes to delete the checkpoint.
        OSError: as `reading_checkpoint`.
    """
    with _except_of_machine(f"checkpoint {path}", MISFIT_REMEDY, "does not fit this code"):
        yield


@contextmanager
def _except_of_machine(what: str, remedy: str, problem: str) -> Iterator[None]:
    """`reading`, but errors of the machine are raised as OSError if of memory, else unchanged."""
    of_machine: Exception | None = None
    with reading(what, remedy, problem):
        try:
            yield
        except Exception as error:
            if not _is_of_machine(error):
                raise
            of_machine = error
    if of_machine is not None:
        if _is_of_memory(of_machine):
            raise OSError(f"{what} cannot be read now ({of_machine or 'too little memory'})") from of_machine
        raise of_machine


def _is_of_machine(error: Exception) -> bool:
    """Whether an error of reading a checkpoint says nothing about what the checkpoint holds."""
    if isinstance(error, OSError):
        return error.errno not in DAMAGED
    known = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError)
    return _is_of_memory(error) or isinstance(error, known) or _says(error, CUDA_ERROR)


def _is_of_memory(error: Exception) -> bool:
    """Whether the host has too little memory."""
    return isinstance(error, (MemoryError, TooLittleMemory)) or _says(error, NO_MEMORY)


def _says(error: Exception, pattern: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and pattern.search(str(error)) is not None


def save_checkpoint(
    run_dir: Path,
    world: World,
    config: Config,
    step: int,
    *,
    weights: dict[str, dict[str, Tensor]],
    train_state: dict[str, Any],
    rank_state: dict[str, Any],
    score: float | None,
) -> None:
    """Write a checkpoint; every rank calls this.

    Args:
        weights: `{"model": tensors, "ema": tensors}`, `ema` only where there is one. Those of the main process are
            saved, the tensors of others may be empty.
        train_state: that of the main process is saved.
        rank_state: state of this rank.
        score: selects the best checkpoint, higher is better.

    Raises:
        WriteError: the disk is full or fails, on any rank; all ranks raise. Earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    target, scratch = folder / step_name(step), folder / f".{step_name(step)}.incomplete"

    def prepare() -> None:
        with reported(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def write() -> list[tuple[str, dict[str, Any]]]:
        files = [_save_state(scratch / f"rank_{world.rank}.pt", rank_state)]
        if world.is_main:
            files += [save_tensors(scratch / f"{name}.safetensors", tensors) for name, tensors in weights.items()]
            files.append(_save_state(scratch / "train.pt", train_state))
            write_text(scratch / "config.yaml", dump_config(config))
            files.append(_seal(scratch / "config.yaml"))
        return files

    def publish() -> None:
        manifest = {"format": FORMAT, "step": step, "n_ranks": world.n_ranks, "score": score, "files": sealed}
        _write_manifest(scratch, manifest)
        with reported(target):
            if target.exists():
                _delete(target)
            scratch.rename(target)
            sync(folder)
        _prune(run_dir, config.training.keep_checkpoints, written=target)

    _together(prepare if world.is_main else None)
    sealed = {name: facts for part in _together(write) if part is not None for name, facts in part}
    _together(publish if world.is_main else None)


def score_checkpoint(run_dir: Path, world: World, config: Config, step: int, score: float) -> None:
    """Add the score to the checkpoint of `step`, which was saved before its evaluation; every rank calls this.

    Raises:
        WriteError: the disk is full or fails, or the checkpoint is damaged; all ranks raise, and it is untouched.
    """
    path = run_dir / "checkpoints" / step_name(step)

    def write() -> None:
        with reported(path / MANIFEST), reading_checkpoint(path, MANIFEST):
            manifest = read_json(path / MANIFEST)
            del manifest["sha256"]
        _write_manifest(path, manifest | {"score": score})
        _prune(run_dir, config.training.keep_checkpoints, written=path)

    _together(write if world.is_main else None)


def _together(work: Callable[[], T] | None) -> list[T | None]:
    """Run `work` on this rank (None: nothing to do here); every rank's result, in the order of ranks, on every rank.

    Raises:
        WriteError: the work of a rank has raised it, or another OSError or ValueError. All ranks raise, so none waits
            for one that has ended.
    """
    result, error = None, None
    try:
        result = work() if work is not None else None
    except (OSError, ValueError) as raised:
        error = raised
    outcomes = gather((result, None if error is None else str(error)))
    for _, message in outcomes:
        if message is not None:
            raise WriteError(message) from error
    return [each for each, _ in outcomes]


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its manifest; damaged ones are skipped with a warning.

    Raises:
        OtherVersion: it was written by another version of this code.
        OSError: it cannot be read now, though it may be in order (memory, permissions, the network).
    """
    for path in step_folders(run_dir):
        try:
            return _open_step(path)
        except OtherVersion:
            raise
        except ValueError as error:
            warnings.warn(f"{error}; trying the previous one", RuntimeWarning, stacklevel=2)
    return None


def resumable_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint from which the run continues: see `latest_checkpoint`.

    Newer ones, which are damaged, are set aside, so that none of them passes for a later state of the run. Only the
    process that holds the run's lock may call this.

    Raises:
        ValueError: there are checkpoints, but all are damaged; none is renamed. Also as `latest_checkpoint`.
        WriteError: one cannot be renamed.
    """
    checkpoint, paths = latest_checkpoint(run_dir), step_folders(run_dir)
    if checkpoint is None and paths:
        raise ValueError(
            f"{run_dir}: all its checkpoints are damaged ({len(paths)}): restore one, or delete "
            f"{run_dir / 'checkpoints'} to start at step 0"
        )
    for path in paths:
        if checkpoint is not None and path == checkpoint.path:
            break
        _set_aside(path)
    return checkpoint


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a checkpoint folder, or a run directory, whose newest checkpoint is taken.

    `runs/NAME@best` is the one of the highest score of a run, `runs/NAME@5000` the one of a step.

    Raises:
        ValueError: no checkpoint there, or only damaged ones; or the chosen one is missing or damaged.
        OSError: as `open_checkpoint`.
    """
    run_dir, choice = split_choice(path)
    if choice is not None:
        return _open_step(chosen_folder(run_dir, choice))
    if (run_dir / MANIFEST).exists():
        return open_checkpoint(run_dir)
    found = latest_checkpoint(run_dir)
    if found is None:
        raise _no_checkpoint(run_dir)
    return found


def split_choice(path: str | Path) -> tuple[Path, str | None]:
    """Split `runs/NAME@best` or `runs/NAME@5000` into a run directory and what is chosen of it.

    Nothing is chosen (None) by a path that exists: the name of a folder may have an @.
    """
    path = Path(path)
    name, _, choice = path.name.rpartition("@")
    if not name or path.exists():
        return path, None
    run_dir = path.with_name(name)
    return (run_dir, choice) if CHOICE.fullmatch(choice) or run_dir.is_dir() else (path, None)


def chosen_folder(run_dir: Path, choice: str) -> Path:
    """The folder of a checkpoint of a run, which need not be in order.

    Args:
        choice: `best`, or a step.

    Raises:
        ValueError: there is none; the message lists the steps that there are.
        OSError: a score cannot be read now, so the best one is unknown.
    """
    paths = step_folders(run_dir)
    if not paths:
        raise _no_checkpoint(run_dir)
    scores, unread = _read_scores(paths)
    best = next(iter(_best_first(scores)), None)
    if choice == "best":
        if unread:
            raise OSError(f"the score of checkpoint {unread[0]} cannot be read now")
        if best is not None:
            return best
        problem = "no evaluated checkpoint, so none is the best"
    elif CHOICE.fullmatch(choice):
        chosen = run_dir / "checkpoints" / step_name(int(choice))
        if chosen in paths:
            return chosen
        problem = f"no checkpoint of step {choice}"
    else:
        problem = f"no checkpoint {choice!r} (after @ comes best or a step)"
    steps = [f"{step_of(path)}{' (best)' * (path == best)}" for path in reversed(paths)]
    raise ValueError(f"{run_dir} has {problem}: there are {', '.join(steps)}")


def _no_checkpoint(path: Path) -> ValueError:
    return ValueError(f"{path} holds no usable checkpoint: name a run directory or a checkpoint folder")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check its files against its manifest.

    Raises:
        ValueError: a file is missing, differs in size or content, or is damaged; the message names it.
        OSError: a file cannot be read now.
    """
    with reading_checkpoint(path, MANIFEST):
        content = read_json(path / MANIFEST)
        version = content["format"]
        if type(version) is not int or not 0 < version < 1000:
            raise ValueError(f"format {version!r} is not the number of one")
        if version != FORMAT:
            raise OtherVersion(
                f"checkpoint {path} has format {version}, this code reads {FORMAT}: use the version of the code that "
                "wrote it"
            )
        if content.pop("sha256") != _own_digest(content):
            raise ValueError("its content has changed since it was written")
        manifest = _MANIFEST.validate_python(content, strict=True)
        files, n_ranks = manifest["files"], manifest["n_ranks"]
        if n_ranks > len(files):
            raise ValueError(f"{n_ranks} processes in {len(files)} files")
        ranks = {f"rank_{rank}.pt" for rank in range(n_ranks)}
        missing = ranks.union(("model.safetensors", "train.pt", "config.yaml")) - files.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, a file outside the checkpoint's folder")
    for name, facts in files.items():
        file, n_bytes = path / name, facts["bytes"]
        with reading_checkpoint(path, name):  # a disk may fail
            n_found = file.stat().st_size if file.is_file() else None
            is_same = n_found == n_bytes and hash_file(file) == facts["sha256"]
        if n_found is None:
            raise ValueError(f"checkpoint {path}: {name} is missing")
        if n_found != n_bytes:
            raise ValueError(f"checkpoint {path}: {name} has {n_found} bytes, not {n_bytes}")
        if not is_same:
            raise ValueError(f"checkpoint {path}: the content of {name} has changed since it was written")
    return Checkpoint(path, manifest["step"], manifest["n_ranks"], manifest["score"])


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Write tensors as safetensors and sync; returns the file's name and manifest entry. Raises WriteError."""
    with reported(path):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        return _seal(path)


def _save_state(path: Path, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    with reported(path):
        torch.save(state, path)
        return _seal(path)


def _seal(path: Path) -> tuple[str, dict[str, Any]]:
    """Sync a file to disk; returns its name and manifest entry."""
    sync(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _own_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, so that a flipped bit in the manifest is noticed."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the checkpoint folder `path`, with its own digest. Raises WriteError."""
    write_text(path / MANIFEST, json.dumps(manifest | {"sha256": _own_digest(manifest)}, indent=1))


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def step_folders(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by their names, newest first, readable or not."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in folders if STEP_NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _open_step(path: Path) -> Checkpoint:
    """As `open_checkpoint`, for a folder whose name has the step."""
    checkpoint = open_checkpoint(path)
    if path.name != step_name(checkpoint.step):
        raise ValueError(f"checkpoint {path}: it was saved at step {checkpoint.step}, not at that of its name")
    return checkpoint


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to a name that no reader takes, with a warning. Raises WriteError."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.damaged_{number}")
    with reported(target):
        path.rename(target)
    warnings.warn(
        f"checkpoint {path} is damaged and was renamed to {target.name}: delete it when it is of no more use",
        RuntimeWarning,
        stacklevel=4,
    )


def _prune(run_dir: Path, n_newest: int, written: Path) -> None:
    """Delete all but the newest checkpoints and the best one, and the folders of interrupted saves.

    What stays is read in full first, except `written`, which was read for its digests just now. What is damaged is set
    aside, and an older one takes its place; an older one stays also beside what cannot be read now, or only by another
    version. A failure to delete or to rename costs space and nothing else.
    """
    for leftover in (run_dir / "checkpoints").glob(".step_*.incomplete"):
        shutil.rmtree(leftover, ignore_errors=True)
    paths = step_folders(run_dir)
    scores, unread = _read_scores(paths)
    by_score = _best_first(scores)
    if set(paths) <= {written, *paths[:n_newest], *by_score[:1]}:
        return  # without reading any
    newest, failed = _first_sound([path for path in paths if path != written], n_newest - 1, known=set())
    best, also_failed = _first_sound([path for path in by_score if path not in failed], 1, known={written, *newest})
    failed |= also_failed
    kept = {written, *newest, *best, *failed, *unread}
    for path, error in failed.items():
        if isinstance(error, (OtherVersion, OSError)):
            continue
        try:
            _set_aside(path)
        except WriteError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
    for path in paths:
        if path not in kept:
            with suppress(OSError):
                _delete(path)


def _first_sound(paths: Sequence[Path], n: int, known: set[Path]) -> tuple[list[Path], dict[Path, Exception]]:
    """The first `n` checkpoints that can be read, and why others before the last of these cannot.

    Args:
        known: which can be read, so that they are not read again.
    """
    sound: list[Path] = []
    failed: dict[Path, Exception] = {}
    for path in paths:
        if len(sound) == n:
            break
        try:
            if path not in known:
                _open_step(path)
            sound.append(path)
        except (ValueError, OSError) as error:
            failed[path] = error
    return sound, failed


def _delete(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a kill leaves no half of it under the name of a whole one."""
    hidden = path.with_name(f".{path.name}.deleted.incomplete")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _best_first(scores: dict[Path, float]) -> list[Path]:
    """Checkpoints in the order of their scores, of equal ones the newest first."""
    return sorted(scores, key=lambda path: (scores[path], step_of(path)), reverse=True)


def _read_scores(paths: Sequence[Path]) -> tuple[dict[Path, float], list[Path]]:
    """The scores of the checkpoints that have one, and those whose score cannot be read now."""
    scores, unread = {}, []
    for path in paths:
        try:
            with reading_checkpoint(path, MANIFEST):
                scores[path] = float(read_json(path / MANIFEST)["score"])
        except OSError:
            unread.append(path)
        except ValueError:  # it has none, or is damaged
            continue
    return scores, unread
