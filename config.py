"""All settings of an experiment, typed and strict: one class per section of the YAML file.

`runtime/config_file.py` reads the file and formats errors. Data sets and objectives are discriminated unions, so each
takes only its own keys. Settings of a data set are defined with the data set. The table of settings in docs/settings.md
is generated from the descriptions.

What depends on the machine or the data is checked before work starts: `training.run.build_objective` (ranks and
microbatches), `training.update.check_graph`, `progressive.count_pool_rows`, `eval.accuracy.check_n_examples`,
`model.hub.check_init_from`.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from data.addition import AdditionSettings
from data.dataset import DataSet
from data.settings import FREE_ON_RESUME, Seed, Settings
from data.sudoku import SudokuSettings
from data.text_pairs import TextSettings
from data.tiny_gsm import TinyGsmSettings

AnyDataSettings = SudokuSettings | TinyGsmSettings | AdditionSettings | TextSettings  # all data sets

NumberOfStages = Annotated[int, Field(gt=0, le=1 << 20)]  # the records hold a share for each stage
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
ModelConfidence = Literal["top_prob", "top_prob_margin", "neg_entropy"]  # measures of a predicted distribution
Confidence = Literal[ModelConfidence, "random"]
RevealOrder = Literal[Confidence, "redrawn"]
Revision = Literal["remask", "plan", "running_confidence"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
Device = Literal["auto", "cpu", "cuda"]
BlockAttention = Literal["prefix", "block_causal"]


class ModelSettings(Settings):
    """Shape of the Qwen2 backbone, with the names of Hugging Face's `Qwen2Config`."""

    vocab_size: int = Field(gt=1, description="number of tokens, including the mask token")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="width of the SwiGLU MLP")
    num_hidden_layers: int = Field(gt=0, description="number of layers")
    num_attention_heads: int = Field(gt=0, description="number of query heads")
    num_key_value_heads: int | None = Field(
        None, gt=0, description="number of key and value heads; null: one per query head"
    )
    tie_word_embeddings: bool = Field(False, description="the output head shares the embedding matrix")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rotary: bool = Field(True, description="use rotary positions; false: only to measure learned positions alone")
    learned_positions: int | None = Field(
        None,
        gt=0,
        validate_default=True,
        description="length of a table of learned positions, added to the token embeddings; at least the length of a "
        "sequence; null: rotary positions only",
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    init_from: str | None = Field(
        None,
        description="run directory, RUN@best, RUN@STEP, checkpoint, Qwen2 folder or Hugging Face name to start from; "
        "null: random",
    )
    shifted: bool | None = Field(
        None,
        description="position i predicts token i + 1, with which text is learned sooner (docs/positions.md); null: if "
        "autoregressive or init_from; false: init_from is an MDM",
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, raw: object) -> object:
        """Drop `causal: null`, which the settings of earlier runs have; the objective decides it."""
        if isinstance(raw, dict) and raw.get("causal", "") is None:
            return {key: value for key, value in raw.items() if key != "causal"}
        return raw

    @property
    def n_key_value_heads(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    # Each key is checked against earlier keys, so that all problems are reported; invalid keys are not in `info.data`.
    @field_validator("num_attention_heads")
    @classmethod
    def _heads_divide_the_width(cls, n_heads: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size", 2 * n_heads)
        if width % n_heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {n_heads}")
        if width // n_heads % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads = {width // n_heads} must be even (for rotary positions)"
            )
        return n_heads

    @field_validator("learned_positions")
    @classmethod
    def _has_positions(cls, n_positions: int | None, info: ValidationInfo) -> int | None:
        if n_positions is None and info.data.get("rotary") is False:
            raise ValueError("rotary false needs learned positions: set learned_positions to the length of a sequence")
        return n_positions

    @field_validator("num_key_value_heads")
    @classmethod
    def _key_heads_divide_the_heads(cls, n_key_heads: int | None, info: ValidationInfo) -> int | None:
        n_heads = info.data.get("num_attention_heads")
        if n_key_heads and n_heads and n_heads % n_key_heads:
            raise ValueError(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_key_heads}")
        return n_key_heads


class ObjectiveSettings(Settings):
    """Base of the settings of an objective. A subclass has a field `name`, a `Literal`."""

    causal: ClassVar[bool] = False  # whether no position of the model attends to a later one


LowDiscrepancy = Annotated[
    bool,
    Field(
        description="spread the numbers of masked positions evenly over a batch, for a loss with less variance "
        "(arXiv 2107.00630), instead of drawing each alone"
    ),
]


class UniformSettings(ObjectiveSettings):
    """The baseline: masks drawn uniformly (docs/algorithm.md)."""

    name: Literal["uniform"]
    low_discrepancy: LowDiscrepancy = False


class BlockSettings(ObjectiveSettings):
    """How rows are divided into blocks. See `progressive_block.py`."""

    block_size: int = Field(gt=0, description="tokens per block; divides the length of a sequence")
    block_attention: BlockAttention = Field(
        description="prefix: a block sees itself and the clean tokens before it, one forward per block; block_causal: "
        "no position sees a later block, one forward for all blocks, and sampling caches keys and values"
    )


class BlockUniformSettings(BlockSettings):
    """Block diffusion with masks drawn uniformly in each block."""

    name: Literal["block_uniform"]
    low_discrepancy: LowDiscrepancy = False


class ProgressiveSettings(ObjectiveSettings):
    """Progressive unmasking, arXiv 2602.10314."""

    n_stages: NumberOfStages | None = Field(None, description="K, number of stages of a trajectory; or k_schedule")
    k_schedule: tuple[tuple[NumberOfStages, Annotated[int, Field(ge=0)]], ...] | None = Field(
        None, description="[[K, from_step], ...], first from_step 0, ascending; or n_stages"
    )
    collapse_threshold: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="tau: also reveal masked positions whose max probability exceeds it; null: off",
    )
    reveal_order: RevealOrder = Field(
        "top_prob",
        description="score of masked positions, as in sampling; the highest are revealed first; top_prob as in the "
        "paper; top_prob_margin and neg_entropy take one more pass of the output head, without a backward pass; random "
        "separates what the order does from what the pool does; redrawn: as many random positions, but drawn anew at "
        "each stage, so that a row only returns",
    )
    pool_batches: int = Field(
        1,
        gt=0,
        description="size of the pool in batches, which are trained in turn; 1 as in the paper; with 2 and more, "
        "neighbouring updates share no rows, and some tasks are learned much sooner (results/README.md)",
    )
    uniform_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="share of uniformly masked rows in each batch")

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

    @model_validator(mode="after")
    def _redrawn_without_threshold(self) -> ProgressiveSettings:
        if self.reveal_order == "redrawn" and self.collapse_threshold is not None:
            raise ValueError("reveal_order 'redrawn' does not depend on the model: set collapse_threshold to null")
        return self

    def n_stages_at(self, step: int) -> int:
        """K at an update, counted from 0."""
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
    """Predict each token from the tokens before it: a causal model, sampled left to right."""

    causal: ClassVar[bool] = True

    name: Literal["autoregressive"]


