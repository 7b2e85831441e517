"""Weights in and out: `model.init_from`, models of checkpoints, and folders of Hugging Face's Qwen2.

    python -m model.hub export runs/tinygsm_arm exported/tinygsm_arm    # for Hugging Face transformers
    python -m model.hub pack runs/sudoku_mini_puma packed/sudoku        # for sampling.py: settings, weights in bfloat16

Both write the settings of the run, so that `load_model` reads both. Parameter names are those of `Qwen2ForCausalLM`,
so weights need no renaming.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from base.commands import CommandParser, ends_with_message
from base.files import reported, write_text
from base.reading import read_json, reading
from config import Config, ModelSettings
from data.dataset import DataSet, DataSettings
from data.text import TOKENIZER_DIR, TOKENIZER_FILE, differing_tokens, load_tokenizer
from model.transformer import EMBEDDING, HEAD, POSITIONS, Transformer, build_model, count_parameters
from runtime.checkpoint import MANIFEST, chosen_folder, find_checkpoint, run_dir_of, split_choice
from runtime.command import shell_command
from runtime.config_file import dump_config, override_config, read_config

CONFIG_FILE = "config.json"
SETTINGS_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_MODULE, TOKENIZER_CLASS = "tokenization_saved", "SavedTokenizer"
TOKENIZER_CODE = f'''"""The tokenizer of this folder, for `AutoTokenizer` with `trust_remote_code=True`."""

from transformers import PreTrainedTokenizerFast


class {TOKENIZER_CLASS}(PreTrainedTokenizerFast):
    """Reads tokenizer.json as it is."""
'''
# Model settings that may differ from those of the weights in `model.init_from`, or are compared in their own way.
NOT_SHAPE = {"vocab_size", "tie_word_embeddings", "learned_positions", "shifted", "init_from"}


@dataclass(frozen=True)
class Pretrained:
    """Weights of a trained model."""

    source: str  # for messages
    settings: ModelSettings
    shifted: bool  # a position predicts the next token
    weights: dict[str, Tensor]  # by Hugging Face's names


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, and where it comes from."""

    model: Transformer
    config: Config
    source: str  # for messages and records
    step: int | None  # of the checkpoint; None for a folder written by this file


def load_model(path: str, overrides: Sequence[str] = ()) -> LoadedModel:
    """The model of a run directory (its newest checkpoint), a checkpoint folder or a folder written by this file.

    `runs/NAME@best` and `runs/NAME@5000` are other checkpoints of a run, see `runtime.checkpoint.find_checkpoint`.
    With averaged weights if there are any, unless the override `training.ema_decay=null` asks for those of the last
    update, which a folder written by this file lacks. Such a folder has the tokenizer of the model, and no data.

    Args:
        overrides: `section.key=value` settings that replace the run's.

    Raises:
        ValueError: no usable checkpoint, or a wrong setting.
    """
    config, weights, source, step = _find(path, overrides)
    return LoadedModel(_model_with(weights, config, source), config, source, step)


def _find(path: str, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Tensor], str, int | None]:
    """Settings and weights of what `load_model` reads, with the fields `source` and `step` of `LoadedModel`."""
    folder = Path(path)
    if _is_written_here(folder):
        config = read_config(folder / SETTINGS_FILE)
        config = config.model_copy(update={"data": config.data.with_tokenizer(folder)})
        is_average = config.training.ema_decay is not None
        config = override_config(config.model_dump(mode="json"), overrides, str(folder / SETTINGS_FILE))
        if is_average and config.training.ema_decay is None:
            raise ValueError(f"training.ema_decay=null: {path} holds only the averaged weights; name the run")
        with reading(f"{folder / WEIGHTS_FILE}", "write the folder again, or copy it again"):
            return config, _load_weights(folder / WEIGHTS_FILE), path, None
    _check_complete(folder)
    checkpoint = find_checkpoint(path)
    config = checkpoint.config(overrides)
    averaged = None if config.training.ema_decay is None else checkpoint.weights("ema")
    weights = averaged or checkpoint.weights("model")
    if weights is None:
        raise ValueError(f"checkpoint {checkpoint.path} holds no weights")
    return config, weights, f"checkpoint {checkpoint.path}", checkpoint.step


def _is_written_here(folder: Path) -> bool:
    """Whether this file wrote the folder: settings and weights, no checkpoint."""
    return (folder / SETTINGS_FILE).exists() and (folder / WEIGHTS_FILE).exists() and not (folder / MANIFEST).exists()


