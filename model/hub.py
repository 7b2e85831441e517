"""Qwen2 checkpoints in and out: the folders that Hugging Face's `Qwen2ForCausalLM` reads and writes.

    python -m model.hub export runs/tinygsm_arm exported/tinygsm_arm

Parameter names are the same on both sides, so only the file layout needs care. The command itself stands in
`pretrained.py`, with all that makes weights and runs fit each other.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import ModelSettings

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_MODULE, TOKENIZER_CLASS = "tokenization_saved", "SavedTokenizer"
TOKENIZER_CODE = f'''"""The tokenizer of this folder, for `AutoTokenizer` with `trust_remote_code=True`."""

from transformers import PreTrainedTokenizerFast


class {TOKENIZER_CLASS}(PreTrainedTokenizerFast):
    """Reads tokenizer.json as it is."""
'''
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """A trained model from elsewhere."""

    source: str  # for messages
    settings: ModelSettings
    shifted: bool  # what it computes at a position is about the next token
    weights: dict[str, Tensor]  # by Hugging Face's names


def read_qwen2(folder: Path, source: str) -> Pretrained:
    """Read config.json and the safetensors files of a Qwen2 or Qwen2.5 folder.

    Raises:
        ValueError: another architecture, a variant that `Transformer` has no counterpart of, or unreadable files.
    """
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = _read_settings(raw)
        index, names = folder / INDEX_FILE, [WEIGHTS_FILE]
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for name in names:
            weights |= load_file(folder / Path(name).name)
    except KeyError as error:
        raise ValueError(f"{source} is no Qwen2 model that can be read: it lacks {error}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{source} is no Qwen2 model that can be read: {error}") from None
    if settings.tie_word_embeddings:
        weights.pop(HEAD, None)
    causal = raw.get("is_causal", True)
    return Pretrained(source, settings, raw.get("next_token_shift", causal), weights)


def write_qwen2(
    folder: Path, model: Pretrained, *, causal: bool, mask_id: int, eos_id: int | None, pad_id: int | None
) -> None:
    """Write a folder that `Qwen2ForCausalLM.from_pretrained` opens with equal logits.

    Of a bidirectional model config.json says `is_causal: false`, which transformers 5 obeys and older ones ignore.
    """
    settings = model.settings
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **settings.model_dump(
            exclude={"causal", "init_from", "shifted", "num_key_value_heads", "rotary", "learned_positions"}
        ),
        "num_key_value_heads": settings.n_key_value_heads,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},  # transformers 5; 4: rope_theta
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


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a fast tokenizer so that `AutoTokenizer` opens it unchanged beside the config.json of `write_qwen2`.

    For `model_type: qwen2`, transformers 5 takes any `tokenizer_class` other than Qwen2Tokenizer for a mistake and
    builds Qwen2Tokenizer, which reads the vocabulary and merges of tokenizer.json but splits text by its own rules. An
    `auto_map` in tokenizer_config.json turns this replacement off; the named class is then used. `auto_map` must name
    a class in a file of the folder; it runs only with `trust_remote_code=True` and tokenizes the same.
    """
    tokenizer.save_pretrained(folder)
    if type(tokenizer).__name__.removesuffix("Fast") == "Qwen2Tokenizer":
        return
    path = folder / TOKENIZER_CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same, by the name that transformers 4 knows too
    # Otherwise transformers 4 also returns token_type_ids, which Qwen2 does not accept.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["auto_map"] = {"AutoTokenizer": [None, f"{TOKENIZER_MODULE}.{TOKENIZER_CLASS}"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / f"{TOKENIZER_MODULE}.py").write_text(TOKENIZER_CODE, encoding="utf-8")


def _read_settings(raw: dict[str, Any]) -> ModelSettings:
    """The shape in a config.json, with Qwen2's defaults for what it leaves out."""
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
        raise ValueError(f"this model has no counterpart of its {listed}")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return ModelSettings(
        **{key: raw[key] for key in same},
        num_key_value_heads=raw.get("num_key_value_heads"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    )


if __name__ == "__main__":
    # The command needs run directories, of which nothing in model/ knows.
    runpy.run_module("pretrained", run_name="__main__", alter_sys=True)
