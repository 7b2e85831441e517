"""One update: what it gives to the pool, the optimizer and the records; what it asks of the device, and may not."""

from __future__ import annotations

import copy
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import oracle
import pytest
import torch
from conftest import PUMA, UNIFORM, tiny_settings
from test_progressive import assert_transitions_of_the_oracle, rows_at
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from base.files import WriteError
from bench.inputs import YAML_FILES, random_rows
from config import Confidence
from model.logits import SMALL_VOCABULARY
from model.token_scores import TokenScores
from objective import Microbatch
from progressive import PumaObjective
from runtime.config_file import parse_config, read_config
from runtime.distributed import World
from runtime.optim import learning_rate
from training.run import Run, build_run
from training.update import (
    TrainingDiverged,
    Updater,
    apply_update,
    check_finite,
    check_graph,
    seed_default_generator,
    several_ranks_prevent_graph,
    uses_graph,
)

OBJECTIVES = {
    "uniform": UNIFORM,
    "puma": PUMA,
    "random_order": {"name": "puma", "n_stages": 4, "reveal_order": "random"},
    "order_of_the_margin": PUMA | {"reveal_order": "top_prob_margin", "collapse_threshold": 0.5},
    "order_of_the_entropy": {"name": "puma", "n_stages": 4, "reveal_order": "neg_entropy"},
    "mixed": {"name": "puma", "n_stages": 4, "uniform_fraction": 0.25},
    "block_puma": {"name": "block_puma", "n_stages": 4, "block_size": 8, "block_attention": "block_causal"},
    "autoregressive": {"name": "autoregressive"},
}
# Operations that make the host wait for the device, since it must know a value or a size.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class NoReads(TorchDispatchMode):
    """Fails where an operation would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads from the device"
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing by a mask reads"
        return func(*args, **(kwargs or {}))


def build(
    objective: dict[str, Any],
    data_dir: Path,
    run_dir: Path,
    device: str = "cpu",
    vocab_size: int | None = None,
    **training: Any,
) -> Run:
    settings = tiny_settings(objective, data_dir)
    settings["model"]["vocab_size"] = vocab_size or settings["model"]["vocab_size"]
    settings["training"] |= {"device": device} | training
    config = parse_config(settings, "test")
    world = World(0, 1, torch.device(device))
    return build_run(config, world, run_dir, config.open_data().train)


@pytest.mark.parametrize("order", get_args(Confidence))
@pytest.mark.parametrize("collapse_threshold", [None, 0.5])
def test_a_pool_reveals_by_the_scores_of_the_weights_before_the_update(
    order: str, collapse_threshold: float | None, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By those of the model's own predictions, whichever token has them: not by those of the true token."""
    objective = PUMA | {"collapse_threshold": collapse_threshold, "reveal_order": order}
    run = build(objective, data_dir, tmp_path, micro_batch_size=4)
    assert isinstance(run.objective, PumaObjective)
    with torch.no_grad():
        run.model.lm_head.weight.mul_(20)  # about half of the probabilities exceed the threshold
    pool, observe, seen = run.objective.pool, run.objective.observe, []

    def recorded(microbatch: Microbatch, scores: TokenScores) -> None:
        seen.append((microbatch, scores))
        observe(microbatch, scores)

    monkeypatch.setattr(run.objective, "observe", recorded)
    updater = Updater(run)
    for step in range(6):  # crosses a change of K
        model, batch = copy.deepcopy(run.model), slice(step % 2 * 8, (step % 2 + 1) * 8)
        pool.set_n_stages(3 if step < 4 else 5)
        before = rows_at(pool, batch)
        updater.step()
        assert [microbatch.rows for microbatch, _ in seen] == [slice(0, 4), slice(4, 8)]
        for microbatch, scores in seen:
            with torch.no_grad():
                logits = model.logits(microbatch.xt)
            rule = "top_prob" if order == "random" else order
            expected = oracle.score_batch(logits, microbatch.x0, microbatch.weight, rule)
            scored = microbatch.weight != 0
            assert torch.equal(scored, before.masked[microbatch.rows])
            for name in ("nll", "max_log_prob", "confidence"):
                found, wanted = getattr(scores, name)[scored], getattr(expected, name)[scored]
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        max_log_prob, confidence = (
            torch.cat([getattr(scores, name) for _, scores in seen]) for name in ("max_log_prob", "confidence")
        )
        after = rows_at(pool, batch)
        assert_transitions_of_the_oracle(pool, before, after, None if order == "random" else confidence, max_log_prob)
        seen.clear()


