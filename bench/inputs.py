"""Settings and training data of a benchmark. The data is random, so that no files are needed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from base.memory import check_memory
from config import Config
from data.dataset import ArrayData, SequenceData
from data.sudoku import SudokuSettings
from data.sudoku_boards import SudokuData
from model.logits import SMALL_VOCABULARY
from runtime.config_file import parse_config, read_config
from runtime.distributed import autocast_dtype, start_world
from runtime.history import ROOT

YAML_FILES = ROOT / "yaml_files"
N_ROWS = 1024


def refuse_unread(
    parser: ArgumentParser, options: Namespace, command: str, read_by: Mapping[str, Sequence[str]]
) -> None:
    """End with a message if an option is given that `command` does not read, so that none is ignored.

    Args:
        read_by: which commands read an option, for those that not all read.
    """
    for name, commands in read_by.items():
        if getattr(options, name) and command not in commands:
            parser.error(f"{command} does not read {name}; these do: {', '.join(commands)}")


def random_rows(config: Config, length: int) -> SequenceData:
    """Rows in the form of the settings' data; the cost of a step does not depend on what the tokens say.

    Raises:
        ValueError: the settings leave nothing to predict, or no token to draw.
    """
    rng, data = np.random.default_rng(0), config.data
    if isinstance(data, SudokuSettings) and length == data.length:
        n_cells = data.size**2
        if data.layout == "in_place" and data.max_clues >= n_cells:
            raise ValueError(
                f"data.max_clues {data.max_clues} with data.layout in_place leaves no cell to predict: lower it"
            )
        solutions = rng.integers(1, data.size + 1, (N_ROWS, n_cells), dtype=np.uint8)
        n_clues = rng.integers(data.min_clues, data.max_clues + 1, (N_ROWS, 1))
        puzzles = solutions * (rng.permuted(np.tile(np.arange(n_cells), (N_ROWS, 1)), axis=1) < n_clues)
        return SudokuData(np.concatenate([puzzles, solutions], axis=1), data.size, data.layout)
    if not config.mask_id:
        raise ValueError("data.mask_id 0 leaves no token below it, from which rows are drawn: set another")
    n_prompt = length * rng.uniform(1 / 16, 1 / 4, (N_ROWS, 1))  # about 42% of all positions are masked, as in TinyGSM
    tokens = rng.integers(0, config.mask_id, (N_ROWS, length), dtype=np.uint32)
    return ArrayData(tokens.astype(np.int64), np.arange(length) < n_prompt, config.mask_id)


def check_size(config: Config, length: int, command: str, device: torch.device) -> None:
    """Raise TooLittleMemory if the rows, or on a CPU what a pass of the command keeps of them, do not fit."""
    training, model = config.training, config.model
    n_bytes = 20 * length * (N_ROWS + training.batch_size)  # int64 tokens, masks and their copies
    if device.type == "cpu":  # the least: hidden states, and for a gradient those of each layer
        n_kept = model.num_hidden_layers if command in ("step", "block") else 1
        n_bytes += 4 * n_kept * model.hidden_size * length * (training.micro_batch_size or training.batch_size)
    check_memory(n_bytes, f"--batch {training.batch_size} with --length {length}")


def read_inputs(
    options: Namespace, experiment: str, n_rows: int, n_rows_slow: int, changes: Sequence[str] = ()
) -> tuple[Config, SequenceData, torch.device, torch.dtype | None]:
    """Settings of `experiment` or `--config` in the options' sizes, data of that shape, device and autocast's type.

    Raises:
        ValueError: wrong settings, as in `random_rows`, or sizes that do not fit into memory.
    """
    path = options.config or YAML_FILES / f"{experiment}.yaml"
    switches = ["training.compile=true"] * options.compile
    switches += [f"training.cuda_graph={'true' if options.graph else 'false'}"]
    # Microbatches are those of the overrides: the file's need not divide the rows of a benchmark.
    switches += ["training.micro_batch_size=null"] + [f"training.batch_size={options.batch}"] * bool(options.batch)
    config = read_config(path, [*changes, *switches, *options.overrides])
    device, length = start_world(config.training.device).device, options.length or config.data.length
    raw = config.model_dump(mode="json")
    if options.vocab:
        raw["model"]["vocab_size"] = options.vocab
        raw["data"].pop("mask_id", None)  # the last token
    is_slow = device.type == "cpu" and raw["model"]["vocab_size"] > SMALL_VOCABULARY
    raw["training"]["batch_size"] = options.batch or (n_rows_slow if is_slow else n_rows)
    raw["model"]["init_from"] = None
    if raw["model"]["learned_positions"] is not None:
        raw["model"]["learned_positions"] = max(length, config.data.length)
    config = parse_config(raw, str(path))
    check_size(config, length, options.command, device)
    return config, random_rows(config, length), device, autocast_dtype(config.training.precision, device)
