"""The processes of a run and the device of each: one process, or as many as torchrun or job.sh starts."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from base.commands import ends_with_message, fail
from runtime.network import choose_interface

# A collective of training that takes longer means that a rank hangs.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# The groups for `PATIENT_TIMEOUT` are made together: who listens waits five times as long for one that cannot connect.
CONNECT_TIMEOUT = timedelta(minutes=1)
# The others wait for the main process while it generates or converts a data set, writes a large checkpoint to a slow
# disk and reads those that stay, or while wandb tries to connect.
PATIENT_TIMEOUT = timedelta(hours=6)
# How long a rank with an error waits for the main process to report one, before it reports its own, and how long the
# main process, which holds the store, waits for the others to have read that: torch prints a page of warnings if the
# store is gone.
REPORT_TIMEOUT = timedelta(seconds=5)
REPORT_KEY, HEARD_KEY = "puma/reported", "puma/heard/"  # in the store of the process group; the second with the rank

GPU_FILES = Path("/dev")
NOT_VISIBLE = "no device is visible"

T = TypeVar("T")

_patient: dist.ProcessGroup | None = None  # of all ranks, with `PATIENT_TIMEOUT`, over the CPU


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    n_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes the files that all ranks share."""
        return self.rank == 0


class Unreachable(OSError):
    """The processes cannot reach each other, nor agree on which of them says so."""


def start_world(device: str) -> World:
    """Join the process group if there is one (RANK is set), and choose this process's device.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: torch can use no CUDA GPU, and the device is `cuda`, or `auto` in a job with GPUs (see job.sh); or
            there are more processes than GPUs, or the variables of the launcher are incomplete.
        Unreachable: the processes cannot reach each other.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device != "cpu" and not on_gpu:
        _check_gpu_is_not_needed(device)
    launched = "RANK" in os.environ  # by torchrun or job.sh; some clusters set WORLD_SIZE without a launcher
    n_ranks, rank = (_launcher_number("WORLD_SIZE"), _launcher_number("RANK")) if launched else (1, 0)
    own = _take_gpu(launched) if on_gpu else torch.device("cpu")
    if launched:
        _join(own, rank, n_ranks)
    return World(rank, n_ranks, own)


def _check_gpu_is_not_needed(device: str) -> None:
    """Raise ValueError if the CPU must not stand in for a GPU that torch cannot use; warn if there is such a GPU."""
    reason, granted = _unusable_gpu(), os.environ.get("PUMA_GPUS")
    if device == "cuda":
        usable = f" that torch can use ({reason})" if reason else ""
        raise ValueError(f"device 'cuda': this machine has no CUDA GPU{usable}; use auto or cpu")
    if granted:
        raise ValueError(
            f"this job has {granted} GPUs on each node, but torch can use none ({reason or NOT_VISIBLE}): repair "
            "the environment, or set training.device=cpu to train on the CPUs"
        )
    if reason is not None and claim_report():
        warnings.warn(f"the CPU is used, since torch cannot use this machine's GPU: {reason}", stacklevel=3)


def _take_gpu(launched: bool) -> torch.device:
    """Make one GPU per process of this machine torch's current device; ValueError if there are too few."""
    local_rank = _launcher_number("LOCAL_RANK", 0) if launched else 0
    n_local = max(local_rank + 1, _launcher_number("LOCAL_WORLD_SIZE", 1) if launched else 1)
    if n_local > (n_gpus := torch.cuda.device_count()):
        raise ValueError(
            f"{n_local} processes were started on this machine, but torch can use {n_gpus} GPUs there: start one "
            "process per GPU, each of which sees all of them (srun --gpu-bind=none), or set training.device=cpu"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def _join(own: torch.device, rank: int, n_ranks: int) -> None:
    """Join the process groups of all ranks, with this process's device. Raises Unreachable."""
    global _patient
    backend = "nccl" if own.type == "cuda" else "gloo"
    try:
        meeting, *_ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        choose_interface(meeting, rank, n_ranks)
        dist.init_process_group(
            backend,
            store=meeting,
            rank=rank,
            world_size=n_ranks,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=own if own.type == "cuda" else None,
        )
        group = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
        dist.distributed_c10d._set_pg_timeout(PATIENT_TIMEOUT, group)
    except RuntimeError as error:  # a DistError, or the plain one of gloo
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise Unreachable(
            f"the {n_ranks} processes of the run cannot reach each other by {place} ({reason}): "
            "check that all were started, and MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME"
        ) from error
    _patient = group


def _launcher_number(name: str, default: int | None = None) -> int:
    """A variable of torchrun's or job.sh's environment; ValueError if it is no number, or missing without a default."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"is {text!r}"
        raise ValueError(
            f"RANK is set, but {name} {found}: start with runtime.launch, torchrun or job.sh, or unset RANK"
        )
    return int(text)


def _unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine; None if there is no GPU, or if the user has hidden it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles"):
        return None
    if not any(GPU_FILES.glob("nvidia[0-9]*")):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: this build of torch has no CUDA
        return str(error).splitlines()[0]
    return NOT_VISIBLE


def store() -> Any:
    """The key-value store through which the ranks have found each other."""
    return dist.distributed_c10d._get_default_store()


def claim_report() -> bool:
    """Decide which process prints a message that all would print: True in that one, or in several.

    Before the process group is there, it is the first process of each machine. Then it is the main one, which notes
    this in the group's store; each of the others waits up to 5 s for the note, and prints the message if there is none.
    """
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    notes = store()
    if dist.get_rank() == 0:
        notes.set(REPORT_KEY, "1")
        return True
    try:
        notes.wait([REPORT_KEY], REPORT_TIMEOUT)
        notes.set(f"{HEARD_KEY}{dist.get_rank()}", "1")
    except dist.DistStoreError:  # timed out
        return True
    except dist.DistError:  # the main process, which holds the store, has ended
        pass
    return False


def fail_once(message: object, status: int = 2) -> NoReturn:
    """End a command with a message, printed by one process of all that fail alike, or by all that are Unreachable."""
    if not (isinstance(message, Unreachable) or claim_report()):
        sys.exit(status)
    try:
        fail(message, status)
    finally:
        if dist.is_initialized() and dist.get_rank() == 0:
            with suppress(dist.DistError):  # not all have failed, or some have ended
                others = [f"{HEARD_KEY}{rank}" for rank in range(1, dist.get_world_size())]
                store().wait(others, REPORT_TIMEOUT)


def stop_world() -> None:
    """Leave the process group."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leaves_world() -> Iterator[None]:
    """Leave the process group at the end, no rank before the main one has come there.

    After an error the process ends at once instead: leaving a group of NCCL may wait for the other ranks, and these
    wait for this one until the launcher sees that it has ended.
    """
    try:
        yield
        if dist.is_initialized():
            with suppress(RuntimeError):  # another rank has failed, and says why
                gather(None)
    except BaseException as error:
        if not dist.is_initialized():
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        with suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1 if status else 0)
    stop_world()


