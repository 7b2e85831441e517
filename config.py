"""Every setting of an experiment, typed and strict: one class per section of the YAML file.

`runtime/config_file.py` reads the file and words the errors. Data sets and objectives are discriminated unions, so that
each takes only its own keys. Settings of a data set are defined with the data set. The descriptions make the table of
settings in docs/settings.md.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from data.dataset import DataSet
from data.settings import FREE_ON_RESUME, Seed, Settings
from data.sudoku import SudokuSettings
from data.tiny_gsm import TinyGsmSettings

AnyDataSettings = SudokuSettings | TinyGsmSettings  # every data set

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Confidence = Literal["top_prob", "top_prob_margin", "neg_entropy", "random"]
BlockAttention = Literal["prefix", "block_causal"]


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


class ObjectiveSettings(Settings):
    """Base of the settings of an objective. A subclass has a field `name`, a `Literal`."""

    causal: ClassVar[bool] = False  # whether it trains a model in which no position sees a later one


class UniformSettings(ObjectiveSettings):
    """The baseline: masks drawn uniformly (docs/algorithm.md)."""

    name: Literal["uniform"]


class BlockSettings(ObjectiveSettings):
    """How the rows of a block objective are cut. See `progressive_block.py`."""

    block_size: int = Field(gt=0, description="tokens per block; divides the length of a sequence")
    block_attention: BlockAttention = Field(
        description="prefix: blocks see themselves and the clean tokens before them, one forward per block; "
        "block_causal: nothing sees a later block, one forward for all blocks, and decoding caches keys and values"
    )


class BlockUniformSettings(BlockSettings):
    """Block diffusion with masks drawn uniformly in each block."""

    name: Literal["block_uniform"]


class ProgressiveSettings(ObjectiveSettings):
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


class AutoregressiveSettings(ObjectiveSettings):
    """Each token from those before it: a causal model, sampled left to right."""

    causal: ClassVar[bool] = True

    name: Literal["autoregressive"]


AnyObjectiveSettings = (
    UniformSettings | PumaSettings | BlockUniformSettings | BlockPumaSettings | AutoregressiveSettings
)


class TrainingSettings(Settings):
    """The loop: batch, optimizer, length, records."""

    batch_size: int = Field(gt=0, description="rows per optimizer step over all ranks")
    micro_batch_size: int | None = Field(
        None, gt=0, description="rows per forward on one rank; null: all at once", json_schema_extra=FREE_ON_RESUME
    )
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
        "ddp",
        description="many ranks: ddp copies the model to each, fsdp cuts it over them, if it outgrows one GPU",
        json_schema_extra=FREE_ON_RESUME,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute each block again in the backward pass: a fifth more time, a tenth of the activations",
        json_schema_extra=FREE_ON_RESUME,
    )
    compile: bool = Field(False, description="torch.compile the model; pays off on long runs")
    cuda_graph: bool = Field(
        False, description="record an update once and replay it; for small models on one GPU, which wait for launches"
    )
    log_every: int = Field(50, gt=0, description="steps between records", json_schema_extra=FREE_ON_RESUME)
    eval_every: int = Field(1000, gt=0, description="steps between evaluations", json_schema_extra=FREE_ON_RESUME)
    save_every: int = Field(1000, gt=0, description="steps between checkpoints", json_schema_extra=FREE_ON_RESUME)
    keep_checkpoints: int = Field(
        2, gt=0, description="newest checkpoints kept, besides the best", json_schema_extra=FREE_ON_RESUME
    )

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


class SamplingRule(Settings):
    """How a sampler chooses what to fill in: which positions come first, and how many in one forward pass."""

    confidence: Confidence = Field("top_prob", description="which masked position is filled first")
    tokens_per_step: int = Field(1, gt=0, description="positions filled per forward pass")
    threshold: float | None = Field(None, gt=0.0, lt=1.0, description="also fill all above this probability")
    temperature: float = Field(0.0, ge=0.0, description="0: most probable token; else Gumbel noise")

    def check(self, *, causal: bool) -> None:
        """Raise ValueError if a model, causal or not, cannot be sampled by this rule."""
        for key in ("confidence", "tokens_per_step", "threshold") if causal else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} {getattr(self, key)}: a causal model is sampled left to right, token by token; leave it out"
                )


DEFAULT_RULE = SamplingRule()


class ValidationSettings(Settings):
    """What is measured on the test split. `confidence` and `tokens_per_step` span a grid of sampling rules."""

    free_on_resume: ClassVar[bool] = True

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

    def rules(self) -> list[SamplingRule]:
        """The grid of sampling rules; the first one gives the headline figure."""
        return [
            SamplingRule(
                confidence=confidence,
                tokens_per_step=n_tokens,
                threshold=self.threshold,
                temperature=self.temperature,
            )
            for confidence, n_tokens in product(self.confidence, self.tokens_per_step)
        ]


class WandbSettings(Settings):
    """Where wandb keeps its copy of the records; metrics.jsonl is always written."""

    free_on_resume: ClassVar[bool] = True

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="a missing network never stops a run"
    )
    project: str = Field("puma", description="wandb project")
    name: str | None = Field(None, description="name of the run; null: the run directory's name")
    entity: str | None = Field(None, description="wandb user or team")


class Config(Settings):
    """One experiment."""

    model: ModelSettings
    data: Annotated[AnyDataSettings, Field(discriminator="dataset")]
    objective: Annotated[AnyObjectiveSettings, Field(discriminator="name")]
    training: TrainingSettings
    validation: ValidationSettings
    wandb: WandbSettings = WandbSettings()

    # Checks of a section against those above it. A section with problems of its own is absent from `info.data`.
    @field_validator("data")
    @classmethod
    def _data_fits_the_model(cls, data: AnyDataSettings, info: ValidationInfo) -> AnyDataSettings:
        problems = []
        vocab_size, n_positions = _model_size("vocab_size", info), _model_size("learned_positions", info)
        if vocab_size is not None and vocab_size < data.min_vocab_size:
            problems.append(
                f"model.vocab_size {vocab_size} is too small for the data: set at least {data.min_vocab_size}"
            )
        if n_positions is not None and n_positions < data.length:
            problems.append(
                f"model.learned_positions {n_positions} is less than the {data.length} tokens of a sequence: set at "
                f"least {data.length}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return data

    @field_validator("objective")
    @classmethod
    def _objective_fits_model_and_data(
        cls, objective: AnyObjectiveSettings, info: ValidationInfo
    ) -> AnyObjectiveSettings:
        name, problems = f"objective {objective.name!r}", []
        model, data = info.data.get("model"), info.data.get("data")
        if model is not None:
            if model.causal not in (None, objective.causal):
                needed = "a causal" if objective.causal else "a bidirectional"
                problems.append(f"model.causal {model.causal}: {name} needs {needed} model; leave it out")
            if objective.causal and model.shifted is False:
                problems.append(f"model.shifted False: {name} predicts the next token; leave it out")
            if _block_causal_size(objective) is not None and _is_shifted(model, objective):
                problems.append(
                    "objective.block_attention 'block_causal' cannot shift scores to the next token, which a start "
                    "from an autoregressive model needs: set block_attention: prefix, or model.shifted: false if it is "
                    "none"
                )
        if data is not None and isinstance(objective, BlockSettings) and data.length % objective.block_size:
            # A shorter last block would train on fewer tokens than its weight says, and need a shape of its own.
            divisors = [size for size in range(1, data.length + 1) if data.length % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - objective.block_size))
            problems.append(
                f"objective.block_size {objective.block_size} does not divide the {data.length} tokens of a sequence: "
                f"the nearest that does is {nearest}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return objective

    @field_validator("validation")
    @classmethod
    def _rules_fit_the_objective(cls, validation: ValidationSettings, info: ValidationInfo) -> ValidationSettings:
        objective = info.data.get("objective")
        if objective is None:
            return validation
        for rule in validation.rules():
            try:
                rule.check(causal=objective.causal)
            except ValueError as error:
                raise ValueError(f"validation.{error}") from None
        return validation

    @property
    def causal(self) -> bool:
        """Whether no position of the model sees a later one."""
        return self.objective.causal

    @property
    def shifted(self) -> bool:
        """Whether what the model computes at a position is about the next token."""
        return _is_shifted(self.model, self.objective)

    @property
    def block_causal_size(self) -> int | None:
        """Block size where the model itself must know the blocks, which is under block_causal attention."""
        return _block_causal_size(self.objective)

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self.data.mask_id_in(self.model.vocab_size)

    def open_data(self) -> DataSet:
        """The data set; it reads its files at first use."""
        return self.data.open(self.model.vocab_size)


def _model_size(key: str, info: ValidationInfo) -> int | None:
    """A number of the model section; if that has other problems, as it is in the file, which is the context."""
    if "model" in info.data:
        return getattr(info.data["model"], key)
    raw = (info.context or {}).get("model")
    size = raw.get(key) if isinstance(raw, dict) else None
    return size if type(size) is int else None


def _is_shifted(model: ModelSettings, objective: ObjectiveSettings) -> bool:
    if model.shifted is not None:
        return model.shifted
    return objective.causal or model.init_from is not None


def _block_causal_size(objective: ObjectiveSettings) -> int | None:
    if isinstance(objective, BlockSettings) and objective.block_attention == "block_causal":
        return objective.block_size
    return None
