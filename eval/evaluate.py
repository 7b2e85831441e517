"""Evaluate a model on the test split: validation loss, and accuracy for each confidence rule and tokens per step.

Used during training, and from the command line for a checkpoint, on one process or with the test split over many:

    python -m eval.evaluate runs/sudoku_puma --json results.json validation.n_final_examples=1000

`--sweep` measures all sampling rules of one or more checkpoints instead, see `eval/sweep.py`.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.commands import CommandParser, say, whole_number
from base.files import check_out, write_text
from base.text import escape
from baselines import next_token_targets, target_weights
from config import Config
from data.dataset import DataSet, SequenceData
from eval.accuracy import (
    NORMAL_95,
    TestQuestions,
    count_examples,
    difficulty_of,
    interruptible,
    measure_rule,
    rank_batches,
)
from eval.likelihood import Likelihood, finite_or_none, likelihood
from model.hub import load_model
from model.transformer import Transformer
from progressive_block import block_layout
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
from runtime.final import ReferenceResult, SamplerResult
from runtime.signals import StopVote

# Seed of the masks of the validation loss: the same in all runs, so that their losses can be compared.
MASK_SEED = 20_260_210
# Settings of `validation` that a sweep reads.
SWEEP_READS = ("n_examples", "n_final_examples", "batch_size", "temperature")


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation."""

    loss: float
    samplers: list[SamplerResult]  # in the order of the settings, the headline first; none if no question was asked
    reference: ReferenceResult | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)  # some of the sampled answers, judged
    likelihood: Likelihood | None = None  # of the rows of the validation loss

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the headline sampler; None if no question was asked."""
        return self.samplers[0].accuracy if self.samplers else None

    @property
    def headline(self) -> str:
        """The main result as a line."""
        return _rule_line(self.samplers[0]) if self.samplers else f"validation loss {self.loss:.4f}"

    def metrics(self) -> dict[str, float | None]:
        """Flat dictionary for the records; None: a group of questions without a reference."""
        values: dict[str, float | None] = {"validation/loss": self.loss}
        if self.likelihood is not None:
            values["validation/nats_per_token"] = self.likelihood.nats_per_token
            values["validation/nats_per_token_error"] = self.likelihood.standard_error
        for result in self.samplers:
            for name in ("accuracy", "accuracy_low", "accuracy_high", "nfe"):
                values[f"validation/{name}/{result.label}"] = getattr(result, name)
            values |= {
                f"validation/{name}/{result.label}": value for name, value in (result.details | result.numbers).items()
            }
        if self.reference is not None:
            values["validation/reference"] = self.reference.accuracy
        for group in self.samplers[0].groups if self.samplers else ():
            facts = {key: value for key, value in asdict(group).items() if key not in ("by", "value")}
            values |= {f"validation/by_{group.by}/{group.value:g}/{key}": value for key, value in facts.items()}
        return values

    def table(self) -> str:
        """Formatted for a terminal."""
        lines = [f"validation loss {self.loss:.4f}"]
        if self.likelihood is not None:
            bound = "" if self.likelihood.exact else "at most "
            error = NORMAL_95 * self.likelihood.standard_error
            interval = f" (+- {error:.2g})" if math.isfinite(error) else ""  # a single row has none
            lines.append(f"{bound}{self.likelihood.nats_per_token:.4g} nats per token{interval}")
        lines += map(_rule_line, self.samplers)
        if self.reference is not None:
            lines.append(f"{self.reference.name} alone: accuracy {100 * self.reference.accuracy:.1f}%")
        if self.samplers and self.samplers[0].groups:
            lines += [
                "",
                f"by difficulty ({self.samplers[0].label}), each group from its lowest value:",
                *_group_lines(self),
            ]
        return "\n".join(lines)


def _rule_line(result: SamplerResult) -> str:
    """The result of a sampling rule as a line."""
    shown = {name: f"{100 * value:.2f}%" for name, value in result.details.items()}
    shown |= {name: f"{value:.4g}" for name, value in result.numbers.items()}
    details = "".join(f", {name.replace('_', ' ')} {value}" for name, value in shown.items())
    return (
        f"{result.rule}: "
        f"accuracy {100 * result.accuracy:.1f}% "
        f"({100 * result.accuracy_low:.1f} to {100 * result.accuracy_high:.1f}) of {result.n}{details}, "
        f"{result.nfe:.1f} forward evaluations"
    )


def _group_lines(evaluation: Evaluation) -> list[str]:
    """Table of fixed width: accuracy of the headline sampler by difficulty."""
    reference = evaluation.reference.name if evaluation.reference else None
    lines = [f"{'':>12}{'n':>7}{'solved':>10}   95% interval{f'   {reference}' if reference else ''}"]
    for group in evaluation.samplers[0].groups:
        interval = f"{100 * group.accuracy_low:5.1f} to {100 * group.accuracy_high:5.1f}"
        other = "" if group.reference is None else f"   {100 * group.reference:.1f}%"
        name = f"{group.by} {group.value:g}"
        lines.append(f"{name:>12}{group.n:>7}{100 * group.accuracy:>9.1f}%   {interval}{other}")
    return lines


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The results as content of a JSON file."""
    samplers = [asdict(each) for each in evaluation.samplers]
    values: dict[str, Any] = {"loss": finite_or_none(evaluation.loss), "samplers": samplers}
    if evaluation.likelihood is not None:
        measured = evaluation.likelihood
        values["likelihood"] = {
            "exact": measured.exact,
            "nats_per_token": finite_or_none(measured.nats_per_token),
            "padding_per_token": finite_or_none(measured.padding_per_token),
            "standard_error": finite_or_none(measured.standard_error),
            "mask_error": finite_or_none(measured.mask_error),
        }
    if evaluation.reference is not None:
        values["reference"] = asdict(evaluation.reference)
    return values


