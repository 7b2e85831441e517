"""The distance of training masks from the sampler's masks: against enumeration, on known masks and on tiny runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PUMA, UNIFORM
from helpers import random_generator, random_model

import train
from progressive_block import MaskedObjective
from results import mask_distance
from results import records as shared
from results.mask_distance import (
    N_STAGES,
    PATHS,
    SWAPS,
    Provenance,
    Rows,
    describe,
    random_distance,
    random_share,
    relative_distance,
    sampler_orders,
    share_within,
    summarize,
    swap_distance,
    training_rows,
)
from runtime.checkpoint import Checkpoint
from runtime.config_file import read_config
from runtime.distributed import start_world
from training.run import build_run
from unmasking import mask_uniformly

IN_PLACE = {"data__layout": "in_place", "model__learned_positions": 16, "training__keep_checkpoints": 9}


@pytest.mark.parametrize(("n_masked", "n_maskable"), [(0, 3), (1, 1), (1, 6), (3, 6), (4, 7), (7, 7)])
def test_random_masks_are_as_far_as_enumeration_says(n_masked, n_maskable):
    """All masks with one count, against the mask that hides the last positions."""
    order = torch.arange(1, n_maskable + 1)
    masks = list(combinations(range(n_maskable), n_masked))
    masked = torch.zeros(len(masks), n_maskable, dtype=torch.bool)
    for row, positions in enumerate(masks):
        masked[row, list(positions)] = True
    distance = swap_distance(masked, torch.ones_like(masked), order.expand(len(masks), -1))
    visited = order > n_maskable - n_masked
    assert distance.tolist() == [int((mask ^ visited).sum()) // 2 for mask in masked]
    expected = random_distance(torch.tensor(n_masked), torch.tensor(n_maskable))
    assert float(distance.double().mean()) == pytest.approx(float(expected))
    for n_swaps in range(n_maskable + 1):
        share = float((distance <= n_swaps).double().mean())
        assert share == pytest.approx(random_share(n_masked, n_maskable, n_swaps))


def random_orders(maskable: torch.Tensor, seed: int) -> torch.Tensor:
    """A random order of the maskable positions of each row, from 1; 0 elsewhere."""
    draw = torch.rand(maskable.shape, generator=random_generator(seed)).masked_fill(~maskable, 2)
    return (draw.argsort(1).argsort(1) + 1) * maskable


def rows_of(masked: torch.Tensor, maskable: torch.Tensor) -> Rows:
    """Rows whose tokens do not matter."""
    return Rows(torch.zeros_like(masked, dtype=torch.long), maskable, masked)


def test_visited_masks_are_at_distance_0_and_uniform_masks_as_far_as_random():
    generator = random_generator(0)
    maskable = torch.rand(3000, 40, generator=generator) < 0.7
    orders = {path: random_orders(maskable, seed) for seed, path in enumerate(PATHS, 1)}
    n_revealed = (torch.rand(3000, 1, generator=generator) * maskable.sum(1, keepdim=True)).long()
    on_path = summarize(rows_of(orders["sampler"] > n_revealed, maskable), orders)
    assert relative_distance(on_path, "sampler") == 0
    assert all(share_within(on_path, "sampler", n_swaps) == 1 for n_swaps in SWAPS)
    assert relative_distance(on_path, "teacher_forced") == pytest.approx(1, abs=0.03), "the paths are independent"

    uniform = summarize(rows_of(mask_uniformly(maskable, generator), maskable), orders)
    assert sum(stage["n"] for stage in uniform) == 3000
    for path in PATHS:
        assert relative_distance(uniform, path) == pytest.approx(1, abs=0.03)
        for n_swaps in SWAPS:
            assert share_within(uniform, path, n_swaps) == pytest.approx(
                share_within(uniform, "random", n_swaps), abs=0.03
            )


def test_stages_are_bins_of_the_revealed_ratio():
    """16 positions, of which 0 to 15 are revealed in order: two rows per stage, at the far end of a reversed order."""
    maskable = torch.ones(16, 16, dtype=torch.bool)
    masked = torch.arange(16) >= torch.arange(16)[:, None]
    order = torch.arange(1, 17).expand(16, -1)
    stages = summarize(rows_of(masked, maskable), {"sampler": order, "teacher_forced": order.flip(1)})
    assert [stage["n"] for stage in stages] == [2] * N_STAGES
    assert all(stage["sampler"] == {"distance": 0, "within": [2] * len(SWAPS)} for stage in stages)
    assert [stage["teacher_forced"]["distance"] for stage in stages] == [1, 5, 9, 13, 15, 11, 7, 3]
    assert stages[1]["random"]["distance"] == pytest.approx(2 * 14 / 16 + 3 * 13 / 16, abs=1e-3)


def trained(config_file: Callable[..., Path], run_dir: Path, objective: dict[str, Any]) -> Path:
    """A tiny run in place, with checkpoints after 3 and 6 updates."""
    path = config_file(objective, f"{run_dir.name}.yaml", **IN_PLACE)
    train.main(["--config", str(path), "--run-dir", str(run_dir)])
    return run_dir


def objective_of(config_file: Callable[..., Path], settings: dict[str, Any], run_dir: Path) -> MaskedObjective:
    """The objective of a tiny run before its first update."""
    config = read_config(config_file(settings, **IN_PLACE))
    objective = build_run(config, start_world("cpu"), run_dir, config.open_data().train).objective
    assert isinstance(objective, MaskedObjective)
    return objective


def test_uniform_rows_are_those_of_the_next_updates(config_file, tmp_path):
    rows = training_rows(objective_of(config_file, UNIFORM, tmp_path), 12, seed=0, step=0)
    objective = objective_of(config_file, UNIFORM, tmp_path)
    batches = []
    for step in range(2):  # of 8 rows
        batches.append(objective.draw_masks(step))
        objective.prefetch()
    assert torch.equal(rows.x0, torch.cat([x0 for x0, _, _ in batches])[:12])
    assert torch.equal(rows.masked, torch.cat([masked for _, _, masked in batches])[:12])
    assert not (rows.masked & ~rows.maskable).any()


def test_puma_rows_are_those_of_the_pool(config_file, tmp_path):
    objective = objective_of(config_file, PUMA, tmp_path)

    def row_set(x0: torch.Tensor, masked: torch.Tensor) -> set[tuple[int, ...]]:
        return {tuple(row) for row in torch.cat([x0, masked], dim=1).tolist()}

    rows = training_rows(objective, 16, seed=0, step=0)
    pool = row_set(rows.x0, rows.masked)
    some = training_rows(objective, 5, seed=0, step=0)
    assert len(row_set(some.x0, some.masked)) == 5
    assert row_set(some.x0, some.masked) < pool
    assert not (rows.masked & ~rows.maskable).any()
    with pytest.raises(ValueError, match="--rows 17: the pool has 16 rows; set at most that"):
        training_rows(objective, 17, seed=0, step=0)
    x0, _, masked = objective.draw_masks(0)  # one of the pool's two batches
    next_rows = row_set(x0, masked)
    assert len(next_rows) == 8
    assert next_rows < pool


def test_paths_are_equal_where_the_model_is_right(config_file):
    """Rows that the sampler itself has filled: the true tokens are then its own, whatever the model."""
    config = read_config(config_file(UNIFORM, **IN_PLACE))
    model = random_model(vocab_size=6, hidden_size=32, learned_positions=16)
    x0 = torch.randint(1, 5, (9, 16), generator=random_generator(1))
    maskable = torch.rand(9, 16, generator=random_generator(2)) < torch.linspace(0.2, 0.9, 9)[:, None]
    first = sampler_orders(model, config, x0, maskable)
    assert not torch.equal(first["sampler"], first["teacher_forced"]), "its tokens differ from random ones"
    again = sampler_orders(model, config, first["tokens"], maskable)
    assert torch.equal(again["sampler"], first["sampler"])
    assert torch.equal(again["teacher_forced"], first["sampler"])
    for order in first["sampler"], first["teacher_forced"]:
        steps = [sorted(row[mask].tolist()) for row, mask in zip(order, maskable, strict=True)]
        assert steps == [list(range(1, int(mask.sum()) + 1)) for mask in maskable]
        assert not order[~maskable].any()


def test_runs_are_measured_and_drawn(config_file, tmp_path, monkeypatch):
    puma, uniform = (
        trained(config_file, tmp_path / name, objective) for name, objective in (("puma", PUMA), ("uniform", UNIFORM))
    )
    out = tmp_path / "out"
    mask_distance.main([str(puma), str(uniform), "--rows", "16", "--out", str(out)])
    records = json.loads((out / "records.json").read_text())
    assert [run["label"] for run in records["runs"]] == ["puma", "uniform"]
    assert records["runs"][0]["masks"] == (
        "puma, K = 3, 5 from update 4, tau = 0.9, reveal order top_prob, a pool of 2 batches, 8 rows per update, seed 0"
    )
    for run in records["runs"]:
        assert [point["step"] for point in run["points"]] == [3, 6]
        assert all(sum(stage["n"] for stage in point["stages"]) == 16 for point in run["points"])
    page = (out / "README.md").read_text()
    assert page.count("| puma | ") == page.count("| uniform | ") == 2
    assert records["commit"] in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    (out / "README.md").unlink()
    mask_distance.main(["--draw", "--out", str(out)])
    assert (out / "README.md").read_text() == page, "made from the records alone"

    def measured() -> list[int]:
        """Updates of the checkpoints of `puma` that the command measures now."""
        steps.clear()
        mask_distance.main([str(puma), "--rows", "16", "--out", str(out)])
        run, other = json.loads((out / "records.json").read_text())["runs"]
        assert other == records["runs"][1] | {"measured": {key: records[key] for key in Provenance.__annotations__}}
        assert run["points"] == [point for point in records["runs"][0]["points"] if point["step"] in kept]
        return steps

    steps: list[int] = []
    kept = [3, 6]
    measure = mask_distance.measure
    monkeypatch.setattr(shared, "commit", lambda: records["commit"])

    def noted(checkpoint: Checkpoint, *rest: Any) -> dict[str, Any]:
        steps.append(checkpoint.step)
        return measure(checkpoint, *rest)

    monkeypatch.setattr(mask_distance, "measure", noted)
    assert measured() == [], "they are in the records"
    monkeypatch.setattr(shared, "commit", lambda: "other code")
    (puma / "checkpoints/step_00000003/model.safetensors").write_bytes(b"damaged")
    kept.remove(3)
    with pytest.warns(RuntimeWarning, match=r"model\.safetensors has 7 bytes.*left out"):
        assert measured() == [6], "again, with the same result"


def test_the_note_and_other_runs_stay(config_file, tmp_path, monkeypatch, capsys):
    """Each with what measured it; rows that cannot be compared with them are refused."""
    old, new = (trained(config_file, tmp_path / name, UNIFORM) for name in ("old", "new"))
    out, records_file = tmp_path / "out", tmp_path / "out/records.json"
    monkeypatch.setattr(shared, "commit", lambda: "first")
    mask_distance.main([str(old), "--rows", "8", "--out", str(out)])
    records = json.loads(records_file.read_text())
    (out / "note.md").write_text("By hand.\n")
    monkeypatch.setattr(shared, "commit", lambda: "second")
    mask_distance.main([str(new), "--rows", "8", "--out", str(out)])
    added = json.loads(records_file.read_text())
    assert added["runs"][0] == records["runs"][0] | {
        "measured": {key: records[key] for key in ("command", "machine", "commit", "date")}
    }
    assert [run["label"] for run in added["runs"]] == ["old", "new"]
    page = (out / "README.md").read_text()
    assert "By hand." in page
    assert f"`{added['command']}`, commit second" in page
    assert f"Earlier: old, `{records['command']}`, commit first" in page

    capsys.readouterr()
    for words in (["--rows", "7"], ["--rows", "8", "--seed", "1"]):
        with pytest.raises(SystemExit) as stop:
            mask_distance.main([str(new), *words, "--out", str(out)])
        assert stop.value.code == 2
        assert (
            "has 'old', measured with --rows 8 --seed 0: use the same, name that run too, or" in capsys.readouterr().err
        )
        assert json.loads(records_file.read_text()) == added
    mask_distance.main([str(new), str(old), "--rows", "8", "--out", str(out)])
    again = json.loads(records_file.read_text())["runs"]
    assert [(run["label"], "measured" in run) for run in again] == [("old", False), ("new", False)]


def test_an_interrupted_measurement_leaves_what_can_be_drawn(config_file, tmp_path, monkeypatch):
    runs = [trained(config_file, tmp_path / name, UNIFORM) for name in ("a", "b")]
    measure, steps = mask_distance.measure, []

    def interrupted(checkpoint: Checkpoint, *rest: Any) -> dict[str, Any]:
        steps.append(checkpoint.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return measure(checkpoint, *rest)

    monkeypatch.setattr(mask_distance, "measure", interrupted)
    command = ["--rows", "8", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        mask_distance.main([*map(str, runs), *command])
    assert stop.value.code == 130
    mask_distance.main(["--draw", "--out", str(tmp_path / "out")])
    mask_distance.main([*map(str, runs), *command])
    assert steps == [3, 6, 3, 3, 6]


def test_runs_of_one_name_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        mask_distance.main([f"{tmp_path}/a/puma", f"{tmp_path}/b/puma"])
    assert stop.value.code == 2
    assert f"{tmp_path}/a/puma, {tmp_path}/b/puma: runs are recorded by the names of" in capsys.readouterr().err
    (tmp_path / "puma").mkdir()
    monkeypatch.chdir(tmp_path / "puma")
    with pytest.raises(SystemExit):
        mask_distance.main([".", f"{tmp_path}/b/puma"])
    assert f"{tmp_path}/puma, {tmp_path}/b/puma: runs are recorded" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--draw"], ["run"]])
@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"runs": []}', '{"runs": {"a": 1}}', "null"])
def test_wrong_records_end_with_one_message(content, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "records.json").write_text(content)
    monkeypatch.setattr(mask_distance, "readable_checkpoints", lambda _: [])
    with pytest.raises(SystemExit) as stop:
        mask_distance.main([*words, "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/records.json cannot be read (")
    assert error.endswith("): repair or delete it, or choose another --out\n")
    assert (tmp_path / "records.json").read_text() == content


def test_random_order_is_told_from_the_order_of_confidence(config_file):
    config = read_config(config_file(PUMA | {"reveal_order": "random"}))
    assert ", reveal order random, " in describe(config)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (None, "holds no usable checkpoint: name a run directory"),
        (
            {"name": "block_uniform", "block_size": 4, "block_attention": "prefix"},
            "objective.name 'block_uniform' must be one that masks whole rows",
        ),
        (PUMA | {"uniform_fraction": 0.25}, "objective.uniform_fraction 0.25 mixes two kinds of masks"),
    ],
)
def test_bad_input_ends_with_one_message(objective, expected, config_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    if objective is not None:
        trained(config_file, run_dir, objective)
    with pytest.raises(SystemExit) as stop:
        mask_distance.main([str(run_dir), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mask_distance, "collect", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as stop:
        mask_distance.main(["run", "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "is not a folder that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give run directories, or --draw without any"),
        (["run", "--draw"], "give run directories, or --draw without any"),
        (["run", "--rows", "0"], "--rows: must be an integer from 1 to"),
    ],
)
def test_wrong_options_are_refused(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        mask_distance.main(words)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
