"""Processes: what they exchange, and that data-parallel gradients are those of one process with the whole batch."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNIFORM, run_python, run_ranks, started_ranks, tiny_settings
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.transformer import Transformer
from runtime.config_file import parse_config
from runtime.distributed import (
    World,
    autocast,
    autocast_dtype,
    from_main,
    gather,
    main_first,
    start_world,
    stop_world,
    sum_over_ranks,
)
from runtime.metrics import reduce_metrics
from unmasking import mask_uniformly, row_weights

N_RANKS = 2
N_ROWS = 8  # of the whole batch
CPU = torch.device("cpu")


def tiny_model() -> Transformer:
    """The same weights on every call."""
    model = Transformer(parse_config(tiny_settings(UNIFORM, Path()), "test").model)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """xt, x0 and mask [N_ROWS, 12], rows with different numbers of masks."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 5, (N_ROWS, 12), generator=generator)
    masked = mask_uniformly(torch.ones_like(x0, dtype=torch.bool), generator)
    return x0.masked_fill(masked, 5), x0, masked


def gradients(world: World, n_microbatches: int) -> dict[str, Tensor]:
    """What one rank's parameters get from its share of the batch, as in the training loop."""
    xt, x0, masked = batch()
    own = slice(world.rank * N_ROWS // world.n_ranks, (world.rank + 1) * N_ROWS // world.n_ranks)
    weight = row_weights(masked[own], N_ROWS // world.n_ranks)
    model = tiny_model()
    wrapped = DistributedDataParallel(model) if world.n_ranks > 1 else model
    parts = list(zip(*(rows.chunk(n_microbatches) for rows in (xt[own], x0[own], weight)), strict=True))
    for part in parts[:-1]:
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                wrapped(*part).loss.backward()
        else:
            wrapped(*part).loss.backward()
    wrapped(*parts[-1]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def work(folder: Path) -> None:
    """One of two processes: everything that they do together, written to a file."""
    world = start_world("cpu")
    rank = world.rank
    found: dict[str, Any] = {"rank": world.rank, "n_ranks": world.n_ranks, "is_main": world.is_main}
    for n_microbatches in (1, 2):
        found[f"gradients_{n_microbatches}"] = gradients(world, n_microbatches)
    values = torch.tensor([1.0 + rank, 10.0])
    found["sum"], found["left_alone"] = sum_over_ranks(values), values
    found["gathered"] = gather({"rank": rank})
    found["from_main"] = from_main(["of", rank])
    figures = {"loss": torch.tensor(1.0 + rank), "histogram": torch.tensor([rank, 1.0]), "sequences_x": torch.tensor(3)}
    found["metrics"] = reduce_metrics(figures, world)

    def slow_on_main() -> bool:
        there = (folder / "made").exists()
        if world.is_main:
            time.sleep(0.3)
            (folder / "made").touch()
        return there

    found["others_find_it_made"] = main_first(world, slow_on_main)
    calls: list[None] = []

    def fail() -> None:
        calls.append(None)
        raise ValueError("no such data")

    try:
        main_first(world, fail)
    except ValueError as error:
        found["failure"], found["n_calls"] = str(error), len(calls)

    def fail_elsewhere() -> None:
        if not world.is_main:
            raise OSError("the disk of another machine is full")

    try:
        main_first(world, fail_elsewhere)
    except OSError as error:
        found["failure_elsewhere"] = str(error)
    gather(None)  # the store ends with the first rank
    stop_world()
    torch.save(found, folder / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    code = "import pathlib, sys; sys.path.insert(0, 'tests'); import test_runtime_distributed as test; "
    result = run_ranks(N_RANKS, "-c", code + "test.work(pathlib.Path(sys.argv[1]))", folder)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(N_RANKS)]


@pytest.mark.parametrize("n_microbatches", [1, 2])
def test_gradients_equal_one_process_with_the_batch_doubled(n_microbatches, found):
    alone = gradients(World(0, 1, CPU), 1)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    for one in found:
        together = one[f"gradients_{n_microbatches}"]
        assert together.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_each_process_knows_its_place(found):
    assert [(one["rank"], one["n_ranks"], one["is_main"]) for one in found] == [(0, 2, True), (1, 2, False)]


def test_sums_leave_their_argument_alone(found):
    for rank, one in enumerate(found):
        assert one["sum"].tolist() == [3.0, 20.0]
        assert one["left_alone"].tolist() == [1.0 + rank, 10.0]


def test_values_are_gathered_in_order_and_broadcast_from_main(found):
    for one in found:
        assert one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["from_main"] == ["of", 0]


def test_figures_are_averaged_and_sequences_added_up(found):
    for one in found:
        assert one["metrics"] == {"loss": 1.5, "histogram": [0.5, 1.0], "sequences_x": 6}


def test_the_main_process_goes_first_and_its_failure_fails_all(found):
    assert [one["others_find_it_made"] for one in found] == [False, True]
    assert [one["failure"] for one in found] == ["no such data"] * 2
    assert [one["n_calls"] for one in found] == [1, 0], "it may have taken hours"


def test_the_failure_of_another_process_fails_all(found):
    assert [one["failure_elsewhere"] for one in found] == ["the disk of another machine is full"] * 2


def test_a_process_that_fails_alone_ends_at_once():
    """Leaving a group of NCCL may wait for the others, which wait for this process."""
    code = """
import time
import torch.distributed as dist
from runtime.distributed import ends_once, gather, start_world
dist.destroy_process_group = lambda: time.sleep(600)
with ends_once():
    world = start_world("cpu")
    gather(None)
    if world.rank:
        raise RuntimeError("lost")
    gather(None)
"""
    result = run_ranks(N_RANKS, "-c", code, timeout=120)
    assert result.returncode == 1
    assert "RuntimeError: lost" in result.stderr


def test_no_process_leaves_before_the_main_one(tmp_path):
    """The launcher ends those that are left soon after the first."""
    code = f"""
import pathlib, time
from runtime.distributed import ends_once, start_world
with ends_once():
    world = start_world("cpu")
    if world.is_main:
        time.sleep(0.5)
        pathlib.Path("{tmp_path}/result").touch()
assert pathlib.Path("{tmp_path}/result").exists()
"""
    result = run_ranks(N_RANKS, "-c", code)
    assert result.returncode == 0, result.stderr


def test_processes_wait_longer_for_each_other_than_to_connect():
    code = """
import time
from datetime import timedelta
from runtime import distributed
distributed.CONNECT_TIMEOUT = timedelta(seconds=1)
with distributed.ends_once():
    world = distributed.start_world("cpu")
    time.sleep(0 if world.rank else 3)
    distributed.gather(None)
"""
    result = run_ranks(N_RANKS, "-c", code)
    assert result.returncode == 0, result.stderr


def test_a_process_that_cannot_reach_the_others_says_so():
    code = """
import os
from runtime.distributed import ends_once, start_world
if os.environ["RANK"] == "1":
    os.environ["GLOO_SOCKET_IFNAME"] = "none"
with ends_once():
    start_world("cpu")
"""
    with started_ranks(N_RANKS, "-c", code) as ranks:
        try:
            _, err = ranks[1].communicate(60)
        finally:
            ranks[0].kill()  # it waits
    assert ranks[1].returncode == 2
    assert err.startswith("error: the 2 processes of the run cannot reach each other by 127.0.0.1:"), err
    assert err.endswith("MASTER_PORT and GLOO_SOCKET_IFNAME\n"), err


# One process


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = start_world("cpu")
    assert world == World(0, 1, CPU)
    assert world.is_main
    values = torch.tensor([1.0])
    assert sum_over_ranks(values).tolist() == [1.0]
    assert gather(3) == [3]
    assert from_main("x") == "x"
    assert main_first(world, lambda: 5) == 5
    stop_world()
    stop_world()


def test_a_world_size_without_a_rank_is_not_torchruns(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert start_world("cpu").n_ranks == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert start_world("auto").device == CPU
    with pytest.raises(ValueError, match=r"device 'cuda': this machine has no CUDA GPU"):
        start_world("cuda")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not set: start with"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is set, but RANK is 'x'"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
            "4 processes were started on this machine, but torch can use 2 GPUs there",
        ),
        ({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}, "3 processes were started"),
    ],
)
def test_places_that_cannot_be_are_refused(environment, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_world("cuda")


def test_processes_that_cannot_meet_end_with_one_message(config_file, tmp_path):
    command = ("train.py", "--config", config_file(), "--run-dir", tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run_python(*command, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert result.returncode == 2
    assert f"error: the 2 processes of the run cannot reach each other by 127.0.0.1:{port} (" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
@pytest.mark.parametrize("arguments", [["--nproc-per-node=gpu"], ["--nproc-per-node=0", "--nnodes=x"]])
def test_a_launch_that_cannot_be_ends_with_one_message(arguments):
    result = run_python("-m", "runtime.launch", "--standalone", *arguments, "train.py")
    assert result.returncode == 2
    assert re.fullmatch("error: the processes cannot be started: .*\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        ({"avx2": True, "avx512_bf16": False}, None),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
    ],
)
def test_precision_auto_asks_the_cpu(flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert autocast_dtype("auto", CPU) == expected
    assert autocast_dtype("float32", CPU) is None
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_is_on_or_off(dtype):
    layer = torch.nn.Linear(2, 2)
    with autocast(CPU, dtype):
        assert layer(torch.ones(1, 2)).dtype == (dtype or torch.float32)
