"""What an evaluation measured, as numbers for the records and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from config import Confidence

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class GroupResult:
    """Accuracy on the questions of one difficulty."""

    by: str  # what difficulty is measured by, e.g. clues
    value: float  # lowest of the group
    n: int
    accuracy: float
    accuracy_low: float  # 95% interval
    accuracy_high: float
    reference: float | None  # share that the task's simple method solves


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
    groups: list[GroupResult] = field(default_factory=list)  # ascending within each measure of difficulty

    @property
    def label(self) -> str:
        """Short name, as in the records: rule and tokens per step."""
        return f"{self.confidence}_{self.tokens_per_step}"


@dataclass(frozen=True)
class Evaluation:
    """Everything measured at once; `samplers` in the order of the settings, its first entry is the headline."""

    loss: float
    samplers: list[SamplerResult]
    reference: tuple[str, float] | None = None  # a simple method and the share of the same questions that it solves
    samples: list[dict[str, Any]] = field(default_factory=list)  # some of what was sampled, judged

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
        if self.reference is not None:
            values["validation/reference"] = self.reference[1]
        for group in self.samplers[0].groups:
            facts = {key: value for key, value in asdict(group).items() if key not in ("by", "value")}
            values |= {f"validation/by_{group.by}/{group.value:g}/{key}": value for key, value in facts.items()}
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
        if self.reference is not None:
            lines.append(f"{self.reference[0]} alone: accuracy {100 * self.reference[1]:.1f}%")
        if self.samplers[0].groups:
            lines += ["", f"by difficulty ({self.samplers[0].label}):", *_group_lines(self)]
        return "\n".join(lines)


def _group_lines(evaluation: Evaluation) -> list[str]:
    """The headline sampler's accuracy by difficulty as a table of fixed width."""
    reference = evaluation.reference[0] if evaluation.reference else None
    lines = [f"{'':>12}{'n':>7}{'solved':>10}   95% interval{f'   {reference}' if reference else ''}"]
    for group in evaluation.samplers[0].groups:
        interval = f"{100 * group.accuracy_low:5.1f} to {100 * group.accuracy_high:5.1f}"
        other = "" if group.reference is None else f"   {100 * group.reference:.1f}%"
        name = f"{group.by} {group.value:g}"
        lines.append(f"{name:>12}{group.n:>7}{100 * group.accuracy:>9.1f}%   {interval}{other}")
    return lines


def group_results(
    difficulty: dict[str, np.ndarray], solved: np.ndarray, reference: np.ndarray | None
) -> list[GroupResult]:
    """Accuracy by difficulty.

    Args:
        difficulty: for each measure, the lowest value of each question's group [n], NaN where it has none.
        solved: bool [n].
        reference: bool [n], what a simple method solves; None where there is none.
    """
    groups = []
    for by, values in difficulty.items():
        for value in np.unique(values[~np.isnan(values)]):
            own = values == value
            n, n_solved = int(own.sum()), int(solved[own].sum())
            low, high = wilson_interval(n_solved, n)
            share = None if reference is None else float(reference[own].mean())
            groups.append(GroupResult(by, float(value), n, n_solved / n, low, high, share))
    return groups


def wilson_interval(n_right: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n trials by Wilson's score, which stays sensible at 0 and 1."""
    share, z2 = n_right / n, NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The figures for a JSON file."""
    values: dict[str, Any] = {"loss": evaluation.loss, "samplers": [asdict(each) for each in evaluation.samplers]}
    if evaluation.reference is not None:
        name, accuracy = evaluation.reference
        values["reference"] = {"name": name, "accuracy": accuracy}
    return values