@pytest.mark.parametrize("vocab_size", [None, SMALL_VOCABULARY + 1])
def test_passes_of_an_update_add_up(vocab_size: int | None, data_dir: Path, tmp_path: Path) -> None:
    """Also with a large vocabulary, where the positions of each pass are found before the first."""
    runs = [
        build(PUMA, data_dir, tmp_path, vocab_size=vocab_size, micro_batch_size=n_rows, max_steps=3)
        for n_rows in (None, 4, 2)
    ]
    for run in runs:
        Updater(run).step()
    for run in runs[1:]:
        assert float(run.loss_sum) == pytest.approx(float(runs[0].loss_sum), rel=1e-6)
        assert float(run.grad_norm_sum) == pytest.approx(float(runs[0].grad_norm_sum), rel=1e-5)
    assert float(runs[0].grad_norm_sum) > 0


def test_what_a_model_draws_follows_from_seed_rank_and_step() -> None:
    def draw(seed: int, rank: int, step: int) -> float:
        config = SimpleNamespace(training=SimpleNamespace(seed=seed))
        run = SimpleNamespace(config=config, world=World(rank, 2, torch.device("cpu")), step=step)
        seed_default_generator(cast(Run, run))
        return float(torch.rand(()))

    places = list(product((0, 1, 2), repeat=3))
    first, again = ([draw(*place) for place in places] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(places)


def test_every_update_has_the_learning_rate_of_its_step(data_dir: Path, tmp_path: Path) -> None:
    run = build(UNIFORM, data_dir, tmp_path, warmup_steps=3, max_steps=20)
    updater, weights = Updater(run), copy.deepcopy(run.model.state_dict())
    rates = []
    for step in range(8):
        updater.step()
        (rate,) = {group["lr"] for group in run.optimizer.param_groups}
        assert rate == learning_rate(step, run.config.training, n_steps=20)
        rates.append(rate)
        unchanged = all(torch.equal(own, weights[name]) for name, own in run.model.state_dict().items())
        assert unchanged == (step == 0), "warm-up starts from 0"
    assert all(first != second for first, second in pairwise(rates[:3] + rates[4:]))
    assert rates[3] == max(rates) == run.config.training.learning_rate


def test_the_gradient_norm_is_that_before_clipping(data_dir: Path, tmp_path: Path) -> None:
    run = build(PUMA, data_dir, tmp_path, max_grad_norm=1e-3, micro_batch_size=4)
    model = copy.deepcopy(run.model)
    Updater(run).step()
    for part in run.batch:
        nll = F.cross_entropy(model.logits(part.xt).transpose(1, 2), part.x0, reduction="none")  # [B, L]
        (nll * part.weight).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    assert norm > 0.01
    assert float(run.grad_norm_sum) == pytest.approx(norm, rel=1e-4)
    # After one update AdamW's first moment is (1 - beta) times the gradient that it was given.
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    given = float(nn.utils.get_total_norm(moments)) / (1 - run.config.training.adam_betas[0])
    assert given == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("place", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_each_of_loss_gradient_and_weights_is_checked_on_its_own(
    place: str, bad: float, data_dir: Path, tmp_path: Path
) -> None:
    """A gradient may overflow where the loss does not, and the last update's weights where both do not."""
    run = build(UNIFORM, data_dir, tmp_path)
    updater = Updater(run)
    for _ in range(2):
        updater.step()
    check_finite(run)
    if place == "loss":
        run.loss_sum += bad
    elif place == "gradient":
        run.grad_norm_sum += bad
    else:
        with torch.no_grad():
            run.model.lm_head.weight[2, 3] = bad
    with pytest.raises(TrainingDiverged, match=r"not finite in one of steps 1 to 2; .*; no checkpoint had been saved"):
        check_finite(run)


def test_a_divergence_is_told_though_its_rows_cannot_be_written(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is then the smaller problem of the two, and a run that ended with it would be started again."""

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise WriteError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr("training.update.save_tensors", full)
    run = build(UNIFORM, data_dir, tmp_path)
    Updater(run).step()
    run.loss_sum.fill_(torch.nan)
    message = r"not finite in step 1; .*diverged_step_00000001_rank_0.safetensors cannot be written \(No space"
    with pytest.raises(TrainingDiverged, match=message):
        check_finite(run)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_an_update_reads_nothing_back(objective, data_dir, tmp_path):
    """On a CPU reading costs nothing and goes unnoticed, so the operations themselves are watched."""
    run = build(objective, data_dir, tmp_path)
    updater = Updater(run)
    updater.step()  # AdamW's first step makes its state
    for _ in range(4):
        with NoReads():
            apply_update(run, updater.dtype)
        run.objective.prefetch()


def test_the_watch_sees_reads():
    with pytest.raises(AssertionError, match="reads from the device"), NoReads():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match="by a mask"), NoReads():
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("objective", "vocab_size"),
    [(objective, None) for objective in OBJECTIVES.values()] + [(PUMA, 10_000)],
    ids=[*OBJECTIVES, "large_vocabulary"],
)
def test_twenty_steps_on_a_gpu_never_wait(objective, vocab_size, data_dir, tmp_path):
    """The mode does not see waits for an event, of which a large vocabulary has one per pass."""
    updater = Updater(build(objective, data_dir, tmp_path, device="cuda", vocab_size=vocab_size, cuda_graph=False))
    for _ in range(3):
        updater.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            updater.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_recorded_update_does_what_an_eager_one_does(objective, data_dir, tmp_path):
    runs = [build(objective, data_dir, tmp_path, device="cuda", cuda_graph=graph) for graph in (False, True)]
    for run in runs:
        updater = Updater(run)
        for _ in range(12):  # crosses a change of K
            updater.step()
    for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_a_recorded_update_equals_an_eager_one_bit_for_bit_with_deterministic_kernels(tmp_path, monkeypatch):
    """With others two eager runs differ too, since some sum in an order of their own."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    runs = []
    try:
        for graph in ("false", "true"):
            overrides = ["training.precision=float32", f"training.cuda_graph={graph}"]
            config = read_config(YAML_FILES / "sudoku_puma.yaml", overrides)  # tiny models take other kernels
            rows = random_rows(config, config.data.length)
            runs.append(build_run(config, World(0, 1, torch.device("cuda")), tmp_path, rows))
            updater = Updater(runs[-1])
            for _ in range(20):
                updater.step()
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_recorded_update_with_flex_attention_does_what_an_eager_one_does(compile, data_dir, tmp_path):
    """Heads wide enough and rows long enough for FlexAttention."""
    runs = []
    for graph in (False, True):
        settings = tiny_settings(OBJECTIVES["block_puma"], data_dir)
        settings["objective"] = settings["objective"] | {"block_size": 27}
        settings["data"] |= {"size": 9, "min_clues": 30, "max_clues": 40}
        settings["model"] |= {"vocab_size": 11, "hidden_size": 32, "learned_positions": 162}
        settings["training"] |= {"device": "cuda", "cuda_graph": graph, "compile": compile}
        config = parse_config(settings, "test")
        runs.append(build_run(config, World(0, 1, torch.device("cuda")), tmp_path, config.open_data().train))
        updater = Updater(runs[-1])
        for _ in range(12):
            updater.step()
    for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_graph_is_taken_where_an_update_can_be_captured(data_dir):
    settings = tiny_settings(PUMA, data_dir)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def graph(device, n_ranks=1, **changes):
        changed = settings | {"training": settings["training"] | changes}
        config = parse_config(changed, "test")
        for rank in range(n_ranks):
            prevented = several_ranks_prevent_graph(config, World(rank, n_ranks, device))
            assert prevented == (n_ranks > 1 and uses_graph(config, World(0, 1, device)))
        return uses_graph(config, World(0, n_ranks, device))

    assert graph(cuda)
    assert graph(cuda, cuda_graph=True)
    assert not graph(cpu)
    assert not graph(cpu, cuda_graph=True)
    assert not graph(cuda, n_ranks=2)
    assert not graph(cuda, n_ranks=2, cuda_graph=False)
    assert not graph(cpu, n_ranks=2)
    assert not graph(cuda, gradient_checkpointing=True)
    assert not graph(cuda, cuda_graph=False)
    settings["model"]["vocab_size"] = 10_000
    assert not graph(cuda)


def test_a_graph_is_refused_where_it_cannot_be_recorded(data_dir):
    settings = tiny_settings(PUMA, data_dir)
    settings["training"]["cuda_graph"] = True
    config = parse_config(settings, "test")
    check_graph(config, World(0, 1, torch.device("cpu")))  # it has no effect there, which train.py says
    with pytest.raises(ValueError, match="one process"):
        check_graph(config, World(0, 2, torch.device("cpu")))
    settings["training"]["gradient_checkpointing"] = True
    with pytest.raises(ValueError, match="cannot be combined with training"):
        check_graph(parse_config(settings, "test"), World(0, 1, torch.device("cpu")))
    settings["training"]["gradient_checkpointing"] = False
    settings["model"]["vocab_size"] = 10_000
    with pytest.raises(ValueError, match="vocab_size of at most 4096, got 10000"):
        check_graph(parse_config(settings, "test"), World(0, 1, torch.device("cpu")))
