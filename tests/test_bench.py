"""The benchmark runs from end to end, and what it compares with computes the same."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PUMA, ROOT
from helpers import numbered_rows, random_generator, random_log_probs, random_model

from bench import dense, measure
from bench.__main__ import main, parse
from bench.head import NAMES, random_problem, run_head
from bench.inputs import random_rows, read_inputs
from bench.measure import Interval, kernel_report, time_in_turn
from bench.step import arithmetic
from config import Config, PumaSettings, SamplingRule
from data.row_queue import RowQueue
from data.stream import SequenceStream
from model.transformer import build_model
from progressive import PumaPool, draw_target
from progressive_block import block_layout
from runtime.config_file import read_config
from runtime.distributed import World
from samplers.full import sample_full
from training.run import build_run
from training.update import Updater

CPU = torch.device("cpu")
PLAIN = PUMA | {"pool_batches": 1}  # the plain form has no deeper pool
TINYGSM = ROOT / "yaml_files" / "tinygsm_puma.yaml"
SMALL = ["model.hidden_size=16", "model.intermediate_size=16", "model.num_hidden_layers=1"]
SMALL += ["model.num_attention_heads=2", "training.device=cpu", "training.precision=float32"]
FULL_BOARDS = ["data.size=4", "data.layout=in_place", "data.source=files", "data.train_file=a.npy"]
FULL_BOARDS += ["data.test_file=b.npy", "data.min_clues=12", "data.max_clues=16", "model.vocab_size=6"]


def bench(*arguments: object, json_file: Path) -> list[dict]:
    """Rows of a benchmark that runs in this process."""
    main([*map(str, arguments), "--json", str(json_file), "--iterations", "2", "--seconds", "0"])
    rows = json.loads(json_file.read_text())
    for row in rows:
        assert row.keys() >= {"name", "unit", "ours_ms", "ours_per_s", "machine", "command"}
        if "dense_ms" in row:
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    return rows


def tiny_config(config_file, **changes) -> Config:
    return read_config(config_file(**changes))


# The commands.


def test_step(config_file, tmp_path, capsys):
    options = ["--batch", 3, "--length", 24, "--vocab", 50, "--no-memory"]
    rows = bench("step", "--config", config_file(PLAIN), *options, json_file=tmp_path / "rows.json")
    assert [row["name"] for row in rows] == ["puma", "uniform"]
    text = capsys.readouterr().out
    assert "batch 3 x 24, vocabulary 50" in text
    assert "puma / uniform, ours_ms" in text
    for row in rows:
        assert "ours_peak_gib" not in row
        assert 0 < row["scored"] < 1
        assert row["utilisation"] == row["floor_ms"] / row["ours_ms"] > 0


def test_step_of_another_objective(config_file, tmp_path):
    file = config_file({"name": "autoregressive"})
    rows = bench("step", "--config", file, "--no-memory", json_file=tmp_path / "rows.json")
    assert [row["name"] for row in rows] == ["autoregressive"]


def test_step_on_the_shape_of_tinygsm_needs_no_files(tmp_path):
    """The shipped settings with a small model; their data is not on disk."""
    options = ["--batch", 2, "--length", 32, "--vocab", 5000, "--no-memory", *SMALL]
    rows = bench("step", "--config", TINYGSM, *options, json_file=tmp_path / "rows.json")
    assert [row["name"] for row in rows] == ["puma", "uniform"]


def test_microbatches_of_the_overrides_are_measured(config_file, tmp_path, monkeypatch):
    """On both sides; those of a file, which need not divide the rows of a benchmark, are not."""
    n_rows = list[int]()
    plain_logits = dense.aligned_logits

    def counted(model, xt):
        n_rows.append(len(xt))
        return plain_logits(model, xt)

    monkeypatch.setattr(dense, "aligned_logits", counted)
    words = ["step", "--config", config_file({"name": "uniform"}, training__micro_batch_size=8), "--no-memory"]
    bench(*words, "--batch", 6, "training.micro_batch_size=2", json_file=tmp_path / "rows.json")
    assert set(n_rows) == {2}
    options = parse([*map(str, words), "--batch", "6"])
    assert read_inputs(options, "sudoku_puma", 1, 1)[0].training.micro_batch_size is None


def test_memory_of_each_step_alone(config_file, tmp_path):
    """In other processes, which build a step each: the vocabulary's weights, gradients and moments are counted."""
    options = ["--batch", 2, "--vocab", 200_000]
    (row,) = bench("step", "--config", config_file({"name": "uniform"}), *options, json_file=tmp_path / "rows.json")
    weights_gib = 2 * 200_000 * 16 * 4 / 2**30  # embeddings and head
    assert row["ours_peak_gib"] > 5 * weights_gib, "two moments and the average as well"
    assert row["dense_peak_gib"] > 5 * weights_gib


