"""Qwen2 folders in and out, and runs that start from trained weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import PUMA, ROOT, SHARED, UNIFORM, run_python, tiny_gsm_settings, tiny_settings
from safetensors.torch import load, save_file
from torch import Tensor

import train
from base.files import WriteError
from config import Config, ModelSettings
from data.text import load_tokenizer
from data.word_problems import generate_problems
from model import hub
from model.hub import fit_vocabulary, load_initial_weights, load_model, read_qwen2
from model.token_predictions import predict_tokens
from model.transformer import POSITIONS, Transformer, build_model
from runtime.checkpoint import find_checkpoint, open_checkpoint
from runtime.config_file import flatten, parse_config, read_config
from samplers.causal import sample_causal

AUTOREGRESSIVE = {"name": "autoregressive"}
QWEN = SHARED / "qwen2_tokenizer"
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_reference(folder: Path, *, shards: bool = False, **changes: Any) -> Any:
    """A random Qwen2 model of transformers and the folder it writes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**(SHAPE | {"initializer_range": 0.3} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder, max_shard_size="10KB" if shards else "5GB")
    return model


def make_config(
    data_dir: Path, source: Path | str, objective: dict = AUTOREGRESSIVE, model: dict | None = None
) -> Config:
    settings = tiny_settings(dict(objective), data_dir)
    settings["model"] = SHAPE | {"init_from": str(source)} | (model or {})
    return parse_config(settings, "test")


