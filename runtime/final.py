"""The result of a complete run: `final.json` in the run directory. A run is complete if it has one that can be read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from data.foreign import MAX_INTEGER, BadInput, read_json, reading
from runtime.distributed import claim_report

FINAL_FILE = "final.json"

Count = Annotated[int, Field(ge=0, lt=MAX_INTEGER)]
Share = Annotated[float, Field(ge=0, le=1)]


class Group(TypedDict):
    """Accuracy on questions of one difficulty."""

    by: str  # measure of difficulty
    value: float
    n: Count
    accuracy: Share
    accuracy_low: Share  # 95% interval
    accuracy_high: Share
    reference: Share | None


class Sampler(TypedDict):
    """Accuracy by one sampling rule."""

    n: Count
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    nfe: float
    details: dict[str, float]
    numbers: dict[str, float]
    groups: list[Group]
    options: dict[str, str | float]


class Reference(TypedDict):
    """A simple method, and the share of the questions that it solves."""

    name: str
    accuracy: Share


class FinalEvaluation(TypedDict):
    """The last evaluation, by all sampling rules of the settings, the headline first; none if no question was asked."""

    loss: float
    samplers: list[Sampler]
    reference: NotRequired[Reference]


class Final(TypedDict):
    """What readers of final.json rely on; it holds more."""

    accuracy: Share | None  # of the headline; None if no question was asked
    n: Count
    evaluation: FinalEvaluation


FINAL = TypeAdapter(Final)


def load_final(run_dir: Path) -> dict[str, Any] | None:
    """The content of final.json; None if the run has none. Raises BadInput for a damaged one."""
    path = run_dir / FINAL_FILE
    if not path.exists():
        return None
    with reading(f"{path}", "the command of the run writes it again"):
        final = read_json(path)
        FINAL.validate_python(final, strict=True)
        if (final["accuracy"] is None) != (not final["evaluation"]["samplers"]):
            raise ValueError("it has an accuracy without sampling rules, or rules without an accuracy")
        return final


def read_final(run_dir: Path) -> dict[str, Any] | None:
    """`load_final`, but a damaged file counts as none, with a warning: the run is not complete."""
    try:
        return load_final(run_dir)
    except BadInput as error:
        if claim_report():
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return None
