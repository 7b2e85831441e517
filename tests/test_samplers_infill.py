"""Rows with holes from templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PUMA, tiny_gsm_settings, tiny_settings

from config import Config
from data.dataset import DataSet
from model.transformer import build_model
from runtime.config_file import parse_config
from samplers.full import sample_full
from samplers.infill import encode_template

BLOCK = {"name": "block_uniform", "block_size": 8, "block_attention": "prefix"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, DataSet]:
    config = parse_config(tiny_gsm_settings(tmp_path_factory.mktemp("text")), "test")
    return config, config.open_data()


def test_holes_are_masks_between_given_tokens_and_only_they_are_filled(text: tuple[Config, DataSet]) -> None:
    config, data = text
    row = encode_template("return <3>+ x<1>", data, config)
    masked = row == config.mask_id
    end = int(masked.nonzero()[0][-1])
    assert masked.sum() == 4
    assert (row[end + 1 :] == data.eos_id).all()
    pieces = [data.tokenizer.decode(part) for part in (row[: masked.argmax()], row[:end][~masked[:end]])]
    assert pieces == ["return ", "return + x"]
    model = build_model(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    xt = torch.from_numpy(row)[None]
    found = sample_full(model.eval(), xt, config.mask_id)
    assert torch.equal(found.tokens[xt != config.mask_id], xt[xt != config.mask_id])
    assert torch.equal(found.order[0] > 0, torch.from_numpy(masked))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("return x", "has no hole: write <3>"),
        ("return <0>", "a hole of no token"),
        ("return <500>", "at most 127 fit a row of 128"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(
    template: str, expected: str, text: tuple[Config, DataSet]
) -> None:
    config, data = text
    with pytest.raises(ValueError, match=expected):
        encode_template(template, data, config)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "autoregressive"}, "a causal model sees no token behind a hole"),
        (BLOCK, "'block_uniform' fills block by block"),
        (PUMA, "data set 'sudoku' has no tokenizer"),
    ],
)
def test_models_that_cannot_infill_are_refused(objective: dict, expected: str, tmp_path: Path) -> None:
    config = parse_config(tiny_settings(objective, tmp_path), "test")
    with pytest.raises(ValueError, match=expected):
        encode_template("1 <2>", config.open_data(), config)