def test_head_measures_memory_whatever_this_process_has_used(tmp_path):
    torch.ones(1 << 28)  # 1 GiB, which is freed at once
    options = ["--batch", 1, "--length", 512, "--vocab", 50_000, *SMALL]
    rows = bench("head", *options, json_file=tmp_path / "rows.json")
    assert [row["name"] for row in rows] == list(NAMES.values())
    logits_gib = 512 * 50_000 * 4 / 2**30
    assert rows[0]["dense_peak_gib"] > 2 * logits_gib > rows[0]["ours_peak_gib"] > 0


def test_profile(config_file, capsys):
    main(["step", "--config", str(config_file(PLAIN)), "--profile"])
    text = capsys.readouterr().out
    assert "puma/ours" in text
    plain_ms, profiled_ms = re.search(r"\n(.*) ms per call, (.*) ms under the profiler\n", text).groups()
    assert min(float(plain_ms), float(profiled_ms)) > 0
    assert "aten::mm" in text


def test_kernels_and_idle_times_of_a_gpu():
    """Two calls: a kernel inside another one's time leaves no gap behind it."""
    intervals = [
        Interval("void at::native::add", 20, 30),
        Interval("product", 0, 10),
        Interval("copy", 2, 4),
        Interval("product", 32, 42),
    ]
    head, _, *rows = kernel_report(intervals, 2)
    assert head == "2 kernels per call of 0.02 ms, the device idle for 0.01 ms"
    assert rows[2:5] == ["| 10 | 1 | product |", "| 5 | 0.5 | add |", "| 1 | 0.5 | copy |"]
    assert rows[8:11] == ["| 1 | 0.5 | 0 to 3 us |", "| 5 | 0.5 | 3 to 20 us |", "| 0 | 0 | 20 us or more |"]
    assert rows[14:] == ["| 5 | 0.5 | product | add |", "| 1 | 0.5 | add | product |"]


@pytest.mark.parametrize("options", [["--batch", 3], ["--config", TINYGSM, "--length", 32, "--vocab", 64]])
def test_sample(tmp_path, options):
    row, *rules = bench("sample", *options, "--steps", 2, "--no-memory", *SMALL, json_file=tmp_path / "rows.json")
    assert row["agreement"] == "100.0%"
    assert row["nfe"] == 2
    names = ["threshold", "stable", "entropy_bound", "remask", "plan", "running_confidence"]
    assert [rule["name"] for rule in rules] == [f"{name} beside top_prob" for name in names]
    assert all(rule["dense_ms"] == row["ours_ms"] for rule in rules)
    assert all(1 <= rule["nfe"] <= 2 for rule in rules)


def test_evaluations_are_at_most_the_cells_to_fill(config_file, tmp_path):
    options = ["--config", config_file(), "--batch", 2, "--steps", 20, "--no-memory"]  # boards of 16 cells
    row, *_ = bench("sample", *options, json_file=tmp_path / "rows.json")
    assert row["nfe"] == 16


def test_data(tmp_path):
    rows = bench("data", "--batch", 40, json_file=tmp_path / "rows.json")
    assert [row["unit"] for row in rows] == ["puzzles", "rows", "rows", "programs"]
    assert ["dense_ms" in row for row in rows] == [False, True, True, True]


