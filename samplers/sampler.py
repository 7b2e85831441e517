"""Which sampler fits a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from config import BlockSettings, Config
from samplers.block import sample_blocks
from samplers.causal import sample_left_to_right
from samplers.full import sample_full
from samplers.step import Samples


def sampler_of(config: Config, eos_id: int | None = None) -> Callable[..., Samples]:
    """The sampler that fits the objective; called as `sample` is.

    Args:
        eos_id: the token that ends a sequence, if the data set has one.
    """
    if isinstance(config.objective, BlockSettings):
        return partial(sample_blocks, block_size=config.objective.block_size, eos_id=eos_id)
    if config.causal:
        return partial(sample_left_to_right, eos_id=eos_id)
    return sample_full
