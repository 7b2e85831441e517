"""The same science written plainly: what the fast paths are measured against.

All logits [B, L, V], log-softmax over them, PyTorch's default optimizer, a Python loop over the rows of the pool and of
the sampler. Nothing is made slow on purpose, and results are those of the fast paths (tests/test_bench.py).

Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import AutoregressiveSettings, BlockSettings, Config, ProgressiveSettings
from data.stream import SequenceStream
from model.transformer import Transformer
from runtime.distributed import autocast
from runtime.optim import ema_decay

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


@dataclass
class Row:
    """One sequence of the pool."""

    x0: Tensor  # int64 [L]
    maskable: Tensor  # bool [L]
    masked: Tensor  # bool [L]
    stage: int


def advance_row(row: Row, confidence: Tensor, target: int, n_stages: int, collapse_threshold: float | None) -> bool:
    """Move a row one stage on, given its confidences (float32 [L]) and target; whether it has finished."""
    row.stage += 1
    if row.stage == n_stages:
        return True
    n_maskable = int(row.maskable.sum())
    n_reveal = target - (n_maskable - int(row.masked.sum()))
    revealed = torch.zeros_like(row.masked)
    if n_reveal > 0:
        revealed[most_confident(confidence.masked_fill(~row.masked, -math.inf), n_reveal)] = True
    collapsed = torch.zeros_like(row.masked)
    if collapse_threshold is not None:
        collapsed = row.masked & ~revealed & (confidence > math.log(collapse_threshold))
    row.masked = row.masked & ~revealed & ~collapsed
    n_masked = int(row.masked.sum())
    if collapsed.any():
        by_ratio = min((n_maskable - n_masked) * n_stages // n_maskable, n_stages - 1)
        row.stage = max(row.stage, by_ratio)
    return n_masked == 0


class DensePool:
    """PUMA's pool as a list of rows."""

    def __init__(
        self,
        stream: SequenceStream,
        n_rows: int,
        settings: ProgressiveSettings,
        mask_id: int,
        device: torch.device,
    ) -> None:
        self.stream, self.mask_id, self.device = stream, mask_id, device
        self.n_stages, self.collapse_threshold = settings.n_stages_at(0), settings.collapse_threshold
        stages = torch.randperm(n_rows) * self.n_stages // n_rows
        self.rows = [self._enter(int(stage)) for stage in stages]

    def _draw_target(self, stage: int, n_maskable: int) -> int:
        ratio = (stage + torch.rand(()).item()) / self.n_stages
        return min(round(ratio * n_maskable), n_maskable - 1)

    def _enter(self, stage: int) -> Row:
        x0, prompt_mask = (part[0].to(self.device) for part in self.stream.draw(1))
        masked = ~prompt_mask
        places = masked.nonzero().squeeze(1)
        n_revealed = self._draw_target(stage, len(places))
        masked[places[torch.randperm(len(places), device=self.device)[:n_revealed]]] = False
        return Row(x0, ~prompt_mask, masked, stage)

    def batch(self) -> Batch:
        """What the next step trains on."""
        x0 = torch.stack([row.x0 for row in self.rows])
        masked = torch.stack([row.masked for row in self.rows])
        weight = torch.stack([row.masked / row.masked.sum() / len(self.rows) for row in self.rows])
        return x0.masked_fill(masked, self.mask_id), x0, weight

    def advance(self, confidence: Tensor) -> None:
        """Reveal by confidence (float32 [B, L]); fresh sequences for what has finished."""
        for i, row in enumerate(self.rows):
            target = self._draw_target(row.stage + 1, int(row.maskable.sum()))
            if advance_row(row, confidence[i], target, self.n_stages, self.collapse_threshold):
                self.rows[i] = self._enter(0)


class DenseUniform:
    """The baseline, row by row."""

    def __init__(self, stream: SequenceStream, n_rows: int, mask_id: int, device: torch.device) -> None:
        self.stream, self.n_rows, self.mask_id, self.device = stream, n_rows, mask_id, device

    def batch(self) -> Batch:
        """What the next step trains on."""
        x0, prompt_mask = self.stream.draw(self.n_rows)
        xt, weight = x0.clone(), torch.zeros(x0.shape)
        for row in range(self.n_rows):
            places = (~prompt_mask[row]).nonzero().squeeze(1)
            n_masked = int(torch.randint(1, len(places) + 1, ()))
            masked = places[torch.randperm(len(places))[:n_masked]]
            xt[row, masked] = self.mask_id
            weight[row, masked] = 1 / (n_masked * self.n_rows)
        return xt.to(self.device), x0.to(self.device), weight.to(self.device)

    def advance(self, confidence: Tensor) -> None:
        """Each step draws its own rows."""