def test_block(tmp_path):
    options = ["--config", TINYGSM, "--batch", 2, "--length", 32, "--vocab", 64, "--no-memory"]
    rows = bench("block", *options, *SMALL, json_file=tmp_path / "rows.json")
    assert [row["unit"] for row in rows] == 3 * ["steps", "tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--config", "no.yaml"], "no.yaml"),
        (["step", "objective.uniform_fraction=0.5"], "objective.uniform_fraction 0.5 has no plain form"),
        (
            ["step", "objective.name=uniform", "objective.low_discrepancy=true"],
            "low_discrepancy True has no plain form",
        ),
        (["step", "objective.pool_batches=2"], "no plain form"),
        (["step", "objective.reveal_order=neg_entropy"], "no plain form"),
        (["step", "--config", str(TINYGSM.with_name("tinygsm_block_puma.yaml")), *SMALL], "python -m bench block"),
        (["step", "--batch", "0"], "must be an integer from 1"),
        (["step", "--batch", "1000000000000"], "--batch 1000000000000 with --length 162: needs"),
        (["head", "--length", "1000000000000"], "--batch 2 with --length 1000000000000: needs"),
        (["step", "--seconds", "nan"], "--seconds: must be a finite number of at least 0, got nan"),
        (["step", "--config", str(TINYGSM), "data.mask_id=0"], "data.mask_id 0 leaves no token below it"),
        (["step", *FULL_BOARDS], "data.max_clues 16 with data.layout in_place leaves no cell to predict: lower it"),
        (["block", "--length", "24"], "16 blocks"),
        (["data", "--steps", "3"], "data does not read steps"),
        (["data", "--profile", "--json", "a.json"], "--json: not with --profile"),
        (["data", "--json", "/nonexistent/a.json"], "--json /nonexistent/a.json: the folder"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--no-memory"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# The plain paths compute what the fast ones do.


@pytest.mark.parametrize(
    ("name", "micro_rows"), [("puma", None), ("uniform", None), ("uniform", 2), ("autoregressive", None)]
)
def test_steps_change_the_weights_and_their_average_alike(config_file, tmp_path, name, micro_rows):
    objective = {"name": name} | ({"n_stages": 3, "collapse_threshold": 0.9} if name == "puma" else {})
    # The plain step has no schedule, and decays biases and norms.
    changes = {
        "training__micro_batch_size": micro_rows,
        "training__warmup_steps": 0,
        "training__weight_decay": 0.0,
        "training__max_steps": 10**6,
    }
    config = tiny_config(config_file, objective=objective, **changes)
    run = build_run(config, World(0, 1, CPU), tmp_path, random_rows(config, config.data.length))
    model = build_model(config)
    model.load_state_dict(run.model.state_dict())
    updater, trainer = Updater(run), dense.DenseTrainer(model, config, None, CPU)
    loss = 0.0
    for _ in range(2):
        updater.step()
        parts = [(batch.xt, batch.x0, batch.weight) for batch in run.batch]
        trainer.step(tuple(map(torch.cat, zip(*parts, strict=True))))
        loss += trainer.loss
    torch.testing.assert_close(torch.tensor(loss), run.loss_sum.float())
    for ours, plain in ((run.model, model), (run.ema.module, trainer.average.module)):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_loss_and_gradients_are_the_same(shifted):
    """Before the optimizer, whose first step hides the size of a gradient."""
    model = random_model()
    model.shifted = shifted
    xt, x0 = torch.randint(0, 23, (2, 3, 7), generator=random_generator(1))
    weight = torch.rand(3, 7, generator=random_generator(2)) * (torch.rand(3, 7, generator=random_generator(3)) < 0.5)
    scores = model(xt, x0, weight)
    scores.loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss, confidence = dense.score(dense.aligned_logits(model, xt), x0, weight)
    loss.backward()
    torch.testing.assert_close(loss, scores.loss)
    torch.testing.assert_close(confidence[weight != 0], scores.confidence[weight != 0])
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [None, 0.8])
def test_the_pool_advances_alike(tau):
    n_rows, n_stages = 24, 5
    queue = RowQueue(SequenceStream(numbered_rows(200, length=20), 0), n_rows, CPU)
    settings = PumaSettings(name="puma", n_stages=n_stages, collapse_threshold=tau)
    ours = PumaPool(settings, queue, block_layout(settings, 20), n_rows=n_rows, generator=random_generator(0))
    for step in range(4):
        confidence = random_log_probs(ours.rows.x0.shape, seed=step)
        twin = random_generator(0)  # draws what the pool is about to draw
        twin.set_state(ours.generator.get_state())
        targets = draw_target(ours.rows.stage.flatten() + 1, n_stages, ours.rows.maskable.sum(1), twin)
        plain = [
            dense.advance_row(
                ours.rows.masked[i].clone(),
                ours.rows.maskable[i],
                confidence[i],
                int(ours.rows.stage[i]),
                int(targets[i]),
                n_stages,
                tau,
            )
            for i in range(n_rows)
        ]
        n_finished = int(ours.n_finished)
        ours.advance(confidence, confidence)
        assert int(ours.n_finished) - n_finished == sum(stage == n_stages for _, stage in plain)
        for i, (masked, stage) in enumerate(plain):
            if stage < n_stages:
                assert torch.equal(ours.rows.masked[i], masked)
                assert int(ours.rows.stage[i]) == stage
    assert int(ours.n_finished) > 0


