"""The output head with its backward pass: in chunks on scored positions, beside all logits.

Shapes: N positions, n scored ones, D width, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.dense import score
from bench.inputs import read_inputs
from bench.measure import Benchmark, Call, Case
from model.logits import chunk_rows
from model.token_scores import score_tokens
from runtime.distributed import autocast

SCORED = 0.4  # share of the positions that carry weight
NAMES = {"dense": "all logits, with confidence"}
if hasattr(F, "linear_cross_entropy"):
    NAMES["torch"] = "torch's linear_cross_entropy, which gives no confidence"
    NAMES["torch_confidence"] = "the same, and a pass for the confidence"

# Hidden states [1, N, D] and head [V, D] with gradients, x0 (int64 [1, N]), weight (float32 [1, N]).
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def random_problem(n: int, width: int, vocab: int, device: torch.device) -> Problem:
    """Hidden states as after the last norm, a head as it is initialised."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, n, width, generator=generator).to(device).requires_grad_()
    head = (0.02 * torch.randn(vocab, width, generator=generator)).to(device).requires_grad_()
    x0 = torch.randint(0, vocab, (1, n), generator=generator).to(device)
    scored = torch.rand(1, n, generator=generator) < SCORED
    return hidden, head, x0, (scored / scored.sum().clamp(min=1)).to(device)


def run_head(problem: Problem, path: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Loss, confidence [1, N] if the path (`ours`, or a key of `NAMES`) has it, gradients of hidden states and head."""
    hidden, head, x0, weight = problem
    confidence: Tensor | None = None
    places = weight[0].nonzero().squeeze(1)  # [n]
    with autocast(hidden.device, dtype):
        if path == "ours":
            loss, _, _, confidence = score_tokens(hidden, head, x0, weight)
        elif path == "dense":
            loss, confidence = score(F.linear(hidden, head), x0, weight)
        else:
            states, matrix = hidden[0, places].to(dtype or hidden.dtype), head.to(dtype or head.dtype)
            chunks = torch.nn.LinearCrossEntropyOptions()
            nll = F.linear_cross_entropy(states, matrix, x0[0, places], reduction="none", options=chunks)
            loss = (nll.float() * weight[0, places]).sum()
    grad_hidden, grad_head = torch.autograd.grad(loss, (hidden, head))
    if path == "torch_confidence":
        confidence = torch.full_like(weight, -torch.inf)
        with torch.no_grad(), autocast(hidden.device, dtype):
            for part in places.split(chunk_rows(head)):
                logits = F.linear(hidden[0, part], head).float()
                confidence[0, part] = logits.amax(1) - logits.logsumexp(1)
    return loss.detach(), confidence, grad_hidden, grad_head


def build(options: Namespace) -> Benchmark:
    """Our head beside each of `NAMES`; the size is that of a batch (by default 2 rows) of the settings' model."""
    config, data, device, dtype = read_inputs(options, "tinygsm_puma", n_rows=2, n_rows_slow=2)
    n, width, vocab = config.training.batch_size * data.length, config.model.hidden_size, config.model.vocab_size
    problem = random_problem(n, width, vocab, device)
    n_scored = int((problem[-1] != 0).sum())
    facts = {"gflop": 6e-9 * width * vocab * n_scored}
    paths: dict[str, Call] = {name: partial(run_head, problem, name, dtype) for name in ("ours", *NAMES)}
    cases = [Case(title, "ours", name, n_scored, "scored positions", facts.copy) for name, title in NAMES.items()]
    size = f"{n} positions, {n_scored} scored, vocabulary {vocab:,}, width {width}"
    return Benchmark(f"Output head, {size}", paths, cases, device, dtype)
