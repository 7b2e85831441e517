"""The autoregressive objective and left-to-right sampling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PUMA, run_python, run_ranks, tiny_settings
from torch import Tensor

import baselines
import sampling
import train
from baselines import AutoregressiveObjective, next_token_targets
from config import Config, ModelSettings, SamplingRule
from data.row_queue import RowQueue
from data.stream import SequenceStream
from eval.evaluate import validation_loss
from model.attention import KeyValueCache
from model.token_predictions import mix_keys, predict_tokens
from model.transformer import Transformer
from runtime.checkpoint import find_checkpoint
from runtime.config_file import parse_config
from runtime.distributed import start_world
from samplers.causal import sample_causal

AUTOREGRESSIVE = {"name": "autoregressive"}
MASK, EOS = 11, 0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class CountingRows:
    """Rows `n SEP 1 2 .. n EOS EOS ..`: a number n from 1 to 6, a separator (10), the count to n, padding."""

    length: int = 10
    mask_id: int = MASK
    eos_id: int | None = EOS

    def __len__(self) -> int:
        return 6

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((len(indices), self.length), dtype=np.int64)
        for row, index in zip(tokens, indices, strict=True):
            row[0], row[1] = index + 1, 10
            row[2 : index + 3] = np.arange(1, index + 2)
        prompt_mask = np.zeros(tokens.shape, dtype=bool)
        prompt_mask[:, :2] = True
        return tokens, prompt_mask


def make_model(seed: int = 0, std: float = 0.3) -> Transformer:
    """A causal model of 12 tokens whose predictions vary from position to position."""
    model = Transformer(
        ModelSettings(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        causal=True,
        shifted=True,
    )
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(std / 0.02)
    return model.eval()


def make_objective(batch_size: int, micro_rows: int, rank: int = 0, n_ranks: int = 1) -> AutoregressiveObjective:
    data = CountingRows()
    n_rows = batch_size // n_ranks
    queue = RowQueue(SequenceStream(data, seed=3, rank=rank, n_ranks=n_ranks), n_rows, CPU)
    return AutoregressiveObjective(queue, n_rows=n_rows, micro_rows=micro_rows)


def gradients(model: Transformer, objectives: list[AutoregressiveObjective]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step, averaged over ranks as data-parallel training does."""
    model.zero_grad()
    total = 0.0
    for objective in objectives:
        for microbatch in objective.microbatches(0):
            loss = model(microbatch.xt, microbatch.x0, microbatch.weight).loss / len(objectives)
            loss.backward()
            total += float(loss.detach())
    return total, [parameter.grad.clone() for parameter in model.parameters()]


# Objective


@pytest.mark.parametrize("eos_id", [None, 0, 3])
def test_targets_are_what_follows_the_prompt_to_the_first_end(eos_id):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 4, (200, 9), generator=generator)
    maskable = torch.rand(200, 9, generator=generator) < 0.7
    targets = next_token_targets(x0, maskable, eos_id)
    for row, given, found in zip(x0.tolist(), (~maskable).tolist(), targets.tolist(), strict=True):
        ended = False
        for position, token in enumerate(row):
            wanted = position > 0 and not given[position] and not ended
            assert found[position] == wanted
            ended |= wanted and token == eos_id


