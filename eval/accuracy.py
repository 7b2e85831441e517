"""Accuracy of a sampling rule on the test: sample in batches, judge, and sum over ranks.

Shapes: L positions, n questions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import Config, SamplingRule
from data.dataset import DataSet, JudgedAnswers, Reference
from model.transformer import Transformer
from runtime.distributed import World, gather, sum_over_ranks
from runtime.final import GroupResult, SamplerResult
from runtime.signals import StopVote
from samplers.build import build_sampler
from samplers.step import no_op

NORMAL_95 = 1.959964  # a normal variable is within so many standard deviations with probability 95%


def group_results(
    difficulty: dict[str, np.ndarray], solved: np.ndarray, reference: np.ndarray | None
) -> list[GroupResult]:
    """Accuracy by difficulty.

    Args:
        difficulty: see `DataSet.difficulty`.
        solved: bool [n].
        reference: bool [n], questions that a simple method solves; None if there is no such method.
    """
    groups = []
    for by, values in difficulty.items():
        for value in np.unique(values[~np.isnan(values)]):
            members = values == value  # [n]
            n, n_solved = int(members.sum()), int(solved[members].sum())
            low, high = wilson_interval(n_solved, n)
            share = None if reference is None else float(reference[members].mean())
            groups.append(GroupResult(by, float(value), n, n_solved / n, low, high, share))
    return groups


def wilson_interval(n_right: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion of n trials; valid at 0 and 1 too."""
    share, z2 = n_right / n, NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def check_n_examples(n_examples: int, data: DataSet, setting: str) -> None:
    """Raise ValueError if `n_examples`, given by `setting`, exceeds the number of questions in the test."""
    if n_examples > data.n_questions:
        raise ValueError(
            f"{setting} {n_examples}: the test has {data.n_questions} {data.question_noun}; set at most that"
        )


def check_questions(config: Config, data: DataSet) -> None:
    """Raise ValueError if the questions that any evaluation asks are not as `DataSet` says, or do not fit the model.

    A model that predicts the next token gets no question without a token: it predicts none from nothing.
    """
    validation, name = config.validation, f"data set {config.data.dataset!r}"
    n_asked = min(max(validation.n_examples, validation.n_last_examples), data.n_questions)
    if not n_asked:
        return
    asked = np.arange(n_asked)
    prompts = data.prompts(asked)
    if prompts.shape != (n_asked, config.data.length) or prompts.dtype != np.int64:
        raise ValueError(
            f"{name}: prompts gave {prompts.dtype} {list(prompts.shape)} for {n_asked} questions, needed is int64 "
            f"[{n_asked}, {config.data.length}]"
        )
    masked = prompts == config.mask_id
    if not masked.any(1).all():
        raise ValueError(
            f"{name}: the prompt of question number {masked.any(1).argmin() + 1} has no mask token {config.mask_id}: "
            "it must have mask tokens in place of the answer"
        )
    difficulty_of(data, asked, config.data.dataset)
    if config.shifted and masked[:, 0].any():
        predicts, other = f"objective {config.objective.name!r}", "set another objective"
        if not config.causal:
            predicts, other = "a model with shifted predictions", "set model.shifted: false"
        raise ValueError(
            f"{masked[:, 0].sum()} of the first {n_asked} {data.question_noun} of the test have no token, the first is "
            f"number {masked[:, 0].argmax() + 1}: {predicts} predicts a token from those before it; give all prompts a "
            f"word, or {other}"
        )


def difficulty_of(data: DataSet, rows: np.ndarray, dataset: str) -> dict[str, np.ndarray]:
    """`DataSet.difficulty` of these questions; ValueError unless each measure is an array of numbers, one per question.

    Args:
        dataset: the data set's name in the settings, for the message.
    """
    found = {name: np.asarray(values) for name, values in data.difficulty(rows).items()}
    for name, values in found.items():
        if values.shape != rows.shape or values.dtype.kind not in "biuf":
            raise ValueError(
                f"data set {dataset!r}: difficulty must give {name!r} as an array of numbers of shape {rows.shape}, "
                f"and gave {values.dtype} {values.shape}"
            )
    return {name: values.astype(np.float64) for name, values in found.items()}


def count_examples(config: Config, overrides: Sequence[str], data: DataSet) -> int:
    """Number of questions to ask: as given by an override, else as after a run's last step, but no more than there are.

    Raises:
        ValueError: an override asks for more than the test has.
    """
    validation = config.validation
    for key, value in (("n_final_examples", validation.n_final_examples), ("n_examples", validation.n_examples)):
        if value is not None and any(override.startswith(f"validation.{key}=") for override in overrides):
            check_n_examples(value, data, f"validation.{key}")
            return value
    return min(validation.n_last_examples, data.n_questions)


@dataclass(frozen=True)
class TestQuestions:
    """The first questions of the test, with their difficulty and reference results."""

    data: DataSet
    reference: Reference | None
    difficulty: dict[str, np.ndarray]
    n_examples: int


@dataclass(frozen=True)
class RuleMeasurement:
    """Result of one sampling rule, with some of its answers."""

    result: SamplerResult
    samples: list[dict[str, Any]]  # the first judged rows, in order
    seconds: float  # of sampling, summed over ranks