AnyObjectiveSettings = (
    UniformSettings | PumaSettings | BlockUniformSettings | BlockPumaSettings | AutoregressiveSettings
)


class TrainingSettings(Settings):
    """Training: batch, optimizer, length, records."""

    batch_size: int = Field(gt=0, description="rows per optimizer step over all ranks")
    micro_batch_size: int | None = Field(
        None, gt=0, description="rows per forward on one rank; null: all rows", json_schema_extra=FREE_ON_RESUME
    )
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, only on matrices")
    adam_betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="decay rates of the two moments of AdamW")
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up of the learning rate, from 0 in the first step"
    )
    decay_steps: int | None = Field(
        None,
        ge=0,
        description="last steps, in which the learning rate decays to 0 as a cosine; before, it is constant; null: all "
        "after the warm-up",
    )
    num_epochs: float | None = Field(None, gt=0, le=1e9, description="length: updates = epochs * rows // batch_size")
    max_steps: int | None = Field(
        None, gt=0, validate_default=True, description="length in updates; with num_epochs, the smaller one counts"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    ema_decay: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="decay of the weight average used by validation and sampling; null: no average",
    )
    seed: Seed = Field(0, description="seed of weights, data order and masks")
    device: Device = Field("auto", description="auto: a GPU if there is one", json_schema_extra=FREE_ON_RESUME)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16: autocast; auto: bfloat16 if the machine has fast bfloat16 matrix products"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several ranks: ddp replicates the model, fsdp shards it, for models too large for one GPU",
        json_schema_extra=FREE_ON_RESUME,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute each layer in the backward pass: a fifth more time, a tenth of the activation memory",
        json_schema_extra=FREE_ON_RESUME,
    )
    compile: bool = Field(
        False,
        description="torch.compile the model; worthwhile for long runs; on a CPU it needs g++",
        json_schema_extra=FREE_ON_RESUME,
    )
    cuda_graph: Literal["auto", True, False] = Field(
        "auto",
        description="capture an update once and replay it, for models bound by kernel launches; auto: with one process "
        "on a GPU and a small vocabulary; not with gradient_checkpointing",
        json_schema_extra=FREE_ON_RESUME,  # it changes no number
    )
    log_every: int = Field(50, gt=0, description="steps between records", json_schema_extra=FREE_ON_RESUME)
    eval_every: int = Field(1000, gt=0, description="steps between evaluations", json_schema_extra=FREE_ON_RESUME)
    save_every: int = Field(1000, gt=0, description="steps between checkpoints", json_schema_extra=FREE_ON_RESUME)
    tensorboard: bool = Field(
        False, description="also write the records as files of TensorBoard", json_schema_extra=FREE_ON_RESUME
    )
    keep_checkpoints: int = Field(
        2, gt=0, description="number of newest checkpoints to keep, besides the best", json_schema_extra=FREE_ON_RESUME
    )

    @field_validator("micro_batch_size")
    @classmethod
    def _microbatches_divide_the_batch(cls, n_rows: int | None, info: ValidationInfo) -> int | None:
        if n_rows and info.data.get("batch_size", n_rows) % n_rows:
            raise ValueError(f"batch_size {info.data['batch_size']} is not a multiple of micro_batch_size {n_rows}")
        return n_rows

    @field_validator("compile")
    @classmethod
    def _compiles_full_parameters(cls, compile: bool, info: ValidationInfo) -> bool:
        if compile and info.data.get("parallel") == "fsdp":
            raise ValueError("compile does not work with parallel 'fsdp': leave one of them out")
        return compile

    @field_validator("max_steps")
    @classmethod
    def _has_a_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if max_steps is None and info.data.get("num_epochs", 1) is None:
            raise ValueError("give num_epochs or max_steps")
        return max_steps


