"""Trained weights from elsewhere as the start of a run, and a run's weights for elsewhere.

`model/hub.py` knows Hugging Face's folders, `runtime/checkpoint.py` this repository's; here the two meet. The command:

    python -m model.hub export runs/tinygsm_arm exported/tinygsm_arm

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, ModelSettings
from config_data import SudokuSettings
from model.hub import CONFIG_FILE, EMBEDDING, HEAD, INDEX_FILE, Pretrained, read_qwen2, write_qwen2, write_tokenizer
from model.transformer import POSITIONS, Transformer
from runtime.checkpoint import MANIFEST, find_checkpoint
from sampling import load_model

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_key_value_heads",
    "rotary",
    "rope_theta",
    "rms_norm_eps",
)


def load_initial_weights(model: Transformer, config: Config) -> None:
    """Give `model` the weights that `model.init_from` names, fitted to its shape; of a run with an average, those.

    Raises:
        ValueError: they cannot be had, or do not fit the settings.
    """
    assert config.model.init_from is not None
    pretrained = _read(config.model.init_from)
    if pretrained.shifted != config.shifted:
        remedy = "leave it out" if pretrained.shifted else "set model.shifted: false"
        kind = "about the next token" if pretrained.shifted else "about the position's own token"
        raise ValueError(
            f"model.shifted is {config.shifted}, but what {pretrained.source} computes at a position is {kind}: "
            f"{remedy}"
        )
    weights = fit_weights(pretrained, config.model)
    try:
        model.load_weights(weights)
    except RuntimeError as error:  # tensors missing, unknown or of another shape than config.json says
        raise ValueError(f"{pretrained.source} does not hold the weights of a Qwen2 model: {error}") from None


def _read(source: str) -> Pretrained:
    """A run directory or checkpoint folder, a Qwen2 folder, or a name on the Hugging Face hub."""
    folder = Path(source)
    if (folder / MANIFEST).exists() or (folder / "checkpoints").is_dir():
        checkpoint = find_checkpoint(folder)
        model, config = load_model(str(checkpoint.path))
        return Pretrained(str(checkpoint.path), config.model, config.shifted, model.weights())
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        raise ValueError(f"model.init_from: {source} holds neither a checkpoint of a run nor a config.json")
    return read_qwen2(folder if folder.is_dir() else _download(source), source)


def fit_weights(pretrained: Pretrained, settings: ModelSettings) -> dict[str, Tensor]:
    """Its weights for a model of this shape, the vocabulary cut or grown to fit.

    Raises:
        ValueError: the model section has another shape; the message names both numbers.
    """
    found = [(key, getattr(settings, key), getattr(pretrained.settings, key)) for key in SHAPE]
    problems = [f"  {key}: {ours} in the settings, {theirs} there" for key, ours, theirs in found if ours != theirs]
    ours, theirs = settings.learned_positions, pretrained.settings.learned_positions
    if theirs is not None and ours != theirs:
        problems.append(f"  learned_positions: {ours} in the settings, {theirs} there")
    if settings.tie_word_embeddings and not pretrained.settings.tie_word_embeddings:
        problems.append("  tie_word_embeddings: true in the settings, there the head is a matrix of its own")
    if problems:
        raise ValueError(f"the model section does not fit {pretrained.source}:\n" + "\n".join(problems))
    weights = dict(pretrained.weights)
    if not settings.tie_word_embeddings and pretrained.settings.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING].clone()
    if settings.learned_positions is not None and pretrained.settings.learned_positions is None:
        # Zeros, so that the model computes what its source does until training changes them.
        weights[POSITIONS] = torch.zeros(settings.learned_positions, settings.hidden_size)
    for name in (EMBEDDING, HEAD):
        if name in weights:
            weights[name] = fit_vocabulary(weights[name], settings.vocab_size)
    return weights


def fit_vocabulary(matrix: Tensor, vocab_size: int) -> Tensor:
    """Cut a matrix [V, D] to `vocab_size` rows, or append copies of its mean row.

    With the mean row, a new token's logit is the mean of all logits, so its probability is at most the mean one and
    the other tokens lose next to nothing. A random row can be the most probable token from the start.
    """
    n_new = vocab_size - len(matrix)
    if n_new <= 0:
        return matrix[:vocab_size]
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(n_new, -1)])


def _download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, from the local cache where it is there already.

    Raises:
        ValueError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # slow to import, and most runs need none

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, "*.safetensors", INDEX_FILE]))
    except Exception as error:  # the library raises a dozen kinds for what is one problem to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder here, and it cannot be fetched from the Hugging Face hub: {reason}"
        ) from None


def export_run(path: str, out: Path) -> str:
    """Write the newest checkpoint of a run directory (or a checkpoint folder) for transformers; says what it wrote.

    Averaged weights where there are any; the tokenizer where the data set has one.

    Raises:
        ValueError: no usable checkpoint, a model that transformers has no counterpart of, no tokenizer where the data
            has one, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no empty folder: name another, or delete it")
    model, config = load_model(path)
    if config.block_causal_size is not None:
        raise ValueError(
            f"{path} is block-causal, which transformers' Qwen2 cannot be: its checkpoints hold the weights under "
            "Hugging Face's names"
        )
    if config.model.learned_positions is not None:
        raise ValueError(
            f"{path} has learned positions, which transformers' Qwen2 has not: read it with `sampling.load_model`, or "
            f"take the weights from its checkpoints, where they have Hugging Face's names and {POSITIONS} is added to "
            "the token embeddings"
        )
    tokenizer = _tokenizer_of(config)
    eos_id = pad_id = None
    if tokenizer is not None:
        eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        write_tokenizer(out, tokenizer)
    exported = Pretrained(path, config.model, config.shifted, model.weights())
    write_qwen2(out, exported, causal=config.causal, mask_id=config.mask_id, eos_id=eos_id, pad_id=pad_id)
    lines = [f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"]
    if not config.causal:
        about = "the next token" if config.shifted else "the position's own token"
        lines.append(
            "note: a masked diffusion model looks both ways. transformers 5 does so by `is_causal: false` in "
            f"config.json, older versions ignore it and read causally. Logits at a position are about {about}, and "
            "generate() does not unmask."
        )
    return "\n".join(lines)


def _tokenizer_of(config: Config) -> Any:
    """The tokenizer of the data; None for Sudoku, which has none."""
    if isinstance(config.data, SudokuSettings):
        return None
    from data.load import find_tokenizer  # slow to import

    return find_tokenizer(config.data)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.hub", description="Export a trained model for Hugging Face transformers."
    )
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="write a folder for Qwen2ForCausalLM.from_pretrained")
    export.add_argument("checkpoint", metavar="RUN_DIR", help="run directory (its newest checkpoint) or checkpoint")
    export.add_argument("out", metavar="OUT_DIR", type=Path, help="new or empty folder")
    options = parser.parse_args(arguments)
    try:
        print(export_run(options.checkpoint, options.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
