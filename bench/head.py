"""The output head with its backward pass: in chunks on scored positions, against all logits.

PyTorch's own `linear_cross_entropy` (2.13 and later) is timed on the scored positions too. It gives no confidence, so a
second column adds the pass that would find it.

Shapes: N positions, n scored ones, D width, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.dense import score
from bench.measure import (
    Report,
    clock_of,
    facts,
    interleave,
    matrix_product,
    measure_peaks,
    medians,
    peak_of,
    row,
    table,
)
from model.logits import chunk_rows
from model.token_scores import score_tokens
from runtime.distributed import autocast, autocast_dtype, start_world

COLUMNS = {
    "path": "path",
    "ms": "ms",
    "times_ours": "times ours",
    "peak_gib": "GiB",
}
PATHS = {
    "ours": "ours: chunks, scored positions, confidence",
    "dense": "dense: all logits, log-softmax, confidence",
    "torch": "torch's linear_cross_entropy in chunks, scored positions, no confidence",
    "torch_confidence": "the same, and a pass for the confidence",
}


@dataclass
class Problem:
    """What a head is given."""

    hidden: Tensor  # [1, N, D], with gradient
    head: Tensor  # [V, D], with gradient
    x0: Tensor  # int64 [1, N]
    weight: Tensor  # float32 [1, N]
    dtype: torch.dtype | None  # of autocast

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of hidden states and head, which are cleared."""
        assert self.hidden.grad is not None
        assert self.head.grad is not None
        grads = self.hidden.grad, self.head.grad
        self.hidden.grad = self.head.grad = None
        return grads


def random_problem(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> Problem:
    """Hidden states as after the last norm, a head as it is initialised."""
    generator = torch.Generator().manual_seed(0)
    n, width, vocab = options.positions, options.width, options.vocab
    hidden = torch.randn(1, n, width, generator=generator).to(device).requires_grad_()
    head = (0.02 * torch.randn(vocab, width, generator=generator)).to(device).requires_grad_()
    x0 = torch.randint(0, vocab, (1, n), generator=generator).to(device)
    scored = torch.rand(1, n, generator=generator) < options.scored
    weight = (scored / scored.sum().clamp(min=1)).to(device)
    return Problem(hidden, head, x0, weight, dtype)


def ours(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and confidence [1, N]; gradients are left in the problem."""
    with autocast(problem.hidden.device, problem.dtype):
        scores = score_tokens(problem.hidden, problem.head, problem.x0, problem.weight)
    scores.loss.backward()
    return scores.loss.detach(), scores.confidence


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same from all logits."""
    with autocast(problem.hidden.device, problem.dtype):
        logits = F.linear(problem.hidden, problem.head)  # [1, N, V]
    loss, confidence = score(logits, problem.x0, problem.weight)
    del logits
    loss.backward()
    return loss.detach(), confidence


def torch_chunked(problem: Problem, with_confidence: bool) -> tuple[Tensor, Tensor | None]:
    """PyTorch's function on the scored positions; its loss, and the confidence [1, N] from a pass of its own."""
    places = problem.weight.flatten().nonzero().squeeze(1)  # [n]
    with autocast(problem.hidden.device, problem.dtype):
        states, head = problem.hidden.flatten(0, 1)[places], problem.head
        nll = F.linear_cross_entropy(
            states.to(problem.dtype or states.dtype),
            head.to(problem.dtype or head.dtype),
            problem.x0.flatten()[places],
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    loss = (nll.float() * problem.weight.flatten()[places]).sum()
    loss.backward()
    if not with_confidence:
        return loss.detach(), None
    confidence = torch.full_like(problem.weight, -torch.inf)
    with torch.no_grad(), autocast(problem.hidden.device, problem.dtype):
        for part, at in zip(states.split(chunk_rows(head)), places.split(chunk_rows(head)), strict=True):
            logits = F.linear(part, head).float()
            confidence[0, at] = logits.amax(1) - logits.logsumexp(1)
    return loss.detach(), confidence


def build(options: Namespace, device: torch.device, dtype: torch.dtype | None, path: str) -> Callable[[], object]:
    """One of `PATHS`, with a problem of its own."""
    problem = random_problem(options, device, dtype)

    def call() -> None:
        if path in ("ours", "dense"):
            (ours if path == "ours" else dense)(problem)
        else:
            torch_chunked(problem, with_confidence=path == "torch_confidence")
        problem.gradients()

    return call


def run(options: Namespace) -> Report | None:
    """Measure as the options say; None in the process that measures memory, which prints one number."""
    device = start_world("auto").device
    dtype = autocast_dtype("auto", device)
    if options.memory_of:
        print(peak_of(lambda: build(options, device, dtype, options.memory_of), device))
        return None
    names = [name for name in PATHS if "torch" not in name or hasattr(F, "linear_cross_entropy")]
    peaks = measure_peaks(options, names)
    product, product_flop = matrix_product(dtype, device)
    calls = {name: build(options, device, dtype, name) for name in names}
    times = interleave(
        calls | {"product": product},
        device,
        options.iterations,
        options.seconds,
        label="head",
        clock=clock_of(options),
    )
    middle = medians(times)
    n_scored = int((random_problem(options, device, dtype).weight != 0).sum())
    peak_flops = 1000 * product_flop / middle["product"]
    floor_ms = 1000 * 6.0 * options.width * options.vocab * n_scored / peak_flops
    result = row(
        "head",
        middle["ours"],
        middle["dense"],
        peaks["ours"],
        peaks["dense"],
        torch_ms=middle.get("torch"),
        torch_peak_gib=peaks.get("torch"),
        torch_confidence_ms=middle.get("torch_confidence"),
        n_positions=options.positions,
        n_scored=n_scored,
        width=options.width,
        vocab=options.vocab,
        n_rounds=len(times["ours"]),
        floor_ms=floor_ms,
        utilisation=f"{floor_ms / middle['ours']:.0%}",
    )
    shown = [
        {"path": PATHS[name], "ms": middle[name], "times_ours": middle[name] / middle["ours"], "peak_gib": peaks[name]}
        for name in names
    ]
    size = f"{options.positions} positions, {n_scored} scored, {options.vocab:,} tokens, width {options.width}"
    lines = [
        f"# Output head, {size}",
        "",
        *table(shown, COLUMNS),
        "",
        f"Forward and backward, medians of {len(times['ours'])} rounds; peak memory with hidden states, head and "
        "their gradients, each path in its own process. The arithmetic on scored positions alone takes "
        f"{floor_ms:,.3g} ms at the speed of a large matrix product ({peak_flops / 1e9:,.0f} GFLOP/s): utilisation "
        f"{floor_ms / middle['ours']:.0%}.",
    ]
    return Report([result], lines)


def about(options: Namespace) -> dict[str, Any]:
    """See `bench.measure.facts`."""
    device = start_world("auto").device
    return facts(options, device, autocast_dtype("auto", device))
