"""One card: NCCL, DDP and FSDP2 with one rank; resuming on another device. Differences are ‖a - b‖ / ‖b‖."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.gpu.report import Report
from bench.gpu.tiny import TINY_SUDOKU
from bench.inputs import YAML_FILES, random_rows
from config import Config
from model.transformer import build_model
from runtime.checkpoint import latest_checkpoint
from runtime.config_file import read_config
from runtime.distributed import World, from_main, gather, start_world, stop_world, sum_over_ranks
from runtime.final import is_complete
from runtime.optim import build_optimizer
from runtime.sharding import full_tensor, is_sharded, shard
from training.run import Run, build_run, data_parallel, restore_run, save_run
from training.update import Updater

YAML_FILE = YAML_FILES / "sudoku_puma.yaml"
N_STEPS = 20
# Of the loopback interface: a machine without a network has no other.
LOOPBACK: dict[str, str] = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
FLOAT32 = "training.precision=float32"


def run(options: Namespace, report: Report) -> None:
    """All checks; a failure in one leaves the others."""
    overrides = [*(TINY_SUDOKU if options.tiny else []), *options.overrides]
    with TemporaryDirectory() as folder:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "train.py"]
        words += ["--config", str(YAML_FILE), "--run-dir", f"{folder}/run", *TINY_SUDOKU]
        words += [f"data.data_dir={folder}", "training.max_steps=6", "training.num_epochs=null"]
        if report.run("train.py, one rank of torchrun", *words, environment=LOOPBACK):
            complete = is_complete(Path(folder, "run"))
            report.add("train.py, one rank of torchrun", "complete" if complete else "no result")
    for name, difference in (report.measure("one rank", one_rank, overrides) or {}).items():
        report.add(name, difference, "", ("<=", 1e-5))
    for name, value in (report.measure("resume across devices", across_devices, overrides) or {}).items():
        report.add(name, value, "", ("<=", 0.0))


def new_run(config: Config, device: torch.device, run_dir: Path = Path("unused")) -> Run:
    """A run on one device, on random boards."""
    return build_run(config, World(0, 1, device), run_dir, random_rows(config, config.data.length))


def trained_weights(run: Run, n_steps: int = N_STEPS) -> dict[str, Tensor]:
    """The full weights after some updates, on the CPU."""
    updater = Updater(run)
    for _ in range(n_steps):
        updater.step()
    return {name: full_tensor(weight.detach()).double().cpu() for name, weight in run.model.weights().items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over all weights."""
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([weights[name].flatten().double() for name in ours]) for weights in (ours, theirs))
    return float((a - b).norm() / b.norm())


def one_rank(overrides: list[str]) -> dict[str, float]:
    """Differences of updates with DDP and with FSDP2 from plain ones, in a process group of one rank.

    `train.py` uses neither on one rank, so both are put around its model here.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place | LOOPBACK)
    # Where there are any: AdamW makes a step of noise where a gradient is only noise.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    config = read_config(YAML_FILE, [*overrides, FLOAT32, "training.cuda_graph=false"])
    world = start_world("auto")
    found = {}
    try:
        ones = torch.ones(3, device=world.device)
        assert torch.equal(sum_over_ranks(ones), ones)
        assert (from_main("text"), gather(5)) == ("text", [5])
        plain = trained_weights(new_run(config, world.device))
        for name, wrap in {"DDP": wrap_ddp, "FSDP2": wrap_fsdp}.items():
            run = new_run(config, world.device)
            wrap(run, world)
            found[f"{name} of one rank against plain updates"] = difference(trained_weights(run), plain)
    finally:
        stop_world()
    return found


def wrap_ddp(run: Run, world: World) -> None:
    """Average gradients over the ranks."""
    run.wrapped = data_parallel(run.model, world.device)


def wrap_fsdp(run: Run, world: World) -> None:
    """Shard the parameters over the ranks."""
    full = run.model
    with torch.device("meta"):
        run.model = run.wrapped = build_model(run.config)
    shard(run.model, run.model.model.layers, full, world)
    assert is_sharded(run.model)
    run.optimizer = build_optimizer(run.model, run.config.training)


def flat(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """AdamW's moments and step counts by one name each, on the CPU."""
    return {f"{number}.{name}": tensor.cpu() for number, each in state.items() for name, tensor in each.items()}


def across_devices(overrides: list[str]) -> dict[str, float]:
    """Train on the CPU, the GPU and the CPU again, from checkpoint to checkpoint.

    Returns:
        For each resumption, the difference of the restored weights and moments from the saved ones.

    Raises:
        RuntimeError: the weights are not finite, or an update or a row was lost.
    """
    config = read_config(YAML_FILE, [*overrides, FLOAT32])
    cpu, other = torch.device("cpu"), start_world("auto").device
    found: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        n_drawn = 0
        for number, device in enumerate((cpu, other, cpu)):
            run = new_run(config, device, Path(folder))
            if number:
                checkpoint = latest_checkpoint(run.run_dir)
                assert checkpoint is not None
                restore_run(run, checkpoint)
                saved = checkpoint.weights("model") or {}
                restored = {name: weight.detach().cpu() for name, weight in run.model.weights().items()}
                name = f"resumed on {device.type} from {('', 'CPU', other.type)[number]}"
                found[f"{name}: weights"] = difference(restored, saved)
                moments = (run.optimizer.state_dict()["state"], checkpoint.state("train")["optimizer"]["state"])
                found[f"{name}: moments"] = difference(*map(flat, moments))
                if run.step != 5 * number or int(run.objective.queue.sequences_drawn) != n_drawn:
                    raise RuntimeError(f"{name}: an update or a row was lost")
            weights = trained_weights(run, 5)
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise RuntimeError(f"weights on {device.type} are not finite")
            n_drawn = int(run.objective.queue.sequences_drawn)
            save_run(run, None)
    return found
