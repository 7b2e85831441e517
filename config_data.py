"""Settings of the data section: one class per data set, chosen by `dataset`; and the base of all settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
SudokuLayout = Literal["two_halves", "in_place"]


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after reading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
