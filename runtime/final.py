"""The result of a complete run: `final.json` in the run directory. A run is complete if it has one that can be read.

`eval` measures results into the same classes into which they are read from the file. Only reading checks their bounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict, TypeAdapter

from base.reading import MAX_INTEGER, BadInput, read_json, reading
from runtime.distributed import claim_report

FINAL_FILE = "final.json"

# Strict: "0.5" in a file is no number.
Real = Annotated[float, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, lt=MAX_INTEGER)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]


@dataclass(frozen=True)
class GroupResult:
    """Accuracy on a group of questions of similar difficulty."""

    by: str  # measure of difficulty, e.g. clues
    value: Real  # lowest value of the group
    n: Count
    accuracy: Share
    accuracy_low: Share  # 95% interval
    accuracy_high: Share
    reference: Share | None  # share solved by the simple method of the data set


@dataclass(frozen=True)
class SamplerResult:
    """Results of one sampling rule."""

    confidence: str  # `config.Confidence`; in a file perhaps a rule of other code
    tokens_per_step: Count
    n: Count  # sequences sampled
    accuracy: Share
    accuracy_low: Share  # 95% interval
    accuracy_high: Share
    nfe: Real  # mean network forward evaluations per sequence
    details: dict[str, Real]  # means of the other figures of the data set, shares
    numbers: dict[str, Real] = field(default_factory=dict)  # means of `DataSet.numbers`
    groups: list[GroupResult] = field(default_factory=list)  # in ascending order for each measure of difficulty
    # What else the rule sets, see `SamplingRule.options`; an integer stays one, as it is shown.
    options: dict[str, str | int | float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short name used in records: confidence rule, tokens per step, and what else the rule sets."""
        others = (f"{key}_{value}" for key, value in self.options.items())
        return "_".join([self.confidence, f"{self.tokens_per_step}", *others])

    @property
    def rule(self) -> str:
        """The sampling rule as people read it."""
        return rule_in_words(self.confidence, self.tokens_per_step, self.options)


@dataclass(frozen=True)
class ReferenceResult:
    """A simple method, and the share of the questions that it solves."""

    name: str
    accuracy: Share


@dataclass(frozen=True)
class FinalEvaluation:
    """The last evaluation."""

    loss: Real
    samplers: list[SamplerResult]  # in the order of the settings, the headline first; none if no question was asked
    reference: ReferenceResult | None = None


@dataclass(frozen=True)
class Final:
    """What readers of final.json rely on; it holds more."""

    accuracy: Share | None  # of the headline; None if no question was asked
    n: Count  # questions that were asked
    evaluation: FinalEvaluation
    example: str  # a question, for a command that samples


FINAL = TypeAdapter(Final)


def rule_in_words(confidence: object, tokens_per_step: object, options: Mapping[str, object]) -> str:
    """A rule as people read it; `options` are those that are not by default, see `SamplingRule.options`."""
    return f"{confidence}, {tokens_per_step} per step" + "".join(f", {key} {value}" for key, value in options.items())


def load_final(run_dir: Path) -> Final | None:
    """The result of a run; None if it has no final.json. Raises BadInput for a damaged one."""
    path = run_dir / FINAL_FILE
    if not path.exists():
        return None
    with reading(f"{path}", "the command of the run writes it again"):
        final = FINAL.validate_python(read_json(path))
        if (final.accuracy is None) != (not final.evaluation.samplers):
            raise ValueError("it has an accuracy without sampling rules, or rules without an accuracy")
        return final


def is_complete(run_dir: Path) -> bool:
    """Whether the run has a final.json that can be read; a damaged one gives a warning."""
    try:
        return load_final(run_dir) is not None
    except BadInput as error:
        if claim_report():
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return False
