"""Every setting of an experiment, typed and strict: one class per section of the YAML file.

`runtime/config_file.py` reads the file and words the errors. Objectives are a discriminated union, so that each takes
only its own keys. The descriptions below are the table of settings in README.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from config_data import DataSettings, Seed, Settings
from config_objective import AutoregressiveSettings, BlockSettings, ObjectiveSettings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Confidence = Literal["top_prob", "top_prob_margin", "neg_entropy", "random"]


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
    rotary: bool = Field(True, description="rotary positions; false only to measure what learned positions do alone")
    learned_positions: int | None = Field(
        None,
        gt=0,
        validate_default=True,
        description="size of a table of learned positions, added to the token embeddings: the longest sequence; "
        "null: rotary positions alone",
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    causal: bool | None = Field(
        None, description="no position sees a later one; null: as the objective needs it, all else is an error"
    )
    init_from: str | None = Field(
        None, description="run directory, checkpoint, Qwen2 folder or Hugging Face name to start from; null: random"
    )
    shifted: bool | None = Field(
        None,
        description="position i scores token i + 1; null: if autoregressive or init_from; false: init_from is an MDM",
    )

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

    @field_validator("learned_positions")
    @classmethod
    def _has_positions(cls, table: int | None, info: ValidationInfo) -> int | None:
        if table is None and info.data.get("rotary") is False:
            raise ValueError("rotary false needs learned positions: set it to the length of a sequence")
        return table

    @field_validator("num_key_value_heads")
    @classmethod
    def _key_heads_divide_the_heads(cls, n_key_heads: int | None, info: ValidationInfo) -> int | None:
        n_heads = info.data.get("num_attention_heads")
        if n_key_heads and n_heads and n_heads % n_key_heads:
            raise ValueError(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_key_heads}")
        return n_key_heads


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
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="many ranks: ddp copies the model to each, fsdp cuts it over them, if it outgrows one GPU"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute each block again in the backward pass: a fifth more time, a tenth of the activations",
    )
    compile: bool = Field(False, description="torch.compile the model; pays off on long runs")
    cuda_graph: bool = Field(
        False, description="record an update once and replay it; for small models on one GPU, which wait for launches"
    )
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

    @field_validator("compile")
    @classmethod
    def _compiles_what_is_whole(cls, compile: bool, info: ValidationInfo) -> bool:
        if compile and info.data.get("parallel") == "fsdp":
            raise ValueError("cannot compile a model that parallel 'fsdp' cuts over ranks; leave one of the two out")
        return compile

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
    n_table_rows: int = Field(
        50, ge=0, description="tiny_gsm: sampled programs that are kept with their verdicts, for each way of sampling"
    )


class WandbSettings(Settings):
    """Where wandb keeps its copy of the records; metrics.jsonl is always written."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="a missing network never stops a run"
    )
    project: str = Field("puma", description="wandb project")
    name: str | None = Field(None, description="name of the run; null: the run directory's name")
    entity: str | None = Field(None, description="wandb user or team")


class Config(Settings):
    """One experiment."""

    model: ModelSettings
    data: Annotated[DataSettings, Field(discriminator="dataset")]
    objective: Annotated[ObjectiveSettings, Field(discriminator="name")]
    training: TrainingSettings
    validation: ValidationSettings
    wandb: WandbSettings = WandbSettings()

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        model, data, problems = self.model, self.data, []
        if model.vocab_size < data.min_vocab_size:
            problems.append(
                f"model.vocab_size {model.vocab_size} is too small for the data: set at least {data.min_vocab_size}"
            )
        if model.learned_positions is not None and model.learned_positions < data.length:
            problems.append(
                f"model.learned_positions {model.learned_positions} is less than the {data.length} tokens of a "
                f"sequence: set at least {data.length}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _objective_fits_model(self) -> Config:
        objective, problems = f"objective {self.objective.name!r}", []
        if self.model.causal not in (None, self.causal):
            needed = "a causal" if self.causal else "a bidirectional"
            problems.append(f"model.causal {self.model.causal}: {objective} needs {needed} model; leave it out")
        if self.causal and not self.shifted:
            problems.append(f"model.shifted False: {objective} predicts the next token; leave it out")
        if self.block_causal_size is not None and self.shifted:
            problems.append(
                "objective.block_attention 'block_causal' cannot shift scores to the next token, which a start from an "
                "autoregressive model needs: set block_attention: prefix, or model.shifted: false if it is none"
            )
        for key in ("confidence", "tokens_per_step", "threshold") if self.causal else ():
            value = getattr(self.validation, key)
            if value != ValidationSettings.model_fields[key].default:
                problems.append(
                    f"validation.{key} {value}: {objective} is sampled left to right, token by token; leave it out"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def causal(self) -> bool:
        """Whether no position of the model sees a later one."""
        return isinstance(self.objective, AutoregressiveSettings)

    @property
    def shifted(self) -> bool:
        """Whether what the model computes at a position is about the next token."""
        if self.model.shifted is not None:
            return self.model.shifted
        return self.causal or self.model.init_from is not None

    @property
    def block_causal_size(self) -> int | None:
        """Block size where the model itself must know the blocks, which is under block_causal attention."""
        blocks = self.objective
        return (
            blocks.block_size
            if isinstance(blocks, BlockSettings) and blocks.block_attention == "block_causal"
            else None
        )

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self.model.vocab_size - 1 if self.data.mask_id is None else self.data.mask_id


# Settings that change what is recorded or how a batch is cut, not what is learnt: a run may be resumed with others.
FREE_ON_RESUME = re.compile(
    r"wandb\..*|validation\..*|data\.(data_dir|test_source|rating_column)|"
    r"training\.(log_every|eval_every|save_every|keep_checkpoints|micro_batch_size|parallel|gradient_checkpointing)"
)
