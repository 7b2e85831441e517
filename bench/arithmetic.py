"""How many floating-point operations a training step must take, whoever computes it.

Shapes: B rows, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from config import ModelSettings


class Arithmetic(NamedTuple):
    """Floating-point operations of a forward and backward pass."""

    backbone: float  # 6 * parameters * tokens
    attention: float  # queries by keys, and their weights by values
    head: float  # on the positions that need it

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def arithmetic(settings: ModelSettings, n_rows: int, length: int, n_scored: float, causal: bool = False) -> Arithmetic:
    """What a step on n_rows rows of `length` tokens takes, of which `n_scored` positions in all carry weight."""
    width, tokens = settings.hidden_size, n_rows * length
    kv_width = width // settings.num_attention_heads * settings.n_key_value_heads
    per_layer = 2 * width * width + 2 * width * kv_width + 3 * width * settings.intermediate_size
    n_keys = length / 2 if causal else length
    return Arithmetic(
        backbone=6.0 * settings.num_hidden_layers * per_layer * tokens,
        attention=12.0 * settings.num_hidden_layers * width * n_keys * tokens,
        head=6.0 * width * settings.vocab_size * n_scored,
    )
