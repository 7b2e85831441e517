"""The output head in chunks against dense logits, and what it allocates."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, get_args

import oracle
import pytest
import torch
from helpers import assert_distribution, needs_compiler, random_generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import ModelConfidence
from model import logits as sizes
from model.logits import SMALL_VOCABULARY
from model.token_predictions import gumbel_noise, hash_uniform, predict_tokens
from model.token_scores import TokenScores, score_tokens, unit_gradient

WIDTH = 8


def random_case(
    n_rows: int = 3,
    length: int = 7,
    vocabulary: int = 11,
    share: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, x0 and weights, of which about `share` are not 0."""
    generator = random_generator(seed)
    hidden = torch.randn(n_rows, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    x0 = torch.randint(vocabulary, (n_rows, length), generator=generator)
    weight = torch.rand(n_rows, length, generator=generator)
    weight *= torch.rand(n_rows, length, generator=generator) < share
    return hidden.requires_grad_(), head.requires_grad_(), x0, weight


def assert_equals_oracle(
    scores: TokenScores,
    case: tuple[Tensor, Tensor, Tensor, Tensor],
    tolerance: float,
    loss_scale: float = 1.0,
    rule: str = "top_prob",
) -> None:
    """Scores, and after a backward pass of loss_scale * loss the gradients too."""
    hidden, head, x0, weight = case
    dense_hidden, dense_head = hidden.detach().double(), head.detach().double()
    expected = oracle.score_batch(dense_hidden @ dense_head.T, x0, weight, rule)
    (loss_scale * scores.loss).backward()
    flat = expected.grad_logits.flatten(0, 1)
    compared = {
        "loss": (scores.loss.detach(), torch.tensor(expected.loss, dtype=torch.float64)),
        "nll": (scores.nll, expected.nll),
        "max_log_prob": (scores.max_log_prob, expected.max_log_prob),
        "confidence": (scores.confidence, expected.confidence),
        "hidden": (hidden.grad, loss_scale * expected.grad_logits @ dense_head),
        "head": (head.grad, loss_scale * flat.T @ dense_hidden.flatten(0, 1)),
    }
    for name, (found, wanted) in compared.items():
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance, msg=f"{name}: ".__add__)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation gives, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """How many operations have `part` in their names."""
        return sum(part in name for name in self.names)


# Training