def evaluate(
    model: Transformer,
    config: Config,
    data: DataSet,
    world: World,
    n_examples: int,
    vote: StopVote | None = None,
) -> Evaluation:
    """Evaluate `model` on the first questions of the test; every rank calls this and gets the full result.

    Args:
        n_examples: number of questions to answer (all, if there are fewer); 0: only the loss, no question.
        vote: asked before every forward pass.

    Raises:
        StopRequested: `vote` has a signal to stop for; all ranks raise.
    """
    device = world.device
    n_examples = min(n_examples, data.n_questions)
    rules = config.validation.rules()
    was_training = model.training
    model.eval()
    try:
        with (
            autocast(device, autocast_dtype(config.training.precision, device)),
            main_bar(world, total=len(rules) * n_examples, desc="evaluating", unit="seq", leave=False) as bar,
        ):
            loss = validation_loss(model, config, data.validation, world, vote)
            measured = _likelihood(model, config, data.validation, world, vote)
            results, reference = [], None
            if n_examples:
                questions = np.arange(n_examples)
                reference = data.reference(questions)
                test = TestQuestions(data, reference, difficulty_of(data, questions, config.data.dataset), n_examples)
                results = [measure_rule(model, config, test, world, rule=rule, bar=bar, vote=vote) for rule in rules]
    finally:
        model.train(was_training)
    return Evaluation(
        loss,
        [each.result for each in results],
        None if reference is None else ReferenceResult(reference.name, float(reference.solved.mean())),
        [sample for each in results for sample in each.samples],
        measured,
    )


def _likelihood(
    model: Transformer, config: Config, data: SequenceData, world: World, vote: StopVote | None
) -> Likelihood | None:
    """Likelihood of the rows of the validation loss; None if the settings do not ask for it."""
    n_draws = config.validation.n_likelihood_draws
    if not n_draws:
        return None
    with interruptible(vote) as check:
        n_rows = config.validation.n_loss_rows
        return likelihood(model, config, data, world, n_rows=n_rows, n_draws=n_draws, before_pass=check)


@torch.no_grad()
def validation_loss(
    model: Transformer, config: Config, data: SequenceData, world: World, vote: StopVote | None = None
) -> float:
    """Loss of the uniform, block-uniform or autoregressive objective on the first rows; `vote` as in `evaluate`.

    The masks do not depend on the number of ranks, and are the same for all models with the same block size.
    """
    n_rows = min(config.validation.n_loss_rows, len(data))
    layout = block_layout(config.objective, data.length)
    x0, prompt_mask = (torch.from_numpy(part) for part in data.rows(np.arange(n_rows)))
    if config.causal:
        target = next_token_targets(x0, ~prompt_mask, data.eos_id)  # [B, L]
        xt, weight = x0, target_weights(target, target.sum())
    else:
        masked = layout.mask_uniformly(~prompt_mask, torch.Generator().manual_seed(MASK_SEED))  # [B, L]
        xt, weight = x0.masked_fill(masked, data.mask_id), layout.weights(masked)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    with interruptible(vote) as check:
        for rows in rank_batches(n_rows, world, config.validation.batch_size):
            check()
            batch_xt, batch_x0, batch_weight = (part[rows].to(world.device) for part in (xt, x0, weight))
            for microbatch in layout.microbatches(batch_xt, batch_x0, batch_weight, len(rows)):
                total += model(microbatch.xt, microbatch.x0, microbatch.weight).loss
    return float(sum_over_ranks(total))


