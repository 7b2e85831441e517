"""How probable models find held-out sequences: a bound for masked diffusion models, the value for autoregressive ones.

    python -m eval.likelihood runs/puma runs/uniform --rows 500 --draws 16

A masked diffusion model (absorbing state) that fills n_maskable positions in uniformly random order, one at a time, has

    -log p(x0) <= sum over n = 1..n_maskable of the mean over random sets of n masked positions
                  of the mean of -log p(x0_i | rest) over these positions,

with equality if the order of filling does not matter to it. The sum is estimated by drawing n: all numbers equally
often, by systematic draws (a random start, then equal steps), twice independently, from which the error due to the
masks is known. With blocks the same holds within each block, given the clean tokens before it, and the bounds of blocks
add up (the chain rule); with blocks of one token, and for an autoregressive model, the value is exact.

The masks depend on the number of the row, the draw and the block size alone: models on the same data get the same
masks, and differences between them are known better than each bound.

A masked diffusion model predicts the padding after the first EOS too, so its bound includes the padding. It is also a
bound for the answer alone, which is at least as probable as the answer with its padding. An autoregressive value ends
with the EOS.

Shapes: B rows, L positions, S positions of a block (L without blocks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.commands import CommandParser, whole_number
from base.files import check_out, write_text
from baselines import next_token_targets, up_to_first_eos
from config import Config
from data.dataset import DataSet, SequenceData
from data.text import decode_completions
from eval.accuracy import NORMAL_95, rank_batches
from model.hub import LoadedModel, load_model
from model.token_predictions import hash_uniform, mix_keys
from model.transformer import Transformer
from progressive_block import BlockLayout, block_layout
from runtime.config_file import split_overrides
from runtime.distributed import (
    World,
    autocast,
    autocast_dtype,
    ends_once,
    main_bar,
    main_first,
    on_main,
    start_world,
    sum_over_ranks,
)
from runtime.markdown import markdown_table
from samplers.step import no_op
from unmasking import reveal_top

SEED = 20_260_211  # of the masks: the same in all runs
REPLICATES = 2  # independent halves of the draws of a row, whose difference gives the error due to the masks


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of rows, or an upper bound of it, in nats; a token is one up to and including the EOS."""

    exact: bool  # False: an upper bound
    per_row: np.ndarray  # float64 [n], nats of all maskable positions of a row
    padding: np.ndarray  # float64 [n], the part of `per_row` for padding after the first EOS; 0 if autoregressive
    n_tokens: np.ndarray  # int64 [n], without padding
    mask_variance: float  # of the sum of `per_row`, due to the draws of masks; 0 if exact

    @property
    def nats_per_token(self) -> float:
        """Nats of all maskable positions, padding included, per token without padding.

        Also a bound for the answer alone, which is at least as probable as the answer with its padding.
        """
        return float(self.per_row.sum() / self.n_tokens.sum())

    @property
    def padding_per_token(self) -> float:
        """The part of `nats_per_token` for padding."""
        return float(self.padding.sum() / self.n_tokens.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of `nats_per_token`, as an estimate for the distribution of the rows; nan for a single row.

        Includes the error due to the masks.
        """
        return ratio_error(self.per_row, self.n_tokens)

    @property
    def mask_error(self) -> float:
        """Standard error of `nats_per_token` due to the masks alone; 0 if exact."""
        return math.sqrt(self.mask_variance) / float(self.n_tokens.sum())


def finite_or_none(number: float) -> float | None:
    """A number for a JSON file, which has neither nan nor inf: a single row has no error."""
    return number if math.isfinite(number) else None


def ratio_error(nats: np.ndarray, n_tokens: np.ndarray) -> float:
    """Standard error of sum(nats) / sum(n_tokens) over independent rows, both [n]; nan for a single row."""
    n = len(nats)
    if n < 2:
        return math.nan
    rest = nats - nats.sum() / n_tokens.sum() * n_tokens
    return math.sqrt(float((rest**2).sum()) / (n - 1) / n) / float(n_tokens.mean())


@torch.no_grad()
def likelihood(
    model: Transformer,
    config: Config,
    data: SequenceData,
    world: World,
    *,
    n_rows: int,
    n_draws: int,
    before_pass: Callable[[], None] = no_op,
    bar: tqdm | None = None,
) -> Likelihood:
    """Likelihood of the first `n_rows` rows (all, if there are fewer); in eval mode, under the caller's autocast.

    Every rank calls this with its part of the work, and gets the full result. No generator is used.

    Args:
        n_draws: masks per row, an even number; not used where the value is exact.
        before_pass: called before each batch; an exception that it raises ends the measurement.
    """
    n_rows, device = min(n_rows, len(data)), world.device
    layout = block_layout(config.objective, data.length)
    exact = config.causal or layout.size == 1
    n_passes = 1 if exact else n_draws // REPLICATES  # that count for a replicate
    per_row, padding = np.zeros((2, REPLICATES, n_rows))
    n_tokens = np.zeros(n_rows, dtype=np.int64)
    for part in rank_batches(n_rows, world, config.validation.batch_size):
        x0, prompt_mask = (torch.from_numpy(each) for each in data.rows(part))
        maskable = ~prompt_mask  # [B, L]
        answer = up_to_first_eos(x0, maskable, data.eos_id)  # [B, L]
        n_tokens[part] = answer.sum(1).numpy()
        draws: Iterable[tuple[int | slice, Tensor, Tensor]]  # the replicates that a pass counts for, masks, weights
        if config.causal:
            target = next_token_targets(x0, maskable, data.eos_id)
            draws = [(slice(None), torch.zeros_like(maskable), target.float())]
        elif exact:  # all draws are this one; what follows the answer does not bear on it
            draws = [(slice(None), maskable, answer.float())]
        else:
            draws = likelihood_masks(maskable, layout, torch.from_numpy(part), n_draws)
        for replicate, masked, weight in draws:
            before_pass()
            xt = x0.masked_fill(masked, data.mask_id)
            for each in layout.microbatches(xt.to(device), x0.to(device), weight.to(device), len(part)):
                nats = (each.weight * model(each.xt, each.x0, each.weight).nll).double().cpu() / n_passes
                per_row[replicate, part[each.rows]] += nats.sum(1).numpy()
                after = ~answer[each.rows, : nats.shape[1]]
                padding[replicate, part[each.rows]] += (nats * after).sum(1).numpy()
        if bar is not None:
            bar.update(len(part) * world.n_ranks)
    # Every row belongs to one rank, so the sum over ranks is the whole.
    sums = torch.from_numpy(np.concatenate([per_row, padding, n_tokens[None]])).to(device)  # float64 [5, n]
    parts = sum_over_ranks(sums).cpu().numpy()
    per_row, padding, n_tokens = parts[:REPLICATES], parts[REPLICATES:-1], parts[-1].astype(np.int64)
    # The variance of a mean of two is a quarter of their squared difference.
    mask_variance = 0.0 if exact else float(((per_row[0] - per_row[1]) ** 2).sum() / 4)
    return Likelihood(exact, per_row.mean(0), padding.mean(0), n_tokens, mask_variance)


def likelihood_masks(
    maskable: Tensor, layout: BlockLayout, row_ids: Tensor, n_draws: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Masks of rows, with weights such that the weighted sum of NLLs has the bound of the row as its expectation.

    Args:
        maskable: bool [B, L].
        row_ids: int64 [B], which with the draw alone decide the masks.
        n_draws: even.

    Yields:
        The replicate (0 or 1), masks bool [B, L], and weights float32 [B, L]: n_maskable / n_masked of the block.
    """
    segments = layout.segments(maskable)  # [N, S]
    n_maskable = segments.sum(1)  # [N]
    blocks = torch.arange(layout.n_blocks).repeat(len(maskable))  # [N]
    keys = mix_keys(mix_keys(row_ids.repeat_interleave(layout.n_blocks), SEED), blocks)
    n_steps = n_draws // REPLICATES
    for replicate in range(REPLICATES):
        start = hash_uniform(mix_keys(keys, -1 - replicate))  # [N]
        for step in range(n_steps):
            n_masked = 1 + ((step + start) / n_steps * n_maskable).floor().long()
            own = mix_keys(keys, replicate * n_steps + step)
            order = hash_uniform(mix_keys(own[:, None], torch.arange(layout.size)))  # [N, S]
            masked = reveal_top(order, segments, torch.minimum(n_masked, n_maskable))
            weight = masked * (n_maskable / n_masked)[:, None].float()
            yield replicate, masked.view_as(maskable), weight.view_as(maskable)


def count_answer_bytes(data: DataSet, n_rows: int) -> int | None:
    """Bytes of the answers of the first rows as UTF-8; None if tokens are not text."""
    if data.tokenizer is None:
        return None
    tokens, prompt_mask = data.validation.rows(np.arange(min(n_rows, len(data.validation))))
    return sum(len(text.encode()) for text in decode_completions(data.tokenizer, tokens, prompt_mask))


@dataclass(frozen=True)
class CheckpointResult:
    """The likelihood of one checkpoint, as it is printed and written."""

    checkpoint: str
    exact: bool
    n_rows: int
    n_tokens: int
    n_draws: int  # masks per row; 0 if exact
    nats_per_token: float
    padding_per_token: float  # the part of that for padding
    standard_error: float | None  # None: a single row has none
    mask_error: float
    bits_per_byte: float | None
    # Nats per token less those of the first checkpoint, on the same rows and masks; None if rows or prompts differ.
    difference: float | None
    difference_error: float | None


def compare(checkpoints: list[str], overrides: list[str], n_rows: int, n_draws: int) -> list[CheckpointResult]:
    """Measure checkpoints one after the other; every rank calls this and gets all results.

    Raises:
        ValueError: as `load_model` and the data sets.
    """
    loaded = [load_model(name, overrides) for name in checkpoints]
    world = start_world(loaded[0].config.training.device)
    results: list[CheckpointResult] = []
    first: tuple[Likelihood, tuple[np.ndarray, np.ndarray]] | None = None
    with main_bar(world, total=n_rows * len(loaded), desc="likelihood", unit="row") as bar:
        for name, each in zip(checkpoints, loaded, strict=True):
            data = main_first(world, partial(_open_held_out, each.config))
            found = _measure(each, data, world, n_rows=n_rows, n_draws=n_draws, bar=bar)
            own = data.validation.rows(np.arange(len(found.per_row)))
            first = first or (found, own)
            same = all(map(np.array_equal, first[1], own))
            gap = found.per_row - first[0].per_row if same else None
            n_bytes = count_answer_bytes(data, n_rows)
            results.append(
                CheckpointResult(
                    checkpoint=name,
                    exact=found.exact,
                    n_rows=len(found.per_row),
                    n_tokens=int(found.n_tokens.sum()),
                    n_draws=0 if found.exact else n_draws,
                    nats_per_token=found.nats_per_token,
                    padding_per_token=found.padding_per_token,
                    standard_error=finite_or_none(found.standard_error),
                    mask_error=found.mask_error,
                    bits_per_byte=float(found.per_row.sum()) / math.log(2) / n_bytes if n_bytes else None,
                    difference=None if gap is None else float(gap.sum() / found.n_tokens.sum()),
                    difference_error=None if gap is None else finite_or_none(ratio_error(gap, found.n_tokens)),
                )
            )
    return results


def _open_held_out(config: Config) -> DataSet:
    """The data set, with the held-out rows, which may be written on first use."""
    data = config.open_data()
    _ = data.validation
    return data


def _measure(loaded: LoadedModel, data: DataSet, world: World, *, n_rows: int, n_draws: int, bar: tqdm) -> Likelihood:
    model, config = loaded.model.to(world.device).eval(), loaded.config
    with autocast(world.device, autocast_dtype(config.training.precision, world.device)):
        return likelihood(model, config, data.validation, world, n_rows=n_rows, n_draws=n_draws, bar=bar)


def table(results: list[CheckpointResult]) -> list[str]:
    """Lines of a Markdown table, with 95% intervals."""
    titles = ["checkpoint", "tokens", "nats per token", "for padding", "masks alone", "less the first"]
    titles += ["bits per byte", "masks"]
    rows = []
    for result in results:
        sign = "" if result.exact else "<= "
        nats = f"{sign}{result.nats_per_token:.4g} ({_half(result.standard_error)})"
        gap = "-"
        if result.difference is not None and result is not results[0]:
            gap = f"{result.difference:+.3g} ({_half(result.difference_error)})"
        bits = "-" if result.bits_per_byte is None else f"{sign}{result.bits_per_byte:.4g}"
        n_draws = "exact" if result.exact else str(result.n_draws)
        padding, masks = f"{result.padding_per_token:.2g}", _half(result.mask_error)
        rows.append([result.checkpoint, f"{result.n_tokens:,}", nats, padding, masks, gap, bits, n_draws])
    n_rows = " and ".join(dict.fromkeys(str(result.n_rows) for result in results))
    what = f"The first {n_rows} held-out rows. In brackets half of the 95% interval."
    return [what, "", *markdown_table(titles, rows)]


def _half(error: float | None) -> str:
    return "-" if error is None else f"{NORMAL_95 * error:.2g}"


def _report(results: list[CheckpointResult], path: Path | None) -> None:
    """Write and print the results."""
    try:
        if path is not None:
            write_text(path, json.dumps([vars(result) for result in results], indent=1) + "\n")
    finally:  # also where the disk is full; after the file, since standard output may be closed
        print("\n".join(table(results)))


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Likelihood of held-out rows, or a bound of it, in nats per token.")
    parser.add_argument(
        "checkpoints", nargs="+", metavar="RUN", help="run directories, RUN@best, RUN@STEP, checkpoints, and key=value"
    )
    parser.add_argument("--rows", type=whole_number(2, 1 << 24), default=500, help="held-out rows")
    parser.add_argument("--draws", type=whole_number(2, 1 << 16), default=16, help="masks per row, an even number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_intermixed_args(arguments)
    with ends_once():
        if options.draws % REPLICATES:
            raise ValueError(f"--draws {options.draws}: give an even number, since the error comes from two halves")
        names, overrides = split_overrides(options.checkpoints)
        if not names:
            raise ValueError("name a run directory or a checkpoint folder")
        if options.json:
            check_out(options.json, "--json")
        results = compare(names, overrides, options.rows, options.draws)
        on_main(partial(_report, results, options.json))


if __name__ == "__main__":
    main()