def measure_rule(
    model: Transformer,
    config: Config,
    test: TestQuestions,
    world: World,
    *,
    rule: SamplingRule,
    bar: tqdm | None = None,
    vote: StopVote | None = None,
) -> RuleMeasurement:
    """Sample by one rule and judge the answers. Raises ValueError for figures that are none, see `check_figures`."""
    data, n_examples = test.data, test.n_examples
    sampler = build_sampler(config, data.eos_id)
    names = (*data.figures, *data.numbers)
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)
    samples: dict[int, dict[str, Any]] = {}
    solved = torch.zeros(n_examples, dtype=torch.float64, device=world.device)
    seconds = 0.0
    with interruptible(vote) as check:
        for rows in rank_batches(n_examples, world, config.validation.batch_size):
            began = time.perf_counter()
            result = sampler(
                model,
                torch.from_numpy(data.prompts(rows)).to(world.device),
                config.mask_id,
                rule,
                seed=config.training.seed,
                row_ids=torch.from_numpy(rows),
                before_pass=check,
            )
            tokens = result.tokens.cpu().numpy()
            seconds += time.perf_counter() - began
            judged = data.judge(tokens, rows)
            check_figures(judged, data, rows, config.data.dataset)
            figures = [*(judged.figures[name] for name in names), result.nfe.cpu().numpy()]
            sums += torch.tensor([each.sum(dtype=np.float64) for each in figures], device=world.device)
            solved[rows] = torch.from_numpy(judged.figures["accuracy"] == 1).to(solved)
            samples |= _as_samples(judged, rows[rows < config.validation.n_table_rows], rule)
            if bar is not None:
                bar.update(len(rows) * world.n_ranks)
    totals = dict(zip((*names, "nfe"), sum_over_ranks(sums).tolist(), strict=True))
    gathered = {row: facts for part in gather(samples) for row, facts in part.items()}
    return RuleMeasurement(
        _summarize(test, rule, totals, sum_over_ranks(solved).cpu().numpy() == 1),
        [gathered[row] for row in sorted(gathered)],
        float(sum_over_ranks(torch.tensor(seconds, dtype=torch.float64, device=world.device))),
    )


def check_figures(judged: JudgedAnswers, data: DataSet, rows: np.ndarray, dataset: str) -> None:
    """Raise ValueError unless `judged` has all figures of the data set, of the right shape and with allowed values.

    Args:
        rows: numbers of the judged questions, int64 [n].
        dataset: the data set's name in the settings, for the message.
    """
    for name in (*data.figures, *data.numbers):
        values = judged.figures.get(name)
        if not isinstance(values, np.ndarray) or values.shape != rows.shape:
            got = "left it out" if values is None else f"gave {type(values).__name__} {np.shape(values)}"
            raise ValueError(
                f"data set {dataset!r}: judge must report {name!r} as an array of shape {rows.shape}, and {got}"
            )
        if name == "accuracy":
            allowed, wanted = (values == 0) | (values == 1), "0 or 1; report a graded score as another figure"
        elif name in data.figures:
            allowed, wanted = (values >= 0) & (values <= 1), "a share from 0 to 1; name it in numbers, not figures"
        else:
            allowed, wanted = np.isfinite(values), "finite"
        if not allowed.all():
            first = int(np.argmin(allowed))
            raise ValueError(
                f"data set {dataset!r}: judge gave {name!r} the value {float(values[first]):g} for question "
                f"{rows[first]}; it must be {wanted}"
            )


def _as_samples(judged: JudgedAnswers, rows: np.ndarray, rule: SamplingRule) -> dict[int, dict[str, Any]]:
    """The first judged rows as records, by their number in the test."""
    by = {"confidence": rule.confidence, "tokens_per_step": rule.tokens_per_step}
    right = judged.figures["accuracy"] == 1  # [n]
    return {
        int(row): by | {"row": int(row), "right": bool(is_right)} | facts
        for row, is_right, facts in zip(rows, right, judged.samples, strict=False)
    }


def _summarize(test: TestQuestions, rule: SamplingRule, totals: dict[str, float], solved: np.ndarray) -> SamplerResult:
    """The result of a rule.

    Args:
        totals: sum of each figure and number, and of the forward evaluations, over all questions.
        solved: bool [n].
    """
    low, high = wilson_interval(totals["accuracy"], test.n_examples)
    means = {name: total / test.n_examples for name, total in totals.items()}
    reference = None if test.reference is None else test.reference.solved
    return SamplerResult(
        confidence=rule.confidence,
        tokens_per_step=rule.tokens_per_step,
        n=test.n_examples,
        accuracy=means["accuracy"],
        accuracy_low=low,
        accuracy_high=high,
        nfe=means["nfe"],
        details={name: means[name] for name in test.data.figures if name != "accuracy"},
        numbers={name: means[name] for name in test.data.numbers},
        groups=group_results(test.difficulty, solved, reference),
        options=rule.options,
    )


def rank_batches(n_rows: int, world: World, batch_size: int) -> list[np.ndarray]:
    """The rows of this rank out of 0..n_rows-1, in batches; every row belongs to exactly one rank."""
    rows = np.arange(world.rank, n_rows, world.n_ranks)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@contextmanager
def interruptible(vote: StopVote | None) -> Iterator[Callable[[], None]]:
    """A function to call before each forward pass: it raises StopRequested if `vote` has received a signal.

    With None it does nothing.
    """
    if vote is None:
        yield no_op
    else:
        with vote.interruptible():
            yield vote.check
