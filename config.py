"""Every setting of an experiment, typed and strict: one class per section of the YAML file.

`runtime/config_file.py` reads the file and words the errors. Data sets and objectives are discriminated unions, so that
each takes only its own keys. The descriptions below are the table of settings in README.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Confidence = Literal["top_prob", "top_prob_margin", "neg_entropy", "random"]
SudokuLayout = Literal["two_halves", "in_place"]
BlockAttention = Literal["prefix", "block_causal"]


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


class SudokuSettings(Settings):
    """Where Sudoku boards come from. See `data/sudoku.py`."""

    dataset: Literal["sudoku"]
    data_dir: str = Field("data/sudoku_new", description="folder of the published set and of generated boards")
    size: Literal[4, 6, 9] = Field(9, description="board size; 6 has boxes of 2 x 3")
    layout: SudokuLayout = Field(
        "two_halves",
        description="two_halves: puzzle cells, then solution cells, as published; in_place: one board, the clues given",
    )
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
    rating_column: str | None = Field(
        None, description="files (.csv, .npz), hub: column of the test puzzles' difficulty; accuracy is reported by it"
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> SudokuSettings:
        problems = []
        if self.min_clues > self.max_clues:
            problems.append(f"min_clues {self.min_clues} is above max_clues {self.max_clues}")
        may_be_generated = self.source in ("generated", "published_or_generated")
        if self.layout == "in_place" and may_be_generated and self.max_clues >= self.size**2:
            problems.append(f"max_clues {self.max_clues}: layout in_place leaves nothing to predict on a full board")
        if self.source in ("published", "published_or_generated") and self.size != 9:
            problems.append(f"source {self.source!r} has 9x9 boards only, size is {self.size}: use source: generated")
        if self.source == "files" and not (self.train_file and self.test_file):
            problems.append("source 'files' needs train_file and test_file")
        if self.source != "files" and (self.train_file or self.test_file):
            problems.append(f"train_file and test_file are ignored by source {self.source!r}: set source: files")
        if (self.source == "hub") != bool(self.hub_name):
            problems.append(f"hub_name and source 'hub' go together; source is {self.source!r}")
        if self.rating_column and self.source not in ("files", "hub"):
            problems.append(f"rating_column is ignored by source {self.source!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def mask_id(self) -> int:
        """The mask token, behind empty and the digits."""
        return self.size + 1

    @property
    def min_vocab_size(self) -> int:
        """Empty, the digits and the mask token."""
        return self.size + 2

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        n_cells = self.size * self.size
        return n_cells if self.layout == "in_place" else 2 * n_cells


class TinyGsmSettings(Settings):
    """Where questions and programs come from. See `data/tiny_gsm.py`, `data/gsm8k.py` and `data/word_problems.py`."""

    dataset: Literal["tiny_gsm"]
    data_dir: str = Field("data/tiny_gsm", description="folder of the tokenized files, or of the word problems")
    source: Literal["files", "word_problems"] = Field(
        "files", description="files: what data/tiny_gsm.py wrote; word_problems: a small set that is generated"
    )
    max_len: int = Field(512, ge=8, multiple_of=8, description="tokens per sequence")
    mask_id: int | None = Field(None, ge=0, description="the mask token; null: the model's last")
    n_held_out: int = Field(1000, gt=0, description="last rows of the data, for the validation loss alone")
    tokenizer: str | None = Field(None, description="files: Hugging Face name or folder; null: the files' own")
    test_source: str | None = Field(
        None, description="files: test.jsonl of GSM8K, or name of a Hugging Face data set; null: openai/gsm8k"
    )
    n_train: int | None = Field(None, gt=0, description="word_problems: rows, the held-out ones included")
    n_test: int | None = Field(None, gt=0, description="word_problems: problems of the test set, none of them in a row")
    seed: int | None = Field(None, ge=0, description="word_problems: seed of the problems")

    @model_validator(mode="after")
    def _source_is_complete(self) -> TinyGsmSettings:
        problems = []
        own = {"files": ("tokenizer", "test_source"), "word_problems": ("n_train", "n_test", "seed")}
        for source, keys in own.items():
            given = [key for key in keys if getattr(self, key) is not None]
            if source != self.source and given:
                problems.append(f"{', '.join(given)}: only source {source!r} reads it, source is {self.source!r}")
        missing = [key for key in own["word_problems"] if getattr(self, key) is None]
        if self.source == "word_problems" and missing:
            problems.append(f"source 'word_problems' needs {', '.join(missing)}")
        if self.n_train is not None and self.n_train <= self.n_held_out:
            problems.append(f"n_held_out {self.n_held_out} leaves no training row of n_train {self.n_train}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def min_vocab_size(self) -> int:
        """The mask token must be among the tokens."""
        return (self.mask_id or 0) + 1

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.max_len


DataSettings = SudokuSettings | TinyGsmSettings


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