# Logits divided by much less overflow, and the first token at infinity would be taken.
MIN_TEMPERATURE = 1e-6


class _RuleOptions(Settings):
    """What a sampling rule and the evaluation share: how many positions a pass fills, and which ones it masks again."""

    threshold: float | None = Field(
        None, gt=0.0, lt=1.0, description="also fill all positions above this probability; null: off"
    )
    kl_bound: float | None = Field(
        None,
        gt=0.0,
        description="with threshold: only where the distribution moved by less than this (KL divergence in nats) at "
        "each of the last two passes; null: off",
    )
    entropy_bound: float | None = Field(
        None,
        ge=0.0,
        description="fill as many of the best positions as have a total entropy, less the largest, of at most this "
        "(nats); null: off",
    )
    revise: Revision | None = Field(
        None,
        description="mask filled positions again, in n_passes passes: remask by the probability when written, plan by "
        "the probability now, running_confidence by the largest so far; null: filled positions stay",
    )
    n_passes: int | None = Field(
        None, gt=0, description="with revise: most forward passes of a row (of each block, if filled by blocks)"
    )
    remask_share: Fraction = Field(
        0.1,
        description="with revise remask: largest share of the filled positions masked again in one pass, rounded up",
    )
    temperature: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,  # far above, the mask token's logit is no longer lower than all others
        description="0: most probable token; else sampled with Gumbel noise (what confidence does to that: "
        "docs/algorithm.md)",
    )

    def _problems(self, confidence: str, tokens_per_step: int) -> list[str]:
        """What does not go together, each with the remedy."""
        problems = []
        if 0 < self.temperature < MIN_TEMPERATURE:
            problems.append(f"temperature {self.temperature}: set 0, or at least {MIN_TEMPERATURE}")
        if self.kl_bound is not None and self.threshold is None:
            problems.append(f"kl_bound {self.kl_bound} needs a threshold: set threshold, for example to 0.9")
        if (self.revise is None) != (self.n_passes is None):
            given = "n_passes" if self.revise is None else "revise"
            missing = "revise" if self.revise is None else "n_passes"
            problems.append(f"{given} {getattr(self, given)} needs {missing}: set both or neither")
        if self.revise != "remask" and not self.is_default("remask_share"):
            problems.append(f"remask_share {self.remask_share} is only for revise 'remask': leave it out")
        counts = {
            "tokens_per_step": tokens_per_step if tokens_per_step != 1 else None,
            "threshold": self.threshold,
            "entropy_bound": self.entropy_bound,
            "revise": self.revise,
        }
        counted = [f"{key} {value}" for key, value in counts.items() if value is not None]
        exclusive = self.entropy_bound is not None or self.revise is not None
        if exclusive and len(counted) > 1:
            problems.append(
                f"{' and '.join(counted)}: each says how many positions a pass fills; leave all but one out"
            )
        if self.revise is not None and confidence != "top_prob":
            problems.append(f"confidence {confidence}: revise {self.revise} compares probabilities; use top_prob")
        return problems