@pytest.mark.parametrize("objective", [{"name": "puma", "n_stages": 3}, {"name": "uniform"}])
def test_plain_batches_are_masked_and_weighted_as_ours(config_file, objective):
    config = tiny_config(config_file, objective=objective)
    data = random_rows(config, config.data.length)
    stream = SequenceStream(data, 0)
    pool = dense.DensePool(stream, config, config.objective, CPU) if objective["name"] == "puma" else None
    for step in range(5):
        xt, x0, weight = pool.batch() if pool else dense.fresh_batch(stream, config)
        masked = xt == config.mask_id
        assert torch.equal(xt[~masked], x0[~masked])
        assert torch.equal(weight != 0, masked)
        torch.testing.assert_close(weight.sum(1), torch.full((len(x0),), 1 / len(x0)))
        assert masked.any(1).all()
        assert not masked[:, : data.length // 2].any(), "prompts"
        if pool:
            pool.advance(random_log_probs(x0.shape, seed=step))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_samples_are_the_same(tokens_per_step, shifted):
    model, mask_id = random_model(), 22
    model.shifted = shifted
    xt = torch.randint(0, 22, (5, 9), generator=random_generator(0))
    xt[torch.rand(5, 9, generator=random_generator(1)) < 0.7] = mask_id
    xt[:, 0] = 1  # a shifted model says the same of tokens 0 and 1, and rounding would break the tie
    xt[:, 4] = 2  # a row that is masked throughout scores all positions alike, and rounding would choose
    xt[3] = 1  # nothing to fill
    ours = sample_full(model, xt, mask_id, SamplingRule(tokens_per_step=tokens_per_step)).tokens
    assert torch.equal(dense.sample(model, xt, mask_id, tokens_per_step), ours)


@pytest.mark.parametrize("path", NAMES)
def test_heads_agree(path):
    problem = random_problem(40, 8, 100, CPU)
    scored = problem[-1] != 0
    loss, confidence, *gradients = run_head(problem, "ours", None)
    other_loss, other_confidence, *other_gradients = run_head(problem, path, None)
    torch.testing.assert_close(other_loss, loss)
    if path != "torch":
        torch.testing.assert_close(other_confidence[scored], confidence[scored])
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)


# What the figures rest on.


@pytest.mark.parametrize("layout", ["two_halves", "in_place"])
def test_random_boards_have_the_clues_of_the_settings(config_file, layout):
    config = tiny_config(config_file, data__layout=layout)  # 4x4 boards with 4 to 8 clues
    data = random_rows(config, config.data.length)
    tokens, prompt_mask = data.rows(np.arange(len(data)))
    assert tokens.max() < config.mask_id
    n_prompt = set(prompt_mask.sum(1).tolist())
    assert n_prompt == ({16} if layout == "two_halves" else set(range(4, 9)))


def test_random_rows_hold_no_mask_and_short_prompts():
    config = read_config(TINYGSM)
    tokens, prompt_mask = random_rows(config, 512).rows(np.arange(200))
    assert tokens.shape == prompt_mask.shape == (200, 512)
    assert tokens.max() < config.mask_id
    assert 0.13 < prompt_mask.mean() < 0.19


def test_arithmetic_counts_every_matrix(config_file):
    config = tiny_config(config_file)
    model = build_model(config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    short, long = (arithmetic(config.model, 3, length, n_scored=0) for length in (10, 20))
    attention = (long - 2 * short) / 2  # four times as much in rows twice as long
    assert attention == 3 * 12 * config.model.num_hidden_layers * config.model.hidden_size * 10**2
    assert short - attention == 6 * matrices * 30
    assert arithmetic(config.model, 3, 10, n_scored=7) - short == 6 * model.lm_head.weight.numel() * 7
    assert arithmetic(config.model, 3, 10, n_scored=0, causal=True) == short - attention / 2


@pytest.mark.parametrize("switches", [[], ["--compile"], ["--graph"]])
def test_fast_calls_are_timed_in_a_row_whatever_the_first_ones_take(switches, monkeypatch):
    n_slow, n_called, n_timed = 2 if switches else 1, 0, list[int]()

    def time_ms(call, n_calls, device):
        nonlocal n_called
        n_called += n_calls
        n_timed.append(n_calls)
        return 1e4 if n_called <= n_slow else 10.0

    monkeypatch.setattr(measure, "time_ms", time_ms)
    n_warmup = parse(["step", *switches]).n_warmup
    time_in_turn({"a": lambda: None}, CPU, n_rounds=1, seconds=60, n_warmup=n_warmup)
    assert n_timed == [*(n_warmup * [1]), 6]


def test_paths_are_called_in_turn():
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = time_in_turn(calls, CPU, n_rounds=4, seconds=0, n_warmup=1)
    # Warm-up, then rounds forwards, backwards and forwards; b ends a round and begins the next.
    assert [name for name, _ in groupby(called)] == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}, "three rounds at least"
