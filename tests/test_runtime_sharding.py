"""Parameters cut over two processes: the same training as with copies, and checkpoints that open anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PUMA, run_python, run_ranks, tiny_settings
from test_train import assert_same_checkpoint

from model.hub import load_model
from runtime.checkpoint import find_checkpoint
from runtime.config_file import parse_config
from runtime.distributed import World
from runtime.metrics import read_metrics
from runtime.sharding import full_tensor, gather_weights, is_sharded, shard_like


def train_run(config: Path, run_dir: Path, *options: str, n_ranks: int = 2) -> str:
    """Train to the end; what it printed."""
    command = ("train.py", "--config", config, "--run-dir", run_dir, *options)
    result = run_ranks(n_ranks, *command) if n_ranks > 1 else run_python(*command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def go_back(run_dir: Path, copy: Path) -> Path:
    """A copy of a finished run, as it stood when it saved step 3."""
    shutil.copytree(run_dir, copy)
    (copy / "final.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    return copy


@pytest.fixture(scope="module")
def config(tmp_path_factory, data_dir) -> Path:
    """Two layers, an average, two microbatches per step, a tied head used twice: all that sharding touches."""
    settings = tiny_settings(PUMA | {"reveal_order": "top_prob_margin"}, data_dir)
    settings["model"] |= {"num_hidden_layers": 2, "tie_word_embeddings": True}
    settings["training"] |= {"micro_batch_size": 2, "max_grad_norm": 0.1, "keep_checkpoints": 9}
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def sharded_run(config, tmp_path_factory) -> Path:
    """A run of six steps under fsdp."""
    run_dir = tmp_path_factory.mktemp("runs") / "fsdp"
    assert "parameters sharded" in train_run(config, run_dir, "training.parallel=fsdp")
    return run_dir


def assert_close(ours: Path, theirs: Path) -> None:
    """Weights, average and moments of two runs' newest checkpoints are equal up to rounding."""
    first, second = find_checkpoint(ours), find_checkpoint(theirs)
    assert first.step == second.step == 6
    for name in ("model", "ema"):
        weights, others = first.weights(name), second.weights(name)
        assert weights is not None
        assert others is not None
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, others[key], rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    moments, others = (each.state("train")["optimizer"]["state"] for each in (first, second))
    assert moments.keys() == others.keys()
    for number, tensors in moments.items():
        torch.testing.assert_close(tensors, others[number], rtol=1e-3, atol=1e-7)


def test_sharded_training_equals_copies_up_to_rounding(config, sharded_run, tmp_path):
    train_run(config, tmp_path / "ddp")
    assert_close(sharded_run, tmp_path / "ddp")
    ours, theirs = (list(read_metrics(path)) for path in (sharded_run, tmp_path / "ddp"))
    assert len(ours) == len(theirs) == 6
    for row, other in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/masked_fraction"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    assert ours[-1]["validation/loss"] == pytest.approx(theirs[-1]["validation/loss"], rel=1e-4)


WATCHED = """
import os
import torch
import train
import training.run

initial_model, load = training.run.initial_model, torch.load


def watched_model(config):
    print("rank", os.environ["RANK"], "has the full model")
    return initial_model(config)


def watched_load(file, **options):
    print("rank", os.environ["RANK"], "maps" if options["mmap"] else "reads", file.name)
    return load(file, **options)


training.run.initial_model, torch.load = watched_model, watched_load
train.main()
"""


def test_only_the_main_process_holds_the_full_model_and_none_the_full_moments(config, sharded_run, tmp_path):
    options = ("--config", config, "training.parallel=fsdp")
    begun = run_ranks(2, "-c", WATCHED, *options, "--run-dir", tmp_path / "begun")
    assert begun.returncode == 0, begun.stderr
    assert "rank 0 has the full model" in begun.stdout
    assert "rank 1 has the full model" not in begun.stdout
    assert_same_checkpoint(sharded_run, tmp_path / "begun")
    resumed = run_ranks(2, "-c", WATCHED, *options, "--run-dir", go_back(sharded_run, tmp_path / "resumed"))
    assert resumed.returncode == 0, resumed.stderr
    assert "has the full model" not in resumed.stdout
    for rank in (0, 1):
        assert f"rank {rank} maps train.pt" in resumed.stdout
    assert_same_checkpoint(sharded_run, tmp_path / "resumed")


def test_initial_weights_that_only_the_main_process_reads_end_all_where_they_are_bad(config, tmp_path):
    (tmp_path / "empty").mkdir()
    options = ("training.parallel=fsdp", f"model.init_from={tmp_path / 'empty'}")
    result = run_ranks(2, "train.py", "--config", config, "--run-dir", tmp_path / "run", *options)
    assert result.returncode == 2
    assert result.stderr.count("holds neither a checkpoint nor a config.json") == 1, result.stderr


def test_a_restart_changes_nothing_nor_does_recomputing_blocks(config, sharded_run, tmp_path):
    again = go_back(sharded_run, tmp_path / "again")
    assert find_checkpoint(again).step == 3
    train_run(config, again, "training.parallel=fsdp", "training.gradient_checkpointing=true")
    assert_same_checkpoint(sharded_run, again)


def test_a_checkpoint_opens_on_one_process(sharded_run, tmp_path):
    loaded = load_model(str(sharded_run))
    model, config = loaded.model, loaded.config
    assert config.training.parallel == "fsdp"
    assert not is_sharded(model)
    result = run_python("-m", "eval.evaluate", sharded_run, "--json", tmp_path / "alone.json")
    assert result.returncode == 0, result.stderr
    alone = json.loads((tmp_path / "alone.json").read_text())
    together = json.loads((sharded_run / "final.json").read_text())["evaluation"]
    assert alone["samplers"] == together["samplers"]


def test_a_sharded_run_goes_on_as_one_process_or_with_copies(config, sharded_run, tmp_path):
    alone = go_back(sharded_run, tmp_path / "alone")
    assert "saved by 2 processes, continues on 1" in train_run(config, alone, "training.parallel=fsdp", n_ranks=1)
    assert (find_checkpoint(alone).step, find_checkpoint(alone).n_ranks) == (6, 1)
    copies = go_back(sharded_run, tmp_path / "copies")
    train_run(config, copies, "training.parallel=ddp")
    assert_close(sharded_run, copies)


def test_unsharded_tensors_are_left_alone():
    tensor = torch.arange(3.0)
    assert full_tensor(tensor) is tensor
    assert shard_like(tensor, tensor) is tensor
    assert gather_weights({"a": tensor}, World(0, 1, torch.device("cpu")))["a"] is tensor


def test_a_compiled_model_cannot_be_cut(data_dir):
    settings = tiny_settings(PUMA, data_dir)
    settings["training"] |= {"parallel": "fsdp", "compile": True}
    with pytest.raises(ValueError, match=r"training\.compile.*compile does not work with parallel 'fsdp'"):
        parse_config(settings, "test")
