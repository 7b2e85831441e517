"""Evaluation: fixed masks, every item counted once over ranks, intervals, and the command on a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from conftest import PUMA, UNIFORM, run_python, run_ranks, tiny_settings
from test_data_sudoku_boards import boards

import train
from base.files import WriteError
from data.dataset import JudgedAnswers
from data.sudoku import Sudoku
from data.sudoku_boards import SudokuData, make_data
from data.sudoku_solver import solve_singles
from eval import evaluate as evaluation
from eval.accuracy import (
    TestQuestions,
    check_figures,
    check_questions,
    count_examples,
    group_results,
    measure_rule,
    wilson_interval,
)
from eval.evaluate import validation_loss
from model.hub import pack_run
from model.transformer import Transformer, build_model
from progressive_block import BlockLayout
from runtime.checkpoint import find_checkpoint
from runtime.config_file import parse_config
from runtime.distributed import World
from runtime.final import SamplerResult

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, data_dir) -> Path:
    """A finished run of a few steps, with four ways of sampling."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = tiny_settings(PUMA, data_dir)
    settings["validation"] |= {"confidence": ["top_prob", "top_prob_margin"], "tokens_per_step": [1, 3]}
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    train.main(["--config", str(config), "--run-dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def model(data_dir) -> Transformer:
    """An untrained model of the tiny settings."""
    model = Transformer(parse_config(tiny_settings(PUMA, data_dir), "test").model)
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # losses that differ from token to token
    return model.eval()


@pytest.fixture
def puzzles() -> SudokuData:
    tokens = boards(4, 37, n_clues=16)
    digits = np.array([np.random.default_rng(row).permutation(4) for row in range(37)]) + 1  # [37, 4]
    return make_data(np.take_along_axis(digits, tokens - 1, axis=1), 4, "test")


def shares(model: Transformer, data: SudokuData, n_ranks: int, n_rows: int, batch_size: int = 8) -> list[float]:
    """What each of `n_ranks` contributes to the loss; outside a process group nothing is added up."""
    settings = tiny_settings(PUMA, Path())
    settings["validation"] |= {"n_loss_rows": n_rows, "batch_size": batch_size}
    config = parse_config(settings, "test")
    return [validation_loss(model, config, data, World(rank, n_ranks, CPU)) for rank in range(n_ranks)]


# The validation loss


def test_the_loss_does_not_depend_on_ranks_or_batches(model, puzzles):
    (alone,) = shares(model, puzzles, 1, 37)
    assert alone > 0
    for n_ranks in (2, 3, 5, 50):
        assert sum(shares(model, puzzles, n_ranks, 37)) == pytest.approx(alone, rel=1e-6)
    for batch_size in (1, 7, 100):
        assert shares(model, puzzles, 1, 37, batch_size)[0] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "size"),
    [
        (UNIFORM, 32),
        (PUMA, 32),
        ({"name": "block_uniform", "block_size": 4, "block_attention": "prefix"}, 4),
        ({"name": "block_uniform", "block_size": 4, "block_attention": "block_causal"}, 4),
    ],
    ids=["uniform", "puma", "prefix", "block_causal"],
)
@torch.no_grad()
def test_the_loss_is_that_of_fixed_masks_whatever_the_seed(objective, size, puzzles):
    """Drawn in each block of the model; a block is predicted from the clean tokens before it."""
    settings = tiny_settings(objective, Path())
    model = build_model(parse_config(settings, "test"))
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.lm_head.weight.mul_(20)  # losses that differ from token to token
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        settings["training"]["seed"] = seed
        losses.append(validation_loss(model.eval(), parse_config(settings, "test"), puzzles, World(0, 1, CPU)))
    assert losses[0] == losses[1]
    x0, prompt_mask = map(torch.from_numpy, puzzles.rows(np.arange(settings["validation"]["n_loss_rows"])))
    generator = torch.Generator().manual_seed(evaluation.MASK_SEED)
    masked = BlockLayout(32, size, "prefix").mask_uniformly(~prompt_mask, generator)
    xt = x0.masked_fill(masked, puzzles.mask_id)
    logits = [
        model.logits(torch.cat([x0[:, :start], xt[:, start : start + size]], dim=1))[:, start:]
        for start in range(0, 32, size)
    ]
    blocks = masked.view(-1, size)
    weight = oracle.weights_of(blocks, int(blocks.any(1).sum())).view_as(masked)
    assert losses[0] == pytest.approx(oracle.score_batch(torch.cat(logits, dim=1), x0, weight).loss, rel=1e-5)


