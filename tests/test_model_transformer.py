"""The backbone: equal to Hugging Face's Qwen2 where that exists, and what is our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import model_settings, needs_compiler, random_generator, random_model
from torch import Tensor

from config import ModelSettings
from model.token_predictions import predict_tokens
from model.transformer import Layer, Transformer, count_parameters

MASK_ID = 22
SHAPES: dict[str, dict[str, Any]] = {
    "one_group_per_head": {},
    "two_groups": {"num_key_value_heads": 2},
    "one_group": {"num_key_value_heads": 1, "rope_theta": 1e6},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
POSITIONS: dict[str, Any] = {"num_key_value_heads": 2, "learned_positions": 19}
OURS = SHAPES | {"learned_positions": POSITIONS}  # Hugging Face's Qwen2 has no counterpart of the last
ours_too = pytest.mark.parametrize("shape", OURS.values(), ids=OURS.keys())


def random_tokens(n_rows: int, length: int, seed: int = 0) -> Tensor:
    """Any tokens, the mask token among them."""
    return torch.randint(23, (n_rows, length), generator=random_generator(seed))


def hugging_face_model(model: Transformer, settings: ModelSettings) -> Any:
    """Qwen2ForCausalLM with the same weights; it refuses weights of another name or shape."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = settings.model_dump() | {"num_key_value_heads": settings.n_key_value_heads}  # the settings have its names
    reference = Qwen2ForCausalLM(Qwen2Config(**shape | {"attn_implementation": "eager"}))
    reference.load_state_dict(model.state_dict())
    return reference.eval()


# Against Hugging Face


@every_shape
@torch.no_grad()
def test_causal_logits_equal_those_of_hugging_face(shape: dict[str, Any]) -> None:
    model = random_model(causal=True, **shape)
    tokens = random_tokens(3, 17)
    expected = hugging_face_model(model, model_settings(**shape))(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-5, atol=1e-5)


@every_shape
@pytest.mark.parametrize("shift", [0, 1, 50])
@torch.no_grad()
def test_bidirectional_attention_is_relative(shape: dict[str, Any], shift: int) -> None:
    """Equal to Hugging Face's with every position visible to every other, wherever the row starts.

    The published code pairs the rotary halves in two ways at once, so that its attention depends on where a row starts.
    """
    model = random_model(**shape)
    tokens = random_tokens(2, 13)
    expected = hugging_face_model(model, model_settings(**shape))(
        tokens,
        attention_mask=torch.zeros(2, 1, 13, 13),  # added to the attention scores: nothing is hidden
        position_ids=torch.arange(shift, shift + 13)[None],
    ).logits
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=2e-5)


@every_shape
def test_parameters_have_the_names_and_shapes_of_hugging_face(shape: dict[str, Any]) -> None:
    model = random_model(**shape)
    parameters = dict(hugging_face_model(model, model_settings(**shape)).named_parameters())  # a tied head comes once
    assert {name: tensor.shape for name, tensor in model.weights().items()} == {
        name: parameter.shape for name, parameter in parameters.items()
    }


# Learned positions


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_learned_positions_are_added_to_the_token_embeddings(causal: bool) -> None:
    """Equal to Hugging Face's model given the sums; all that knows of the table is the embedding."""
    model = random_model(causal=causal, **POSITIONS)
    weights = model.weights()
    table = weights.pop("model.embed_positions.weight")
    assert table.shape == (19, 32)
    plain = Transformer(model_settings(num_key_value_heads=2), causal=causal)
    plain.load_weights(weights)
    tokens = random_tokens(3, 17)
    expected = hugging_face_model(plain, model_settings(num_key_value_heads=2))(
        inputs_embeds=weights["model.embed_tokens.weight"][tokens] + table[:17],
        attention_mask=None if causal else torch.zeros(3, 1, 17, 17),
    ).logits
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=2e-5)
    assert (plain.logits(tokens) - expected).abs().max() > 0.1, "the table makes a difference"


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_only_learned_positions_tell_masked_positions_apart(learned: bool) -> None:
    """Rotary positions are relative: where all tokens are equal, a bidirectional model computes the same everywhere."""
    model = random_model(**(POSITIONS if learned else {}))
    logits = model.logits(torch.full((1, 19), MASK_ID))[0]  # [L, V]
    spread = (logits - logits.mean(0)).abs().max()
    assert (spread > 0.1) if learned else (spread < 1e-5)


