"""Choose the sampler for a model."""

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
    """The sampler for the objective; its arguments are those of `sample_full`.

    Args:
        eos_id: the token that ends a sequence; None if the data set has none.
    """
    if isinstance(config.objective, BlockSettings):
        return partial(sample_blocks, block_size=config.objective.block_size, eos_id=eos_id)
    if config.causal:
        return partial(sample_causal, eos_id=eos_id)
    return sample_full