def loaded(config: Config) -> Transformer:
    model = build_model(config)
    load_initial_weights(model, config)
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 20, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def autoregressive_run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A finished run of six steps with averaged weights."""
    folder = tmp_path_factory.mktemp("arm")
    settings = tiny_settings(AUTOREGRESSIVE, data_dir)
    del settings["model"]["learned_positions"]  # which the export has no counterpart of
    (folder / "arm.json").write_text(json.dumps(settings))  # JSON is YAML too
    train.main(["--config", str(folder / "arm.json"), "--run-dir", str(folder / "run")])
    return folder / "run"


# Reading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_a_qwen2_folder_gives_equal_logits(tied, shards, tmp_path, tokens, data_dir):
    reference = write_reference(tmp_path / "qwen2", shards=shards, tie_word_embeddings=tied)
    assert (tmp_path / "qwen2" / "model.safetensors").exists() != shards
    model = loaded(make_config(data_dir, tmp_path / "qwen2", model={"tie_word_embeddings": tied}))
    torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)


def test_a_diffusion_model_scores_the_next_token_with_them(tmp_path, tokens, data_dir):
    reference = write_reference(tmp_path / "qwen2")
    config = make_config(data_dir, tmp_path / "qwen2", PUMA)
    assert config.shifted
    assert not config.causal
    model = loaded(config)
    expected = reference(tokens[:, :1]).logits[:, 0]
    expected[:, 19] = -torch.inf
    causal = loaded(make_config(data_dir, tmp_path / "qwen2"))
    found = predict_tokens(causal.hidden_states(tokens)[:, 1], causal.lm_head.weight, 19)
    assert torch.equal(found.token, expected.argmax(1)), "what is computed at position 0 is about token 1"
    weight = torch.zeros(tokens.shape)
    weight[:, 4] = 1 / 3
    nll = -model.logits(tokens)[:, 3].log_softmax(1).gather(1, tokens[:, 4:5]).mean()
    torch.testing.assert_close(model(tokens, tokens, weight).loss, nll)


@pytest.mark.parametrize(
    ("facts", "shifted"),
    [({}, True), ({"is_causal": False}, False), ({"is_causal": False, "next_token_shift": True}, True)],
)
def test_a_folder_says_what_its_positions_predict(facts, shifted, tmp_path):
    write_reference(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    assert read_qwen2(tmp_path, "a test").shifted == shifted


def test_rotary_base_is_read_in_old_and_new_spelling(tmp_path, tokens, data_dir):
    reference = write_reference(
        tmp_path / "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5
    )
    same = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
    new = loaded(make_config(data_dir, tmp_path / "qwen2", model=same))
    raw = json.loads((tmp_path / "qwen2" / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "qwen2" / "config.json").write_text(json.dumps(raw | {"rope_theta": 1000000}))
    old = loaded(make_config(data_dir, tmp_path / "qwen2", model=same))
    for model in (new, old):
        torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("runs/tinygsm_mini_arm", "Train it first: python train.py --config yaml_files/tinygsm_mini_arm.yaml"),
        ("runs/tinygsm_mini_arm@best", "--config yaml_files/tinygsm_mini_arm.yaml"),
        ("./tinygsm_mini_arm", "model.init_from: ./tinygsm_mini_arm does not exist"),
        ("runs/my_own", "runs/my_own does not exist"),
    ],
)
def test_a_run_that_is_not_there_is_named_before_any_work_on_data(
    source, expected, tmp_path, config_file, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = config_file(PUMA, model__init_from=source, data__data_dir=str(tmp_path / "boards"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "boards").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [15, 20, 23])
def test_the_vocabulary_is_cut_or_grown(vocab_size, tied, tmp_path, data_dir):
    reference = write_reference(tmp_path / "qwen2", tie_word_embeddings=True)
    model = loaded(
        make_config(data_dir, tmp_path / "qwen2", model={"vocab_size": vocab_size, "tie_word_embeddings": tied})
    )
    tokens = torch.arange(15)[None]
    logits, expected = model.logits(tokens), reference(tokens).logits
    n_common = min(vocab_size, 20)
    assert logits.shape == (1, 15, vocab_size)
    torch.testing.assert_close(logits[..., :n_common], expected[..., :n_common])
    if vocab_size > 20:
        new = logits.softmax(2)[..., 20:]
        assert (new < 1 / 20).all(), "a new token is no more probable than the mean token"
        assert torch.equal(model.model.embed_tokens.weight[20], model.model.embed_tokens.weight[22])


def test_new_rows_are_the_mean_row():
    matrix = torch.tensor([[1.0, 5.0], [3.0, 1.0]])
    assert fit_vocabulary(matrix, 4).tolist() == [[1, 5], [3, 1], [2, 3], [2, 3]]
    assert fit_vocabulary(matrix, 1).tolist() == [[1, 5]]


def test_another_shape_is_refused_with_both_numbers(tmp_path, data_dir):
    write_reference(tmp_path / "qwen2")
    other = {"hidden_size": 32, "num_hidden_layers": 5, "rope_theta": 1e6, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match="does not fit") as error:
        loaded(make_config(data_dir, tmp_path / "qwen2", model=other))
    numbers = (("hidden_size", 32, 16), ("num_hidden_layers", 5, 2), ("rope_theta", 1000000.0, 10000.0))
    for key, ours, theirs in numbers:
        assert f"{key}: {ours} in the settings, {theirs} in the weights" in str(error.value)
    problems, section = str(error.value).split("\nmodel:\n")
    assert "tie_word_embeddings: true in the settings, false in the weights" in problems
    assert "intermediate_size" not in problems
    fitting = yaml.safe_load(section)
    assert fitting["init_from"] == str(tmp_path / "qwen2")
    del other["tie_word_embeddings"], other["rope_theta"]  # the message leaves defaults out
    loaded(make_config(data_dir, tmp_path / "qwen2", model=other | fitting))


@pytest.mark.parametrize("given", [{"num_key_value_heads": 4}, {"num_key_value_heads": None}])
def test_settings_are_named_as_in_yaml_files(given, tmp_path, data_dir):
    write_reference(tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"\n  num_key_value_heads: 4 in the settings, 2 in the weights\n"):
        loaded(make_config(data_dir, tmp_path / "qwen2", model=given))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "rope_scaling"),
        ({"head_dim": 64}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_variants_without_a_counterpart_are_refused(change, expected, tmp_path):
    write_reference(tmp_path / "qwen2")
    raw = json.loads((tmp_path / "qwen2" / "config.json").read_text()) | change
    (tmp_path / "qwen2" / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    with pytest.raises(ValueError, match=expected):
        read_qwen2(tmp_path / "qwen2", "the source")


def test_broken_folders_are_refused(tmp_path, data_dir):
    folder = tmp_path / "qwen2"
    write_reference(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    weights = load(content)
    config = make_config(data_dir, folder)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"Qwen2 model .* cannot be read"):
        loaded(config)
    weights.pop("model.norm.weight")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.* must hold the weights"):
        loaded(config)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        loaded(config)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither a checkpoint nor a config\.json"):
        loaded(config)


def test_a_name_is_fetched_from_the_hub(tmp_path, tokens, data_dir, monkeypatch):
    import huggingface_hub

    reference = write_reference(tmp_path / "cache")
    asked: list[str] = []

    def fetch(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = loaded(make_config(data_dir, "Qwen/Qwen2-tiny"))
    assert asked == ["Qwen/Qwen2-tiny"]
    torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)


def test_without_a_network_a_name_ends_with_one_message(config_file, tmp_path):
    config = config_file(model__init_from="Qwen/Qwen2.5-0.5B")
    result = run_python("train.py", "--config", config, "--run-dir", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "'Qwen/Qwen2.5-0.5B' is not a folder, and on the Hugging Face hub it cannot be read" in result.stderr


@pytest.mark.parametrize("source", ["runs/not/there", "/not/there"])
def test_a_folder_that_is_not_there_is_named(source, data_dir):
    with pytest.raises(ValueError, match=f"'{source}' is not a folder"):
        loaded(make_config(data_dir, source))


# Runs that start from others


def test_a_run_starts_with_the_averaged_weights_of_another(autoregressive_run, config_file, tmp_path):
    config = read_config(config_file(PUMA, model__init_from=str(autoregressive_run)))
    run, _ = train.build_or_restore(config, tmp_path / "run")
    assert run.averaged_model is not None
    for name, tensor in find_checkpoint(autoregressive_run).weights("ema").items():
        assert torch.equal(run.model.weights()[name], tensor), name
        assert torch.equal(run.averaged_model.weights()[name], tensor), name
    assert str(autoregressive_run) in train.start_message(run)


def test_a_resumed_run_no_longer_needs_what_it_started_from(autoregressive_run, config_file, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(autoregressive_run, source)
    config = str(config_file(PUMA, model__init_from=str(source)))

    def interrupted_save(run: Any, score: float | None) -> None:
        save(run, score)
        raise KeyboardInterrupt

    save = train.save_run
    train.main(["--config", config, "--run-dir", str(tmp_path / "straight")])
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", interrupted_save)
        with pytest.raises(SystemExit):
            train.main(["--config", config, "--run-dir", str(tmp_path / "broken")])
    shutil.rmtree(source)
    train.main(["--config", config, "--run-dir", str(tmp_path / "broken")])
    straight, broken = (find_checkpoint(tmp_path / name).weights("ema") for name in ("straight", "broken"))
    for name, tensor in straight.items():
        assert torch.equal(tensor, broken[name]), name
    loaded = load_model(str(tmp_path / "broken"))
    model, settings = loaded.model, loaded.config
    assert model.shifted
    assert settings.shifted


def test_a_chosen_checkpoint_of_a_run_is_loaded_packed_and_started_from(autoregressive_run, config_file, tmp_path):
    """The run has saved steps 3 and 6."""
    source = f"{autoregressive_run}@3"
    weights = open_checkpoint(autoregressive_run / "checkpoints" / "step_00000003").weights("ema")
    assert load_model(source).step == 3
    hub.pack_run(source, tmp_path / "packed")
    run, _ = train.build_or_restore(read_config(config_file(PUMA, model__init_from=source)), tmp_path / "run")
    for name, tensor in weights.items():
        assert torch.equal(run.model.weights()[name], tensor), name
        assert torch.equal(load_model(str(tmp_path / "packed")).model.weights()[name], tensor.bfloat16().float()), name


def test_a_model_of_the_hub_is_fetched_by_one_process_before_all_build_theirs(config_file, tmp_path, monkeypatch):
    def fetch(name: str) -> None:
        raise ValueError(f"{name} is fetched")

    monkeypatch.setattr(hub, "_download", fetch)
    monkeypatch.setattr(train, "build_run", lambda *_, **__: pytest.fail("built first"))
    with pytest.raises(ValueError, match="owner/name is fetched"):
        train.build_or_restore(read_config(config_file(PUMA, model__init_from="owner/name")), tmp_path / "run")


@pytest.mark.parametrize(
    ("choice", "message"),
    [("4", r"has no checkpoint of step 4: there are 3.*, 6"), ("last", "after @ comes best or a step")],
)
def test_a_checkpoint_to_start_from_that_is_not_there_is_refused_before_any_work(
    choice, message, autoregressive_run, config_file, tmp_path
):
    source = f"{autoregressive_run}@{choice}"
    config = read_config(config_file(PUMA, model__init_from=source, data__data_dir=str(tmp_path / "boards")))
    with pytest.raises(ValueError, match=message):
        train.build_or_restore(config, tmp_path / "run")
    assert not (tmp_path / "boards").exists()


def test_a_run_starts_from_a_packed_model(autoregressive_run, config_file, tmp_path):
    hub.pack_run(str(autoregressive_run), tmp_path / "packed")
    run, _ = train.build_or_restore(
        read_config(config_file(PUMA, model__init_from=str(tmp_path / "packed"))), tmp_path / "run"
    )
    for name, tensor in find_checkpoint(autoregressive_run).weights("ema").items():
        assert torch.equal(run.model.weights()[name], tensor.bfloat16().float()), name
    grown = loaded(read_config(config_file(PUMA, model__init_from=str(tmp_path / "packed"), model__vocab_size=8)))
    embedding = grown.model.embed_tokens.weight
    assert torch.equal(embedding[7], embedding[:6].mean(0)), "not rounded"
    assert load_model(str(tmp_path / "packed")).step is None
    assert load_model(str(autoregressive_run)).step == 6


def test_a_packed_model_is_one_for_all_readers(autoregressive_run, config_file, tmp_path):
    """Also with a folder in it that has the name of a run's checkpoints."""
    packed = tmp_path / "packed"
    hub.pack_run(str(autoregressive_run), packed)
    (packed / "checkpoints").mkdir()
    model = load_model(str(packed)).model
    run, _ = train.build_or_restore(read_config(config_file(PUMA, model__init_from=str(packed))), tmp_path / "run")
    for name, tensor in model.weights().items():
        assert torch.equal(run.model.weights()[name], tensor), name
    assert hub.tokenizer_folder(str(packed)) == packed