@contextmanager
def ends_once(interrupted: str = "interrupted") -> Iterator[None]:
    """`ends_with_message` for a command of several processes, which leave the process group at its end.

    Args:
        interrupted: the message for Ctrl-C.
    """
    with leaves_world(), ends_with_message(interrupted, fail_once):
        yield


def main_first(world: World, work: Callable[[], T]) -> T:
    """Run `work` on the main process, then on the others, which find the files that the main process has written.

    A ValueError or OSError of any rank is raised on every rank; after one of the main process the others do not even
    begin. All wait for the last, since the collectives of training do not wait as long.
    """
    result, error = only_on_main(work), None
    if not world.is_main:
        try:
            result = work()
        except (ValueError, OSError) as raised:
            error = raised
    for failure in gather(error):
        if failure is not None:
            raise failure
    return cast(T, result)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, on every rank; the argument is not changed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:  # one rank may capture this in a CUDA graph
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's `value`, on every rank; the value itself on one process."""
    return sum_over_ranks(value) / dist.get_world_size() if dist.is_initialized() else value


def from_main(value: Any) -> Any:
    """The main process's `value` (plain data), on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process; its result (plain data), or its ValueError, OSError or Ctrl-C, on every rank."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError, KeyboardInterrupt) as raised:
            error = raised
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return result


def only_on_main(work: Callable[[], T]) -> T | None:
    """Run `work` on the main process, which alone gets the result, of any kind; its error is raised as in `on_main`."""
    result: T | None = None

    def keep_result() -> None:
        nonlocal result
        result = work()

    on_main(keep_result)
    return result


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (plain data) in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient)
    return values


def main_bar(world: World, **options: Any) -> tqdm:
    """A progress bar on the main process, if standard error is a terminal; the options of `tqdm`."""
    return tqdm(**options, disable=None if world.is_main else True)


def rank_slice(total: int, rank: int, n_ranks: int) -> slice:
    """The part of `total` items that belongs to this rank; the parts of all ranks differ by at most one item."""
    return slice(total * rank // n_ranks, total * (rank + 1) // n_ranks)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, None for float32 without autocast.

    Args:
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 on GPUs and CPUs with bfloat16 instructions.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Not every supported version of torch has `get_capabilities`.
            capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
            fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        precision = "bfloat16" if fast else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast context of `dtype`; disabled for None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
