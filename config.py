"""Every setting of an experiment, typed and strict: one class per section of the YAML file.

`runtime/config_file.py` reads the file and words the errors. Objectives are a discriminated union, so that each takes
only its own keys. The descriptions below are the table of settings in README.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Confidence = Literal["top_prob", "top_prob_margin", "neg_entropy", "random"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after reading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """Shape of the Qwen2 backbone; the names are those of Hugging Face's `Qwen2Config`."""

    vocab_size: int = Field(gt=1, description="tokens, the mask token included")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="width of the SwiGLU MLP")
    num_hidden_layers: int = Field(gt=0, description="layers")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_key_value_heads: int | None = Field(None, gt=0, description="key and value heads; null: one per query head")
    tie_word_embeddings: bool = Field(False, description="output head shares the embedding matrix")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")

    @property
    def n_key_value_heads(self) -> int:
        """Key and value heads with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    # Checks of a key given those before it, so that no other problem hides it; wrong keys are absent from `info.data`.
    @field_validator("num_attention_heads")
    @classmethod
    def _heads_divide_the_width(cls, n_heads: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size", 2 * n_heads)
        if width % n_heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {n_heads}")
        if width // n_heads % 2:
            raise ValueError(f"hidden_size / num_attention_heads = {width // n_heads} must be even (rotary)")
        return n_heads

    @field_validator("num_key_value_heads")
    @classmethod
    def _key_heads_divide_the_heads(cls, n_key_heads: int | None, info: ValidationInfo) -> int | None:
        n_heads = info.data.get("num_attention_heads")
        if n_key_heads and n_heads and n_heads % n_key_heads:
            raise ValueError(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_key_heads}")
        return n_key_heads


class SudokuSettings(Settings):
    """Where Sudoku boards come from. See `data/sudoku.py`."""

    dataset: Literal["sudoku"]
    data_dir: str = Field("data/sudoku_new", description="folder of the published set and of generated boards")
    size: Literal[4, 6, 9] = Field(9, description="board size; 6 has boxes of 2 x 3")
    source: Literal["published_or_generated", "published", "generated", "files", "hub"] = Field(
        "published_or_generated", description="which of the sources below is read"
    )
    n_train: int = Field(1_000_000, gt=0, description="generated: training puzzles")
    n_test: int = Field(2000, gt=0, description="generated: test puzzles, none of them in the training set")
    min_clues: int = Field(30, gt=0, description="generated: fewest clues")
    max_clues: int = Field(40, gt=0, description="generated: most clues")
    seed: Seed = Field(0, description="generated: seed of the puzzles")
    train_file: str | None = Field(None, description="files: .csv, .npz or .npy of the training boards")
    test_file: str | None = Field(None, description="files: the same for the test boards")
    hub_name: str | None = Field(None, description="hub: name of a Hugging Face data set")
    train_split: str = Field("train", description="hub: split for training")
    test_split: str = Field("test", description="hub: split for tests")
    puzzle_column: str = Field("puzzle", description="hub: column of the puzzles")
    solution_column: str = Field("solution", description="hub: column of the solutions")

    @model_validator(mode="after")
    def _source_is_complete(self) -> SudokuSettings:
        problems = []
        if self.min_clues > self.max_clues:
            problems.append(f"min_clues {self.min_clues} is above max_clues {self.max_clues}")
        if self.source in ("published", "published_or_generated") and self.size != 9:
            problems.append(f"source {self.source!r} has 9x9 boards only, size is {self.size}: use source: generated")
        if self.source == "files" and not (self.train_file and self.test_file):
            problems.append("source 'files' needs train_file and test_file")
        if self.source != "files" and (self.train_file or self.test_file):
            problems.append(f"train_file and test_file are ignored by source {self.source!r}: set source: files")
        if (self.source == "hub") != bool(self.hub_name):
            problems.append(f"hub_name and source 'hub' go together; source is {self.source!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def min_vocab_size(self) -> int:
        """Empty, the digits and the mask token."""
        return self.size + 2


class UniformSettings(Settings):
    """The baseline: masks drawn uniformly (DESIGN: section 2)."""

    name: Literal["uniform"]


class PumaSettings(Settings):
    """Progressive unmasking, arXiv 2602.10314."""

    name: Literal["puma"]
    n_stages: int | None = Field(None, gt=0, description="K, stages of a trajectory; or k_schedule")
    k_schedule: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)]], ...] | None = Field(
        None, description="[[K, from_step], ...], first from_step 0, ascending; or n_stages"
    )
    collapse_threshold: float | None = Field(
        None, gt=0.0, le=1.0, description="tau: also reveal what the model predicts with more than this probability"
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
    def _one_schedule(self) -> PumaSettings:
        if (self.n_stages is None) == (self.k_schedule is None):
            raise ValueError("give exactly one of n_stages and k_schedule")
        return self

    def n_stages_at(self, step: int) -> int:
        """K at an update (0 is the first)."""
        if self.k_schedule is None:
            assert self.n_stages is not None
            return self.n_stages
        return [n_stages for n_stages, from_step in self.k_schedule if from_step <= step][-1]


class TrainingSettings(Settings):
    """The loop: batch, optimizer, length, records."""

    batch_size: int = Field(gt=0, description="rows per optimizer step over all ranks")
    micro_batch_size: int | None = Field(None, gt=0, description="rows per forward on one rank; null: all at once")
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on matrices only")
    adam_betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, then cosine decay to 0")
    num_epochs: float | None = Field(None, gt=0, description="length: updates = epochs * rows // batch_size")
    max_steps: int | None = Field(None, gt=0, validate_default=True, description="length in updates; the smaller wins")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    ema_decay: float | None = Field(
        None, gt=0.0, lt=1.0, description="average of the weights, used by validation and sampling; null: none"
    )
    seed: Seed = Field(0, description="weights, data order and masks")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 means autocast; auto: where the machine multiplies bfloat16 fast"
    )
    compile: bool = Field(False, description="torch.compile the model; pays off on long runs")
    log_every: int = Field(50, gt=0, description="steps between records")
    eval_every: int = Field(1000, gt=0, description="steps between evaluations")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept, besides the best")

    @field_validator("micro_batch_size")
    @classmethod
    def _microbatches_divide_the_batch(cls, n_rows: int | None, info: ValidationInfo) -> int | None:
        if n_rows and info.data.get("batch_size", n_rows) % n_rows:
            raise ValueError(f"batch_size {info.data['batch_size']} is not a multiple of micro_batch_size {n_rows}")
        return n_rows

    @field_validator("max_steps")
    @classmethod
    def _has_a_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if max_steps is None and info.data.get("num_epochs", 1) is None:
            raise ValueError("give num_epochs or max_steps")
        return max_steps


class ValidationSettings(Settings):
    """What is measured on the test split."""

    confidence: tuple[Confidence, ...] = Field(
        ("top_prob",), min_length=1, description="which masked position is filled first"
    )
    tokens_per_step: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (1,), min_length=1, description="positions filled per forward pass"
    )
    threshold: float | None = Field(None, gt=0.0, lt=1.0, description="also fill all above this probability")
    temperature: float = Field(0.0, ge=0.0, description="0: most probable token; else Gumbel noise")
    n_examples: int = Field(1000, gt=0, description="test sequences sampled per evaluation")
    n_final_examples: int | None = Field(None, gt=0, description="the same after the last step; null: n_examples")
    n_loss_rows: int = Field(1000, gt=0, description="test sequences of the validation loss (fixed masks)")
    batch_size: int = Field(256, gt=0, description="rows per forward in evaluation, on one rank")


class WandbSettings(Settings):
    """Where wandb keeps its copy of the records; metrics.jsonl is always written."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="a missing network never stops a run"
    )
    project: str = Field("puma", description="wandb project")
    name: str | None = Field(None, description="name of the run; null: the run directory's name")
    entity: str | None = Field(None, description="wandb user or team")


ObjectiveSettings = UniformSettings | PumaSettings


class Config(Settings):
    """One experiment."""

    model: ModelSettings
    data: SudokuSettings
    objective: Annotated[ObjectiveSettings, Field(discriminator="name")]
    training: TrainingSettings
    validation: ValidationSettings
    wandb: WandbSettings = WandbSettings()

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.model.vocab_size < self.data.min_vocab_size:
            raise ValueError(
                f"model.vocab_size {self.model.vocab_size} is too small for the data: set at least "
                f"{self.data.min_vocab_size} (empty, {self.data.size} digits, mask)"
            )
        return self


# Settings that change what is recorded, not what is learnt: a run may be resumed with others.
FREE_ON_RESUME = re.compile(
    r"wandb\..*|validation\..*|training\.(log_every|eval_every|save_every|keep_checkpoints)|data\.data_dir"
)
