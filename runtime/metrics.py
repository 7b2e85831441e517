"""Records of a run: `metrics.jsonl`, and wandb if the settings enable it.

Each row of metrics.jsonl is one JSON object with `step`, `seconds` (of training, without evaluation) and
`sequences_distinct`, the three x-axes of the curves. wandb gets the same rows; an error of wandb gives one warning and
does not stop the run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import WandbSettings
from data.files import write_text
from data.foreign import parse_object, read_lines, reading
from runtime.distributed import World, sum_over_ranks

METRICS_FILE = "metrics.jsonl"
WANDB_INIT_TIMEOUT_S = 60


class Recorder:
    """Writes the records; only the main process has one."""

    def __init__(self, run_dir: Path, settings: WandbSettings, config: dict[str, Any], from_step: int) -> None:
        """Open the records of a run that continues at `from_step`; rows of later steps are deleted.

        Raises:
            WriteError: the records cannot be written.
        """
        self.path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] <= from_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb = _start_wandb(run_dir, settings, config)

    def write(self, values: dict[str, Any]) -> None:
        """Append one row; values that are not finite are left out."""
        row = {
            key: value for key, value in values.items() if not (isinstance(value, float) and not math.isfinite(value))
        }
        self._append(json.dumps(row) + "\n")
        self._send(row)

    def _append(self, line: str) -> None:
        """Append a whole line, or nothing if the disk is full; training continues."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                n_before, content = file.seek(0, os.SEEK_END), line.encode()
                try:
                    while content:  # a write to a nearly full disk may be partial
                        content = content[file.write(content) :]
                except OSError:
                    file.truncate(n_before)
                    raise
        except OSError as error:
            _warn_unwritten(self.path, error)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Write rows (all with the same keys) to `<name>_<step>.jsonl` and show them in wandb."""
        path = self.path.with_name(f"{name}_{step:08d}.jsonl")
        try:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            _warn_unwritten(path, error)
        if self._wandb is not None:
            import wandb

            # As text: a column of a wandb table holds one type, and programs return values of any type.
            cells = [[str(value) for value in row.values()] for row in rows]
            self._send({name: wandb.Table(columns=list(rows[0]), data=cells), "step": step})

    def picture(self, name: str, path: Path) -> None:
        """Show a picture file in wandb."""
        if self._wandb is not None:
            try:
                import wandb

                self._wandb.log({name: wandb.Image(str(path))})
            except Exception as error:
                self._give_up(error)

    def page(self, path: Path) -> None:
        """Keep the run's page as an artefact in wandb."""
        if self._wandb is not None:
            try:
                import wandb

                artefact = wandb.Artifact(f"report-{self._wandb.id}", type="report")
                artefact.add_file(str(path))
                self._wandb.log_artifact(artefact)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Finish the wandb run."""
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                _warn(error)
            self._wandb = None

    def _send(self, row: dict[str, Any]) -> None:
        if self._wandb is None:
            return
        try:
            import wandb

            histograms = {
                key: wandb.Histogram(np_histogram=(np.array(value), np.arange(len(value) + 1)))
                for key, value in row.items()
                if isinstance(value, list)
            }
            self._wandb.log(row | histograms)
        except Exception as error:  # no failure of network or service stops training
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _warn(error)
        self._wandb = None


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; none without one. Lines that hold no row are left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    with reading(f"{path}", "move it away"):
        for _, line in read_lines(path):
            try:
                row = parse_object(line)
            except (ValueError, RecursionError):  # cut short by a kill or a full disk, or damaged
                continue
            if type(row.get("step")) is int:
                yield row


def reduce_metrics(metrics: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Metrics over all ranks as plain numbers and lists: `sequences_...` are summed, all others averaged."""
    flat = torch.cat([values.to(world.device, torch.float64).flatten() for values in metrics.values()])
    totals = sum_over_ranks(flat).split([values.numel() for values in metrics.values()])
    reduced: dict[str, Any] = {}
    for (name, values), total in zip(metrics.items(), totals, strict=True):
        result = total if name.startswith("sequences_") else total / world.n_ranks
        reduced[name] = result.tolist() if values.ndim else float(result)
    return reduced


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux's ru_maxrss starts at the peak of the parent process; VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere


def _start_wandb(run_dir: Path, settings: WandbSettings, config: dict[str, Any]) -> Any:
    """A wandb run with the id kept in the run directory, offline if the network fails; None if it is off or fails."""
    if settings.mode == "disabled":
        return None
    try:
        import wandb

        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "name": settings.name or run_dir.name,
            "id": id_file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config,
            "settings": wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S),
        }
        try:
            run = wandb.init(mode=settings.mode, **options)
        except Exception as error:
            if settings.mode == "offline":
                raise
            warnings.warn(
                f"wandb cannot go online ({error}); records go to {run_dir}/wandb: upload them later with `wandb sync`",
                RuntimeWarning,
                stacklevel=3,
            )
            wandb.teardown()  # the failed run still holds the id, so wandb would refuse it
            run = wandb.init(mode="offline", **options)
        for axis in ("step", "seconds", "sequences_distinct"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        return run
    except Exception as error:
        _warn(error)
        return None


def _warn_unwritten(path: Path, error: OSError) -> None:
    warnings.warn(f"a record is lost: {path} cannot be written ({error.strerror})", RuntimeWarning, stacklevel=4)


def _warn(error: Exception) -> None:
    warnings.warn(f"wandb is off for the rest of this run: {error}", RuntimeWarning, stacklevel=3)
