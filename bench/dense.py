"""The same computation written plainly: what the fast paths are measured against.

All logits [B, L, V], log-softmax over them, PyTorch's default optimizer, a Python loop over the rows of the pool and of
the sampler. Nothing is made slow on purpose, and results are those of the fast paths (tests/test_bench.py).

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import AutoregressiveSettings, BlockSettings, Config, ProgressiveSettings
from data.stream import SequenceStream
from model.transformer import Transformer
from runtime.distributed import autocast
from runtime.optim import ema_decay

# Settings of an objective that this file implements; all others must have their defaults.
WITH_PLAIN_FORM = {"name", "n_stages", "k_schedule", "collapse_threshold"}
Batch = tuple[Tensor, Tensor, Tensor]  # xt, x0 (int64 [B, L]) and weight (float32 [B, L])


def aligned_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [B, L, V] in which entry i is about token i."""
    logits = model.logits(tokens)
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if model.shifted else logits


def score(logits: Tensor, x0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (scalar with gradient) and max log-probability (float32 [B, L]) from all logits [B, L, V]."""
    log_p = logits.float().log_softmax(dim=-1)  # [B, L, V]
    nll = -log_p.gather(-1, x0[..., None]).squeeze(-1)  # [B, L]
    return (weight * nll).sum(), log_p.detach().max(dim=-1).values


def most_confident(confidence: Tensor, n: int) -> Tensor:
    """The n best places of a row (float32 [L]), int64 [n]; of equal ones the earlier, which `topk` does not promise."""
    return confidence.sort(descending=True, stable=True).indices[:n]


def advance_row(
    masked: Tensor, maskable: Tensor, confidence: Tensor, stage: int, target: int, n_stages: int, tau: float | None
) -> tuple[Tensor, int]:
    """A row's masked positions (bool [L]) after revealing up to `target` by confidence, and its stage (K: finished)."""
    stage += 1
    if stage == n_stages:
        return masked, stage
    n_maskable, n_masked = int(maskable.sum()), int(masked.sum())
    best = most_confident(confidence.masked_fill(~masked, -math.inf), max(0, target - n_maskable + n_masked))
    masked = masked.index_fill(0, best, False)
    collapsed = masked & (confidence > (math.inf if tau is None else math.log(tau)))
    masked = masked & ~collapsed
    if collapsed.any():
        stage = max(stage, (n_maskable - int(masked.sum())) * n_stages // n_maskable)
    return masked, stage if masked.any() else n_stages


class DensePool:
    """PUMA's pool as a list of rows."""

    def __init__(self, stream: SequenceStream, config: Config, settings: ProgressiveSettings, device: torch.device):
        self.stream, self.mask_id, self.device = stream, config.mask_id, device
        self.n_stages, self.tau = settings.n_stages_at(0), settings.collapse_threshold
        n_rows = config.training.batch_size
        self.rows = [self._enter(int(stage)) for stage in torch.randperm(n_rows) * self.n_stages // n_rows]

    def _draw_target(self, stage: int, n_maskable: int) -> int:
        return min(round((stage + torch.rand(()).item()) / self.n_stages * n_maskable), n_maskable - 1)

    def _enter(self, stage: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """A fresh row's x0 (int64 [L]), masked and maskable (bool [L]), and stage."""
        x0, prompt_mask = (part[0].to(self.device) for part in self.stream.draw(1))
        n_maskable = int((~prompt_mask).sum())
        return x0, choose(~prompt_mask, n_maskable - self._draw_target(stage, n_maskable)), ~prompt_mask, stage

    def batch(self) -> Batch:
        """What the next step trains on."""
        x0, masked = torch.stack([row[0] for row in self.rows]), torch.stack([row[1] for row in self.rows])
        return x0.masked_fill(masked, self.mask_id), x0, masked / masked.sum(1, keepdim=True) / len(x0)

    def advance(self, confidence: Tensor) -> None:
        """Reveal by confidence (float32 [B, L]); fresh sequences for what has finished."""
        for i, (x0, masked, maskable, stage) in enumerate(self.rows):
            target = self._draw_target(stage + 1, int(maskable.sum()))
            masked, stage = advance_row(masked, maskable, confidence[i], stage, target, self.n_stages, self.tau)
            self.rows[i] = self._enter(0) if stage == self.n_stages else (x0, masked, maskable, stage)


def choose(allowed: Tensor, n: int) -> Tensor:
    """n random places (bool [L]) where `allowed` (bool [L]) is True."""
    places = allowed.nonzero().squeeze(1)
    return torch.zeros_like(allowed).index_fill(0, places[torch.randperm(len(places), device=places.device)[:n]], True)


def fresh_batch(stream: SequenceStream, config: Config) -> Batch:
    """The baseline's batch, masked row by row, or the autoregressive one; the rows of a benchmark have no EOS."""
    x0, prompt_mask = stream.draw(config.training.batch_size)
    if isinstance(config.objective, AutoregressiveSettings):
        prompt_mask[:, 0] = True  # nothing comes before it
        return x0, x0, ~prompt_mask / (~prompt_mask).sum()
    masked = torch.stack([choose(row, int(torch.randint(1, int(row.sum()) + 1, ()))) for row in ~prompt_mask])
    return x0.masked_fill(masked, config.mask_id), x0, masked / masked.sum(1, keepdim=True) / len(x0)


class DenseTrainer:
    """Eager training steps of a model with PyTorch's own optimizer and weight average."""

    def __init__(self, model: Transformer, config: Config, dtype: torch.dtype | None, device: torch.device) -> None:
        self.model, self.dtype, self.device, self.loss = model, dtype, device, math.nan
        training, decay = config.training, config.training.ema_decay
        rate, betas, self.max_grad_norm = training.learning_rate, training.adam_betas, training.max_grad_norm
        self.micro_rows = training.micro_batch_size or training.batch_size
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=training.weight_decay)
        self.average: AveragedModel | None = None
        if decay is not None:  # its first update copies the weights
            self.average = AveragedModel(model, avg_fn=lambda a, b, n: a.lerp(b, 1 - ema_decay(decay, int(n))))

    def step(self, batch: Batch) -> Tensor:
        """One update; max log-probabilities, float32 [B, L]."""
        self.loss, confidences = 0.0, list[Tensor]()
        for xt, x0, weight in zip(*(part.to(self.device).split(self.micro_rows) for part in batch), strict=True):
            with autocast(self.device, self.dtype):
                logits = aligned_logits(self.model, xt)
            loss, confidence = score(logits, x0, weight)
            del logits  # autograd keeps what it needs
            loss.backward()
            self.loss += loss.item()
            confidences.append(confidence)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return torch.cat(confidences)


def dense_step(config: Config, trainer: DenseTrainer, stream: SequenceStream) -> Callable[[], object]:
    """An update by the objective of the settings; ValueError for objectives that are not written plainly here."""
    settings = config.objective
    if isinstance(settings, BlockSettings):
        raise ValueError(f"objective {settings.name!r} has no plain form: see `python -m bench block`")
    for key in type(settings).model_fields:
        if key not in WITH_PLAIN_FORM and not settings.is_default(key):
            raise ValueError(f"objective.{key} {getattr(settings, key)!r} has no plain form: leave it out")
    if not isinstance(settings, ProgressiveSettings):
        return lambda: trainer.step(fresh_batch(stream, config))
    pool = DensePool(stream, config, settings, trainer.device)
    return lambda: pool.advance(trainer.step(pool.batch()))


@torch.no_grad()
def sample(model: Transformer, xt: Tensor, mask_id: int, tokens_per_step: int) -> Tensor:
    """Fill in each row on its own (int64 [B, L]), the most probable positions first."""
    tokens = xt.clone()
    for row in tokens:
        while bool((masked := row == mask_id).any()):
            logits = aligned_logits(model, row[None])[0].float()  # [L, V]
            logits[:, mask_id] = -math.inf
            best = logits.softmax(dim=-1).max(dim=-1)
            confidence = best.values.masked_fill(~masked, -math.inf)
            chosen = most_confident(confidence, min(tokens_per_step, int(masked.sum())))
            row[chosen] = best.indices[chosen]
    return tokens
