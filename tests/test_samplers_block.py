"""The block sampler: blocks in order, the same with and without cached keys and values, rows on their own."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from conftest import PUMA
from helpers import assert_same_samples
from test_model_block_mask import BLOCK, LENGTH, MASK, build
from torch import Tensor

import sampling
import train
from config import SamplingRule
from model.transformer import Transformer
from samplers.block import sample_blocks
from samplers.full import sample_full

RULES = {
    "top_prob": {},
    "margin, two per step": {"confidence": "top_prob_margin", "tokens_per_step": 2},
    "entropy, threshold": {"confidence": "neg_entropy", "threshold": 0.4},
    "random, temperature": {"confidence": "random", "temperature": 0.7},
    "entropy bound": {"entropy_bound": 0.7},
    "stable": {"threshold": 0.2, "kl_bound": 0.5},
    "remask, temperature": {"revise": "remask", "n_passes": 5, "remask_share": 0.4, "temperature": 0.7},
    "plan": {"revise": "plan", "n_passes": 5},
    "running confidence": {"revise": "running_confidence", "n_passes": 5},
}


def prompts(n_rows: int = 7, seed: int = 2) -> Tensor:
    """Prompts anywhere: single tokens, whole blocks, a row with nothing to fill and one with all but its first token.

    (Where all tokens are masks, all positions tie: which comes first is a matter of rounding.)
    """
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randint(0, MASK, (n_rows, LENGTH), generator=generator)
    given = torch.rand(xt.shape, generator=generator) < 0.3
    given[0, :BLOCK] = given[1, BLOCK : 2 * BLOCK] = given[2, 2 * BLOCK :] = given[3, 5 : 2 * BLOCK] = True
    given[4], given[5], given[5:, 0] = True, False, True
    return xt.masked_fill(~given, MASK)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("block_size", [BLOCK, None], ids=["block_causal", "prefix"])
def test_blocks_are_filled_in_order_and_prompts_kept(rules, block_size):
    xt = prompts()
    result = sample_blocks(build(block_size), xt, MASK, SamplingRule(**rules), block_size=BLOCK)
    wanted = xt == MASK
    assert not (result.tokens == MASK).any()
    assert torch.equal(result.tokens[~wanted], xt[~wanted])
    assert torch.equal(result.order > 0, wanted)
    assert torch.equal(result.nfe, result.order.amax(1)), "a row takes part in a pass only to fill something"
    for order in result.order:
        steps = [block[block > 0] for block in order.view(-1, BLOCK)]
        steps = [block for block in steps if len(block)]
        for earlier, later in pairwise(steps):
            assert earlier.max() < later.min()
    if "revise" in rules:
        n_blocks = wanted.view(len(xt), -1, BLOCK).any(2).sum(1)
        assert (result.nfe <= rules["n_passes"] * n_blocks).all()
    elif "threshold" not in rules and "entropy_bound" not in rules:
        per_step = rules.get("tokens_per_step", 1)
        n_steps = (wanted.view(len(xt), -1, BLOCK).sum(2) + per_step - 1) // per_step
        assert torch.equal(result.nfe, n_steps.sum(1))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_cached_decoding_gives_the_same_tokens(rules):
    network, xt = build(BLOCK), prompts()
    cached = sample_blocks(network, xt, MASK, SamplingRule(**rules), block_size=BLOCK)
    assert_same_samples(cached, sample_blocks(network, xt, MASK, SamplingRule(**rules), block_size=BLOCK, cached=False))


def test_cached_passes_are_over_what_is_new(monkeypatch):
    widths: list[int] = []
    hidden_states = Transformer.hidden_states

    def recorded(self, xt, cache=None):
        widths.append(xt.shape[1])
        return hidden_states(self, xt, cache)

    monkeypatch.setattr(Transformer, "hidden_states", recorded)
    network, xt = build(BLOCK), torch.full((2, LENGTH), MASK)
    sample_blocks(network, xt, MASK, SamplingRule(tokens_per_step=3), block_size=BLOCK)
    assert widths == [BLOCK, BLOCK] + [2 * BLOCK, BLOCK] * (LENGTH // BLOCK - 1)
    widths.clear()
    sample_blocks(network, xt, MASK, SamplingRule(tokens_per_step=3), block_size=BLOCK, cached=False)
    assert widths == [width for end in range(BLOCK, LENGTH + 1, BLOCK) for width in (end, end)]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("block_size", [BLOCK, None], ids=["block_causal", "prefix"])
def test_rows_do_not_depend_on_their_neighbours(rules, block_size):
    network, xt = build(block_size), prompts()
    together = sample_blocks(network, xt, MASK, SamplingRule(**rules), block_size=BLOCK)
    for row in range(len(xt)):
        alone = sample_blocks(
            network, xt[row : row + 1], MASK, SamplingRule(**rules), block_size=BLOCK, row_ids=torch.tensor([row])
        )
        for name in ("tokens", "order", "nfe"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), (row, name)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_one_block_is_the_plain_sampler(rules):
    network, xt = build(None), prompts()
    assert_same_samples(
        sample_blocks(network, xt, MASK, SamplingRule(**rules), block_size=LENGTH),
        sample_full(network, xt, MASK, SamplingRule(**rules)),
    )


@pytest.mark.parametrize("block_size", [BLOCK, None], ids=["block_causal", "prefix"])
def test_a_row_stops_with_the_block_that_holds_the_end(block_size):
    network, xt = build(block_size), prompts(n_rows=24)
    full = sample_blocks(network, xt, MASK, block_size=BLOCK)
    wanted = xt == MASK
    eos = int(full.tokens[wanted].bincount().argmax())
    result = sample_blocks(network, xt, MASK, block_size=BLOCK, eos_id=eos)
    n_stopped = 0
    for row in range(len(xt)):
        ends = ((full.tokens[row] == eos) & wanted[row]).nonzero()
        stop = LENGTH if len(ends) == 0 else (int(ends[0]) // BLOCK + 1) * BLOCK
        assert torch.equal(result.tokens[row, :stop], full.tokens[row, :stop])
        behind = slice(stop, LENGTH)
        assert (result.tokens[row, behind] == torch.where(wanted[row, behind], eos, xt[row, behind])).all()
        assert result.nfe[row] == full.order[row, :stop].max(), "no passes after the end"
        assert (result.order[row, behind] == torch.where(wanted[row, behind], result.nfe[row], 0)).all()
        n_stopped += bool(wanted[row, behind].any())
    assert 0 < n_stopped < len(xt)


def test_an_end_within_a_prompt_stops_nothing():
    network, xt, unused = build(BLOCK), prompts(), 9
    xt[:, 0] = unused
    full = sample_blocks(network, xt, MASK, block_size=BLOCK)
    clean = ~((full.tokens == unused) & (xt == MASK)).any(1)
    assert clean.any()
    result = sample_blocks(network, xt, MASK, block_size=BLOCK, eos_id=unused)
    assert torch.equal(result.tokens[clean], full.tokens[clean])
    assert torch.equal(result.nfe[clean], full.nfe[clean])


def test_a_block_size_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="block_size 5 does not divide the 24 tokens"):
        sample_blocks(build(None), prompts(), MASK, block_size=5)


@pytest.mark.parametrize("layout", ["prefix", "block_causal"])
def test_evaluation_and_the_command_line_sample_a_trained_block_model_by_blocks(layout, config_file, tmp_path, capsys):
    objective = PUMA | {"name": "block_puma", "block_size": 8, "block_attention": layout}
    run_dir = tmp_path / "run"
    train.main(["--config", str(config_file(objective)), "--run-dir", str(run_dir)])
    assert json.loads((run_dir / "final.json").read_text())["n"] == 10
    capsys.readouterr()
    sampling.main(["--checkpoint", str(run_dir), "--puzzle", "1...............", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "16 network forward evaluations"
    assert len([line for line in lines[1:6] if "|" in line]) == 4
    steps = [int(number) for line in lines[1:6] for number in re.findall(r"[0-9]+", line[18:])]
    assert len(steps) == 16
    assert max(steps[:8]) < min(steps[8:]), "the first two board rows are one block, the last two the next"