def test_weights_to_start_from_are_read_without_their_model(autoregressive_run, data_dir, monkeypatch):
    """It would take as much memory again."""
    shape = load_model(str(autoregressive_run)).config.model
    changes = {"init_from": str(autoregressive_run), "vocab_size": shape.vocab_size + 1}
    settings = tiny_settings(AUTOREGRESSIVE, data_dir) | {"model": shape.model_dump(exclude={"shifted"}) | changes}
    config = parse_config(settings, "test")
    model = build_model(config)
    monkeypatch.setattr(hub, "build_model", None)
    load_initial_weights(model, config)
    embedding = find_checkpoint(autoregressive_run).weights("ema")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight[-1], embedding.mean(0))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.tensor(1), "has torch.int64, which is not floating point"),
        (torch.tensor(True), "has torch.bool, which is not floating point"),
        (torch.tensor(1j), "has torch.complex64, which is not floating point"),
        (torch.tensor(float("nan")), "has numbers that are not finite"),
        (torch.tensor(float("-inf")), "has numbers that are not finite"),
    ],
)
def test_packed_weights_that_are_no_finite_numbers_are_refused(value, reason, autoregressive_run, tmp_path):
    hub.pack_run(str(autoregressive_run), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    weights = load(file.read_bytes())
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = torch.where(torch.arange(len(norm)) == 1, value, norm.to(value.dtype))
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"model\.norm\.weight {reason}\): write the folder again"):
        load_model(str(tmp_path / "packed"))