@torch.no_grad()
def test_without_rotary_positions_only_the_table_tells_the_order() -> None:
    """With a table of zeros, tokens in another order give the same logits in that order."""
    model = random_model(**POSITIONS | {"rotary": False})
    tokens, order = random_tokens(2, 19), torch.randperm(19, generator=random_generator(1))
    moved = (model.logits(tokens[:, order]) - model.logits(tokens)[:, order]).abs().max()
    assert moved > 0.1
    assert model.model.embed_positions is not None
    model.model.embed_positions.weight.zero_()
    torch.testing.assert_close(model.logits(tokens[:, order]), model.logits(tokens)[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_longer_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="20 tokens, but the model has 19 learned positions"):
        random_model(**POSITIONS).logits(random_tokens(1, 20))


@torch.no_grad()
def test_a_table_of_zeros_changes_nothing() -> None:
    model = random_model(**POSITIONS)
    assert model.model.embed_positions is not None
    model.model.embed_positions.weight.zero_()
    plain = random_model(num_key_value_heads=2)
    plain.load_weights({name: tensor for name, tensor in model.weights().items() if "embed_positions" not in name})
    tokens = random_tokens(2, 19)
    assert torch.equal(model.logits(tokens), plain.logits(tokens))


# Weights


@ours_too
def test_weights_start_at_standard_deviation_002(shape: dict[str, Any]) -> None:
    """As Qwen2's do; the published code starts wider."""
    model = Transformer(model_settings(**shape | {"hidden_size": 128, "intermediate_size": 256}))
    model.reset_parameters(random_generator(0))
    for name, tensor in model.weights().items():
        if tensor.ndim == 2:
            standard_error = 0.02 / tensor.numel() ** 0.5
            assert float(tensor.std()) == pytest.approx(0.02, abs=5 * standard_error), name
            assert float(tensor.mean()) == pytest.approx(0, abs=5 * standard_error), name
        else:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_a_seed_gives_the_same_weights_whatever_was_there_before() -> None:
    fresh, used = Transformer(model_settings()), random_model(1)
    for model in (fresh, used):
        model.reset_parameters(random_generator(7))
    for name, tensor in fresh.weights().items():
        assert torch.equal(tensor, used.weights()[name]), name


@ours_too
@torch.no_grad()
def test_saved_weights_give_the_same_model(shape: dict[str, Any]) -> None:
    model, other = random_model(1, **shape), random_model(2, **shape)
    other.load_weights({name: tensor.clone() for name, tensor in model.weights().items()})
    tokens = random_tokens(2, 9)
    assert torch.equal(model.logits(tokens), other.logits(tokens))


def test_a_tied_head_is_the_embedding_and_stays_so() -> None:
    model = random_model(tie_word_embeddings=True)
    assert "lm_head.weight" not in model.weights()
    model.load_weights(random_model(3, tie_word_embeddings=True).weights())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in random_model().weights()


def test_wrong_weights_are_refused_by_name() -> None:
    model, weights = random_model(), random_model().weights()
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        model.load_weights({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
    with pytest.raises(RuntimeError, match="unknown"):
        model.load_weights(weights | {"unknown": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_weights(random_model(intermediate_size=40).weights())


# Attention


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_what_a_position_sees(causal: bool) -> None:
    """A token that changes moves the logits of every position that may see it, and of no other."""
    model = random_model(causal=causal)
    tokens = random_tokens(1, 11)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 23
    moved = (model.logits(tokens) - model.logits(changed)).abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [not causal or position >= 6 for position in range(11)]


@torch.no_grad()
def test_rows_of_a_batch_are_independent() -> None:
    model, tokens = random_model(), random_tokens(5, 11)
    together = model.logits(tokens)
    for row in range(5):
        torch.testing.assert_close(model.logits(tokens[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [1, 100])
@torch.no_grad()
def test_only_distances_between_positions_count(causal: bool, shift: int) -> None:
    model, tokens = random_model(causal=causal), random_tokens(2, 11)
    moved = model.model(tokens, positions=torch.arange(shift, shift + 11))
    torch.testing.assert_close(moved, model.model(tokens), rtol=1e-4, atol=1e-4)
    spread = model.model(tokens, positions=2 * torch.arange(11))
    assert (spread - moved).abs().max() > 0.01


@torch.no_grad()
def test_a_mask_says_which_keys_a_query_sees() -> None:
    """The lower triangle makes a bidirectional model causal, a full mask a causal one bidirectional."""
    both, causal = random_model(), random_model(causal=True)
    tokens = random_tokens(2, 11)
    everything = torch.ones(11, 11, dtype=torch.bool)
    torch.testing.assert_close(both.model(tokens, mask=everything.tril()), causal.model(tokens), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(causal.model(tokens, mask=everything), both.model(tokens), rtol=1e-4, atol=1e-5)


# The cache of keys and values


@ours_too
@pytest.mark.parametrize("parts", [[11], [1] * 11, [4, 1, 6]], ids=["at_once", "one_by_one", "in_parts"])
@torch.no_grad()
def test_causal_passes_over_parts_equal_one_pass_over_all(shape: dict[str, Any], parts: list[int]) -> None:
    model, tokens = random_model(causal=True, **shape), random_tokens(3, 11)
    cache = model.model.empty_cache(3, 14)  # room to spare changes nothing
    hidden = []
    for part in tokens.split(parts, dim=1):
        hidden.append(model.model(part, cache=cache))
        cache.length += part.shape[1]
    torch.testing.assert_close(torch.cat(hidden, dim=1), model.model(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_over_a_cache_equal_one_pass_with_a_block_causal_mask() -> None:
    """A block sees itself and the blocks before it; passes over a block that is not final yet leave no trace."""
    model, tokens = random_model(), random_tokens(3, 12)
    block = torch.arange(12) // 4
    expected = model.model(tokens, mask=block[:, None] >= block)
    cache = model.model.empty_cache(3, 12)
    for start in (0, 4, 8):
        model.model(random_tokens(3, 4, seed=start + 1), cache=cache)  # a draft
        hidden = model.model(tokens[:, start : start + 4], cache=cache)
        torch.testing.assert_close(hidden, expected[:, start : start + 4], rtol=1e-4, atol=1e-5)
        cache.length += 4


@torch.no_grad()
def test_rows_kept_in_the_cache_go_on_as_before() -> None:
    model, tokens = random_model(causal=True), random_tokens(4, 9)
    kept = torch.tensor([0, 3])
    cache = model.model.empty_cache(4, 9)
    model.model(tokens[:, :5], cache=cache)
    cache.length += 5
    cache.keep_rows(kept)
    hidden = model.model(tokens[kept, 5:], cache=cache)
    torch.testing.assert_close(hidden, model.model(tokens[kept])[:, 5:], rtol=1e-4, atol=1e-5)


# The training pass and prediction


@ours_too
@pytest.mark.parametrize("causal", [False, True])
def test_forward_is_about_the_token_at_each_position(shape: dict[str, Any], causal: bool) -> None:
    """Entry i scores token i by the logits of position i; loss, scores and gradients equal the oracle's."""
    model = random_model(causal=causal, **shape)
    xt, x0 = random_tokens(3, 9, seed=1), random_tokens(3, 9, seed=2)
    weight = torch.rand(3, 9, generator=random_generator(3)) * (torch.arange(9) % 3 > 0)
    scores = model(xt, x0, weight)
    scores.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(xt)
    expected = oracle.score_batch(logits.detach(), x0, weight)
    logits.backward(expected.grad_logits.float())
    assert float(scores.loss.detach()) == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(scores.nll.double(), expected.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.max_log_prob.double(), expected.max_log_prob, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.confidence, scores.max_log_prob)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_hidden_states_predict_the_tokens_at_their_positions() -> None:
    model, xt = random_model(), random_tokens(3, 9)
    positions = torch.rand(3, 9, generator=random_generator(1)) < 0.4
    predicted = predict_tokens(model.hidden_states(xt)[positions], model.lm_head.weight, MASK_ID)
    logits = model.logits(xt)[positions]
    assert len(logits) == len(predicted.token) > 5
    for place, expected in enumerate(oracle.prediction(row, MASK_ID) for row in logits):
        assert int(predicted.token[place]) == expected[0]
        assert float(predicted.log_prob[place]) == pytest.approx(expected[1]["top_prob"], abs=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_shifted_model_tells_a_token_at_the_position_before_it(causal: bool) -> None:
    """`logits` does not know; token 0, before which there is nothing, is told at its own position."""
    plain = random_model(causal=causal)
    shifted = Transformer(model_settings(), causal=causal, shifted=True).eval()
    shifted.load_weights(plain.weights())
    xt, x0 = random_tokens(3, 9, seed=1), random_tokens(3, 9, seed=2)
    weight = torch.rand(3, 9, generator=random_generator(3))
    logits = plain.logits(xt).detach()
    assert torch.equal(shifted.logits(xt), plain.logits(xt))
    about = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    expected = oracle.score_batch(about, x0, weight)
    scores = shifted(xt, x0, weight)
    torch.testing.assert_close(scores.nll.double(), expected.nll, rtol=1e-4, atol=1e-5)
    predicted = predict_tokens(shifted.hidden_states(xt)[weight > 0], shifted.lm_head.weight, MASK_ID)
    best = [oracle.prediction(row, MASK_ID)[0] for row in about.flatten(0, 1)]
    assert predicted.token.tolist() == best
    assert torch.equal(shifted.predicted_logits(xt), about)


@torch.no_grad()
def test_the_logits_of_a_block_are_those_of_a_row_that_ends_with_it() -> None:
    plain, size = random_model(), 4
    model = Transformer(model_settings(), causal=False, shifted=False, block_size=size).eval()
    model.load_weights(plain.weights())
    xt = random_tokens(2, 12)
    logits = model.predicted_logits(xt)
    for end in range(size, 13, size):
        alone = model.logits(xt[:, :end]) if end == size else model.predicted_logits(xt[:, :end])
        torch.testing.assert_close(logits[:, end - size : end], alone[:, end - size :], rtol=1e-4, atol=1e-5)
    predicted = predict_tokens(model.hidden_states(xt).flatten(0, 1), model.lm_head.weight, MASK_ID)
    assert torch.equal(logits[..., :MASK_ID].argmax(2).flatten(), predicted.token)
    assert not torch.allclose(model.logits(xt), logits, atol=1e-3), "it attends to later blocks"


def test_the_compiled_pass_serves_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation's shapes change at every call, so that it would compile at every call."""
    calls: list[Callable[..., Any]] = []

    def compile_and_count(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*arguments: Any, **options: Any) -> Any:
            calls.append(function)
            return function(*arguments, **options)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_and_count)
    model = random_model()
    model.model.compile_training()
    xt, weight = random_tokens(2, 5), torch.ones(2, 5)
    evaluated = model(xt, xt, weight).loss
    model.hidden_states(xt)
    assert model.model._compute not in calls
    trained = model.train()(xt, xt, weight).loss
    assert calls.count(model.model._compute) == 1
    torch.testing.assert_close(trained, evaluated)


@needs_compiler
def test_compiled_updates_learn_the_same() -> None:
    """With one product for query, key and value, here of different widths and with biases that are not 0."""
    model = random_model(num_attention_heads=4, num_key_value_heads=2, learned_positions=9).train()
    xt, weight = random_tokens(4, 9), torch.full((4, 9), 1 / 36)
    found = []
    for compiled in (False, True):
        if compiled:
            model.model.compile_training()
        scores = model(xt, xt, weight)
        found.append((scores.loss, *torch.autograd.grad(scores.loss, list(model.parameters()))))
    for eager, compiled_one in zip(*found, strict=True):
        torch.testing.assert_close(compiled_one, eager, rtol=1e-4, atol=1e-6)
    biases = [
        own for (name, _), own in zip(model.named_parameters(), found[0][1:], strict=True) if "v_proj.bias" in name
    ]
    assert all(bias.abs().max() > 1e-3 for bias in biases)


def test_recomputed_blocks_keep_less_and_learn_the_same() -> None:
    """The same loss and gradients, bit for bit, from a fraction of what a backward pass usually keeps."""
    xt, weight = random_tokens(4, 9), torch.full((4, 9), 1 / 36)
    kept, gradients, losses = [], [], []
    for recomputed in (False, True):
        model = random_model(num_hidden_layers=4).train()
        if recomputed:
            model.recompute_layers()
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(xt, xt, weight).loss
        loss.backward()
        kept.append(sum(sizes))
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert kept[1] < kept[0] / 4
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))


def test_recomputed_layers_draw_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a module draws in the forward pass, such as dropout."""
    compute = Layer._compute
    monkeypatch.setattr(Layer, "_compute", lambda *given: F.dropout(compute(*given), 0.5))
    xt, weight = random_tokens(4, 9), torch.full((4, 9), 1 / 36)
    gradients = []
    for recomputed in (False, True):
        model = random_model().train()
        if recomputed:
            model.recompute_layers()
        torch.manual_seed(0)
        model(xt, xt, weight).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@ours_too
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_parameters_are_counted_without_the_model(shape: dict[str, Any], n_layers: int) -> None:
    settings = model_settings(**shape | {"num_hidden_layers": n_layers})
    n_parameters = sum(map(Tensor.numel, Transformer(settings).parameters()))
    assert count_parameters(settings) == n_parameters


def test_bfloat16_autocast_stays_close_and_gives_float32_gradients() -> None:
    model = random_model()
    xt, x0 = random_tokens(4, 9, seed=1), random_tokens(4, 9, seed=2)
    weight = torch.full((4, 9), 1 / 36)
    exact = model(xt, x0, weight)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(xt, x0, weight)
    rough.loss.backward()
    assert rough.loss.dtype == rough.nll.dtype == rough.confidence.dtype == torch.float32
    assert float(rough.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.02)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
