"""Which sampler fits a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from config import BlockSettings, Config
from samplers.block import sample_blocks
from samplers.causal import sample_causal
from samplers.full import sample_full
from samplers.step import Samples

Sampler = Callable[..., Samples]


def build_sampler(config: Config, eos_id: int | None = None) -> Sampler:
    """The sampler that fits the objective; called as `sample_full` is.

    Args:
        eos_id: the token that ends a sequence, if the data set has one.
    """
    if isinstance(config.objective, BlockSettings):
        return partial(sample_blocks, block_size=config.objective.block_size, eos_id=eos_id)
    if config.causal:
        return partial(sample_causal, eos_id=eos_id)
    return sample_full