def test_packed_weights_of_one_byte_are_read_if_finite(autoregressive_run, tmp_path):
    hub.pack_run(str(autoregressive_run), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load(file.read_bytes()).items()}
    save_file(weights, file)
    assert load_model(str(tmp_path / "packed")).model.weights()["model.norm.weight"].isfinite().all()
    norm = weights["model.norm.weight"].float()
    norm[1] = torch.nan
    save_file(weights | {"model.norm.weight": norm.to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has numbers that are not finite"):
        load_model(str(tmp_path / "packed"))


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_a_packed_folder_without_one_of_its_files_is_refused_by_name(name, autoregressive_run, data_dir, tmp_path):
    packed = tmp_path / "packed"
    hub.pack_run(str(autoregressive_run), packed)
    (packed / name).unlink()
    for load_it in (lambda: load_model(str(packed)), lambda: loaded(make_config(data_dir, packed))):
        with pytest.raises(ValueError, match=f"packed/{name} is missing"):
            load_it()


@pytest.mark.parametrize("damage", ["rows", "name"])
def test_a_packed_vocabulary_that_its_settings_do_not_describe_is_refused(
    damage, autoregressive_run, config_file, tmp_path
):
    packed = tmp_path / "packed"
    hub.pack_run(str(autoregressive_run), packed)
    weights = load((packed / "model.safetensors").read_bytes())
    embedding = weights.pop("model.embed_tokens.weight")
    weights["model.embed_tokens.weight" if damage == "rows" else "other"] = embedding[:-1].contiguous()
    save_file(weights, packed / "model.safetensors")
    config = read_config(config_file(PUMA, model__init_from=str(packed)))
    with pytest.raises(ValueError, match=r"packed.*embed_tokens\.weight is .*: name another in model\.init_from"):
        train.build_or_restore(config, tmp_path / "run")


def test_a_table_of_positions_starts_at_zero_where_the_source_has_none(tmp_path, tokens, data_dir):
    """So that the model computes at first what its source does."""
    reference = write_reference(tmp_path / "qwen2")
    model = loaded(make_config(data_dir, tmp_path / "qwen2", model={"learned_positions": 40}))
    assert model.weights()[POSITIONS].shape == (40, 16)
    assert not model.weights()[POSITIONS].any()
    torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)


def test_a_table_of_positions_is_taken_over_or_refused_with_both_lengths(data_dir, tmp_path):
    path = tmp_path / "mdm.json"
    path.write_text(json.dumps(tiny_settings(dict(UNIFORM), data_dir)))
    train.main(["--config", str(path), "--run-dir", str(tmp_path / "mdm"), "training.max_steps=1"])
    settings = tiny_settings(dict(UNIFORM), data_dir)
    settings["model"] |= {"init_from": str(tmp_path / "mdm"), "shifted": False}
    table = loaded(parse_config(settings, "test")).weights()[POSITIONS]
    assert table.std() > 0.01
    assert torch.equal(table, find_checkpoint(tmp_path / "mdm").weights("ema")[POSITIONS])
    for length, problem in (
        (40, "learned_positions: 40 in the settings, 32 in the weights"),
        (None, "null in the settings, 32"),
    ):
        settings["model"]["learned_positions"] = length
        with pytest.raises(ValueError, match=problem):
            loaded(parse_config(settings, "test"))
    result = run_python("-m", "model.hub", "export", tmp_path / "mdm", tmp_path / "out")
    assert result.returncode == 2
    assert "learned positions, which transformers' Qwen2 does not support" in result.stderr
    assert not (tmp_path / "out").exists()


def test_whether_scores_are_shifted_must_agree_with_the_source(autoregressive_run, data_dir, tmp_path):
    def from_source(source: Path, objective: dict[str, Any] = UNIFORM, **model: Any) -> Config:
        settings = tiny_settings(dict(objective), data_dir)
        settings["model"] |= {"init_from": str(source), **model}
        return parse_config(settings, "test")

    with pytest.raises(ValueError, match=r"model\.shifted is False, but .* predicts the next token"):
        loaded(from_source(autoregressive_run, shifted=False))
    blocks = {"name": "block_uniform", "block_size": 8, "block_attention": "block_causal"}
    with pytest.raises(ValueError, match=r"block_causal' does not .* prefix, or model.shifted: false, which needs the"):
        from_source(autoregressive_run, blocks)
    with pytest.raises(ValueError, match=r"leave model\.shifted out, and set objective\.block_attention: prefix"):
        loaded(from_source(autoregressive_run, blocks, shifted=False))
    path = tmp_path / "mdm.json"
    path.write_text(json.dumps(tiny_settings(dict(UNIFORM), data_dir)))
    train.main(["--config", str(path), "--run-dir", str(tmp_path / "mdm"), "training.max_steps=1"])
    with pytest.raises(ValueError, match=r"predicts its own token: set model\.shifted: false"):
        loaded(from_source(tmp_path / "mdm"))
    model = loaded(from_source(tmp_path / "mdm", shifted=False))
    assert torch.equal(model.lm_head.weight, find_checkpoint(tmp_path / "mdm").weights("ema")["lm_head.weight"])


# Writing


def test_an_exported_autoregressive_model_opens_with_equal_logits(autoregressive_run, tmp_path):
    from transformers import Qwen2ForCausalLM

    out = tmp_path / "exported"
    result = run_python("-m", "model.hub", "export", autoregressive_run, out)
    assert result.returncode == 0, result.stderr
    model = load_model(str(autoregressive_run)).model
    reference = Qwen2ForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(0, 5, (4, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)
    written = sample_causal(model, torch.cat([tokens[:, :16], torch.full((4, 16), 5)], dim=1), 5)
    assert torch.equal(reference.generate(tokens[:, :16], max_new_tokens=16), written.tokens)
    again = read_qwen2(out, str(out))
    assert again.shifted
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in model.weights().items())
    result = run_python("-m", "model.hub", "export", autoregressive_run, out)
    assert result.returncode == 2
    assert "not an empty folder" in result.stderr
    result = run_python("-m", "model.hub", "export", tmp_path, tmp_path / "other")
    assert result.returncode == 2
    assert "no usable checkpoint" in result.stderr


def test_weights_that_qwen2_has_not_are_not_exported(autoregressive_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Transformer, "weights", lambda model: model.state_dict() | {"model.layers.0.self_attn.q_norm.weight": 0}
    )
    with pytest.raises(ValueError, match=r"Qwen2 has not, such as model\.layers\.0\.self_attn\.q_norm\.weight: read"):
        hub.export_run(str(autoregressive_run), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("shifted", [False, True])
def test_an_exported_diffusion_model_looks_both_ways(shifted, tmp_path, tokens):
    from transformers import Qwen2ForCausalLM

    settings = ModelSettings.model_validate(SHAPE | {"tie_word_embeddings": True, "rope_theta": 500.0})
    model = Transformer(settings, shifted=shifted).eval()
    source = hub.Pretrained("a test", settings, shifted, model.weights())
    hub.write_qwen2(tmp_path, source, causal=False, mask_id=19, eos_id=0, pad_id=1)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / name).read_text())
        assert (written["eos_token_id"], written["pad_token_id"]) == (0, 1), name
    reference = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model.logits(tokens), reference(tokens).logits)
    assert read_qwen2(tmp_path, "the same").shifted == shifted


