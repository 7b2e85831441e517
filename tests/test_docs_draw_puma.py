"""The figure of README that explains PUMA."""

from __future__ import annotations

import pytest
from conftest import PUMA, UNIFORM

import train
from docs.draw_puma import main


@pytest.mark.pictures
def test_the_figure_is_drawn(config_file, tmp_path):
    objective = {"name": "puma", "k_schedule": [[3, 0], [5, 4]]}
    train.main(["--config", str(config_file(objective)), "--run-dir", str(tmp_path / "run")])
    main([str(tmp_path / "run"), "--out", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("objective", "options", "expected"),
    [(UNIFORM, [], "uniform on sudoku: name a run of puma"), (PUMA, ["--row", "100000"], "--row 100000: there are")],
)
def test_what_cannot_be_drawn_ends_with_one_message(objective, options, expected, config_file, tmp_path, capsys):
    train.main(["--config", str(config_file(objective)), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "run"), *options])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
