"""Settings of the objective section: one class per objective, chosen by `name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from config_data import Settings

BlockAttention = Literal["prefix", "block_causal"]


class UniformSettings(Settings):
    """The baseline: masks drawn uniformly (docs/algorithm.md)."""

    name: Literal["uniform"]


class BlockSettings(Settings):
    """How the rows of a block objective are cut. See `progressive_block.py`."""

    block_size: int = Field(gt=0, description="tokens per block; divides the length of a sequence")
    block_attention: BlockAttention = Field(
        description="prefix: blocks see themselves and the clean tokens before them, one forward per block; "
        "block_causal: nothing sees a later block, one forward for all blocks, and decoding caches keys and values"
    )


class BlockUniformSettings(BlockSettings):
    """Block diffusion with masks drawn uniformly in each block."""

    name: Literal["block_uniform"]


class ProgressiveSettings(Settings):
    """Progressive unmasking, arXiv 2602.10314."""

    n_stages: int | None = Field(None, gt=0, description="K, stages of a trajectory; or k_schedule")
    k_schedule: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)]], ...] | None = Field(
        None, description="[[K, from_step], ...], first from_step 0, ascending; or n_stages"
    )
    collapse_threshold: float | None = Field(
        None, gt=0.0, le=1.0, description="tau: also reveal what the model predicts with more than this probability"
    )
    pool_batches: int = Field(
        1, gt=0, description="size of the pool in batches, which updates train in turn; the paper's pool is one batch"
    )
    uniform_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of each batch that stays ordinary uniformly masked rows"
    )

    @field_validator("k_schedule")
    @classmethod
    def _schedule_ascends(cls, schedule: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        if schedule is not None:
            steps = [from_step for _, from_step in schedule]
            if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
                raise ValueError(f"k_schedule: from_step must start at 0 and ascend, got {steps}")
        return schedule

    @model_validator(mode="after")
    def _one_schedule(self) -> ProgressiveSettings:
        if (self.n_stages is None) == (self.k_schedule is None):
            raise ValueError("give exactly one of n_stages and k_schedule")
        return self

    def n_stages_at(self, step: int) -> int:
        """K at an update (0 is the first)."""
        if self.k_schedule is None:
            assert self.n_stages is not None
            return self.n_stages
        return [n_stages for n_stages, from_step in self.k_schedule if from_step <= step][-1]


class PumaSettings(ProgressiveSettings):
    """Progressive unmasking of whole rows."""

    name: Literal["puma"]


class BlockPumaSettings(BlockSettings, ProgressiveSettings):
    """Progressive unmasking in each block."""

    name: Literal["block_puma"]


class AutoregressiveSettings(Settings):
    """Each token from those before it: a causal model, sampled left to right."""

    name: Literal["autoregressive"]


ObjectiveSettings = UniformSettings | PumaSettings | BlockUniformSettings | BlockPumaSettings | AutoregressiveSettings
