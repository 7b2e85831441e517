"""What an evaluation measured, as numbers for the records and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from config import Confidence

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


def wilson_interval(n_right: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n trials by Wilson's score, which stays sensible at 0 and 1."""
    share, z2 = n_right / n, NORMAL_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The figures for a JSON file."""
    return {"loss": evaluation.loss, "samplers": [asdict(result) for result in evaluation.samplers]}
