"""What a run that is started again may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import UNIFORM, tiny_settings

from config import Config
from runtime.config_file import parse_config
from training.resume import may_change_length


@pytest.mark.parametrize(
    ("newest", "before", "now", "may"),
    [
        (4, (6, 2), (8, 3), True),
        (4, (8, 3), (6, 2), True),
        (5, (6, 2), (9, 3), False),
        (5, (9, 3), (6, 2), False),
        (4, (8, 0), (3, 0), False),
    ],
)
def test_a_length_changes_no_update_that_was_done(
    newest: int, before: tuple[int, int], now: tuple[int, int], may: bool, tmp_path: Path
) -> None:
    """The learning rate decays in the last steps of a length: of 6 with 2 after the fourth."""
    for step in (1, newest):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)

    def of_length(max_steps: int, decay_steps: int) -> Config:
        settings = tiny_settings(UNIFORM, tmp_path)
        settings["training"] |= {"max_steps": max_steps, "decay_steps": decay_steps}
        return parse_config(settings, "test")

    changes = {"training.max_steps", "training.decay_steps"}
    assert may_change_length(of_length(*before), of_length(*now), changes, tmp_path) == may
    assert not may_change_length(of_length(*before), of_length(*now), changes | {"training.seed"}, tmp_path)
    (tmp_path / "final.json").touch()
    assert not may_change_length(of_length(*before), of_length(*now), changes, tmp_path)
