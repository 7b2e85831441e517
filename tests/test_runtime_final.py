"""final.json: what is measured is what is read, and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base.reading import BadInput
from eval.evaluate import Evaluation, as_json
from runtime.final import (
    Final,
    FinalEvaluation,
    GroupResult,
    ReferenceResult,
    SamplerResult,
    is_complete,
    load_final,
)

GROUP = GroupResult("clues", 8.0, 3, 0.5, 0.1, 0.9, None)
RULE = SamplerResult(
    "top_prob", 2, 10, 0.5, 0.2, 0.8, 8.5, {"cells": 0.9}, {"edits": 3.5}, [GROUP], {"n_passes": 4, "threshold": 0.9}
)
REFERENCE = ReferenceResult("singles", 0.2)


def content() -> dict[str, Any]:
    """Of the file, as it is written."""
    evaluation = as_json(Evaluation(1.5, [RULE], REFERENCE))
    return {"accuracy": 0.5, "n": 10, "steps": 6, "evaluation": evaluation, "example": "53..7"}


def test_what_is_read_is_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "final.json").write_text(json.dumps(content()))
    found = load_final(tmp_path)
    assert found == Final(0.5, 10, FinalEvaluation(1.5, [RULE], REFERENCE), "53..7")
    assert found.evaluation.samplers[0].label == RULE.label == "top_prob_2_n_passes_4_threshold_0.9"
    assert is_complete(tmp_path)


def test_a_run_without_a_result_has_none(tmp_path: Path) -> None:
    assert load_final(tmp_path) is None
    assert not is_complete(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda final: final.update(accuracy="0.5"), "accuracy: "),
        (lambda final: final.update(n=True), "n: "),
        (lambda final: final.update(accuracy=None), "rules without an accuracy"),
        (lambda final: final["evaluation"].update(samplers=[]), "accuracy without sampling rules"),
        (lambda final: final.pop("evaluation"), "evaluation: "),
        (lambda final: final["evaluation"]["samplers"][0].update(accuracy=1.5), r"evaluation\.samplers\.0\.accuracy: "),
        (lambda final: final["evaluation"]["samplers"][0].pop("nfe"), r"evaluation\.samplers\.0\.nfe: "),
        (lambda final: final["evaluation"]["reference"].update(accuracy=-1), r"evaluation\.reference\.accuracy: "),
    ],
)
def test_a_damaged_file_names_what_is_wrong(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    final = content()
    damage(final)
    (tmp_path / "final.json").write_text(json.dumps(final))
    with pytest.raises(BadInput, match=rf"final\.json cannot be read \(.*{message}"):
        load_final(tmp_path)
    with pytest.warns(RuntimeWarning, match=message):
        assert not is_complete(tmp_path)