class DenseAutoregressive:
    """Each token from those before it, to the first EOS."""

    def __init__(self, stream: SequenceStream, n_rows: int, device: torch.device) -> None:
        self.stream, self.n_rows, self.device = stream, n_rows, device

    def batch(self) -> Batch:
        """What the next step trains on."""
        x0, prompt_mask = self.stream.draw(self.n_rows)
        target = ~prompt_mask
        target[:, 0] = False
        eos_id = self.stream.data.eos_id
        for row in range(self.n_rows if eos_id is not None else 0):
            ends = ((x0[row] == eos_id) & target[row]).nonzero()
            if len(ends):
                target[row, int(ends[0]) + 1 :] = False
        weight = (target / target.sum()).to(self.device)
        x0 = x0.to(self.device)
        return x0, x0, weight

    def advance(self, confidence: Tensor) -> None:
        """Nothing is learnt from confidences."""


DenseObjective = DensePool | DenseUniform | DenseAutoregressive


def check_has_plain_form(config: Config) -> None:
    """Raise ValueError for objectives that are not written plainly here."""
    settings = config.objective
    if isinstance(settings, BlockSettings):
        raise ValueError(f"objective {settings.name!r} has no plain form: see `python -m bench block`")
    if isinstance(settings, ProgressiveSettings) and settings.uniform_fraction:
        raise ValueError(f"objective.uniform_fraction {settings.uniform_fraction} has no plain form: set it to 0")
    if isinstance(settings, ProgressiveSettings) and settings.pool_batches > 1:
        raise ValueError(f"objective.pool_batches {settings.pool_batches} has no plain form: set it to 1")


def build_dense_objective(config: Config, stream: SequenceStream, device: torch.device) -> DenseObjective:
    """The plain form of the objective that the settings name."""
    settings, n_rows = config.objective, config.training.batch_size
    if isinstance(settings, ProgressiveSettings):
        return DensePool(stream, n_rows, settings, config.mask_id, device)
    if isinstance(settings, AutoregressiveSettings):
        return DenseAutoregressive(stream, n_rows, device)
    return DenseUniform(stream, n_rows, config.mask_id, device)


class DenseTrainer:
    """Eager training steps of a model."""

    def __init__(self, model: Transformer, config: Config, dtype: torch.dtype | None, device: torch.device) -> None:
        training = config.training
        self.model, self.training, self.dtype, self.device = model, training, dtype, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), training.learning_rate, training.adam_betas, weight_decay=training.weight_decay
        )
        self.average = [p.detach().clone() for p in model.parameters()] if training.ema_decay else None
        self.n_averaged = 0
        self.loss = math.nan

    def step(self, objective: DenseObjective) -> None:
        """One update."""
        confidences, loss = [], 0.0
        for xt, x0, weight in self._parts(objective.batch()):
            with autocast(self.device, self.dtype):
                logits = aligned_logits(self.model, xt)
            part, confidence = score(logits, x0, weight)
            part.backward()
            loss += part.item()
            confidences.append(confidence)
            del logits, part  # so that the next part finds the memory
        self.loss = loss
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average()
        objective.advance(torch.cat(confidences))

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None and self.training.ema_decay is not None:
            decay = ema_decay(self.training.ema_decay, self.n_averaged) if self.n_averaged else 0.0
            for average, parameter in zip(self.average, self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
            self.n_averaged += 1

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        n_rows = self.training.micro_batch_size or len(batch[0])
        yield from zip(*(tensor.split(n_rows) for tensor in batch), strict=True)


@torch.no_grad()
def sample(model: Transformer, xt: Tensor, mask_id: int, tokens_per_step: int) -> Tensor:
    """Fill in each row on its own (int64 [B, L]), the most probable positions first."""
    rows = []
    for row in xt.clone():
        while bool((row == mask_id).any()):
            logits = aligned_logits(model, row[None])[0].float()  # [L, V]
            logits[:, mask_id] = -math.inf
            best = logits.softmax(dim=-1).max(dim=-1)
            masked = row == mask_id
            confidence = best.values.masked_fill(~masked, -math.inf)
            chosen = most_confident(confidence, min(tokens_per_step, int(masked.sum())))
            row[chosen] = best.indices[chosen]
        rows.append(row)
    return torch.stack(rows)
