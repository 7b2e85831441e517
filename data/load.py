"""The data set that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from config import Config, DataSettings, SudokuSettings, TinyGsmSettings
from data.generate_sudoku import cached_generated
from data.gsm8k import HUB_NAME, Prompts, build_prompts, read_problems
from data.stream import SequenceData
from data.sudoku import SudokuData, count_shared_puzzles
from data.sudoku_files import load_hub, load_published, load_sudoku_file, published_available
from data.text import load_tokenizer
from data.token_files import TinyGsmData, open_tiny_gsm, read_meta, tokenizer_of
from data.word_problems import TEST_FILE, cached_word_problems

Split = Literal["train", "test"]


def load_split(config: Config, split: Split) -> SequenceData:
    """Read one split; what is generated is made on first use and kept in `data_dir`.

    Raises:
        ValueError: a file is missing or holds a bad row; the message names it.
    """
    if isinstance(config.data, SudokuSettings):
        return load_sudoku(config.data, split)
    return load_tiny_gsm(config.data, split, config.mask_id, config.model.vocab_size)


def load_tiny_gsm(settings: TinyGsmSettings, split: Split, mask_id: int, vocab_size: int) -> TinyGsmData:
    """Questions with programs: `test` is the last `n_held_out` rows, `train` all before them."""
    data = open_tiny_gsm(_token_folder(settings), settings.max_len, mask_id, vocab_size)
    n_train = len(data) - settings.n_held_out
    if n_train < 1:
        raise ValueError(f"data.n_held_out {settings.n_held_out} leaves no training row of {len(data)}")
    return data.part(slice(0, n_train) if split == "train" else slice(n_train, None))


def load_prompts(settings: TinyGsmSettings, tokenizer: Any, mask_id: int) -> Prompts:
    """Test problems as prompts; ValueError where they cannot be read or do not fit."""
    folder = _token_folder(settings)
    if settings.source == "word_problems":
        problems = read_problems(str(folder / TEST_FILE))
    else:
        problems = read_problems(settings.test_source or HUB_NAME, cache_dir=folder)
    return build_prompts(problems, tokenizer, mask_id, settings.max_len)


def find_tokenizer(settings: TinyGsmSettings) -> Any:
    """The tokenizer of the data; ValueError where it cannot be loaded or is not the one that made the rows."""
    folder = _token_folder(settings)
    tokenizer = load_tokenizer(settings.tokenizer or tokenizer_of(folder))
    eos_id = read_meta(folder).get("eos_id", tokenizer.eos_token_id)
    if eos_id != tokenizer.eos_token_id:
        raise ValueError(
            f"the rows in {folder} end in token {eos_id} and tokenizer {tokenizer.name_or_path!r} has EOS "
            f"{tokenizer.eos_token_id}: set data.tokenizer to the one that made them"
        )
    return tokenizer


def _token_folder(settings: TinyGsmSettings) -> Path:
    """The folder of the tokenized rows; word problems are written on first use."""
    if settings.source == "files":
        return Path(settings.data_dir)
    assert settings.n_train is not None  # checked in config.py, as are these two
    assert settings.n_test is not None
    assert settings.seed is not None
    return cached_word_problems(settings.data_dir, settings.n_train, settings.n_test, settings.seed, settings.max_len)


def count_shared(train: SequenceData, test: SequenceData) -> int:
    """How many test puzzles are in the training set; TinyGSM is tested on problems of another source."""
    if isinstance(train, SudokuData) and isinstance(test, SudokuData):
        return count_shared_puzzles(train, test)
    return 0


def load_sudoku(settings: SudokuSettings, split: Split) -> SudokuData:
    """One split of the boards."""
    train = split == "train"
    source = settings.source
    rating_column = None if train else settings.rating_column
    if source == "published_or_generated":
        source = "published" if published_available(settings.data_dir) else "generated"
    if source == "published":
        return load_published(settings.data_dir, split, settings.layout)
    if source == "hub":
        assert settings.hub_name is not None  # checked in config.py, as are the files below
        return load_hub(
            settings.hub_name,
            settings.train_split if train else settings.test_split,
            settings.puzzle_column,
            settings.solution_column,
            settings.size,
            settings.layout,
            rating_column,
        )
    if source == "files":
        path = settings.train_file if train else settings.test_file
        assert path is not None
        return load_sudoku_file(path, settings.size, settings.layout, rating_column)
    paths = cached_generated(
        settings.data_dir,
        settings.size,
        settings.n_train,
        settings.n_test,
        settings.min_clues,
        settings.max_clues,
        settings.seed,
    )
    return load_sudoku_file(paths[0 if train else 1], settings.size, settings.layout)


def describe_source(settings: DataSettings) -> str:
    """One line that says which data a run uses, and why where the settings leave it open."""
    if isinstance(settings, TinyGsmSettings):
        if settings.source == "word_problems":
            return f"{settings.n_train:,} generated word problems with programs, {settings.n_test:,} others for tests"
        return f"questions with programs in {settings.data_dir}, tested on {settings.test_source or HUB_NAME}"
    size = f"{settings.size}x{settings.size}"
    generated = f"{settings.n_train:,} generated {size} boards with {settings.min_clues} to {settings.max_clues} clues"
    if settings.source == "published_or_generated":
        if published_available(settings.data_dir):
            return f"the published Sudoku set in {settings.data_dir}"
        return f"{generated}: the published Sudoku set is not in {settings.data_dir}"
    if settings.source == "generated":
        return generated
    place = {"published": settings.data_dir, "files": settings.train_file, "hub": settings.hub_name}[settings.source]
    return f"{size} boards of {place}"
