"""Overrides for `--tiny`: one small layer, and 4x4 boards."""

from __future__ import annotations

TINY_MODEL = [
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
]
TINY_SUDOKU = [
    *TINY_MODEL,
    "model.vocab_size=6",
    "model.learned_positions=32",
    "data.source=generated",
    "data.size=4",
    "data.n_train=200",
    "data.n_test=20",
    "data.min_clues=6",
    "data.max_clues=10",
    "training.batch_size=8",
    "training.log_every=2",
    "training.eval_every=3",
    "training.save_every=3",
    "validation.n_examples=10",
    "validation.n_final_examples=20",
    "validation.n_loss_rows=20",
]
