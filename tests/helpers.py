"""Small parts that several tests share: syntax trees, rows that can be told apart, models, chi-square, losses."""

from __future__ import annotations

import ast
import functools
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

from config import ModelSettings
from data.sudoku_boards import BOX_SHAPE
from model.token_scores import TokenScores
from model.transformer import Transformer
from runtime.metrics import read_metrics
from samplers.step import Samples

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs g++ and Python.h on a CPU",
)


@functools.cache
def project_trees() -> dict[Path, ast.Module]:
    """The syntax tree of every Python file of the project, by its path from the root, in order of paths.

    Experiments in `runs/`, which git ignores, do not belong to it.
    """
    paths: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "runs"]  # .venv and the like
        paths += [Path(folder, name).relative_to(ROOT) for name in files if name.endswith(".py")]
    return {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in sorted(paths)}


N_TOKENS = 10  # ordinary tokens, 0 to 9


class NumberedRows:
    """A `SequenceData` of random rows; position 0 is a prompt that holds the row's number.

    Args:
        n_maskable: how many positions each row has that are no prompt, int [N]; they lie anywhere but at position 0.
    """

    def __init__(self, n_maskable: np.ndarray, length: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.length = length
        self.tokens = rng.integers(0, N_TOKENS, size=(len(n_maskable), length))
        self.tokens[:, 0] = np.arange(len(n_maskable))
        self.prompt_mask = np.ones((len(n_maskable), length), dtype=bool)
        for row, n in enumerate(n_maskable):
            self.prompt_mask[row, 1 + rng.permutation(length - 1)[:n]] = False

    @property
    def mask_id(self) -> int:
        """Beyond every row number and token."""
        return max(len(self.tokens), N_TOKENS)

    @property
    def eos_id(self) -> None:
        """All rows are of one length."""

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `SequenceData`."""
        return self.tokens[indices], self.prompt_mask[indices]


def numbered_rows(n_rows: int, length: int, seed: int = 0, n_maskable: int | None = None) -> NumberedRows:
    """Rows of `n_maskable` positions each; by default of any number from 1 to length - 1."""
    if n_maskable is not None:
        return NumberedRows(np.full(n_rows, n_maskable), length, seed)
    return NumberedRows(np.random.default_rng(seed).integers(1, length, size=n_rows), length, seed)


def random_generator(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def random_log_probs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Stand-in for the model's confidences: log-probabilities spread over (0, 1), float32."""
    return torch.rand(shape, generator=random_generator(seed)).clamp(min=1e-6).log()


def scores_of(confidence: Tensor, max_log_prob: Tensor | None = None) -> TokenScores:
    """What an objective observes; by the rule `top_prob` if the confidence ([b, L]) is given alone."""
    nothing = torch.full_like(confidence, torch.nan)
    return TokenScores(nothing.sum(), nothing, confidence if max_log_prob is None else max_log_prob, confidence)


def model_settings(**changes: Any) -> ModelSettings:
    """A small model with an odd vocabulary, so that no two sizes are equal."""
    return ModelSettings(
        **{
            "vocab_size": 23,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
        }
        | changes
    )


def random_model(seed: int = 0, causal: bool = False, **changes: Any) -> Transformer:
    """A model with every parameter random, biases and norms too."""
    model = Transformer(model_settings(**changes), causal=causal)
    generator = random_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return model.eval()


def assert_distribution(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square test at about 5 standard deviations: the counts come from these probabilities.

    The statistic's cube root is close to normal (Wilson and Hilferty). Give at least 5 expected counts per cell.
    """
    assert counts.shape == probabilities.shape
    assert not counts[probabilities == 0].any(), "something happened that has probability 0"
    counts, probabilities = counts[probabilities > 0].double(), probabilities[probabilities > 0].double()
    expected = counts.sum() * probabilities / probabilities.sum()
    assert expected.min() >= 5, "too few draws for the test"
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    deviation = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert deviation < 5, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def assert_same_samples(ours: Samples, theirs: Samples) -> None:
    """The same tokens, in the same order, with as many passes, and nearly the same confidence."""
    for name in ("tokens", "order", "nfe"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.confidence, theirs.confidence, equal_nan=True, atol=1e-5, rtol=0)


def solved_grid(size: int) -> np.ndarray:
    """A legal grid: the first row shifted by a box's width in each row of boxes and by one between them; int64 [C]."""
    height, width = BOX_SHAPE[size]
    rows = [
        [(width * (row % height) + row // height + column) % size + 1 for column in range(size)] for row in range(size)
    ]
    return np.array(rows).ravel()


def losses(run_dir: Path) -> dict[int, float]:
    """The training losses of a run, by step."""
    return {row["step"]: row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}
