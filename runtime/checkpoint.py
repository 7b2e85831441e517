"""Checkpoints that stay valid if the process is killed at any moment.

A checkpoint is a folder `checkpoints/step_00001000` of the run directory. It holds the weights (and their average) as
safetensors, the settings, the optimizer's state, one file per rank with the state of objective, stream and generator,
and a manifest with size and SHA-256 of every file. It is written under a temporary name, synced and renamed, so it is
either complete or absent. Reading a checkpoint never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import Config
from data.files import reported, sync_folder, write_text
from data.hashes import hash_file
from runtime.config_file import dump_config, read_config
from runtime.distributed import World, barrier, gather

MANIFEST = "manifest.json"
FORMAT = 2
MANIFEST_MAX_BYTES = 1 << 24  # a manifest has some kilobytes; a larger one is refused unread


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files match its manifest."""

    path: Path
    step: int
    n_ranks: int
    score: float | None  # higher is better; None if it was not evaluated

    def weights(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of `model` or `ema`; None if the file does not exist. Raises ValueError if it cannot be read."""
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file) if file.exists() else None
        except SafetensorError as error:
            raise ValueError(f"checkpoint {self.path}: {file.name} cannot be read ({error})") from None

    def state(self, name: str) -> dict[str, Any]:
        """State saved as `train` or `rank_<r>`; ValueError if it holds anything but plain data and tensors."""
        try:
            state: dict[str, Any] = torch.load(self.path / f"{name}.pt", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"checkpoint {self.path}: {name}.pt cannot be read ({reason})") from None
        return state

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """Settings of the run when it was saved, with `section.key=value` overrides."""
        return read_config(self.path / "config.yaml", overrides)


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
        weights: `{"model": tensors, "ema": tensors}`, `ema` only where there is one; the same on all ranks.
        train_state: state that is equal on all ranks, saved once.
        rank_state: state of this rank.
        score: selects the best checkpoint, higher is better.

    Raises:
        WriteError: the disk is full or fails; earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    target, scratch = folder / f"step_{step:08d}", folder / f".step_{step:08d}.incomplete"
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    barrier()
    files = [_save_state(scratch / f"rank_{world.rank}.pt", rank_state)]
    if world.is_main:
        for name, tensors in weights.items():
            files.append(save_tensors(scratch / f"{name}.safetensors", tensors))
        files.append(_save_state(scratch / "train.pt", train_state))
        write_text(scratch / "config.yaml", dump_config(config))
        files.append(_seal(scratch / "config.yaml"))
    sealed = {name: facts for part in gather(files) for name, facts in part}
    if world.is_main:
        manifest = {"format": FORMAT, "step": step, "n_ranks": world.n_ranks, "score": score, "files": sealed}
        write_text(scratch / MANIFEST, json.dumps(manifest | {"sha256": _own_digest(manifest)}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        sync_folder(folder)
        _prune(folder, config.training.keep_checkpoints)
    barrier()


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its manifest; damaged ones are skipped with a warning."""
    for path in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        try:
            return open_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the previous one", RuntimeWarning, stacklevel=2)
    return None


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a checkpoint folder, or a run directory, whose newest checkpoint is taken.

    Raises:
        ValueError: no checkpoint there, or only damaged ones.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return open_checkpoint(path)
    found = latest_checkpoint(path)
    if found is None:
        raise ValueError(f"{path} holds no usable checkpoint: name a run directory or a checkpoint folder")
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check its files against its manifest.

    Raises:
        ValueError: a file is missing or differs in size or content; the message names it.
    """
    try:
        if (path / MANIFEST).stat().st_size > MANIFEST_MAX_BYTES:
            raise ValueError(f"it has more than {MANIFEST_MAX_BYTES} bytes")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this code reads {FORMAT}")
        if manifest.pop("sha256") != _own_digest(manifest):
            raise ValueError("its content has changed since it was written")
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        n_ranks = manifest["n_ranks"]
        if type(manifest["step"]) is not int or type(n_ranks) is not int or not 1 <= n_ranks <= len(files):
            raise ValueError(f"step {manifest['step']!r} of {n_ranks!r} processes in {len(files)} files")
        ranks = {f"rank_{rank}.pt" for rank in range(n_ranks)}
        missing = ranks.union(("model.safetensors", "train.pt", "config.yaml")) - files.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: {MANIFEST} cannot be read ({error})") from None
    for name, (n_bytes, digest) in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"checkpoint {path}: {name} is missing")
        if file.stat().st_size != n_bytes:
            raise ValueError(f"checkpoint {path}: {name} has {file.stat().st_size} bytes, not {n_bytes}")
        if hash_file(file) != digest:
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
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _own_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, so that a flipped bit in the manifest is noticed."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, n_newest: int) -> None:
    """Delete all but the newest checkpoints and the best one, and the folders of interrupted saves."""
    for leftover in folder.glob(".step_*.incomplete"):
        shutil.rmtree(leftover, ignore_errors=True)
    paths = sorted(folder.glob("step_*"))
    scores = {path: score for path in paths if (score := _score(path)) is not None}
    kept = set(paths[-n_newest:]) | ({max(scores, key=lambda path: (scores[path], path))} if scores else set())
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _score(path: Path) -> float | None:
    try:
        return float(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