def _check_complete(folder: Path) -> None:
    """Raise ValueError if the folder has one of the two files that this file writes, and no checkpoint instead."""
    found = {name: (folder / name).exists() for name in (SETTINGS_FILE, WEIGHTS_FILE)}
    if len(set(found.values())) == 2 and not (folder / MANIFEST).exists() and not (folder / "checkpoints").exists():
        missing = min(found, key=found.__getitem__)
        raise ValueError(f"{folder / missing} is missing, and there are no checkpoints: write or copy the folder again")


def _load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError unless all are finite floating-point numbers."""
    weights = load_file(file)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has {tensor.dtype}, which is not floating point")
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no numbers of one byte
        if wide.numel() and not torch.stack(wide.aminmax()).isfinite().all():  # quicker than asking each number
            raise ValueError(f"{name} has numbers that are not finite")
    return weights


def _is_run(source: str) -> bool:
    """Whether the source is a checkpoint or a run directory."""
    folder, choice = split_choice(source)
    if choice is not None or (folder / MANIFEST).exists():
        return True
    return (folder / "checkpoints").is_dir() and not _is_written_here(folder)


def _model_with(weights: dict[str, Tensor], config: Config, source: str) -> Transformer:
    """The model of the settings with these weights; BadInput, which names the source, if they do not fit."""
    remedy = "the settings describe another model; leave out overrides of the model section"
    with reading(f"{source}: weights", remedy):
        n_found, n_needed = sum(map(Tensor.numel, weights.values())), count_parameters(config.model)
        if n_found != n_needed:  # before a model is built whose size only the settings give
            raise ValueError(f"they have {n_found:,} parameters, the model of the settings has {n_needed:,}")
    model = build_model(config)
    with reading(f"{source}: weights", remedy):
        model.load_weights(weights)
    return model.eval()


def check_init_from(source: str) -> None:
    """Raise ValueError if `model.init_from` is a local folder, or a checkpoint of a run, that is not there.

    Quick, so that it can come first.
    """
    folder, choice = split_choice(source)
    if choice is not None and folder.is_dir():
        chosen_folder(folder, choice)
    if folder.exists() or not source.startswith(("runs/", "./", "../", "/", "~")):  # else a name on the hub
        return
    config = Path("yaml_files") / f"{folder.name}.yaml"
    if source.startswith("runs/") and (Path(__file__).parents[1] / config).exists():
        raise ValueError(f"model.init_from: {source} does not exist. Train it first: python train.py --config {config}")
    raise ValueError(f"model.init_from: {source} does not exist")


def tokenizer_folder(source: str) -> Path | None:
    """Where a run, a checkpoint or a folder written by this file keeps its tokenizer; None: `source` is another.

    The folder is missing if the data has no tokenizer.
    """
    folder, _ = split_choice(source)
    if _is_run(source):
        return (run_dir_of(folder) if (folder / MANIFEST).exists() else folder) / TOKENIZER_DIR
    return folder if _is_written_here(folder) else None


def initial_data(config: Config) -> DataSettings:
    """The data settings of a run that starts from `model.init_from`: with its tokenizer if one would be trained.

    Raises:
        ValueError: one would be trained, and the weights are not of a run that has one.
    """
    source = config.model.init_from
    assert source is not None
    if not config.data.trains_tokenizer:
        return config.data
    folder = tokenizer_folder(source)
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        remedy = f"set data.tokenizer: {source}"
        if folder is not None:
            remedy = f"copy its own into that run as {folder.name}/, or set data.tokenizer"
        raise ValueError(
            "data.tokenizer is null, so a tokenizer would be trained whose tokens are not those of model.init_from "
            f"{source}: {remedy}"
        )
    return config.data.with_tokenizer(folder)


def check_initial_tokenizer(source: str, data: DataSet) -> None:
    """Raise ValueError if the run `model.init_from` has a tokenizer in which a token of the data is another text."""
    folder = tokenizer_folder(source)
    if folder is None or not (folder / TOKENIZER_FILE).is_file() or data.tokenizer is None:
        return
    theirs = load_tokenizer(str(folder))
    if changed := differing_tokens(data.tokenizer, theirs):
        ours, other = (each.convert_ids_to_tokens(changed[0]) for each in (data.tokenizer, theirs))
        raise ValueError(
            f"the tokenizer of the data is not that of model.init_from {source}: {len(changed)} tokens differ, such as "
            f"{changed[0]}, {ours!r} in the data and {other!r} there. Set data.tokenizer: {folder}, or start from "
            "other weights"
        )


def load_initial_weights(model: Transformer, config: Config) -> None:
    """Load the weights of `model.init_from` into `model`, with the vocabulary resized; averaged ones if a run has them.

    Raises:
        ValueError: the weights cannot be read or do not fit the settings.
    """
    assert config.model.init_from is not None
    pretrained = _read(config.model.init_from)
    if pretrained.shifted != config.shifted:
        remedy = "leave model.shifted out" if pretrained.shifted else "set model.shifted: false"
        if pretrained.shifted and config.block_causal_size is not None:
            remedy += ", and set objective.block_attention: prefix, since block_causal does not support shifted scores"
        target = "the next token" if pretrained.shifted else "its own token"
        raise ValueError(
            f"model.shifted is {config.shifted}, but in {pretrained.source} a position predicts {target}: {remedy}"
        )
    weights = fit_weights(pretrained, config.model)
    with reading(f"model.init_from: {pretrained.source}", "it must hold the weights that its settings describe"):
        model.load_weights(weights)


def _read(source: str) -> Pretrained:
    """Read what `load_model` reads, a Qwen2 folder, or a model of the Hugging Face hub."""
    folder = Path(source)
    if _is_run(source) or (_is_written_here(folder) and not (folder / CONFIG_FILE).exists()):
        config, weights, found, _ = _find(source)
        with reading(f"{found}: weights", "name another in model.init_from, or copy it again"):
            _check_vocabulary(weights, config.model)
        # Packed ones are in bfloat16, which would round the mean row of a larger vocabulary.
        weights = {name: tensor.float() for name, tensor in weights.items()}
        return Pretrained(found, config.model, config.shifted, weights)
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        _check_complete(folder)
        raise ValueError(f"model.init_from: {source} holds neither a checkpoint nor a config.json")
    return read_qwen2(folder if folder.is_dir() else _download(source), source)


def _check_vocabulary(weights: dict[str, Tensor], settings: ModelSettings) -> None:
    """Raise ValueError unless embedding and head have the size that the settings of the weights say.

    `fit_weights` changes their number of rows, after which a wrong number is not noticed.
    """
    if EMBEDDING not in weights:
        raise ValueError(f"{EMBEDDING} is missing")
    shape = (settings.vocab_size, settings.hidden_size)
    for name in (EMBEDDING, HEAD):
        if name in weights and weights[name].shape != shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}, but the settings say {list(shape)}")


def fit_weights(pretrained: Pretrained, settings: ModelSettings) -> dict[str, Tensor]:
    """The weights for a model of these settings, with the vocabulary resized.

    Raises:
        ValueError: other settings differ; the message names both values and gives a section that fits.
    """
    ours, theirs = (
        each.model_copy(update={"num_key_value_heads": each.n_key_value_heads})
        for each in (settings, pretrained.settings)
    )
    shape = [key for key in ModelSettings.model_fields if key not in NOT_SHAPE]
    differing = [key for key in shape if getattr(ours, key) != getattr(theirs, key)]
    if theirs.learned_positions not in (None, ours.learned_positions):
        differing.append("learned_positions")
    if ours.tie_word_embeddings and not theirs.tie_word_embeddings:
        differing.append("tie_word_embeddings")
    if differing:
        listed = "\n".join(
            f"  {key}: {_yaml(getattr(ours, key))} in the settings, {_yaml(getattr(theirs, key))} in the weights"
            for key in differing
        )
        kept: dict[str, Any] = {"init_from": ours.init_from, "shifted": ours.shifted}
        kept["vocab_size"] = max(ours.vocab_size, theirs.vocab_size)
        if theirs.learned_positions is None:
            kept["learned_positions"] = ours.learned_positions
        section = {"model": theirs.model_copy(update=kept).model_dump(exclude_defaults=True)}
        raise ValueError(
            f"the model section does not fit {pretrained.source}:\n{listed}\nThis one does:\n"
            + yaml.safe_dump(section, sort_keys=False).rstrip()
        )
    weights = dict(pretrained.weights)
    if not settings.tie_word_embeddings and pretrained.settings.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING].clone()
    if settings.learned_positions is not None and pretrained.settings.learned_positions is None:
        # Zeros: before training the model computes the same as the one that it starts from.
        weights[POSITIONS] = torch.zeros(settings.learned_positions, settings.hidden_size)
    for name in (EMBEDDING, HEAD):
        if name in weights:
            weights[name] = fit_vocabulary(weights[name], settings.vocab_size)
    return weights


def _yaml(value: float | bool | None) -> str:
    """A value as it is written in a YAML file."""
    return yaml.safe_dump(value).partition("\n")[0]


def fit_vocabulary(matrix: Tensor, vocab_size: int) -> Tensor:
    """Truncate a matrix [V, D] to `vocab_size` rows, or append copies of its mean row.

    With the mean row, a new token's logit is the mean of all logits, so its probability is at most the average.
    With a random row, a new token could be the most probable one.
    """
    n_new = vocab_size - len(matrix)
    if n_new <= 0:
        return matrix[:vocab_size]
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(n_new, -1)])


def fetch_initial_weights(source: str) -> None:
    """Download the model of `model.init_from` if it is a Hugging Face name. Raises ValueError."""
    if not (_is_run(source) or Path(source).exists()):
        _download(source)


def _download(name: str) -> Path:
    """Download a model of the Hugging Face hub unless it is in the local cache; returns its folder.

    Raises:
        ValueError: the download failed.
    """
    from huggingface_hub import snapshot_download  # slow to import

    with reading(f"model.init_from: {name!r} is not a folder, and on the Hugging Face hub it", "name a folder"):
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, "*.safetensors", INDEX_FILE]))


def read_qwen2(folder: Path, source: str) -> Pretrained:
    """Read config.json and the safetensors files of a Qwen2 or Qwen2.5 folder.

    Raises:
        ValueError: another architecture, a variant that `Transformer` does not implement, or unreadable files.
    """
    with reading(f"Qwen2 model {source}", "name another in model.init_from, or copy it again"):
        raw = read_json(folder / CONFIG_FILE)
        settings = _read_settings(raw)
        index, names = folder / INDEX_FILE, [WEIGHTS_FILE]
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for name in names:
            file = folder / Path(name).name
            if not file.is_file():
                raise ValueError(f"{file.name} is missing")
            weights |= _load_weights(file)
        if settings.tie_word_embeddings:
            weights.pop(HEAD, None)
        _check_vocabulary(weights, settings)
        shifted = raw.get("next_token_shift", raw.get("is_causal", True))
        if type(shifted) is not bool:
            raise ValueError(f"next_token_shift {shifted!r} is not true or false")
    return Pretrained(source, settings, shifted, weights)


def write_qwen2(
    folder: Path, model: Pretrained, *, causal: bool, mask_id: int, eos_id: int | None, pad_id: int | None
) -> None:
    """Write a folder that `Qwen2ForCausalLM.from_pretrained` opens with equal logits.

    For a bidirectional model config.json has `is_causal: false`, which transformers 5 uses and older versions ignore.
    """
    settings = model.settings
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **settings.model_dump(exclude={"init_from", "shifted", "num_key_value_heads", "rotary", "learned_positions"}),
        "num_key_value_heads": settings.n_key_value_heads,
        "hidden_act": "silu",
        "use_sliding_window": False,
        # Of transformers 5; version 4 reads rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "dtype": "float32",
        "is_causal": causal,
        "next_token_shift": model.shifted,
        "mask_token_id": mask_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    generation = {"do_sample": False, "eos_token_id": eos_id, "pad_token_id": pad_id, "suppress_tokens": [mask_id]}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.weights.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for name, content in ((CONFIG_FILE, config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_qwen2_has(weights: dict[str, Tensor], settings: ModelSettings, path: str) -> None:
    """Raise ValueError if transformers' Qwen2 has no place for some of the weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        names = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=settings.num_hidden_layers)).state_dict().keys()
    if unknown := weights.keys() - names:
        raise ValueError(
            f"{path} has weights that transformers' Qwen2 has not, such as {min(unknown)}: read it with "
            "`model.hub.load_model`"
        )


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a fast tokenizer so that `AutoTokenizer` opens it unchanged next to the config.json of `write_qwen2`.

    For `model_type: qwen2`, transformers 5 replaces any `tokenizer_class` other than Qwen2Tokenizer by Qwen2Tokenizer,
    which reads the vocabulary and merges of tokenizer.json but splits text by its own rules. An `auto_map` in
    tokenizer_config.json disables the replacement. `auto_map` must name a class in a file of the folder; that class is
    used only with `trust_remote_code=True` and tokenizes the same.
    """
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    # Otherwise transformers 4 also returns token_type_ids, which Qwen2 does not accept.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["auto_map"] = {"AutoTokenizer": [None, f"{TOKENIZER_MODULE}.{TOKENIZER_CLASS}"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / f"{TOKENIZER_MODULE}.py").write_text(TOKENIZER_CODE, encoding="utf-8")


def _read_settings(raw: dict[str, Any]) -> ModelSettings:
    """The model settings of a config.json, with Qwen2's defaults for missing keys."""
    if raw.get("model_type") != "qwen2":
        raise ValueError(f"its model_type is {raw.get('model_type')!r}, not 'qwen2'")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "use_sliding_window": raw.get("use_sliding_window", False),
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "head_dim": raw.get("head_dim") not in (None, raw["hidden_size"] // raw["num_attention_heads"]),
    }
    if any(unsupported.values()):
        listed = ", ".join(key for key, wrong in unsupported.items() if wrong)
        raise ValueError(f"unsupported {listed}")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return ModelSettings(
        **{key: raw[key] for key in same},
        num_key_value_heads=raw.get("num_key_value_heads"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    )


def _check_out(out: Path) -> None:
    """Raise ValueError unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: name another, or delete it")


def pack_run(path: str, out: Path) -> str:
    """Write what sampling needs of a run directory (its newest checkpoint) or checkpoint folder; returns a message.

    That is the settings, the weights in bfloat16 (averaged ones if there are any), and the tokenizer if the data has
    one. Unlike `export_run` it takes every model. `load_model` reads the folder.

    Raises:
        ValueError: no usable checkpoint, a missing tokenizer, or `out` is not empty.
    """
    _check_out(out)
    loaded = load_model(path)
    model, config = loaded.model, loaded.config
    tokenizer = config.open_data().tokenizer
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.weights().items()}
    with reported(out):
        out.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            write_tokenizer(out, tokenizer)
        save_file(weights, out / WEIGHTS_FILE, metadata={"format": "pt"})
    write_text(out / SETTINGS_FILE, dump_config(config))
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    files = ", ".join(sorted(file.name for file in out.iterdir()))
    command = shell_command("sampling.py", "--checkpoint", out)
    return f"wrote {out}: {files}, {n_bytes / 1e6:.1f} MB; sample from it with: {command}"


def export_run(path: str, out: Path) -> str:
    """Export a run directory (its newest checkpoint) or checkpoint folder for transformers; returns a message.

    Writes the averaged weights if there are any, and the tokenizer if the data has one.

    Raises:
        ValueError: no usable checkpoint, a model that transformers does not implement, a missing tokenizer, or `out`
            is not empty.
    """
    _check_out(out)
    loaded = load_model(path)
    model, config = loaded.model, loaded.config
    if config.block_causal_size is not None:
        raise ValueError(
            f"{path} is block-causal, which transformers' Qwen2 does not support: read it with `model.hub.load_model`"
        )
    if config.model.learned_positions is not None:
        raise ValueError(
            f"{path} has learned positions, which transformers' Qwen2 does not support: read it with "
            f"`model.hub.load_model`, or take the weights from its checkpoints, where they have Hugging Face's names; "
            f"{POSITIONS} is added to the token embeddings"
        )
    _check_qwen2_has(model.weights(), config.model, path)
    tokenizer = config.open_data().tokenizer
    eos_id = pad_id = None
    if tokenizer is not None:
        eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    exported = Pretrained(path, config.model, config.shifted, model.weights())
    with reported(out):
        if tokenizer is not None:
            write_tokenizer(out, tokenizer)
        write_qwen2(out, exported, causal=config.causal, mask_id=config.mask_id, eos_id=eos_id, pad_id=pad_id)
    write_text(out / SETTINGS_FILE, dump_config(config))
    lines = [f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"]
    if not config.causal:
        target = "the next token" if config.shifted else "the token at that position"
        lines.append(
            "note: the model is bidirectional (`is_causal: false` in config.json). transformers 5 supports this; older "
            f"versions ignore it and run the model causally. Logits at a position predict {target}; generate() does "
            "not unmask."
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line; bad input ends with one message and exit status 2."""
    parser = CommandParser(prog="python -m model.hub", description="Write a trained model as a folder of its own.")
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="write a folder for Qwen2ForCausalLM.from_pretrained")
    export.set_defaults(write=export_run)
    pack = commands.add_parser("pack", help="write a small folder for sampling.py: settings and weights in bfloat16")
    pack.set_defaults(write=pack_run)
    for command in (export, pack):
        command.add_argument(
            "checkpoint",
            metavar="RUN_DIR",
            help="run directory (its newest checkpoint), RUN@best, RUN@STEP or checkpoint",
        )
        command.add_argument("out", metavar="OUT_DIR", type=Path, help="new or empty folder")
    options = parser.parse_args(arguments)
    with ends_with_message():
        print(options.write(options.checkpoint, options.out))


if __name__ == "__main__":
    main()
