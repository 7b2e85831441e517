"""Block objectives: ordinary rows are one block, blocks advance and finish on their own, rows with their last block."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import tiny_settings
from helpers import assert_distribution, scores_of
from torch import Tensor

import progressive_block
from config import (
    AnyObjectiveSettings,
    BlockAttention,
    BlockPumaSettings,
    BlockUniformSettings,
    ModelSettings,
    PumaSettings,
    TrainingSettings,
    UniformSettings,
)
from data.stream import SequenceStream
from model.token_predictions import hash_uniform, mix_keys
from model.transformer import Transformer
from objective import Objective
from progressive import PumaObjective, PumaPool
from progressive_block import BlockLayout, block_layout
from runtime.config_file import parse_config
from training.run import build_objective

LENGTH, BLOCK, VOCAB, MASK = 12, 4, 9, 8
LAYOUTS = ("prefix", "block_causal")
CPU = torch.device("cpu")


class Rows:
    """Random rows with prompts anywhere: a row's prompt share and whole blocks of prompt vary from row to row."""

    length, mask_id = LENGTH, MASK

    def __init__(self, n: int = 40, seed: int = 0, n_prompt_blocks: int = 2) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, MASK, (n, LENGTH))
        self.prompt_mask = rng.random((n, LENGTH)) < rng.random((n, 1))
        for row in range(n):
            blocks = rng.choice(LENGTH // BLOCK, rng.integers(0, n_prompt_blocks + 1), replace=False)
            for block in blocks:
                self.prompt_mask[row, block * BLOCK : (block + 1) * BLOCK] = True
        full = self.prompt_mask.all(1)
        self.prompt_mask[full, -1] = False

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[indices], self.prompt_mask[indices]


def build(
    settings: AnyObjectiveSettings, n_rows: int = 10, data: Rows | None = None, micro_batch_size: int | None = None
) -> Objective:
    trained = TrainingSettings(batch_size=n_rows, micro_batch_size=micro_batch_size, learning_rate=1.0, max_steps=1)
    return build_objective(settings, trained, SequenceStream(data or Rows(), 0), CPU)


def puma(layout: BlockAttention = "prefix", size: int = BLOCK, **changes: Any) -> BlockPumaSettings:
    settings = {"n_stages": 4, "collapse_threshold": None} | changes
    return BlockPumaSettings(name="block_puma", block_size=size, block_attention=layout, **settings)


UNIFORM_BLOCKS = BlockUniformSettings(name="block_uniform", block_size=BLOCK, block_attention="prefix")


def invented_confidence(x0: Tensor, step: int) -> Tensor:
    """Log-probabilities that depend on position, tokens and step alone; several are above any sensible threshold."""
    keys = mix_keys(x0 + 10 * torch.arange(x0.shape[1]), step)
    return (hash_uniform(keys) ** 0.3).log().float()


def run_step(objective: Objective, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step without a model: what was trained, joined to whole rows, and the objective advanced."""
    batches = list(objective.microbatches(step))
    n_rows = max(batch.rows.stop for batch in batches)
    xt, x0, weight = (torch.zeros(n_rows, LENGTH, dtype=dtype) for dtype in (torch.long, torch.long, torch.float32))
    for batch in batches:
        width = batch.xt.shape[1]
        confidence = invented_confidence(batch.x0, step)
        objective.observe(batch, scores_of(confidence.masked_fill(batch.weight == 0, -torch.inf)))
        for whole, part in ((xt, batch.xt), (x0, batch.x0), (weight, batch.weight)):
            whole[batch.rows, batch.columns] = part[:, batch.columns]
        behind = torch.ones(width, dtype=torch.bool)
        behind[batch.columns] = False
        assert torch.equal(batch.xt[:, behind], batch.x0[:, behind]), "the prefix is clean"
        assert not batch.weight[:, behind].any()
    objective.end_step()
    objective.prefetch()
    return xt, x0, weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("plain", "block"),
    [
        (UniformSettings(name="uniform"), "block_uniform"),
        (PumaSettings(name="puma", k_schedule=((3, 0), (5, 4)), collapse_threshold=0.8), "block_puma"),
        (PumaSettings(name="puma", n_stages=4, uniform_fraction=0.3), "block_puma"),
    ],
    ids=["uniform", "puma", "puma_with_uniform_rows"],
)
def test_one_block_per_row_is_the_row_objective_bit_for_bit(plain, block, layout):
    whole = plain.model_dump() | {"name": block, "block_size": LENGTH, "block_attention": layout}
    settings = (BlockPumaSettings if block == "block_puma" else BlockUniformSettings)(**whole)
    shape = ModelSettings(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    losses: list[list[float]] = []
    runs = [
        (build(plain, micro_batch_size=5), Transformer(shape)),
        (
            build(settings, micro_batch_size=5),
            Transformer(shape, block_size=LENGTH if layout == "block_causal" else None),
        ),
    ]
    for objective, model in runs:
        model.reset_parameters(torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        losses.append([])
        for step in range(12):
            for batch in objective.microbatches(step):
                scores = model(batch.xt, batch.x0, batch.weight)
                scores.loss.backward()
                objective.observe(batch, scores)
                losses[-1].append(scores.loss.item())
            optimizer.step()
            optimizer.zero_grad()
            objective.end_step()
            objective.prefetch()
    assert losses[0] == losses[1]
    states = [objective.state_dict() for objective, _ in runs]
    assert torch.equal(states[0]["generator"], states[1]["generator"]), "the same random stream"
    assert states[0]["queue"] == states[1]["queue"]
    for key, value in states[0].get("pool", {}).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["pool"][key])), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["block_uniform", "block_puma"])
def test_weights_are_those_of_a_mean_over_blocks(name, layout):
    settings = (
        puma(layout)
        if name == "block_puma"
        else BlockUniformSettings(name="block_uniform", block_size=BLOCK, block_attention=layout)
    )
    objective = build(settings)
    for step in range(20):
        xt, _, weight = run_step(objective, step)
        assert float(weight.sum()) == pytest.approx(1, rel=1e-5)
        masked = [
            [[i for i in range(first, first + BLOCK) if row[i] == MASK] for first in range(0, LENGTH, BLOCK)]
            for row in xt.tolist()
        ]
        n_live = sum(bool(block) for row in masked for block in row)
        expected = torch.zeros(weight.shape)
        for row, blocks in enumerate(masked):
            for block in blocks:
                for position in block:
                    expected[row, position] = 1 / (len(block) * n_live)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


def test_over_ranks_a_block_weighs_the_same_wherever_it_is(monkeypatch):
    blocks, masked = BlockLayout(LENGTH, BLOCK, "prefix"), torch.zeros(4, LENGTH, dtype=torch.bool)
    masked[:2, :BLOCK], masked[2:, 0] = True, True  # 4 blocks here, 10 on the other rank
    monkeypatch.setattr(progressive_block, "mean_over_ranks", lambda n_counted: (n_counted + 10) / 2)
    weight = blocks.weights(masked, over_ranks=True)
    torch.testing.assert_close(weight.sum(1), torch.full((4,), 1 / 7))
    assert float(blocks.weights(masked).sum()) == pytest.approx(1), "in evaluation all ranks count all rows"


@pytest.mark.parametrize("name", ["block_uniform", "block_puma"])
def test_the_weights_of_training_are_over_ranks(name, monkeypatch):
    monkeypatch.setattr(progressive_block, "mean_over_ranks", lambda n_counted: (n_counted + 10) / 2)
    xt, _, weight = build(puma() if name == "block_puma" else UNIFORM_BLOCKS).draw(0)
    masked = (xt == MASK).view(-1, BLOCK)
    n_blocks = int(masked.any(1).sum())
    assert n_blocks != 10, "the other rank has another number"
    expected = oracle.weights_of(masked, (n_blocks + 10) / 2).view_as(xt)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [UNIFORM_BLOCKS, puma(uniform_fraction=0.5)], ids=lambda settings: settings.name)
def test_uniform_masks_each_number_of_positions_of_a_block_equally_often(settings):
    """In all rows of the baseline, and in the uniform rows beside the pool, which are the last ones."""
    data = Rows()
    data.prompt_mask[:] = False
    data.prompt_mask[:, :2] = True  # two maskable positions in the first block
    objective = build(settings, 40 if settings is UNIFORM_BLOCKS else 80, data)
    counts = torch.cat([(run_step(objective, step)[0][-40:] == MASK).view(40, -1, BLOCK).sum(2) for step in range(100)])
    for block, n_maskable in enumerate((2, 4, 4)):
        possible = torch.arange(BLOCK + 1)
        probabilities = ((possible >= 1) & (possible <= n_maskable)) / n_maskable
        assert_distribution(counts[:, block].bincount(minlength=BLOCK + 1), probabilities)


def test_block_masks_of_low_discrepancy_are_spread_over_all_blocks_of_a_batch():
    data = Rows()
    data.prompt_mask[:] = False
    objective, shares = build(UNIFORM_BLOCKS.model_copy(update={"low_discrepancy": True}), 8, data), []
    for step in range(60):
        n_masked = (run_step(objective, step)[0] == MASK).view(-1, BLOCK).sum(1)
        assert n_masked.bincount(minlength=BLOCK + 1).tolist() == [0, *[len(n_masked) // BLOCK] * BLOCK]
        shares.append(n_masked.view(-1, LENGTH // BLOCK))
    of_two_blocks = np.corrcoef(torch.cat(shares).T.numpy())[np.triu_indices(LENGTH // BLOCK, 1)]
    assert np.abs(of_two_blocks).max() < 0.2, "the blocks of a row are independent"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tau", [None, 0.8])
def test_blocks_follow_their_own_confidence_and_rows_retire_with_their_last_block(layout, tau):
    """Every step of the pool, block by block, against the rules of docs/algorithm.md."""
    data, n_stages, n_retired = Rows(n=60), 4, 0
    objective = build(puma(layout, n_stages=n_stages, collapse_threshold=tau), 10, data)
    assert isinstance(objective, PumaObjective)
    pool, threshold = objective.pool, np.log(tau) if tau else np.inf
    for step in range(60):
        x0, masked, maskable = pool.rows.x0.clone(), pool.rows.masked.clone(), pool.rows.maskable.clone()
        stage, n_taken = pool.rows.stage.clone(), int(objective.queue.n_taken)
        xt, trained, weight = run_step(objective, step)
        assert torch.equal(trained, x0)
        assert torch.equal(xt, x0.masked_fill(masked, MASK))
        assert torch.equal(weight > 0, masked)
        assert masked.any(1).all(), "every row gives a loss"
        assert torch.equal(stage < n_stages, masked.view(10, -1, BLOCK).any(2)), "finished blocks say so"
        assert not (pool.rows.masked & ~pool.rows.maskable).any(), "prompts never change"
        confidence = invented_confidence(x0, step)
        for row in range(10):
            blocks = [slice(first, first + BLOCK) for first in range(0, LENGTH, BLOCK)]
            ends = [
                int(now) + 1 >= n_stages or not (masked[row, block] & (confidence[row, block] <= threshold)).any()
                for block, now in zip(blocks, stage[row], strict=True)
            ]
            if all(ends):
                assert_next_of_the_data(pool, row, data, n_taken)
                n_taken, n_retired = n_taken + 1, n_retired + 1
                continue
            assert torch.equal(pool.rows.x0[row], x0[row]), "a row stays until its last block has finished"
            for block, end, now in zip(blocks, ends, stage[row].tolist(), strict=True):
                if end:
                    assert not pool.rows.masked[row, block].any(), "a finished block is clean until its row retires"
                else:
                    assert_revealed_by_confidence(
                        masked[row, block], pool.rows.masked[row, block], confidence[row, block], threshold
                    )
                    n_maskable, n_masked = int(maskable[row, block].sum()), int(pool.rows.masked[row, block].sum())
                    lowest, highest = (
                        min(round(edge / n_stages * n_maskable), n_maskable - 1) for edge in (now + 1, now + 2)
                    )
                    assert n_maskable - n_masked >= lowest
                    if tau is None:
                        assert n_maskable - n_masked <= highest
        assert n_taken == int(objective.queue.n_taken), "no sequence is lost"
    assert n_retired > len(data), "the test saw more than an epoch"


def assert_next_of_the_data(pool: PumaPool, row: int, data: Rows, n_taken: int) -> None:
    """The row holds the sequence that comes after the first `n_taken` of the stream, at its very beginning."""
    stream = SequenceStream(data, 0)
    x0, prompt_mask = (part[-1] for part in stream.draw(n_taken + 1))
    assert torch.equal(pool.rows.x0[row], x0)
    assert torch.equal(pool.rows.maskable[row], ~prompt_mask)
    assert pool.rows.age[row] == 0
    starts = (~prompt_mask).view(-1, BLOCK).any(1)
    assert torch.equal(pool.rows.stage[row], torch.where(starts, 0, pool.n_stages)), "all prompt: finished"


def assert_revealed_by_confidence(before: Tensor, after: Tensor, confidence: Tensor, threshold: float) -> None:
    """One step of one block (bool [S]): what was revealed is more confident than what was not."""
    assert not (after & ~before).any(), "revealed positions stay revealed"
    assert not (after & (confidence > threshold)).any()
    revealed = before & ~after
    if revealed.any():
        assert confidence[revealed].min() > confidence[after].max(), "most confident first"


def test_finished_blocks_stay_finished_when_the_number_of_stages_changes():
    objective = build(puma(n_stages=None, k_schedule=((2, 0), (7, 1)), collapse_threshold=0.8), 20)
    assert isinstance(objective, PumaObjective)
    run_step(objective, 0)
    finished = ~objective.pool.rows.masked.view(20, -1, BLOCK).any(2)
    assert finished.any()
    next(iter(objective.microbatches(1)))
    stage = objective.pool.rows.stage
    assert objective.pool.n_stages == 7
    assert (stage[finished] == 7).all()
    assert (stage[~finished] < 7).all()
    histogram = objective.metrics()["stage_histogram"]
    assert histogram.shape == (7,)
    assert float(histogram.sum()) == pytest.approx(1), "the histogram is over blocks in flight"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_and_shapes_do_not_depend_on_the_data(layout):
    def shapes(data: Rows) -> list[list[tuple]]:
        objective = build(puma(layout, collapse_threshold=0.8), 6, data, micro_batch_size=3)
        steps = []
        for step in range(10):
            steps.append([(batch.xt.shape, batch.rows) for batch in objective.microbatches(step)])
            run_step(objective, step)
        return steps

    mostly_prompt, no_prompt = Rows(n_prompt_blocks=2), Rows()
    no_prompt.prompt_mask[:] = False
    found = shapes(mostly_prompt)
    assert found == shapes(no_prompt)
    assert all(step == found[0] for step in found)
    n_passes = 2 * (LENGTH // BLOCK if layout == "prefix" else 1)
    assert len(found[0]) == n_passes


def test_block_sizes_that_do_not_divide_a_row_are_refused(tmp_path):
    settings = tiny_settings({"name": "block_uniform", "block_size": 5, "block_attention": "prefix"}, tmp_path)
    with pytest.raises(ValueError, match=r"block_size 5 does not divide the 32 tokens .* nearest divisor is 4"):
        parse_config(settings, "tiny.yaml")


def test_an_objective_without_blocks_has_one_block_per_row():
    assert block_layout(PumaSettings(name="puma", n_stages=2), LENGTH) == BlockLayout(LENGTH, LENGTH, "prefix")
