"""Measure a model on the test split: validation loss, and accuracy for each confidence rule and tokens per step.

Works on a live model during training and on a checkpoint from the command line, on one process or sharded over many:

    python -m eval.evaluate runs/sudoku_puma --json results.json validation.n_examples=5000

Shapes: B rows, L positions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from autoregressive import next_token_targets, target_weights
from config import Confidence, Config
from data.load import load_split
from data.sudoku import SudokuData
from eval.sudoku_eval import judge_boards
from model.transformer import Transformer
from progressive_block import build_blocks
from runtime.checkpoint import write_text
from runtime.distributed import World, autocast, autocast_dtype, main_first, start_world, stop_world, sum_over_ranks
from sampling import load_model, sampler_of

# Masks of the validation loss: the same in every evaluation of every run, so that losses can be compared.
MASK_SEED = 20_260_210
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class SamplerResult:
    """What one way of sampling reached."""

    confidence: Confidence
    tokens_per_step: int
    n: int  # sequences sampled
    accuracy: float
    accuracy_low: float  # 95% interval
    accuracy_high: float
    nfe: float  # network forward evaluations per sequence, mean
    details: dict[str, float]  # means of what else the data set's judge reports

    @property
    def label(self) -> str:
        """Short name, as in the records: rule and tokens per step."""
        return f"{self.confidence}_{self.tokens_per_step}"


@dataclass(frozen=True)
class Evaluation:
    """Everything measured at once; `samplers` in the order of the settings, its first entry is the headline."""

    loss: float
    samplers: list[SamplerResult]

    @property
    def accuracy(self) -> float:
        """The headline figure, by which the best checkpoint is chosen."""
        return self.samplers[0].accuracy

    def metrics(self) -> dict[str, float]:
        """Flat, for the records."""
        values = {"validation/loss": self.loss}
        for result in self.samplers:
            for name in ("accuracy", "accuracy_low", "accuracy_high", "nfe"):
                values[f"validation/{name}/{result.label}"] = getattr(result, name)
            values |= {f"validation/{name}/{result.label}": value for name, value in result.details.items()}
        return values

    def table(self) -> str:
        """Readable lines."""
        lines = [f"validation loss {self.loss:.4f}"]
        for result in self.samplers:
            details = "".join(
                f", {name.replace('_', ' ')} {100 * value:.2f}%" for name, value in result.details.items()
            )
            lines.append(
                f"{result.confidence}, {result.tokens_per_step} per step: accuracy {100 * result.accuracy:.1f}% "
                f"({100 * result.accuracy_low:.1f} to {100 * result.accuracy_high:.1f}) of {result.n}{details}, "
                f"{result.nfe:.1f} forward evaluations"
            )
        return "\n".join(lines)


def evaluate(model: Transformer, config: Config, data: SudokuData, world: World, n_examples: int) -> Evaluation:
    """Measure `model` on the first rows of `data`; every rank calls this and gets the whole result.

    Args:
        n_examples: sequences to sample (as many as there are, if fewer).
    """
    settings, device = config.validation, world.device
    dtype = autocast_dtype(config.training.precision, device)
    n_examples = min(n_examples, len(data))
    grid = list(product(settings.confidence, settings.tokens_per_step))
    was_training = model.training
    model.eval()
    with autocast(device, dtype), _bar(world, len(grid) * n_examples) as bar:
        loss = validation_loss(model, config, data, world)
        samplers = [_run_sampler(model, config, data, world, n_examples, *cell, bar) for cell in grid]
    model.train(was_training)
    return Evaluation(loss, samplers)


@torch.no_grad()
def validation_loss(model: Transformer, config: Config, data: SudokuData, world: World) -> float:
    """Loss of the uniform, block-uniform or autoregressive objective over the first rows.

    The masks never change whatever the number of ranks; models of the same block size are measured on the same ones.
    """
    n_rows = min(config.validation.n_loss_rows, len(data))
    blocks = build_blocks(config.objective, data.length)
    x0, prompt_mask = (torch.from_numpy(part) for part in data.rows(np.arange(n_rows)))
    if config.causal:
        target = next_token_targets(x0, ~prompt_mask, data.eos_id)  # [B, L]
        xt, weight = x0, target_weights(target, target.sum())
    else:
        masked = blocks.mask_uniformly(~prompt_mask, torch.Generator().manual_seed(MASK_SEED))  # [B, L]
        xt, weight = x0.masked_fill(masked, data.mask_id), blocks.weights(masked)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for rows in _own_batches(n_rows, world, config.validation.batch_size):
        own_xt, own_x0, own_weight = (part[rows].to(world.device) for part in (xt, x0, weight))
        for microbatch in blocks.microbatches(own_xt, own_x0, own_weight, len(rows)):
            total += model(microbatch.xt, microbatch.x0, microbatch.weight).loss
    return float(sum_over_ranks(total))


def wilson_interval(n_right: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n trials by Wilson's score, which stays sensible at 0 and 1."""
    share, z2 = n_right / n, NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def _run_sampler(
    model: Transformer,
    config: Config,
    data: SudokuData,
    world: World,
    n_examples: int,
    confidence: Confidence,
    tokens_per_step: int,
    bar: tqdm,
) -> SamplerResult:
    settings, sampler = config.validation, sampler_of(config, data.eos_id)
    sums: dict[str, torch.Tensor] = {}
    for rows in _own_batches(n_examples, world, settings.batch_size):
        tokens, prompt_mask = (torch.from_numpy(part).to(world.device) for part in data.rows(rows))
        result = sampler(
            model,
            tokens.masked_fill(~prompt_mask, data.mask_id),
            data.mask_id,
            confidence=confidence,
            tokens_per_step=tokens_per_step,
            threshold=settings.threshold,
            temperature=settings.temperature,
            seed=config.training.seed,
            row_ids=torch.from_numpy(rows),
        )
        figures = judge_boards(result.tokens, tokens, data.size) | {"nfe": result.nfe.float()}
        for name, values in figures.items():
            sums[name] = sums.get(name, 0) + values.sum(dtype=torch.float64)
        bar.update(len(rows) * world.n_ranks)
    names = ("accuracy", "cell_accuracy", "nfe")
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    n_right, n_cells_right, nfe = sum_over_ranks(torch.stack([sums.get(name, zero) for name in names])).tolist()
    low, high = wilson_interval(n_right, n_examples)
    return SamplerResult(
        confidence,
        tokens_per_step,
        n_examples,
        n_right / n_examples,
        low,
        high,
        nfe / n_examples,
        {"cell_accuracy": n_cells_right / n_examples},
    )


def _own_batches(n_rows: int, world: World, batch_size: int) -> list[np.ndarray]:
    """This rank's share of rows 0..n_rows-1 in batches; every row belongs to one rank."""
    own = np.arange(world.rank, n_rows, world.n_ranks)
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _bar(world: World, total: int) -> tqdm:
    return tqdm(total=total, desc="evaluating", unit="seq", disable=not world.is_main, leave=False)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The result for a JSON file."""
    return {"loss": evaluation.loss, "samplers": [asdict(result) for result in evaluation.samplers]}


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on its test split.")
    parser.add_argument("checkpoint", help="run directory (its newest checkpoint) or checkpoint folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to use instead of the run's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    try:
        model, config = load_model(options.checkpoint, overrides=options.overrides)
        world = start_world(config.training.device)
        data = main_first(world, lambda: load_split(config.data, "test"))
        n_examples = config.validation.n_final_examples or config.validation.n_examples
        evaluation = evaluate(model.to(world.device), config, data, world, n_examples)
        if world.is_main:
            print(evaluation.table())
            if options.json:
                write_text(options.json, json.dumps(as_json(evaluation), indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        stop_world()


if __name__ == "__main__":
    main()
