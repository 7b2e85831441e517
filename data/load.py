"""The data set that the settings name."""

from __future__ import annotations

from typing import Literal

from config import SudokuSettings
from data.generate_sudoku import cached_generated
from data.sudoku import SudokuData
from data.sudoku_files import load_hub, load_published, load_sudoku_file, published_available

Split = Literal["train", "test"]


def load_split(settings: SudokuSettings, split: Split) -> SudokuData:
    """Read one split; generated boards are made on first use and kept in `data_dir`.

    Raises:
        ValueError: a file is missing or holds a bad row; the message names it.
    """
    train = split == "train"
    source = settings.source
    if source == "published_or_generated":
        source = "published" if published_available(settings.data_dir) else "generated"
    if source == "published":
        return load_published(settings.data_dir, split)
    if source == "hub":
        assert settings.hub_name is not None  # checked in config.py, as are the files below
        return load_hub(
            settings.hub_name,
            settings.train_split if train else settings.test_split,
            settings.puzzle_column,
            settings.solution_column,
            settings.size,
        )
    if source == "files":
        path = settings.train_file if train else settings.test_file
        assert path is not None
        return load_sudoku_file(path, settings.size)
    paths = cached_generated(
        settings.data_dir,
        settings.size,
        settings.n_train,
        settings.n_test,
        settings.min_clues,
        settings.max_clues,
        settings.seed,
    )
    return load_sudoku_file(paths[0 if train else 1], settings.size)


def describe_source(settings: SudokuSettings) -> str:
    """One line that says which boards a run uses, and why where the settings leave it open."""
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