def test_no_more_rows_than_there_are(model, puzzles):
    assert shares(model, puzzles, 1, 10_000) == shares(model, puzzles, 1, 37)


# The whole evaluation


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_forward_pass_is_in_the_precision_of_training(precision, model, data_dir):
    settings = tiny_settings(PUMA, data_dir)
    settings["training"]["precision"] = precision
    settings["validation"] |= {"n_likelihood_draws": 2}
    config = parse_config(settings, "test")
    enabled: list[bool] = []
    model.model.register_forward_hook(lambda *_: enabled.append(torch.is_autocast_enabled("cpu")))
    evaluation.evaluate(model, config, config.open_data().load(train=False), World(0, 1, CPU), n_examples=2)
    assert len(enabled) > 16, "the loss, the likelihood and every step of sampling"
    assert set(enabled) == {precision == "bfloat16"}


# Figures of a data set


@pytest.mark.parametrize(
    ("reported", "wrong"),
    [
        ({"accuracy": 0.8}, "'accuracy' the value 0.8 for question 0"),
        ({"accuracy": 1.2}, "'accuracy' the value 1.2 for question 0"),
        ({"accuracy": np.nan}, "'accuracy' the value nan"),
        ({"cell_accuracy": 3.2}, "'cell_accuracy' the value 3.2"),
        ({"cell_accuracy": -0.1}, "'cell_accuracy' the value -0.1"),
        ({"edit_distance": np.inf}, "'edit_distance' the value inf"),
        ({"edit_distance": None}, "'edit_distance' as an array of shape (3,), and left it out"),
        ({"edit_distance": np.ones(1)}, "gave ndarray (1,)"),
    ],
)
def test_figures_that_are_none_are_refused_by_name_and_value(reported, wrong, model, data_dir, monkeypatch):
    with pytest.raises(ValueError, match="data set 'sudoku'") as caught:
        evaluate_with_figures(model, data_dir, monkeypatch, **reported)
    assert wrong in str(caught.value)


def test_shares_are_shown_as_percentages_and_other_numbers_as_they_are(model, data_dir, monkeypatch):
    result = evaluate_with_figures(model, data_dir, monkeypatch, edit_distance=3.2)
    (sampler,) = evaluation.as_json(result)["samplers"]
    assert sampler["details"] == {"cell_accuracy": 0.5}
    assert sampler["numbers"] == {"edit_distance": pytest.approx(3.2)}
    assert "cell accuracy 50.00%, edit distance 3.2," in result.table()
    assert result.metrics()["validation/edit_distance/top_prob_1"] == pytest.approx(3.2)


def evaluate_with_figures(model, data_dir, monkeypatch, **reported: Any) -> evaluation.Evaluation:
    """Evaluate on three questions with a data set that reports other figures than Sudoku's; None: leaves one out."""
    values = {"accuracy": 1, "cell_accuracy": 0.5, "edit_distance": 0} | reported
    arrays = {
        name: np.full(3, value) if np.isscalar(value) else np.array(value)
        for name, value in values.items()
        if value is not None
    }
    monkeypatch.setattr(Sudoku, "numbers", ("edit_distance",))
    monkeypatch.setattr(Sudoku, "judge", lambda *_: JudgedAnswers(arrays))
    config = parse_config(tiny_settings(PUMA, data_dir), "test")
    return evaluation.evaluate(model, config, config.open_data().load(train=False), World(0, 1, CPU), n_examples=3)


