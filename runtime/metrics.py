"""Records of a run: `metrics.jsonl`, and wandb and TensorBoard if the settings enable them.

Each row of metrics.jsonl is one JSON object with `step`, `seconds` (of training, without evaluation),
`sequences_distinct` and `tokens` (trained on, prompts and padding included), the x-axes of the curves. wandb and
TensorBoard get the same rows, and when a run resumes those that they lack; an error of theirs gives one warning and
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

from base.commands import say
from base.files import WriteError, reported, write_text
from base.reading import BadInput, parse_object, read_lines, reading
from config import Config, WandbMode
from runtime.config_file import setting_name
from runtime.distributed import World, sum_over_ranks

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
WANDB_INIT_TIMEOUT_S = 60
PlainMode = Literal["online", "offline", "disabled"]
WANDB_MODES: tuple[PlainMode, ...] = ("online", "offline", "disabled")
WANDB_HOST = "api.wandb.ai"
MAX_WANDB_BINS = 512
HEADLINE = "validation/accuracy/"  # the first such key of a row is the headline figure


class Recorder:
    """Writes the records; only the main process has one."""

    def __init__(self, run_dir: Path, config: Config, from_step: int) -> None:
        """Open the records of a run that continues at `from_step`; rows and samples of later steps are deleted.

        Raises:
            WriteError: the records cannot be written.
        """
        self.path = run_dir / METRICS_FILE
        # So far, for the summary of wandb.
        self._best_accuracy, self._best_loss = -1.0, math.inf
        kept = [row for row in read_metrics(run_dir) if row["step"] <= from_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        for step, path in samples_files(run_dir).items():
            if step > from_step:
                with reported(path):
                    path.unlink()
        wandb = _start_wandb(run_dir, config)
        # The steps of wandb are those of training, so its next step tells which rows it has: a process that is killed
        # may leave some unsent, and may have sent later ones, which training is about to repeat. Offline it has none.
        self._wandb_step = 0 if wandb is None else wandb.step
        tensorboard = _start_tensorboard(run_dir) if config.training.tensorboard else None
        self._services: dict[str, Any] = {"wandb": wandb, "TensorBoard": tensorboard}  # None: off
        for row in kept if wandb is not None or tensorboard is not None else ():
            samples: list[dict[str, Any]] = []
            with suppress(BadInput):
                samples = read_samples(run_dir, row["step"])
            self._send(row, samples)

    def write(self, values: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Append one row, without values that are not finite, and write sampled answers to `samples_<step>.jsonl`.

        Args:
            samples: all with the same keys.
        """
        row = {
            key: value for key, value in values.items() if not (isinstance(value, float) and not math.isfinite(value))
        }
        if samples:
            path = _samples_file(self.path.parent, row["step"])
            try:
                write_text(path, "".join(json.dumps(each) + "\n" for each in samples))
            except WriteError as error:
                _warn_lost(error)
        self._append(json.dumps(row) + "\n")
        self._send(row, samples)

    def _append(self, line: str) -> None:
        """Append a whole line, or nothing if the disk is full; training continues."""
        try:
            with reported(self.path), open(self.path, "ab", buffering=0) as file:
                n_before, content = file.seek(0, os.SEEK_END), line.encode()
                try:
                    while content:  # a write to a nearly full disk may be partial
                        content = content[file.write(content) :]
                except OSError:
                    file.truncate(n_before)
                    raise
        except WriteError as error:
            _warn_lost(error)

    def final(self, figures: dict[str, Any], pictures: dict[str, Path], page: Path | None) -> None:
        """Show the result of a complete run in wandb.

        Args:
            figures: for its summary, as `final/<name>`.
            pictures: files by name.
            page: the run's page, kept as an artefact; None if there is none.
        """
        with self._talking_to("wandb") as run:
            if run is None:
                return
            import wandb

            run.summary.update({f"final/{name}": value for name, value in figures.items()})
            if pictures:
                run.log({name: wandb.Image(str(path)) for name, path in pictures.items()})
            if page is not None:
                artefact = wandb.Artifact(f"report-{run.id}", type="report")
                artefact.add_file(str(page))
                run.log_artifact(artefact)

    def close(self) -> None:
        """Finish the wandb run and the files of TensorBoard."""
        with self._talking_to("wandb") as run:
            if run is not None:
                run.finish()
        with self._talking_to("TensorBoard") as writer:
            if writer is not None:
                writer.close()
        self._services.clear()

    def _send(self, row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """Pass a row on to wandb and TensorBoard."""
        # Accuracy of the first sampling rule, if this row has one; a run that asks no questions has only the loss.
        accuracy: Any = next((value for key, value in row.items() if key.startswith(HEADLINE)), None)
        loss: Any = row.get("validation/loss")
        best: dict[str, Any] = {}
        if isinstance(accuracy, (int, float)):
            if accuracy > self._best_accuracy:
                self._best_accuracy = float(accuracy)
                best = {"best/accuracy": accuracy, "best/step": row["step"]}
        elif isinstance(loss, (int, float)) and loss < self._best_loss:
            self._best_loss = float(loss)
            best = {"best/loss": loss, "best/step": row["step"]}
        with self._talking_to("wandb") as run:
            if run is not None:
                if row["step"] >= self._wandb_step:
                    run.log(row | _wandb_media(row, samples), step=row["step"], commit=True)
                if best:
                    run.summary.update(best)
        with self._talking_to("TensorBoard") as writer:
            if writer is not None:
                for key, value in row.items():
                    if key != "step" and isinstance(value, (int, float)):
                        writer.add_scalar(key, value, row["step"])
                writer.flush()

    @contextmanager
    def _talking_to(self, service: Literal["wandb", "TensorBoard"]) -> Iterator[Any]:
        """The wandb run or the writer of TensorBoard's files; None if it is off.

        No failure of network, service or disk stops training: the service is off from then on.
        """
        try:
            yield self._services.get(service)
        except Exception as error:
            warnings.warn(f"{service} is off for the rest of this run: {error}", RuntimeWarning, stacklevel=3)
            self._services[service] = None


def _samples_file(run_dir: Path, step: int) -> Path:
    return run_dir / f"samples_{step:08d}.jsonl"


def samples_files(run_dir: Path) -> dict[int, Path]:
    """The files of sampled answers in a run directory, by the step at which the run was evaluated."""
    numbers = {path: path.stem.removeprefix("samples_") for path in run_dir.glob("samples_*.jsonl")}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The answers sampled at a step; none without their file. Raises BadInput if it cannot be read."""
    return list(_read_objects(_samples_file(run_dir, step), "delete it; only the samples are lost"))


def _wandb_media(row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists of a row as histograms, and samples as a table."""
    import wandb

    media: dict[str, Any] = {
        key: wandb.Histogram(np_histogram=_histogram(value)) for key, value in row.items() if isinstance(value, list)
    }
    if samples:
        # As text: a column of a wandb table holds one type, and programs return values of any type.
        cells = [[str(value) for value in each.values()] for each in samples]
        media["samples"] = wandb.Table(columns=list(samples[0]), data=cells)
    return media


def _histogram(counts: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Counts and the edges of their bins, of which wandb takes 512: neighbours share one if there are more."""
    width = -(-len(counts) // MAX_WANDB_BINS)
    starts = np.arange(0, len(counts), width)
    return np.add.reduceat(counts, starts), np.append(starts, len(counts))


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; none without one. Raises BadInput if it cannot be read."""
    return (row for row in _read_objects(run_dir / METRICS_FILE, "move it away") if type(row.get("step")) is int)


def _read_objects(path: Path, remedy: str) -> Iterator[dict[str, Any]]:
    """The objects in a .jsonl file that a run writes, by `reading`; other lines are left out."""
    if not path.exists():
        return
    with reading(f"{path}", remedy):
        for _, line in read_lines(path):
            try:
                found = parse_object(line)
            except (ValueError, RecursionError):  # cut short by a kill or a full disk, or damaged
                continue
            yield found


def reduce_metrics(metrics: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Metrics over all ranks as plain numbers and lists: `sequences_...` are summed, all others averaged."""
    flat = torch.cat([values.to(world.device, torch.float64).flatten() for values in metrics.values()])
    totals = sum_over_ranks(flat).cpu().split([values.numel() for values in metrics.values()])
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


def wandb_mode(mode: WandbMode) -> PlainMode:
    """The mode of wandb on this machine: `auto` is $WANDB_MODE, else online if there is a key, else disabled."""
    if mode != "auto":
        return mode
    for wanted in WANDB_MODES:
        if os.environ.get("WANDB_MODE") == wanted:
            return wanted
    if _has_wandb_key():
        return "online"
    say("wandb is off: no key is configured; `wandb login` switches it on, or wandb.mode=offline")
    return "disabled"


def _has_wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or WANDB_HOST
    try:
        return netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, NetrcParseError, RuntimeError):  # no file, a damaged one, no home
        return False


def _start_wandb(run_dir: Path, config: Config) -> Any:
    """A wandb run with the id kept in the run directory, offline if the network fails; None if it is off or fails."""
    settings = config.wandb
    mode = wandb_mode(settings.mode)
    if mode == "disabled":
        return None
    try:
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
        if not run_id:  # a file on a full disk may be empty
            run_id = secrets.token_hex(4)
            write_text(id_file, run_id)
        options: dict[str, Any] = {
            "project": settings.project,
            "entity": settings.entity,
            "name": settings.name or run_dir.name,
            "group": settings.group or setting_name(config),
            "job_type": settings.job_type,
            "tags": list(settings.tags),
            "id": run_id,
            "resume": "allow",
            "dir": str(run_dir),
            "config": config.model_dump(mode="json"),
            "settings": wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S),
        }
        try:
            run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"wandb cannot go online ({error}); records go to {run_dir}/wandb: upload them later with `wandb sync`",
                RuntimeWarning,
                stacklevel=3,
            )
            wandb.teardown()  # the failed run still holds the id, so wandb would refuse it
            run = wandb.init(mode="offline", **options)
        for axis in ("step", "seconds", "sequences_distinct", "tokens"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        return run
    except Exception as error:
        warnings.warn(f"wandb is off for this run: {error}", RuntimeWarning, stacklevel=3)
        return None


def _start_tensorboard(run_dir: Path) -> Any:
    """A writer of event files, which are written anew from the records; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        return SummaryWriter(str(folder))
    except ImportError:
        warnings.warn(
            "training.tensorboard: the package is not installed, so nothing is written for TensorBoard: "
            "`pip install tensorboard`, then resume the run",
            RuntimeWarning,
            stacklevel=3,
        )
    except Exception as error:
        warnings.warn(f"TensorBoard is off for this run: {error}", RuntimeWarning, stacklevel=3)
    return None


def _warn_lost(error: WriteError) -> None:
    warnings.warn(f"a record is lost: {error}", RuntimeWarning, stacklevel=4)
