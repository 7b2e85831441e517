"""Block-causal attention: one pass over noisy and clean copies equals a pass per block behind its clean prefix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import model.transformer
from config import ModelSettings
from model import block_mask
from model.attention import attend
from model.block_mask import decoding_mask, dense_mask, flex_mask, training_mask
from model.token_scores import score_tokens
from model.transformer import Transformer

# It warns that it is slow without compilation, which CPUs have no backward pass for.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTH, BLOCK, VOCAB, MASK = 24, 6, 11, 10
CPU = torch.device("cpu")


def build(block_size: int | None = BLOCK, seed: int = 0, head_width: int = 8) -> Transformer:
    """A model with weights large enough that attention matters."""
    settings = ModelSettings(
        vocab_size=VOCAB,
        hidden_size=4 * head_width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        learned_positions=LENGTH,
    )
    network = Transformer(settings, block_size=block_size)
    generator = torch.Generator().manual_seed(seed)
    network.reset_parameters(generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(n_rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Half masked rows: xt, x0 and uneven weights; no loss in the second row's third block."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (n_rows, LENGTH), generator=generator)
    masked = torch.rand(x0.shape, generator=generator) < 0.5
    masked[1, 2 * BLOCK : 3 * BLOCK] = False
    weight = masked * torch.rand(x0.shape, generator=generator)
    return x0.masked_fill(masked, MASK), x0, weight


def test_dense_mask_is_the_rule():
    n_clean = LENGTH - BLOCK
    copies = [("noisy", place // BLOCK) for place in range(LENGTH)] + [("clean", i // BLOCK) for i in range(n_clean)]
    mask = dense_mask(LENGTH, BLOCK, CPU)
    assert mask.shape == (len(copies), len(copies))
    for i, (query, query_block) in enumerate(copies):
        for j, (key, key_block) in enumerate(copies):
            if query == "noisy":
                expected = key_block == query_block if key == "noisy" else key_block < query_block
            else:
                expected = key == "clean" and key_block <= query_block
            assert mask[i, j] == expected, (query, query_block, key, key_block)


@pytest.mark.parametrize(
    ("length", "size", "device", "head_width", "expected"),
    [
        (128, 64, "cuda", 16, "flex"),
        (128, 64, "cuda", 15, "dense"),
        (128, 64, "cpu", 64, "dense"),
        (96, 64, "cuda", 64, "dense"),
        (97, 64, "cuda", 64, "flex"),
        (4, 2, "cpu", 16, "dense"),
        (128, 128, "cuda", 64, None),
        (128, 128, "cpu", 64, None),
    ],
)
def test_flex_attention_is_taken_on_a_gpu_for_wide_heads_and_more_than_one_tile(
    length, size, device, head_width, expected, monkeypatch
):
    """96 positions in blocks of 64 are 128 queries, which is one tile."""
    for name in ("flex", "dense"):
        monkeypatch.setattr(block_mask, f"{name}_mask", lambda *arguments, name=name: (name, *arguments))
    where = torch.device(device)
    found = training_mask(length, size, where, head_width)
    assert found == (None if expected is None else (expected, length, size, where))


def test_decoding_mask_is_the_rule():
    mask = decoding_mask(BLOCK, 3 * BLOCK, BLOCK, CPU)
    assert mask is not None
    assert mask.shape == (2 * BLOCK, 3 * BLOCK)
    for i in range(2 * BLOCK):
        for j in range(3 * BLOCK):
            assert mask[i, j] == (j // BLOCK <= (BLOCK + i) // BLOCK)
    assert decoding_mask(2 * BLOCK, 3 * BLOCK, BLOCK, CPU) is None, "the last block looks at everything"
    assert decoding_mask(0, BLOCK, BLOCK, CPU) is None


def test_one_pass_has_the_loss_and_gradients_of_a_pass_per_block():
    ours, reference = build(), build()
    xt, x0, weight = batch()
    scores = ours(xt, x0, weight)
    scores.loss.backward()

    total = torch.zeros(())
    nll, confidence = torch.zeros_like(weight), torch.zeros_like(weight)
    for start in range(0, LENGTH, BLOCK):
        block = slice(start, start + BLOCK)
        tokens = torch.cat([x0[:, :start], xt[:, block]], dim=1)
        blocks = torch.arange(start + BLOCK) // BLOCK
        hidden = reference.model(tokens, mask=blocks[:, None] >= blocks)[:, start:]
        own = score_tokens(hidden, reference.lm_head.weight, x0[:, block], weight[:, block])
        total = total + own.loss
        nll[:, block], confidence[:, block] = own.nll, own.confidence
    total.backward()

    torch.testing.assert_close(scores.loss, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.nll, nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.confidence, confidence, rtol=1e-4, atol=1e-5)
    for (name, parameter), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert scale > 0, name
        if not name.endswith("k_proj.bias"):  # softmax ignores it, so its gradient is rounding alone
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5 * float(scale), msg=name)


@torch.no_grad()
def test_one_pass_has_the_loss_of_blocks_behind_a_cached_clean_prefix():
    network = build()
    xt, x0, weight = batch()
    scores = network(xt, x0, weight)
    cache = network.model.empty_cache(len(xt), LENGTH)
    for start in range(0, LENGTH, BLOCK):
        block = slice(start, start + BLOCK)
        own = score_tokens(
            network.model(xt[:, block], cache=cache), network.lm_head.weight, x0[:, block], weight[:, block]
        )
        torch.testing.assert_close(scores.nll[:, block], own.nll, rtol=1e-4, atol=1e-5)
        network.model(x0[:, block], cache=cache)  # the clean block's keys and values over the noisy one's
        cache.length += BLOCK


@torch.no_grad()
def test_a_block_sees_only_itself_and_earlier_clean_tokens():
    network = build()
    xt, x0, weight = batch()
    weight = torch.ones_like(weight)
    before = network(xt, x0, weight).nll
    block = slice(BLOCK, 2 * BLOCK)
    noisier = xt.clone()
    noisier[:, block] = MASK
    changed = (network(noisier, x0, weight).nll != before).view(len(xt), -1, BLOCK)
    assert changed[:, 1].any(), "the block itself"
    assert not changed[:, [0, 2, 3]].any(), "no other block sees its noisy copy"
    other, same_target = x0.clone(), x0[:, block]
    other[:, block] = (same_target + 1) % MASK
    changed = (network(xt, other, weight).nll != before).view(len(xt), -1, BLOCK)
    assert not changed[:, 0].any(), "earlier blocks do not see it"
    assert changed[:, 2].all()
    assert changed[:, 3].all(), "later blocks see its clean copy"


@torch.no_grad()
@pytest.mark.parametrize("n_key_heads", [4, 2])
def test_flex_attention_equals_the_dense_mask(n_key_heads):
    generator = torch.Generator().manual_seed(0)
    n_tokens = 2 * LENGTH - BLOCK
    q = torch.randn(2, 4, n_tokens, 16, generator=generator)
    k, v = torch.randn(2, 2, n_key_heads, n_tokens, 16, generator=generator)
    flex = attend(q, k, v, flex_mask(LENGTH, BLOCK, CPU))
    torch.testing.assert_close(flex, attend(q, k, v, dense_mask(LENGTH, BLOCK, CPU)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_model_gives_the_same_scores_with_flex_attention(monkeypatch):
    network = build(head_width=16)
    dense = network(*batch())
    monkeypatch.setattr(
        model.transformer, "training_mask", lambda length, size, device, head_width: flex_mask(length, size, device)
    )
    flex = network(*batch())
    torch.testing.assert_close(flex.nll, dense.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flex.confidence, dense.confidence, rtol=1e-4, atol=1e-5)


def test_flex_tiles_that_are_masked_throughout_are_left_out():
    mask = flex_mask(1024, 128, CPU)
    n_tiles = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    # Tiles of 128: per noisy block itself and the clean ones before it, per clean block it and those before it.
    assert n_tiles == sum(1 + block for block in range(8)) + sum(1 + block for block in range(7))


def test_one_block_per_row_is_the_plain_model_bit_for_bit():
    plain, blocks = build(block_size=None), build(block_size=LENGTH)
    for network in (plain, blocks):
        network(*batch()).loss.backward()
    assert torch.equal(plain(*batch()).nll, blocks(*batch()).nll)
    for (name, parameter), other in zip(plain.named_parameters(), blocks.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), name