def test_the_loss_is_the_mean_over_the_targets_as_hugging_face_computes_it(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model, objective = make_model(), make_objective(6, 6)
    (microbatch,) = objective.microbatches(0)
    scores = model(microbatch.xt, microbatch.x0, microbatch.weight)
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    reference.load_state_dict(model.state_dict())
    labels = microbatch.x0.masked_fill(microbatch.weight == 0, -100)
    torch.testing.assert_close(scores.loss, reference(microbatch.x0, labels=labels).loss)
    n_targets = sum(n + 1 for n in range(1, 7))  # n numbers and one EOS in each of the six rows
    assert int((microbatch.weight > 0).sum()) == n_targets
    torch.testing.assert_close(microbatch.weight.sum(), torch.tensor(1.0))


def test_ranks_and_microbatches_do_not_change_the_mean(monkeypatch):
    model = make_model()
    loss, expected = gradients(model, [make_objective(6, 6)])
    parts = gradients(model, [make_objective(6, 2)])
    counts: list[Tensor] = []

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    monkeypatch.setattr(baselines, "sum_over_ranks", note)
    for rank in range(3):
        list(make_objective(6, 2, rank, 3).microbatches(0))
    assert len({int(count) for count in counts}) > 1, "ranks must differ for this test to tell anything"
    monkeypatch.setattr(baselines, "sum_over_ranks", lambda count: torch.stack(counts).sum())
    ranks = gradients(model, [make_objective(6, 1, rank, 3) for rank in range(3)])
    for other_loss, others in (parts, ranks):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for ours, theirs in zip(expected, others, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_the_share_of_targets_is_a_mean_over_rows_that_stays_in_its_place():
    """Of 8 positions behind the prompt, a count to n has n + 1 targets; each rank reports its own rows."""
    for rank, n_ranks in ((0, 1), (1, 2)):
        objective = make_objective(4, 2, rank, n_ranks)
        place = objective.metrics()["target_fraction"].data_ptr()
        for step in range(3):
            x0 = torch.cat([microbatch.x0 for microbatch in objective.microbatches(step)])
            figures = objective.metrics()
            assert float(figures["target_fraction"]) == pytest.approx(float((x0[:, 0] + 1).double().mean() / 8))
            assert figures["target_fraction"].data_ptr() == place, "a CUDA graph writes to the same memory"
            assert int(figures["sequences_drawn"]) == (step + 1) * len(x0)
            objective.prefetch()


def test_two_processes_reach_the_weights_of_one(config_file, tmp_path):
    config = config_file(AUTOREGRESSIVE, training__max_steps=3)
    alone = run_python("train.py", "--config", config, "--run-dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    together = run_ranks(2, "train.py", "--config", config, "--run-dir", tmp_path / "together")
    assert together.returncode == 0, together.stderr
    weights = find_checkpoint(tmp_path / "together").weights("model")
    for name, tensor in find_checkpoint(tmp_path / "alone").weights("model").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_small_model_learns_to_count_and_stops():
    model, objective = make_model(std=0.02).train(), make_objective(6, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        (microbatch,) = objective.microbatches(step)
        model(microbatch.xt, microbatch.x0, microbatch.weight).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()
        objective.prefetch()
    tokens, prompt_mask = (torch.from_numpy(part) for part in CountingRows().rows(np.arange(6)))
    samples = sample_causal(model.eval(), tokens.masked_fill(~prompt_mask, MASK), MASK, eos_id=EOS)
    assert torch.equal(samples.tokens, tokens)
    assert samples.nfe.tolist() == [n + 1 for n in range(1, 7)]
    assert samples.order[0].tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_validation_loss_is_that_of_next_tokens(data_dir):
    config = parse_config(tiny_settings(AUTOREGRESSIVE, data_dir), "test")
    model = make_model()
    data: Any = CountingRows()
    world = start_world("cpu")
    loss = validation_loss(model, config, data, world)
    tokens, prompt_mask = (torch.from_numpy(part) for part in data.rows(np.arange(6)))
    target = next_token_targets(tokens, ~prompt_mask, EOS)[:, 1:]
    log_probs = model.logits(tokens)[:, :-1].log_softmax(2).gather(2, tokens[:, 1:, None]).squeeze(2)
    assert loss == pytest.approx(-float(log_probs[target].mean().detach()), rel=1e-5)


# Sampling


def sample_without_cache(model: Transformer, row: Tensor, eos_id: int | None, temperature: float, row_id: int) -> tuple:
    """One row (int64 [L]) token by token, everything computed anew for each; tokens, order, nfe."""
    row, order, nfe = row.clone(), torch.zeros_like(row), 0
    key = mix_keys(torch.tensor([row_id]), 5)
    for position in range(len(row)):
        if row[position] != MASK:
            continue
        nfe += 1
        hidden = model.model(row[None, :position])[:, -1]
        predicted = predict_tokens(
            hidden, model.lm_head.weight, MASK, temperature=temperature, noise_key=mix_keys(key, position)
        )
        row[position], order[position] = predicted.token[0], nfe
        if eos_id is not None and row[position] == eos_id:
            order[row == MASK] = nfe
            row[row == MASK] = eos_id
    return row, order, nfe


def mixed_prompts(n_rows: int = 24, length: int = 14) -> Tensor:
    """Prompts of one to eight tokens, some with given tokens behind masked ones; two rows are complete."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, MASK, (n_rows, length), generator=generator)
    for row, n_prompt in zip(rows, torch.randint(1, 9, (n_rows,), generator=generator), strict=True):
        given = (torch.rand(length, generator=generator) < 0.15) | (torch.arange(length) < n_prompt)
        row[~given] = MASK
    rows[5:7] = rows[5:7].masked_fill(rows[5:7] == MASK, 1)
    return rows


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_cached_sampling_equals_sampling_without_a_cache(eos_id, temperature):
    model, rows = make_model(), mixed_prompts()
    ids = torch.arange(len(rows)) * 7
    samples = sample_causal(
        model, rows, MASK, SamplingRule(temperature=temperature), eos_id=eos_id, seed=5, row_ids=ids
    )
    for index, row in enumerate(rows):
        tokens, order, nfe = sample_without_cache(model, row, eos_id, temperature, int(ids[index]))
        assert torch.equal(samples.tokens[index], tokens)
        assert torch.equal(samples.order[index], order)
        assert int(samples.nfe[index]) == nfe
    given = rows != MASK
    assert torch.equal(samples.tokens[given], rows[given])
    if eos_id is not None:
        assert len(set(samples.nfe.tolist())) > 3, "rows must end at different places for this test to tell anything"


def test_a_row_does_not_depend_on_its_neighbours():
    model, rows = make_model(), mixed_prompts()
    whole = sample_causal(model, rows, MASK, SamplingRule(temperature=1.0), eos_id=EOS)
    for index in range(len(rows)):
        own = slice(index, index + 1)
        alone = sample_causal(
            model, rows[own], MASK, SamplingRule(temperature=1.0), eos_id=EOS, row_ids=torch.tensor([index])
        )
        assert torch.equal(alone.tokens, whole.tokens[own])
        assert torch.equal(alone.order, whole.order[own])
        assert torch.equal(alone.nfe, whole.nfe[own])
    again = sample_causal(model, rows, MASK, SamplingRule(temperature=1.0), eos_id=EOS, seed=1)
    assert not torch.equal(again.tokens, whole.tokens)


def test_finished_rows_leave_the_batch(monkeypatch):
    kept: list[int] = []
    keep_rows = KeyValueCache.keep_rows

    def count(cache: KeyValueCache, rows: Tensor) -> None:
        kept.append(len(rows))
        keep_rows(cache, rows)

    monkeypatch.setattr(KeyValueCache, "keep_rows", count)
    sample_causal(make_model(), mixed_prompts(), MASK, SamplingRule(temperature=1.0), eos_id=EOS)
    assert kept == sorted(kept, reverse=True)
    assert len(kept) >= 3
    assert kept[0] < 24
    assert kept[-1] == 0


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_mask_token_is_never_written(temperature):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[MASK] = 50 * model.lm_head.weight[3]  # the best token by far, or the worst
    samples = sample_causal(model, mixed_prompts(), MASK, SamplingRule(temperature=temperature))
    assert not (samples.tokens == MASK).any()


def test_what_left_to_right_sampling_cannot_do_is_refused():
    model, rows = make_model(), mixed_prompts()
    with pytest.raises(ValueError, match="tokens_per_step 2: a causal model is sampled left to right"):
        sample_causal(model, rows, MASK, SamplingRule(tokens_per_step=2))
    rows[3, 0] = MASK
    with pytest.raises(ValueError, match="row 3 has no prompt"):
        sample_causal(model, rows, MASK)


# Settings and commands


@pytest.mark.parametrize(
    ("objective", "section", "change", "expected"),
    [
        (AUTOREGRESSIVE, "model", {"shifted": False}, "model.shifted False"),
        (AUTOREGRESSIVE, "validation", {"tokens_per_step": [1, 2]}, "validation.tokens_per_step"),
        (AUTOREGRESSIVE, "validation", {"confidence": ["random"]}, "validation.confidence"),
        (AUTOREGRESSIVE, "validation", {"threshold": 0.5}, "validation.threshold"),
        (AUTOREGRESSIVE, "objective", {"n_stages": 3}, "n_stages"),
        (
            {"name": "block_uniform", "block_size": 4, "block_attention": "block_causal"},
            "model",
            {"init_from": "somewhere"},
            "block_causal",
        ),
    ],
)
def test_settings_that_contradict_the_objective_are_refused(objective, section, change, expected, data_dir):
    settings = tiny_settings(dict(objective), data_dir)
    settings[section].update(change)
    with pytest.raises(ValueError, match=expected):
        parse_config(settings, "test")


def test_what_follows_from_the_objective_may_be_spelled_out(data_dir):
    settings = tiny_settings(AUTOREGRESSIVE, data_dir)
    settings["model"]["shifted"] = True
    config = parse_config(settings, "test")
    assert isinstance(config, Config)
    assert config.causal
    assert config.shifted
    plain = parse_config(tiny_settings(PUMA, data_dir), "test")
    assert not plain.causal
    assert not plain.shifted


def test_train_evaluate_and_sample_by_command(config_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train.main(["--config", str(config_file(AUTOREGRESSIVE)), "--run-dir", str(run_dir)])
    final = json.loads((run_dir / "final.json").read_text())
    assert final["nfe"] == 16, "a 4x4 board is written cell by cell"
    assert final["evaluation"]["loss"] > 0
    capsys.readouterr()
    puzzle = ["--checkpoint", str(run_dir), "--puzzle", "123434122143432."]
    sampling.main(puzzle)
    assert "16 network forward evaluations" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        sampling.main([*puzzle, "--tokens-per-step", "2"])
    assert stop.value.code == 2
    assert "left to right" in capsys.readouterr().err