@pytest.mark.parametrize("chunk_elements", [1, 11, 40, 77, 1 << 24])
@pytest.mark.parametrize("tile_tokens", [1, 5, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_gradients_equal_the_oracle_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, tile_tokens: int, dtype: torch.dtype
) -> None:
    """Chunks of less than a row, one row, several with a rest, several without, and all at once; tiles likewise."""
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    case = random_case(dtype=dtype)
    scores = score_tokens(*case)
    assert scores.loss.dtype == scores.nll.dtype == scores.confidence.dtype == torch.float32
    assert_equals_oracle(scores, case, tolerance=2e-5)
    assert case[0].grad.dtype == case[1].grad.dtype == dtype


@pytest.mark.parametrize("n_scored", [0, 1, 21])
def test_any_number_of_scored_positions(n_scored: int) -> None:
    """None at all gives loss 0 and gradients of 0; then one; then all."""
    hidden, head, x0, weight = random_case(share=2.0)
    weight.view(-1)[n_scored:] = 0
    case = (hidden, head, x0, weight)
    scores = score_tokens(*case)
    assert int((scores.nll != 0).sum()) == n_scored
    assert_equals_oracle(scores, case, tolerance=2e-5)


def test_a_scaled_loss_has_scaled_gradients() -> None:
    """As gradient accumulation and loss scaling need; the gradients are computed before the scale is known."""
    case = random_case()
    assert_equals_oracle(score_tokens(*case), case, tolerance=2e-5, loss_scale=-3.5)


class Products(TorchDispatchMode):
    """Counts products in place."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten.mul_.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", [11, SMALL_VOCABULARY + 1])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_gradient_that_is_known_to_be_1_changes_nothing(vocabulary: int, share: float) -> None:
    """The gradients are not multiplied then; by another tensor of the same value they are."""
    cases = [random_case(vocabulary=vocabulary, share=share) for _ in range(2)]
    for case, gradient in zip(cases, (unit_gradient(torch.device("cpu")), torch.tensor(1.0)), strict=True):
        loss = score_tokens(*case).loss
        with Products() as products:
            loss.backward(gradient)
        assert (products.n == 0) == (gradient is unit_gradient(torch.device("cpu")))
    for ours, theirs in zip(*(case[:2] for case in cases), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


RULES: tuple[ModelConfidence, ...] = get_args(ModelConfidence)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocabulary", [2, 11, SMALL_VOCABULARY + 1])
def test_the_confidence_of_every_rule_equals_the_oracle(rule: ModelConfidence, vocabulary: int) -> None:
    """With a small vocabulary, where all positions are scored, and a large one. Loss and gradients stay the same."""
    case, plain = random_case(vocabulary=vocabulary), random_case(vocabulary=vocabulary)
    scores, expected = score_tokens(*case, confidence=rule), score_tokens(*plain)
    expected.loss.backward()
    assert scores.confidence.dtype == torch.float32
    assert_equals_oracle(scores, case, tolerance=2e-5, rule=rule)
    gradients = [(ours.grad, theirs.grad) for ours, theirs in zip(case[:2], plain[:2], strict=True)]
    for ours, theirs in (*zip(scores[:3], expected[:3], strict=True), *gradients):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_positions_without_weight_have_no_nll_and_no_confidence(rule: ModelConfidence) -> None:
    hidden, head, x0, weight = random_case()
    scores = score_tokens(hidden, head, x0, weight, confidence=rule)
    assert (scores.nll[weight == 0] == 0).all()
    assert (scores.max_log_prob[weight == 0] == -torch.inf).all()
    assert (scores.confidence[weight == 0] == -torch.inf).all()
    assert (scores.nll[weight != 0] > 0).all()
    assert scores.confidence[weight != 0].isfinite().all()


def test_of_a_large_vocabulary_only_positions_with_weight_are_scored() -> None:
    """Half of the positions or more have none, and the logits of a large vocabulary are most of the work."""
    hidden, head, x0, weight = random_case(vocabulary=SMALL_VOCABULARY + 1)
    with torch.no_grad():
        hidden[weight == 0] = torch.nan
    scores = score_tokens(hidden, head, x0, weight)
    scores.loss.backward()
    assert torch.isfinite(scores.loss)
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad[weight == 0].any()
    assert torch.isfinite(head.grad).all()


@pytest.mark.parametrize("rule", RULES)
def test_only_the_loss_has_a_gradient(rule: ModelConfidence) -> None:
    scores = score_tokens(*random_case(), confidence=rule)
    assert scores.loss.requires_grad
    assert not any(part.requires_grad for part in scores[1:])


def test_the_largest_probability_takes_no_more_products_and_the_other_rules_one() -> None:
    counts = []
    for rule in RULES:
        with Operations() as operations:
            score_tokens(*random_case(vocabulary=SMALL_VOCABULARY + 1), confidence=rule)
        counts.append(operations.count("mm"))
    assert counts[0] < counts[1] == counts[2]


@pytest.mark.parametrize("in_tiles", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_without_gradients_are_the_same_for_a_third_of_the_products(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, in_tiles: bool
) -> None:
    """Evaluation runs the model under `no_grad`, where its parameters still require gradients."""
    if not in_tiles:  # as on a GPU
        monkeypatch.setattr(sizes, "is_padded", lambda head: True)
    monkeypatch.setattr(sizes, "TILE_TOKENS", 2 * SMALL_VOCABULARY)
    case = random_case(vocabulary=SMALL_VOCABULARY + 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Operations() as in_training:
            trained = score_tokens(*case)
        with Operations() as in_evaluation, torch.no_grad():
            scored = score_tokens(*case)
    assert not scored.loss.requires_grad
    for ours, theirs in zip(trained, scored, strict=True):
        assert torch.equal(ours.detach(), theirs)
    assert (in_training.count("mm"), in_evaluation.count("mm")) == (3, 1)
    assert (in_training.count("scatter"), in_evaluation.count("scatter")) == (1, 0)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_the_other_still_does(frozen: int) -> None:
    both = random_case()
    score_tokens(*both).loss.backward()
    one = random_case()
    one[frozen].requires_grad_(False)
    score_tokens(*one).loss.backward()
    assert one[frozen].grad is None
    torch.testing.assert_close(one[1 - frozen].grad, both[1 - frozen].grad)


def test_a_sure_model_gives_finite_scores() -> None:
    """Logits of thousands: the loss is large where it is sure and wrong, never infinite or NaN."""
    hidden, head, x0, weight = random_case()
    with torch.no_grad():
        hidden *= 1e4
    case = (hidden, head, x0, weight)
    scores = score_tokens(*case)
    scores.loss.backward()
    assert torch.isfinite(scores.loss)
    assert torch.isfinite(scores.nll).all()
    assert (scores.confidence <= 0).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_bfloat16_autocast_is_close_for_a_large_vocabulary() -> None:
    """Bfloat16 keeps 8 bits of each product's factors; sums and the softmax stay float32."""
    case = random_case(vocabulary=SMALL_VOCABULARY + 1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(*case)
    assert scores.loss.dtype == torch.float32
    exact = score_tokens(*random_case(vocabulary=SMALL_VOCABULARY + 1))
    assert not torch.equal(scores.nll, exact.nll)  # bfloat16 was in use
    assert_equals_oracle(scores, case, tolerance=0.05)
    assert case[0].grad.dtype == case[1].grad.dtype == torch.float32


def test_a_small_vocabulary_stays_in_float32_under_autocast() -> None:
    """Bfloat16 logits tie where the model is sure, and ties would choose the order in which positions are revealed."""
    case = random_case()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(*case)
    assert_equals_oracle(scores, case, tolerance=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_of_rows_by_length_by_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    n_rows, length, vocabulary = 4, 32, 5000
    chunk_elements = 4 * vocabulary
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(sizes, "TILE_ELEMENTS", chunk_elements)
    case = random_case(n_rows, length, vocabulary, share=2.0)
    hidden, head, _, _ = case
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        score_tokens(*case).loss.backward()
        predict_tokens(hidden.detach().flatten(0, 1), head, 0)
        predict_tokens(hidden.detach().flatten(0, 1), head, 0, temperature=1.0, noise_key=torch.arange(n_rows * length))
    assert head.numel() <= largest.numel <= max(head.numel(), chunk_elements)
    assert largest.numel * 8 < n_rows * length * vocabulary


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_of_whole_chunks_equals_that_in_tiles(dtype: torch.dtype, compiled: bool) -> None:
    """GPUs take whole chunks, CPUs tiles; bfloat16 rounds the logits and the gradient of both."""
    hidden, head, x0, weight = random_case(vocabulary=2500)
    states, matrix, target = hidden.detach().flatten(0, 1).to(dtype), head.detach().to(dtype), x0.flatten()
    in_tiles = sizes.chunk_scorer(matrix, len(matrix), len(states), compiled=False)(states, target, weight.flatten())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    score_logits = sizes._compiled_softmax() if compiled else sizes._score_logits
    whole = score_logits(states @ matrix.T, target, weight.flatten(), True)
    assert in_tiles[2].dtype == whole[2].dtype == dtype
    for ours, theirs in zip(in_tiles, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-5)


# Not ("compiled", 0.9999): compiled for a CPU it adds token after token, so that small terms vanish beside a sum of 1.
@pytest.mark.parametrize(
    ("way", "probability"),
    [
        *product(["whole", "tiles"], [0.5, 0.99, 0.999, 0.9999]),
        *(pytest.param("compiled", probability, marks=needs_compiler) for probability in (0.5, 0.99, 0.999)),
    ],
)
def test_the_gradient_at_the_true_token_survives_bfloat16(way: str, probability: float) -> None:
    """It is weight * (p - 1), which cancels in bfloat16: rounded only afterwards, it has an error of 2^-8."""
    n_tokens, place = 2500, 1700
    logits = torch.zeros(1, n_tokens, dtype=torch.bfloat16)
    logits[0, place] = math.log(probability / (1 - probability) * (n_tokens - 1))
    logits, target, weight = logits.expand(4, -1), torch.full((4,), place), torch.tensor([1.0, 0.37, 3.3, 1e-3])
    if way == "tiles":  # states of width 1 and a matrix that is the logits
        score = sizes.chunk_scorer(logits[0, :, None].contiguous(), n_tokens, 4, compiled=False)
        _, _, gradient = score(torch.ones(4, 1, dtype=torch.bfloat16), target, weight)
    else:
        score_logits = sizes._compiled_softmax() if way == "compiled" else sizes._score_logits
        _, _, gradient = score_logits(logits.clone(), target, weight, True)
    expected = weight.double()[:, None] * logits.double().softmax(1)
    expected[:, place] -= weight.double()
    assert gradient is not None
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("vocabulary", [11, 64])
@pytest.mark.parametrize("chunk_elements", [40, 1 << 24])
def test_a_padded_vocabulary_gives_the_same_scores_and_gradients(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, chunk_elements: int
) -> None:
    """As on a GPU with a large vocabulary; 64 needs no padding."""
    monkeypatch.setattr(sizes, "is_padded", lambda head: True)
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", chunk_elements)
    case = random_case(vocabulary=vocabulary)
    assert sizes.product_matrix(case[1], torch.bfloat16).shape == (64, WIDTH)
    assert_equals_oracle(score_tokens(*case), case, tolerance=2e-5)
    assert case[1].grad.shape == (vocabulary, WIDTH)


@pytest.mark.gpu
def test_an_odd_large_vocabulary_on_a_gpu_equals_the_cpu() -> None:
    hidden, head, x0, weight = random_case(vocabulary=SMALL_VOCABULARY + 3)
    case = (hidden.detach().cuda().requires_grad_(), head.detach().cuda().requires_grad_(), x0.cuda(), weight.cuda())
    scores = score_tokens(*case)
    scores.loss.backward()
    score_tokens(hidden, head, x0, weight).loss.backward()
    for ours, theirs in ((case[0].grad, hidden.grad), (case[1].grad, head.grad)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)


# Sampling


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tile_tokens", [5, 64, 1024])
def test_a_padded_vocabulary_gives_the_same_predictions(
    monkeypatch: pytest.MonkeyPatch, tile_tokens: int, temperature: float
) -> None:
    """Also where whole tiles are padding."""
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    hidden, head, _, _ = random_case(n_rows=30)
    states, keys = hidden.detach().flatten(0, 1), torch.arange(210)
    plain = predict_tokens(states, head, 4, temperature=temperature, noise_key=keys)
    monkeypatch.setattr(sizes, "is_padded", lambda head: True)
    padded = predict_tokens(states, head, 4, temperature=temperature, noise_key=keys)
    for name, ours, theirs in zip(plain._fields, padded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{name}: ".__add__)


@pytest.mark.parametrize("tile_elements", [1, 11, 40, 1 << 24])
@pytest.mark.parametrize("tile_tokens", [1, 2, 5, 1024])
@pytest.mark.parametrize("banned", [0, 4, 10])
def test_predictions_equal_the_oracle(
    monkeypatch: pytest.MonkeyPatch, tile_elements: int, tile_tokens: int, banned: int
) -> None:
    """Whatever the tiles; of one token, the banned one is a tile of its own."""
    monkeypatch.setattr(sizes, "TILE_ELEMENTS", tile_elements)
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    hidden, head, _, _ = random_case()
    states = hidden.detach().flatten(0, 1)
    predicted = predict_tokens(states, head, banned, n_candidates=4)
    logits = states.double() @ head.detach().double().T
    for place in range(len(states)):
        log_p = oracle.log_softmax(logits[place].index_fill(0, torch.tensor(banned), -torch.inf))
        best = log_p.argsort(descending=True)[:4]
        assert predicted.candidates[place].tolist() == best.tolist()
        assert predicted.candidate_log_probs[place].tolist() == pytest.approx(log_p[best].tolist(), abs=1e-5)
        token, confidence = oracle.prediction(logits[place], banned)
        assert int(predicted.token[place]) == token
        assert float(predicted.log_prob[place]) == pytest.approx(confidence["top_prob"], abs=1e-5)
        assert float(predicted.margin[place]) == pytest.approx(confidence["top_prob_margin"], abs=1e-5)
        assert float(predicted.neg_entropy[place]) == pytest.approx(confidence["neg_entropy"], abs=1e-5)


@pytest.mark.parametrize("tile_tokens", [2, 1024])
@pytest.mark.parametrize("n_candidates", [5, 6, 50])
def test_the_banned_token_is_no_candidate_however_many_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, n_candidates: int, tile_tokens: int
) -> None:
    """Of 6 tokens 5 are left; a trace asks for a fixed number, whatever the vocabulary."""
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    hidden, head, _, _ = random_case(vocabulary=6)
    predicted = predict_tokens(hidden.detach().flatten(0, 1), head, 4, n_candidates=n_candidates)
    assert predicted.candidates is not None
    assert predicted.candidate_log_probs is not None
    assert predicted.candidates.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 5]] * 21
    torch.testing.assert_close(predicted.candidate_log_probs.exp().sum(1), torch.ones(21))


def test_the_tokens_do_not_depend_on_the_number_of_candidates() -> None:
    """Nor where logits are equal, as bfloat16 products of many tokens are."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 2, (50, 4), generator=generator).float()
    head = torch.randint(0, 2, (5000, 4), generator=generator).float()
    alone, traced = (predict_tokens(states, head, 4999, n_candidates=n) for n in (0, 5))
    assert torch.equal(alone.token, traced.token)
    assert torch.equal(alone.margin, traced.margin)


@pytest.mark.parametrize("tile_tokens", [4, 1000])
def test_current_tokens_and_divergence_equal_the_oracle_under_autocast_too(
    monkeypatch: pytest.MonkeyPatch, tile_tokens: int
) -> None:
    """Where logits are large, sums of products in bfloat16 would make a divergence of 0 look like 0.05."""
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    generator = torch.Generator().manual_seed(0)
    head, states = (torch.randn(shape, generator=generator) for shape in ((11, 8), (6, 8)))
    states = 8 * states
    previous = states.clone()
    previous[:3] += torch.randn(3, 8, generator=generator)
    current = torch.tensor([0, 1, 2, 3, 9, 10])
    with torch.autocast("cpu", torch.bfloat16):
        found = predict_tokens(states, head, banned=4, current=current, previous=previous)
    logits, others = (each.double() @ head.double().T for each in (states, previous))  # a small head stays float32
    logits[:, 4] = others[:, 4] = -1e30
    assert found.current_log_prob is not None
    assert found.kl is not None
    for place in range(6):
        log_p, log_q = oracle.log_softmax(logits[place]), oracle.log_softmax(others[place])
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        assert float(found.kl[place]) == pytest.approx(divergence, rel=1e-4, abs=1e-4)
        assert float(found.current_log_prob[place]) == pytest.approx(float(log_p[current[place]]), abs=1e-4)
        assert float(found.neg_entropy[place]) == pytest.approx(float((log_p.exp() * log_p).sum()), abs=1e-4)


def test_no_position_gives_no_prediction() -> None:
    predicted = predict_tokens(torch.empty(0, WIDTH), torch.randn(11, WIDTH), 0)
    assert [len(part) for part in predicted[:4]] == [0] * 4
    assert predicted.token.dtype == torch.int64


def test_neg_entropy_of_a_uniform_and_of_a_sure_distribution() -> None:
    """Higher is less uncertain, 0 is certain, though many probabilities underflow to 0."""
    head = torch.eye(WIDTH)
    states = torch.stack([torch.zeros(WIDTH), torch.tensor([1000.0] + [0.0] * (WIDTH - 1))])
    predicted = predict_tokens(states, head, banned=WIDTH - 1)
    assert predicted.neg_entropy.tolist() == pytest.approx([-math.log(WIDTH - 1), 0], abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 5.0])
def test_the_banned_token_is_never_produced_and_takes_no_probability(temperature: float) -> None:
    """Though its logit is by far the largest."""
    head = torch.zeros(5, WIDTH)
    head[3] = 100.0
    states = torch.ones(2000, WIDTH)
    predicted = predict_tokens(states, head, 3, temperature=temperature, noise_key=torch.arange(2000))
    assert not (predicted.token == 3).any()
    torch.testing.assert_close(predicted.log_prob, torch.full((2000,), math.log(1 / 4)))
    if temperature > 0:
        assert set(predicted.token.tolist()) == {0, 1, 2, 4}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_temperature_samples_from_the_tempered_distribution(temperature: float) -> None:
    """Token k comes with probability proportional to p(k)^(1 / temperature), rare tokens too."""
    n_draws = 40_000
    head = torch.tensor([[0.0], [1.0], [-1.0], [5.0], [0.5]])  # token 3 is banned
    logits = torch.tensor([0.0, 1.0, -1.0, -torch.inf, 0.5], dtype=torch.float64)
    predicted = predict_tokens(
        torch.ones(n_draws, 1), head, 3, temperature=temperature, noise_key=torch.arange(n_draws)
    )
    expected = oracle.log_softmax(logits / temperature).exp()
    assert_distribution(predicted.token.bincount(minlength=5), expected)
    torch.testing.assert_close(
        predicted.log_prob.double(), oracle.log_softmax(logits)[predicted.token], rtol=1e-5, atol=1e-5
    )


def test_tokens_of_neighbouring_positions_are_drawn_independently() -> None:
    """Pairs of draws under successive keys, as neighbouring positions of a row could have."""
    predicted = predict_tokens(
        torch.ones(60_000, 1), torch.zeros(4, 1), 3, temperature=1.0, noise_key=torch.arange(60_000)
    )
    pairs = predicted.token[:-1] * 3 + predicted.token[1:]
    assert_distribution(pairs.bincount(minlength=9), torch.full((9,), 1 / 9))


@pytest.mark.parametrize("tile_tokens", [1, 4])
def test_tiles_of_the_vocabulary_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch, tile_tokens: int) -> None:
    hidden, head, _, _ = random_case(n_rows=300)
    states, keys = hidden.detach().flatten(0, 1), torch.arange(2100)
    whole = predict_tokens(states, head, 0, temperature=1.0, noise_key=keys)
    monkeypatch.setattr(sizes, "TILE_TOKENS", tile_tokens)
    parts = predict_tokens(states, head, 0, temperature=1.0, noise_key=keys)
    for name, ours, theirs in zip(whole._fields, whole, parts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{name}: ".__add__)


def test_an_extreme_tile_neither_overflows_nor_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of different tiles that lie thousands apart, for training and for sampling."""
    monkeypatch.setattr(sizes, "TILE_TOKENS", 2)
    head = torch.tensor([[5000.0], [4999.0], [-5000.0], [-5001.0], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 3, 1, requires_grad=True)
    x0, weight = torch.tensor([[0, 2, 4]]), torch.ones(1, 3)
    scores = score_tokens(hidden, head, x0, weight)
    scores.loss.backward()
    near = math.log1p(math.exp(-1.0))
    assert scores.nll[0].tolist() == pytest.approx([near, 10_000 + near, 5000 + near], rel=1e-6)
    share = torch.tensor([1.0, math.exp(-1.0), 0.0, 0.0, 0.0]) / (1 + math.exp(-1.0))
    expected = 3 * share - torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(head.grad[:, 0], expected)
    predicted = predict_tokens(torch.ones(1, 1), head, banned=0)
    assert predicted.token.tolist() == [1]
    assert [float(part) for part in predicted[1:4]] == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


def test_a_key_gives_the_same_token_wherever_it_stands() -> None:
    hidden, head, _, _ = random_case(n_rows=8)
    states, keys = hidden.detach().flatten(0, 1), torch.arange(56) * 12_345
    together = predict_tokens(states, head, 0, temperature=1.0, noise_key=keys).token
    turned = predict_tokens(states.flip(0), head, 0, temperature=1.0, noise_key=keys.flip(0)).token
    assert torch.equal(together, turned.flip(0))
    alone = [predict_tokens(states[i : i + 1], head, 0, temperature=1.0, noise_key=keys[i : i + 1]) for i in range(56)]
    assert together.tolist() == [int(predicted.token) for predicted in alone]


def test_uniform_numbers_are_finer_than_float32_and_never_0_or_1() -> None:
    """Float32 uniforms end at 1 - 2^-24, which would end Gumbel noise at 16.6 and starve rare tokens."""
    uniform = hash_uniform(torch.cat([torch.arange(-50_000, 50_000), torch.tensor([2**63 - 1, -(2**63)])]))
    assert uniform.dtype == torch.float64
    assert ((uniform > 0) & (uniform < 1)).all()
    assert (uniform * 2**24 % 1 > 0).float().mean() > 0.99
    assert_distribution((uniform * 100).long().bincount(minlength=100), torch.full((100,), 0.01))


def test_gumbel_noise_has_its_distribution() -> None:
    """P(noise < x) = exp(-exp(-x))."""
    noise = gumbel_noise(torch.arange(500), 200)
    assert noise.shape == (500, 200)
    assert noise.dtype == torch.float64
    share = (-(-noise).exp()).exp()  # uniform if so
    assert_distribution((share * 50).long().flatten().bincount(minlength=50), torch.full((50,), 0.02))