def test_sampled_answers_depend_on_the_seed_and_the_question_alone(model, data_dir):
    """At a temperature: not on the batch, nor on the rank, that a question is in."""
    settings = tiny_settings(PUMA, data_dir)
    settings["validation"] |= {"temperature": 1.0, "tokens_per_step": [4], "n_table_rows": 20}

    def answers(seed: int, batch_size: int, rank: int = 0, n_ranks: int = 1) -> dict[int, str]:
        settings["training"]["seed"], settings["validation"]["batch_size"] = seed, batch_size
        config = parse_config(settings, "test")
        data, world = config.open_data().load(train=False), World(rank, n_ranks, CPU)
        test = TestQuestions(data, None, {}, 11)
        measured = measure_rule(model, config, test, world, rule=config.validation.rules()[0])
        return {sample["row"]: sample["answer"] for sample in measured.samples}

    whole = answers(0, 11)
    assert list(whole) == list(range(11))
    assert answers(0, 3) == whole
    assert answers(0, 4, 0, 2) | answers(0, 4, 1, 2) == whole
    assert sum(answers(1, 11)[row] == answer for row, answer in whole.items()) < 3


def test_the_time_is_that_of_sampling_alone(model, data_dir, monkeypatch):
    """Of two batches; judging, which is slow where answers are programs, is not part of it."""
    settings = tiny_settings(PUMA, data_dir)
    settings["validation"] |= {"batch_size": 2}
    config = parse_config(settings, "test")
    clock = iter([10.0, 11.5, 20.0, 24.0])
    monkeypatch.setattr("eval.accuracy.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    test = TestQuestions(config.open_data().load(train=False), None, {}, 3)
    measured = measure_rule(model, config, test, World(0, 1, CPU), rule=config.validation.rules()[0])
    assert measured.seconds == 1.5 + 4.0


def test_the_question_of_a_wrong_figure_is_named():
    """By its number in the test, not in the batch."""
    data: Any = SimpleNamespace(figures=("accuracy", "share"), numbers=("distance",))
    figures = {name: np.zeros(3) for name in ("accuracy", "share", "distance")}
    rows = np.array([5, 8, 11])
    check_figures(JudgedAnswers(figures), data, rows, "mine")
    for name, value in (("accuracy", 0.5), ("share", 1.5), ("distance", np.nan)):
        wrong = figures | {name: np.array([0, 1, value])}
        with pytest.raises(ValueError, match=f"gave '{name}' the value {value:g} for question 11;"):
            check_figures(JudgedAnswers(wrong), data, rows, "mine")
    unlike: Any = figures | {"share": [0.0, 0.5, 1.0]}
    with pytest.raises(ValueError, match=r"'share' as an array of shape \(3,\), and gave list \(3,\)"):
        check_figures(JudgedAnswers(unlike), data, rows, "mine")


# Intervals


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(n_right, n, low, high):
    assert wilson_interval(n_right, n) == pytest.approx((low, high), abs=5e-5)


def test_intervals_hold_the_share_and_narrow_with_more_trials():
    for n in (1, 10, 1000, 10**6):
        for n_right in {0, 1, n // 2, n}:
            low, high = wilson_interval(n_right, n)
            assert 0 <= low <= n_right / n + 1e-12
            assert n_right / n <= high + 1e-12
            assert high <= 1
    widths = [high - low for low, high in (wilson_interval(n // 4, n) for n in (100, 400, 1600))]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.05)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.05)


# By difficulty


def test_groups_have_their_own_accuracy_and_interval():
    clues, ratings = np.array([30, 31, 30, 31, 31]), np.array([2.0, 2.0, 2.0, np.nan, 3.0])
    solved = np.array([True, False, False, True, True])
    found = group_results({"clues": clues, "rating": ratings}, solved, np.array([True, True, True, False, False]))
    facts = [(group.by, group.value, group.n, group.accuracy, group.reference) for group in found]
    assert facts == [
        ("clues", 30, 2, 1 / 2, 1),
        ("clues", 31, 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
        ("rating", 2, 3, pytest.approx(1 / 3), 1),
        ("rating", 3, 1, 1, 0),
    ]
    for group in found:
        assert (group.accuracy_low, group.accuracy_high) == wilson_interval(group.accuracy * group.n, group.n)


def test_puzzles_are_grouped_by_clues_and_rating_beside_what_singles_solve(run_dir, tmp_path, capsys):
    """In the records, the JSON file and the table; the rating comes from a column of the test file."""
    test = np.load(next(Path(find_checkpoint(run_dir).config().data.data_dir).glob("sudoku_4x4_*_test.npy")))
    ratings = 1.25 + np.arange(20) % 3
    rows = [f"{puzzle},{solution},{rating}" for puzzle, solution, rating in zip(*as_text(test), ratings, strict=True)]
    ratings[7], rows[7] = np.nan, rows[7].rpartition(",")[0] + ","  # a puzzle that has not been rated
    (tmp_path / "rated.csv").write_text("\n".join(["puzzle,solution,hardness", *rows]) + "\n")
    files = [f"data.{split}_file={tmp_path}/rated.csv" for split in ("train", "test")]
    words = ["data.source=files", *files, "data.rating_column=hardness", "validation.tokens_per_step=[1]"]
    out = tmp_path / "result.json"
    evaluation.main([str(run_dir), *words, "validation.n_final_examples=20", "--json", str(out)])
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    sampler = result["samplers"][0]
    clues = (test[:, :16] != 0).sum(1)
    singles = (solve_singles(test[:, :16], 4) != 0).all(1)
    expected = {("clues", float(value)): clues == value for value in np.unique(clues)}
    expected |= {("rating", value): np.floor(ratings) == value for value in (1.0, 2.0, 3.0)}
    assert [(group["by"], group["value"]) for group in sampler["groups"]] == list(expected)
    for group in sampler["groups"]:
        own = expected[group["by"], group["value"]]
        assert group["n"] == own.sum()
        assert group["reference"] == pytest.approx(singles[own].mean())
        assert f"{group['by']} {group['value']:g}" in printed
    n_solved = sum(group["n"] * group["accuracy"] for group in sampler["groups"] if group["by"] == "clues")
    assert n_solved == pytest.approx(20 * sampler["accuracy"])
    assert sum(group["n"] for group in sampler["groups"] if group["by"] == "rating") == 19
    assert result["reference"] == {"name": "naked and hidden singles", "accuracy": singles.mean()}
    assert f"naked and hidden singles alone: accuracy {100 * singles.mean():.1f}%" in printed
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("validation/by_clues/") for key in records[-1])


def as_text(boards: np.ndarray) -> tuple[list[str], list[str]]:
    """Puzzles and solutions [N, 2 * C] as csv files have them."""
    rows = ["".join(map(str, row)) for row in boards.tolist()]
    return [row[: len(row) // 2] for row in rows], [row[len(row) // 2 :] for row in rows]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.rating_column=hardnes", "no column ['hardnes']; its columns are ['puzzle', 'solution']"),
        ("data.rating_column=puzzle", "ratings must be numbers"),
    ],
)
def test_ratings_that_are_none_are_refused(change, expected, run_dir, tmp_path, capsys):
    (tmp_path / "rated.csv").write_text("puzzle,solution\n12.40000.....000,1234341221434321\n")
    files = [f"data.{split}_file={tmp_path}/rated.csv" for split in ("train", "test")]
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), "data.source=files", *files, change])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


# The command


def test_the_command_measures_what_training_measured_last(run_dir, tmp_path, capsys):
    out = tmp_path / "result.json"
    evaluation.main([str(run_dir), "--json", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    final = json.loads((run_dir / "final.json").read_text())
    assert result["loss"] == final["evaluation"]["loss"]
    assert result["samplers"] == final["evaluation"]["samplers"]
    cells = [(sampler["confidence"], sampler["tokens_per_step"]) for sampler in result["samplers"]]
    assert cells == [("top_prob", 1), ("top_prob", 3), ("top_prob_margin", 1), ("top_prob_margin", 3)]
    for sampler in result["samplers"]:
        assert sampler["n"] == 10
        assert 0 <= sampler["accuracy_low"] <= sampler["accuracy"] <= sampler["accuracy_high"] <= 1
        assert (sampler["accuracy_low"], sampler["accuracy_high"]) == wilson_interval(10 * sampler["accuracy"], 10)
        assert sampler["nfe"] == {1: 16, 3: 6}[sampler["tokens_per_step"]]
        assert 0 < sampler["details"]["cell_accuracy"] < 1
    assert printed.count("forward evaluations") == 4
    assert f"validation loss {result['loss']:.4f}" in printed


@pytest.mark.parametrize(("kind", "overrides"), [("ema", []), ("model", ["training.ema_decay=null"])])
def test_the_averaged_weights_are_what_is_measured_unless_others_are_asked_for(
    run_dir, tmp_path, capsys, kind, overrides
):
    checkpoint = find_checkpoint(run_dir)
    weights = checkpoint.weights(kind)
    assert weights is not None
    model = Transformer(checkpoint.config().model)
    model.load_weights(weights)
    data = make_data(np.load(next(Path(checkpoint.config().data.data_dir).glob("sudoku_4x4_*_test.npy"))), 4, "test")
    evaluation.main([str(run_dir), "--json", str(tmp_path / "result.json"), *overrides])
    loss = json.loads((tmp_path / "result.json").read_text())["loss"]
    assert loss == pytest.approx(validation_loss(model.eval(), checkpoint.config(), data, World(0, 1, CPU)), rel=1e-6)


def test_a_packed_model_has_only_its_averaged_weights(run_dir, tmp_path, capsys):
    pack_run(str(run_dir), tmp_path / "packed")
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "packed"), "training.ema_decay=null"])
    assert stop.value.code == 2
    assert "packed holds only the averaged weights; name the run" in capsys.readouterr().err


def test_a_checkpoint_folder_and_other_settings(run_dir, tmp_path, capsys):
    out = tmp_path / "result.json"
    overrides = ["validation.n_examples=7", "validation.confidence=[random]", "validation.tokens_per_step=[16]"]
    # In README's order, options in between.
    evaluation.main([str(run_dir / "checkpoints" / "step_00000003"), "--json", str(out), *overrides])
    (sampler,) = json.loads(out.read_text())["samplers"]
    assert (sampler["confidence"], sampler["n"], sampler["nfe"]) == ("random", 7, 1)


def test_a_temperature_is_told_from_none(run_dir, tmp_path, capsys):
    """In the table, the labels of the records and the file, which also says what was evaluated."""
    out, changes = tmp_path / "result.json", ["validation.temperature=0.7", "validation.tokens_per_step=[4]"]
    evaluation.main([str(run_dir), "--json", str(out), "validation.n_examples=2", *changes])
    assert "top_prob, 4 per step, temperature 0.7: accuracy" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [each["options"] for each in result["samplers"]] == [{"temperature": 0.7}] * 2
    assert SamplerResult(**result["samplers"][0]).label == "top_prob_4_temperature_0.7"
    assert (result["checkpoint"], result["step"]) == (str(run_dir), 6)
    assert result["overrides"] == ["validation.n_examples=2", *changes]


def test_the_file_is_written_though_nothing_can_be_printed(run_dir, tmp_path, monkeypatch):
    def closed(self):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation.Evaluation, "table", closed)
    with pytest.raises(SystemExit):
        evaluation.main([str(run_dir), "validation.n_examples=1", "--json", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["samplers"]


@pytest.mark.parametrize("option", ["--json", "--samples"])
def test_files_are_checked_before_work(option, run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), option, str(tmp_path / "none" / "out")])
    assert stop.value.code == 2
    assert f"{option} {tmp_path}/none/out: the folder {tmp_path}/none does not exist" in capsys.readouterr().err