class SamplingRule(_RuleOptions):
    """How a sampler chooses positions to fill: which ones first, and how many in one forward pass.

    - `tokens_per_step`: the best so many in each pass.
    - `threshold`: also all above a probability (Fast-dLLM, arXiv 2505.22618).
    - `threshold` and `kl_bound`: of those only where the distribution has come to rest (KLASS, Kim et al. 2025).
    - `entropy_bound`: as many as a bound on the error of filling them independently allows (EB-Sampler,
      arXiv 2505.24857).
    - `revise`: filled positions may be masked again. Each pass i of n_passes leaves the share i / n_passes of the
      maskable positions filled, rounded up, so that the number of passes is bounded:
      `remask` (ReMDM, arXiv 2503.00307) masks the filled positions whose tokens had the lowest probabilities when they
      were written, at most remask_share of them (rounded up) and no more than the schedule leaves masked (this is the
      paper's sigma_t; the paper draws positions in proportion to their lack of confidence, this code takes the least
      confident);
      `plan` (self-planning P2, arXiv 2502.03540) ranks masked positions by the probability of their token and
      filled ones by that of their token in this pass, and keeps the best;
      `running_confidence` (MDPO, arXiv 2508.13148) ranks all by the largest probability that they had in any pass in
      which they were masked, and keeps the best.

    Given positions never change.
    """

    confidence: Confidence = Field("top_prob", description="score of masked positions; the highest are filled first")
    tokens_per_step: int = Field(1, gt=0, description="positions filled per forward pass")

    @model_validator(mode="after")
    def _goes_together(self) -> SamplingRule:
        problems = self._problems(self.confidence, self.tokens_per_step)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def options(self) -> dict[str, str | float]:
        """Settings besides `confidence` and `tokens_per_step` that differ from their defaults."""
        return {key: getattr(self, key) for key in _RuleOptions.model_fields if not self.is_default(key)}

    def check(self, *, causal: bool) -> None:
        """Raise ValueError if the rule does not work with a model that is `causal` or not."""
        chosen = [key for key in NOT_FOR_CAUSAL if not self.is_default(key)]
        if causal and chosen:
            listed = ", ".join(f"{key} {getattr(self, key)}" for key in chosen)
            raise ValueError(f"{listed}: a causal model is sampled left to right, token by token; leave it out")