def _check_options(parser: ArgumentParser, options: Namespace) -> None:
    """End the command with a message if options have no effect with, or without, --sweep."""
    without = {"--json": options.json, "--samples": options.samples}
    only_with = {"--rules": options.rules, "--max-passes": options.max_passes, "--out": options.out}
    unused = [name for name, value in (without if options.sweep else only_with).items() if value is not None]
    if unused:
        remedy = "not with --sweep, whose files --out names" if options.sweep else "only with --sweep"
        parser.error(f"{', '.join(unused)}: {remedy}")
    runs = [each for each in options.overrides if os.path.exists(each) or os.path.exists(each.rpartition("@")[0])]
    if runs and not options.sweep:
        parser.error(f"{', '.join(runs)}: several runs only with --sweep; evaluate one after the other")
    sections = [each.partition("=")[0].split(".") for each in options.overrides if "=" in each]
    without_effect = [".".join(key) for key in sections if key[0] == "validation" and key[-1] not in SWEEP_READS]
    if options.sweep and without_effect:
        parser.error(
            f"{', '.join(without_effect)}: no effect with --sweep, which sets the rules itself (choose with --rules); "
            f"of validation it reads only {', '.join(SWEEP_READS)}"
        )


def _check_files(options: Namespace) -> None:
    """Raise ValueError if a file cannot be written."""
    if options.json and options.samples and options.json.resolve() == options.samples.resolve():
        raise ValueError(f"--json and --samples: both name {options.json}; give two files")
    for path, option in ((options.json, "--json"), (options.samples, "--samples")):
        if path is not None:
            check_out(path, option)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(description="Evaluate a checkpoint on its test split.")
    parser.add_argument("checkpoint", help="run directory (its newest checkpoint), RUN@best, RUN@STEP or checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the run's; with --sweep also more runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="write validation.n_table_rows answers of each rule to FILE (JSONL)",
    )
    parser.add_argument("--sweep", action="store_true", help="measure all sampling rules, each over its dial")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="with --sweep: only these rules")
    parser.add_argument(
        "--max-passes",
        type=whole_number(1),
        metavar="N",
        help="with --sweep: leave out rules with more passes by design",
    )
    parser.add_argument(
        "--out", type=Path, metavar="NAME", help="with --sweep: write NAME.json, .csv, .md, .png; by default sweep"
    )
    options = parser.parse_intermixed_args(arguments)
    _check_options(parser, options)
    if options.sweep:
        _sweep(options)
        return
    with ends_once():
        loaded = load_model(options.checkpoint, options.overrides)
        config = loaded.config
        world = start_world(config.training.device)
        on_main(partial(_check_files, options))
        data = main_first(world, lambda: config.open_data().load(train=False))
        n_examples = count_examples(config, options.overrides, data)
        described = config.data.describe()
        if world.is_main:
            say(f"data: {escape(described)}")
        evaluation = evaluate(loaded.model.to(world.device), config, data, world, n_examples)
        if world.is_main:
            source = {
                "checkpoint": options.checkpoint,
                "step": loaded.step,
                "overrides": options.overrides,
                "data": described,
            }
            try:
                if options.json:
                    write_text(options.json, json.dumps(source | as_json(evaluation), indent=1) + "\n")
                if options.samples:
                    write_text(options.samples, "".join(json.dumps(row) + "\n" for row in evaluation.samples))
            finally:  # also where the disk is full; after the files, since standard output may be closed
                print(evaluation.table())


def _sweep(options: Namespace) -> None:
    """The command with --sweep."""
    from eval.sweep import sweep, sweep_table

    more, overrides = split_overrides(options.overrides)
    with ends_once("interrupted; the same command continues"):
        # The files name a checkpoint as the user did.
        checkpoints = [replace(load_model(each, overrides), source=each) for each in (options.checkpoint, *more)]
        world = start_world(checkpoints[0].config.training.device)
        out = options.out or Path("sweep")
        points = sweep(checkpoints, world, out, overrides, names=options.rules, max_passes=options.max_passes)
        if world.is_main:
            print("\n".join(sweep_table(points)))


if __name__ == "__main__":
    main()