def test_results_and_samples_need_two_files(run_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), "--json", str(tmp_path / "a"), "--samples", f"{tmp_path}/../{tmp_path.name}/a"])
    assert stop.value.code == 2
    assert "--json and --samples: both name" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_printed(run_dir, tmp_path, capsys, monkeypatch):
    def fill_the_disk(path, text):
        raise WriteError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(evaluation, "write_text", fill_the_disk)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), "--json", str(tmp_path / "out.json"), "validation.n_examples=2"])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "forward evaluations" in printed.out
    assert "out.json cannot be written (No space left on device)" in printed.err


def test_a_single_row_has_no_error_and_its_file_no_nan(run_dir, tmp_path, capsys):
    out = tmp_path / "out.json"
    changes = ["validation.n_loss_rows=1", "validation.n_likelihood_draws=2", "validation.n_final_examples=2"]
    evaluation.main([str(run_dir), "--json", str(out), *changes])
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["likelihood"]["standard_error"] is None
    assert found["likelihood"]["nats_per_token"] > 0
    assert re.search(r"^at most [\d.]+ nats per token$", capsys.readouterr().out, re.MULTILINE)


def test_without_questions_only_the_loss_is_measured(run_dir, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluation.main([str(run_dir), "--json", str(out), "validation.n_examples=0"])
    assert json.loads(out.read_text())["samplers"] == []
    assert re.fullmatch(r"data: \d+ generated 4x4 boards .*\nvalidation loss [\d.]+\n", capsys.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), "--sweep", "--out", str(tmp_path / "sweep"), "validation.n_examples=0"])
    assert stop.value.code == 2
    assert "asks no questions" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["n_examples", "n_final_examples"])