# Settings of `SamplingRule`, and of `ValidationSettings`, that a causal model leaves no choice of: they are refused.
NOT_FOR_CAUSAL = tuple(key for key in SamplingRule.model_fields if key != "temperature")
DEFAULT_RULE = SamplingRule()


class ValidationSettings(_RuleOptions):
    """Evaluation on the test split, by all combinations of `confidence` and `tokens_per_step`."""

    free_on_resume: ClassVar[bool] = True

    confidence: tuple[Confidence, ...] = Field(
        ("top_prob",), min_length=1, description="score of masked positions; the highest are filled first"
    )
    tokens_per_step: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (1,), min_length=1, description="positions filled per forward pass"
    )
    n_examples: int = Field(
        1000,
        ge=0,
        description="number of test sequences sampled per evaluation; 0: only the validation loss, which then selects "
        "the best checkpoint",
    )
    n_final_examples: int | None = Field(
        None, ge=0, description="number of test sequences sampled after the last step; null: n_examples"
    )
    n_loss_rows: int = Field(1000, gt=0, description="number of rows for the validation loss (fixed masks)")
    n_likelihood_draws: int = Field(
        0,
        ge=0,
        multiple_of=2,
        description="masks per row for the bound of the likelihood of these rows, in nats per token, an even number; "
        "an autoregressive model's value is exact with any; 0: off",
    )
    batch_size: int = Field(256, gt=0, description="rows per forward on one rank")
    n_table_rows: int = Field(
        50,
        ge=0,
        description="number of sampled answers recorded with their verdicts, for each sampling rule",
    )

    @model_validator(mode="after")
    def _rules_go_together(self) -> ValidationSettings:
        found = [self._problems(*chosen) for chosen in product(self.confidence, self.tokens_per_step)]
        problems = list(dict.fromkeys(problem for each in found for problem in each))
        for key in ("confidence", "tokens_per_step"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                problems.append(f"{key} has an entry twice")
        if self.n_final_examples == 0 and self.n_examples:
            problems.append(
                f"n_final_examples 0 with n_examples {self.n_examples}: the result would lack the accuracy, which "
                "selects checkpoints; set n_examples to 0 too, or leave n_final_examples out"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def n_last_examples(self) -> int:
        """Number of test sequences sampled after the last step."""
        return self.n_examples if self.n_final_examples is None else self.n_final_examples

    def rules(self) -> list[SamplingRule]:
        """All sampling rules; the first one gives the headline figure."""
        options = {key: getattr(self, key) for key in _RuleOptions.model_fields}
        return [
            SamplingRule(confidence=confidence, tokens_per_step=n_tokens, **options)
            for confidence, n_tokens in product(self.confidence, self.tokens_per_step)
        ]


class WandbSettings(Settings):
    """Copy of the records in wandb; metrics.jsonl is always written."""

    free_on_resume: ClassVar[bool] = True

    mode: WandbMode = Field(
        "disabled",
        description="where wandb records; auto: online if a key is configured, else disabled; a missing network never "
        "stops a run",
    )
    project: str = Field("puma", description="wandb project")
    name: str | None = Field(None, description="name of the run; null: the run directory's name")
    entity: str | None = Field(None, description="wandb user or team")
    group: str | None = Field(None, description="group of the run; null: the same for all seeds of these settings")
    job_type: str = Field("train", description="what kind of run it is, to filter by")
    tags: tuple[str, ...] = Field((), description="labels of the run")


class Config(Settings):
    """All settings of one experiment."""

    model: ModelSettings
    data: Annotated[AnyDataSettings, Field(discriminator="dataset")]
    objective: Annotated[AnyObjectiveSettings, Field(discriminator="name")]
    training: TrainingSettings
    validation: ValidationSettings
    wandb: WandbSettings = WandbSettings()

    # Each section is checked against the sections above it. An invalid section is not in `info.data`.
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
            if objective.causal and model.shifted is False:
                problems.append(f"model.shifted False: {name} predicts the next token; leave it out")
            if _block_causal_size(objective) is not None and _is_shifted(model, objective):
                unshifted = "model.shifted: false"
                if model.init_from is not None:  # shifted scores go on from those of an autoregressive model
                    unshifted += ", which needs the weights of an MDM in model.init_from"
                problems.append(
                    "objective.block_attention 'block_causal' does not support shifted scores: set block_attention: "
                    f"prefix, or {unshifted}"
                )
        if (
            data is not None
            and model is not None
            and _is_shifted(model, objective)
            and data.remedy_for_no_start is not None
        ):
            shift = "model.shifted true" if model.shifted else "model.shifted null with model.init_from"
            needing = name if objective.causal else shift
            other = "set another objective" if objective.causal else "set model.shifted: false"
            problems.append(
                f"{needing} needs rows that begin with a given token, and this data's do not: "
                f"{data.remedy_for_no_start}, or {other}"
            )
        if data is not None and isinstance(objective, BlockSettings) and data.length % objective.block_size:
            # A shorter last block would need its own shape, and weigh more per token than the other blocks.
            divisors = [size for size in range(1, data.length + 1) if data.length % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - objective.block_size))
            problems.append(
                f"objective.block_size {objective.block_size} does not divide the {data.length} tokens of a sequence: "
                f"the nearest divisor is {nearest}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return objective

    @field_validator("validation")
    @classmethod
    def _rules_fit_the_objective(cls, validation: ValidationSettings, info: ValidationInfo) -> ValidationSettings:
        objective, problems = info.data.get("objective"), []
        if objective is None or not objective.causal:
            return validation
        for key in NOT_FOR_CAUSAL:
            if not validation.is_default(key):
                default = ValidationSettings.model_fields[key].default
                problems.append(
                    f"validation.{key} {getattr(validation, key)}: objective {objective.name!r} is sampled left to "
                    f"right, token by token; leave it out or set it to {_shown(default)}"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return validation

    @property
    def causal(self) -> bool:
        """Whether no position of the model attends to a later one."""
        return self.objective.causal

    @property
    def shifted(self) -> bool:
        """Whether the model predicts the next token at a position."""
        return _is_shifted(self.model, self.objective)

    @property
    def block_causal_size(self) -> int | None:
        """Block size if the model uses block_causal attention, else None."""
        return _block_causal_size(self.objective)

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self.data.mask_id_in(self.model.vocab_size)

    def open_data(self) -> DataSet:
        """The data set; it reads its files on first use."""
        return self.data.open(self.model.vocab_size)


def _model_size(key: str, info: ValidationInfo) -> int | None:
    """A number of the model section; if that is invalid, from the raw settings, which are the validation context."""
    if "model" in info.data:
        return getattr(info.data["model"], key)
    raw = (info.context or {}).get("model")
    size = raw.get(key) if isinstance(raw, dict) else None
    return size if type(size) is int else None


def _shown(default: object) -> object:
    """A default as it is written in YAML."""
    return "null" if default is None else list(default) if isinstance(default, tuple) else default


def _is_shifted(model: ModelSettings, objective: ObjectiveSettings) -> bool:
    if model.shifted is not None:
        return model.shifted
    return objective.causal or model.init_from is not None


def _block_causal_size(objective: ObjectiveSettings) -> int | None:
    if isinstance(objective, BlockSettings) and objective.block_attention == "block_causal":
        return objective.block_size
    return None