def test_an_export_holds_the_tokenizer_of_the_data(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

    mini = read_config(ROOT / "yaml_files" / "tinygsm_mini_puma.yaml").model_dump(mode="json")
    mini["objective"] = AUTOREGRESSIVE
    mini["model"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mini["model"]["learned_positions"] = None
    mini["data"] |= {"data_dir": str(tmp_path / "data"), "n_train": 600, "n_test": 20}
    mini["training"] |= {"max_steps": 2, "batch_size": 4}
    mini["validation"] = {"n_examples": 2, "n_final_examples": 2, "n_loss_rows": 4}
    (tmp_path / "mini.json").write_text(json.dumps(mini))
    train.main(["--config", str(tmp_path / "mini.json"), "--run-dir", str(tmp_path / "run")])
    message = hub.export_run(str(tmp_path / "run"), tmp_path / "out")
    assert "tokenizer.json" in message
    hub.pack_run(str(tmp_path / "run"), tmp_path / "packed")
    prompt = load_model(str(tmp_path / "run")).config.open_data().encode("Anna has 5 books.")
    (tmp_path / "data").rename(tmp_path / "elsewhere")  # both folders hold all that sampling needs
    for folder, dtype in (("out", torch.float32), ("packed", torch.bfloat16)):
        loaded = load_model(str(tmp_path / folder))
        model, config = loaded.model, loaded.config
        assert np.array_equal(config.open_data().encode("Anna has 5 books."), prompt)
        weights = load_model(str(tmp_path / "run")).model.weights()
        assert all(torch.equal(tensor, weights[name].to(dtype).float()) for name, tensor in model.weights().items())
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = load_model(str(tmp_path / "run")).config.open_data().tokenizer
    texts = [f"{problem.question}\n{problem.code}" for problem in generate_problems(50, seed=5)]
    assert_same_tokenizer(tokenizer, own, texts)
    assert set(tokenizer(texts[0])) == {"input_ids", "attention_mask"}
    trusting = "import json, sys; from transformers import AutoTokenizer; texts = json.load(sys.stdin); tokenizer = "
    trusting += "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True); "
    trusting += "print(type(tokenizer).__name__, json.dumps([tokenizer(text).input_ids for text in texts]))"
    result = subprocess.run(
        [sys.executable, "-c", trusting, str(tmp_path / "out")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    name, ids = result.stdout.split(" ", 1)
    assert name == "SavedTokenizer"
    assert json.loads(ids) == own(texts).input_ids
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.eos_token_id is not None
    assert generation.suppress_tokens == [511]
    prompt = tokenizer("Anna has 5 books.\n", return_tensors="pt").input_ids
    reference: Any = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    answer = reference.generate(prompt, max_new_tokens=20)
    loaded = load_model(str(tmp_path / "run"))
    model, config = loaded.model, loaded.config
    xt = torch.cat([prompt, torch.full((1, 20), config.mask_id)], dim=1)
    ours = sample_causal(model, xt, config.mask_id, eos_id=tokenizer.eos_token_id)
    assert torch.equal(ours.tokens[:, : answer.shape[1]], answer)


def assert_same_tokenizer(found: Any, own: Any, texts: list[str]) -> None:
    assert found(texts).input_ids == own(texts).input_ids
    assert found.backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
    assert (len(found), found.eos_token_id, found.pad_token_id) == (len(own), own.eos_token_id, own.pad_token_id)
    assert found.decode(found(texts[0]).input_ids) == texts[0]


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the Qwen2 tokenizer in ../shared/data")
def test_qwen2s_own_tokenizer_is_written_unchanged(tmp_path):
    from transformers import AutoTokenizer

    own = load_tokenizer(str(QWEN))
    settings = ModelSettings.model_validate(SHAPE)
    source = hub.Pretrained("a test", settings, True, Transformer(settings, shifted=True).weights())
    hub.write_qwen2(tmp_path, source, causal=True, mask_id=19, eos_id=0, pad_id=0)
    hub.write_tokenizer(tmp_path, own)
    with open(SHARED / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        questions = [json.loads(next(file))["question"] for _ in range(50)]
    assert_same_tokenizer(AutoTokenizer.from_pretrained(tmp_path), own, questions)
    assert AutoTokenizer.from_pretrained(QWEN)(questions).input_ids == own(questions).input_ids


@pytest.mark.parametrize("name", ["baseline", "puma"])
def test_experiments_from_an_autoregressive_model_change_nothing_else(name):
    plain, started = (
        flatten(read_config(ROOT / "yaml_files" / f"tinygsm_{stem}.yaml")) for stem in (name, f"{name}_from_arm")
    )
    assert {key for key in plain if plain[key] != started[key]} == {"model.init_from"}
    source = flatten(read_config(ROOT / "yaml_files" / f"{Path(started['model.init_from']).name}.yaml"))
    for section in ("model", "data", "training"):
        own = {key: value for key, value in source.items() if key.startswith(f"{section}.")}
        more = {"model.learned_positions"} if section == "model" else set()  # a causal model needs none
        assert {key for key in own if own[key] != plain[key]} == more, section


def test_overrides_give_a_packed_model_rows_to_be_evaluated_on(tmp_path):
    """It has a tokenizer and no rows: those of its run where they still are, else those that an override names."""
    path = tmp_path / "tiny.json"
    settings = tiny_gsm_settings(tmp_path / "rows")
    settings["training"]["max_steps"] = 1
    path.write_text(json.dumps(settings))
    train.main(["--config", str(path), "--run-dir", str(tmp_path / "run")])
    hub.pack_run(str(tmp_path / "run"), tmp_path / "packed")
    assert load_model(str(tmp_path / "packed")).config.open_data().load(train=False).n_questions == 4
    rows, elsewhere = Path(settings["data"]["data_dir"]), tmp_path / "elsewhere"
    rows.rename(elsewhere)
    with pytest.raises(ValueError, match=rf"{rows}/meta\.json is missing.* set data\.data_dir to a folder that has it"):
        load_model(str(tmp_path / "packed")).config.open_data().load(train=False)
    changes = [f"data.data_dir={elsewhere}", f"data.test_source={elsewhere / 'test.jsonl'}"]
    data = load_model(str(tmp_path / "packed"), changes).config.open_data().load(train=False)
    assert data.n_questions == 4


def test_a_folder_that_cannot_be_written_is_named(autoregressive_run, tmp_path, monkeypatch):
    """The tokenizers library raises a bare Exception, the one for tensors an error of its own."""

    def fail(*_: object, **__: object) -> None:
        raise Exception("File too large")

    monkeypatch.setattr(hub, "save_file", fail)
    for write in (hub.pack_run, hub.export_run):
        with pytest.raises(WriteError, match=r"out cannot be written \(File too large"):
            write(str(autoregressive_run), tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