def test_more_examples_than_there_are_is_refused(key, run_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run_dir), f"validation.{key}=5000"])
    assert stop.value.code == 2
    assert f"validation.{key} 5000: the test has 20 puzzles" in capsys.readouterr().err


def test_the_training_rows_are_not_read(run_dir, tmp_path, capsys):
    boards = "puzzle,solution\n12.40000.....000,1234341221434321\n"
    (tmp_path / "test.csv").write_text(boards)
    files = [f"data.{split}_file={tmp_path}/{split}.csv" for split in ("train", "test")]
    evaluation.main([str(run_dir), "data.source=files", *files, "validation.n_examples=1"])
    assert "of 1" in capsys.readouterr().out


def test_the_examples_that_an_override_asks_for_are_sampled(run_dir, tmp_path):
    """Though the run's own settings name another number for its last evaluation."""
    out = tmp_path / "result.json"
    overrides = ["validation.n_examples=3", "validation.tokens_per_step=[16]"]
    evaluation.main([str(run_dir), *overrides, "--json", str(out)])
    assert {sampler["n"] for sampler in json.loads(out.read_text())["samplers"]} == {3}


def test_two_processes_count_every_item_once(run_dir, tmp_path):
    """Eleven items on two ranks, in batches of four."""
    words = [run_dir, "validation.n_examples=11", "validation.n_loss_rows=11", "validation.batch_size=4", "--json"]
    alone = run_python("-m", "eval.evaluate", *words, tmp_path / "alone.json")
    together = run_ranks(2, "-m", "eval.evaluate", *words, tmp_path / "together.json")
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "together"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for ours, theirs in zip(one["samplers"], two["samplers"], strict=True):
        assert ours["n"] == 11
        assert 0 < ours["details"]["cell_accuracy"] < 1
        assert theirs["details"] == pytest.approx(ours["details"])
        exact = ("numbers", "groups", "options")
        assert [theirs[key] for key in exact] == [ours[key] for key in exact]
        means = [
            {key: value for key, value in each.items() if key not in (*exact, "details")} for each in (ours, theirs)
        ]
        assert means[0] == pytest.approx(means[1])
    assert together.stdout.count("validation loss") == 1, "one process prints"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/nonexistent"], "holds no usable checkpoint"),
        (["RUN", "validation.n_exmples=3"], "did you mean 'n_examples'?"),
        (["RUN", "validation.tokens_per_step=[0]"], "validation.tokens_per_step.0 = 0"),
        (["RUN", "model.hidden_size=32"], "the settings describe another model"),
    ],
)
def test_bad_input_ends_with_one_message(words, expected, run_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([word.replace("RUN", str(run_dir)) for word in words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_an_autoregressive_model_gets_no_empty_prompts(tmp_path, monkeypatch):
    def ask(objective: dict[str, Any], shifted: bool | None = None) -> None:
        settings = tiny_settings(objective, tmp_path)
        settings["model"]["shifted"] = shifted
        config = parse_config(settings, "test")
        data = config.open_data()
        prompts = data.prompts

        def without_first(indices: np.ndarray) -> np.ndarray:
            found = prompts(indices)
            found[2:, 0] = config.mask_id
            return found

        monkeypatch.setattr(data, "prompts", without_first)
        check_questions(config, data)

    ask(UNIFORM)
    missing = "8 of the first 10 puzzles of the test have no token, the first is number 3: "
    with pytest.raises(ValueError, match=missing + "objective 'autoregressive' predicts"):
        ask({"name": "autoregressive"})
    with pytest.raises(ValueError, match=missing + "a model with shifted predictions .* set model.shifted: false"):
        ask(UNIFORM, shifted=True)


@pytest.mark.parametrize(("during", "last"), [(2, 9), (9, 2), (2, 99)])
def test_prompts_are_checked_as_far_as_any_evaluation_asks(during, last, tmp_path, monkeypatch):
    """Those in the run and the last one, of which either may ask more; not those that neither asks."""
    settings = tiny_settings({"name": "autoregressive"}, tmp_path)
    settings["validation"] |= {"n_examples": during, "n_final_examples": last}
    config = parse_config(settings, "test")
    data = config.open_data()
    asked: list[int] = []
    prompts = data.prompts

    def note(indices: np.ndarray) -> np.ndarray:
        asked.extend(indices.tolist())
        return prompts(indices)

    monkeypatch.setattr(data, "prompts", note)
    check_questions(config, data)
    assert asked == list(range(min(max(during, last), 20)))


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("prompts", lambda prompts: np.abs(prompts - 1), r"the prompt of question number 1 has no mask token \d+"),
        ("prompts", lambda prompts: prompts[:, :-1], r"prompts gave int64 \[10, 31\] .* needed is int64 \[10, 32\]"),
        ("prompts", lambda prompts: prompts.astype(np.int32), "prompts gave int32"),
        ("difficulty", lambda _: {"clues": np.ones(3)}, r"'clues' as an array of numbers of shape \(10,\), .* \(3,\)"),
        ("difficulty", lambda _: {"kind": ["easy"] * 10}, "'kind' as an array of numbers"),
    ],
)
def test_questions_that_are_none_are_refused_before_training(method, returned, message, tmp_path, monkeypatch):
    config = parse_config(tiny_settings(PUMA, tmp_path), "test")
    plain = getattr(Sudoku, method)
    monkeypatch.setattr(Sudoku, method, lambda data, rows: returned(plain(data, rows)))
    with pytest.raises(ValueError, match=rf"data set 'sudoku': .*{message}"):
        train.build_or_restore(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rows_of_another_length_than_the_settings_say_are_refused(tmp_path, monkeypatch):
    config = parse_config(tiny_settings(PUMA, tmp_path), "test")
    monkeypatch.setattr(type(config.data), "length", 40)
    with pytest.raises(ValueError, match="rows have 32 tokens, but `length` of its settings is 40"):
        train.build_or_restore(config, tmp_path / "run")


def test_the_number_of_questions_is_that_of_an_override_or_of_the_last_evaluation(tmp_path):
    """The last one asks no more than there are; an override that asks more is refused, and n_final_examples is first.

    The settings hold the values of overrides, so an override alone tells which value was asked for.
    """
    settings = tiny_settings(PUMA, tmp_path)
    counts = {}
    for last in (7, 99):
        settings["validation"] |= {"n_examples": 3, "n_final_examples": last}
        config = parse_config(settings, "test")
        data: Any = SimpleNamespace(n_questions=20, question_noun="puzzles")
        counts[last] = [
            count_examples(config, overrides, data)
            for overrides in ([], ["training.seed=1"], ["validation.n_examples=3"])
        ]
        both = ["validation.n_examples=3", f"validation.n_final_examples={last}"]
        if last <= 20:
            counts[last].append(count_examples(config, both, data))
        else:
            with pytest.raises(ValueError, match="n_final_examples 99: the test has 20 puzzles"):
                count_examples(config, both, data)
    assert counts == {7: [7, 7, 3, 7], 99: [20, 20, 3]}
