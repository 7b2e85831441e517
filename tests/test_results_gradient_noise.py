"""The correlation of gradients of neighbouring updates: on known series, and on a tiny run."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PUMA
from helpers import random_generator

import train
from config import PumaSettings, UniformSettings
from results import gradient_noise
from results.gradient_noise import centre, correlations, noise_of_sum, variants

SERIES = {"label": "a", "correlation": 41 * [0.5]}


@pytest.mark.parametrize("n_shared", [1, 2, 8])
def test_updates_that_share_rows_are_correlated_by_the_share(n_shared):
    """Each row adds the same gradient to `n_shared` successive updates, as in a pool of one batch with K = n_shared."""
    rows = torch.randn(400 + n_shared - 1, 2000, generator=random_generator(0))
    gradient = rows.unfold(0, n_shared, 1).sum(-1) + 3  # [400, P], with a mean that is no noise
    found = correlations(centre(gradient))
    assert found[0] == 1
    for lag in range(1, 12):
        assert found[lag] == pytest.approx(max(0, 1 - lag / n_shared), abs=0.1)
    expected = 1 + 2 * sum((1 - lag / 8) * (1 - lag / n_shared) for lag in range(1, n_shared))
    assert noise_of_sum(found, 8) == pytest.approx(expected, rel=0.15)


def test_equal_updates_are_worth_one():
    assert noise_of_sum([1.0] * 32, 32) == pytest.approx(32)


def test_variants_differ_in_pool_and_order_alone():
    puma = [each for each in variants(5, UniformSettings(name="uniform")).values() if isinstance(each, PumaSettings)]
    assert {each.n_stages for each in puma} == {5}
    assert [(each.pool_batches, each.reveal_order) for each in puma] == [
        (1, "top_prob"),
        (1, "random"),
        (16, "top_prob"),
    ]


def test_the_pools_have_the_threshold_of_the_run():
    run = PumaSettings(name="puma", k_schedule=((2, 0), (4, 9)), collapse_threshold=0.9, pool_batches=4)
    puma = [each for each in variants(4, run).values() if isinstance(each, PumaSettings)]
    assert {(each.n_stages, each.k_schedule, each.collapse_threshold) for each in puma} == {(4, None, 0.9)}
    assert [each.pool_batches for each in puma] == [1, 1, 16]
    assert gradient_noise._threshold(run) == " with tau = 0.9"
    spread = UniformSettings(name="uniform", low_discrepancy=True)
    assert variants(4, spread)["uniform masks of low discrepancy"] == spread


def test_a_run_is_measured_and_drawn(config_file, tmp_path):
    """Repeated rows show, and the model is that of the checkpoint."""
    path = config_file(PUMA, "run.yaml", data__n_train=2000)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    train.main(["--config", str(path), "--run-dir", str(run_dir)])
    gradient_noise.main([str(run_dir), "--out", str(out)])
    records = json.loads((out / "run/records.json").read_text())
    assert (records["step"], records["n_stages"], records["updates"]) == (6, 5, 128)
    first = {each["label"]: each["correlation"][1] for each in records["series"]}
    assert first["one batch in the pool"] > 0.3 > 0.2 > first["uniform masks"]
    assert abs(first["16 batches in the pool"]) < 0.2
    page = (out / "run/README.md").read_text()
    assert page.count("\n| ") == 6
    assert (out / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    (out / "run/README.md").unlink()
    gradient_noise.main([str(run_dir), "--draw", "--out", str(out)])
    assert (out / "run/README.md").read_text() == page, "made from the records alone"


def test_gradients_that_do_not_fit_into_memory_are_refused(config_file, tmp_path, monkeypatch, capsys):
    train.main(["--config", str(config_file()), "--run-dir", str(tmp_path / "run")])
    monkeypatch.setattr("base.memory.free_memory", lambda: 1 << 20)
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main([str(tmp_path / "run"), "--out", str(tmp_path), "--updates", "100000"])
    assert stop.value.code == 2
    assert "--updates 100000: the gradients: needs" in capsys.readouterr().err


def test_too_few_updates_for_the_sum_over_a_trajectory_are_refused(config_file, tmp_path, capsys):
    config = config_file({"name": "puma", "n_stages": 66})
    train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--updates 128: for K = 66 give at least 130" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert noise_of_sum([1.0] * (128 // 2 + 1), 65) == pytest.approx(65), "the largest that 128 updates can tell"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_stages": 0}, "n_stages: Input should be greater than or equal to 1"),
        ({"n_stages": 42}, "n_stages 42 is above 41"),
        ({"series": 6 * [SERIES]}, "series: List should have at most 5 items"),
    ],
)
def test_records_that_cannot_be_drawn_are_refused(changes, reason, tmp_path, capsys):
    words = dict.fromkeys(["command", "machine", "commit", "date", "run", "settings"], "a")
    records = words | {"step": 1, "updates": 80, "n_stages": 41, "batch_size": 1, "series": [SERIES]}
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "records.json"
    file.write_text(json.dumps(records))
    gradient_noise.main(["run", "--draw", "--out", str(tmp_path)])
    file.write_text(json.dumps(records | changes))
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main(["run", "--draw", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("path", "name"), [(".", "run"), ("checkpoints/..", "run"), ("..", "parent")])
def test_the_folder_is_named_after_the_run_however_it_is_given(path, name, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "parent" / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(run_dir)
    with pytest.raises(SystemExit):
        gradient_noise.main([path, "--draw", "--out", str(tmp_path)])
    assert f"{tmp_path}/{name}/records.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--draw",)])
def test_a_folder_without_a_run_ends_with_a_message(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gradient_noise.main([str(tmp_path / "nothing"), "--out", str(tmp_path), *options])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
