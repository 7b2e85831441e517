"""No code from foreign folders of models, tokenizers and data sets, even if standard input answers every question `y`.

Each folder here brings code that would create a file. Pickles are in tests/test_faults.py, test_runtime_checkpoint.py
and test_data_sudoku_files.py, YAML tags in test_config.py.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, UNIFORM, run_python, tiny_gsm_settings, tiny_settings
from helpers import project_trees

import train
from data.sudoku_boards import load_hub
from data.text import encode_texts, load_tokenizer
from data.token_files import TOKENIZER_DIR
from data.word_problems import TEST_FILE, train_tokenizer

QUESTION = "Anna has 5 books. Then she buys 3 more."
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, executed: Path) -> None:
        self.executed = executed

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.executed,)


def poison(folder: Path, executed: Path, **tokenizer_config: object) -> None:
    """Add a Python file, a config.json whose auto_map maps every class to it, and a tokenizer_config.json."""
    code = f"open({str(executed)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
    (folder / "hostile.py").write_text(code + "class Hostile(PreTrainedTokenizerFast):\n    pass\n")
    auto_map = dict.fromkeys(AUTO_CLASSES, "hostile.Hostile")
    (folder / "config.json").write_text(json.dumps({"model_type": "hostile", "auto_map": auto_map}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(folder)
    return folder


SHELL = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
AUTO_MAP = {"AutoTokenizer": [None, "hostile.Hostile"]}
TOKENIZER_CONFIGS: dict[str, dict[str, object]] = {
    "auto_map": {"auto_map": AUTO_MAP, "tokenizer_class": "Hostile"},
    "auto_map as a list": {"auto_map": ["hostile.Hostile", "hostile.Hostile"]},
    "auto_map to another repository": {"auto_map": {"AutoTokenizer": [None, "some/where--hostile.Hostile"]}},
    "a request for trust": {"auto_map": AUTO_MAP, "trust_remote_code": True},
    "a dotted class": {"tokenizer_class": "hostile.Hostile"},
    "a chat template": {"chat_template": SHELL},
    **{f"class {name}": {"tokenizer_class": name} for name in AUTO_CLASSES},
}


@pytest.mark.parametrize("name", TOKENIZER_CONFIGS)
def test_a_tokenizer_folder_executes_nothing(name, tokenizer_dir, tmp_path, monkeypatch):
    folder, executed = tmp_path / "tokenizer", tmp_path / "executed"
    shutil.copytree(tokenizer_dir, folder)
    poison(folder, executed, **TOKENIZER_CONFIGS[name])
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("%s", str(executed)))
    (folder / "chat_template.jinja").write_text(SHELL % executed)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    tokenizer, own = load_tokenizer(str(folder)), load_tokenizer(str(tokenizer_dir))
    assert encode_texts(tokenizer.backend_tokenizer, [QUESTION]) == encode_texts(own.backend_tokenizer, [QUESTION])
    assert tokenizer.eos_token_id == own.eos_token_id
    tokenizer.save_pretrained(tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert not list((tmp_path / "copy").glob("*.py"))
    assert not executed.exists()


@pytest.mark.parametrize("name", ["tokenizer.pkl", "vocab.pkl", "tokenizer.model", "tiktoken.model"])
def test_other_files_do_not_stand_in_for_tokenizer_json(name, tokenizer_dir, tmp_path):
    executed = tmp_path / "executed"
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    poison(tmp_path / "tokenizer", executed, auto_map=AUTO_MAP, tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer" / name).write_bytes(pickle.dumps(Malicious(executed)))
    with pytest.raises(ValueError, match=r"has no fast version \(tokenizer\.json\); choose one that has"):
        load_tokenizer(str(tmp_path / "tokenizer"))
    assert not executed.exists()


def test_a_tokenizer_of_the_hub_is_fetched_without_code(tokenizer_dir, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        calls.append(name)
        assert all(pattern.endswith(".json") for pattern in allow_patterns)
        for pattern in allow_patterns:
            for file in tokenizer_dir.glob(pattern):
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    tokenizer, own = load_tokenizer("some/where"), load_tokenizer(str(tokenizer_dir))
    assert calls == ["some/where"]
    assert encode_texts(tokenizer.backend_tokenizer, [QUESTION]) == encode_texts(own.backend_tokenizer, [QUESTION])


def test_padding_and_truncation_of_tokenizer_json_are_not_applied(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    facts = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    padding = facts | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<eos>"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding, "truncation": truncation}))
    tokenizer, own = load_tokenizer(str(tmp_path / "tokenizer")), load_tokenizer(str(tokenizer_dir))
    assert encode_texts(tokenizer.backend_tokenizer, [QUESTION]) == encode_texts(own.backend_tokenizer, [QUESTION])


# Commands


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose tokenizer has become hostile after the training."""
    folder = tmp_path_factory.mktemp("hostile")
    settings = tiny_gsm_settings(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    train.main(["--config", str(folder / "run.yaml"), "--run-dir", str(folder / "run")])
    data = Path(settings["data"]["data_dir"])
    poison(data / TOKENIZER_DIR, folder / "executed", auto_map=AUTO_MAP, tokenizer_class="Hostile")
    (folder / "tokenizer").symlink_to(data / TOKENIZER_DIR)
    (folder / TEST_FILE).symlink_to(data / TEST_FILE)
    rows = [{"question": QUESTION, "code": "def simple_math_problem() -> int:\n    return 8"}]
    (folder / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "yes").write_text("y\n" * 10_000)
    return folder


COMMANDS = {
    "train": "train.py --config {folder}/run.yaml --run-dir {out}",
    "sampling": "sampling.py --checkpoint {folder}/run --tokens-per-step 64 --prompt Why?",
    "evaluate": "-m eval.evaluate {folder}/run",
    "prompts": "-m eval.gsm8k_eval prompts {folder}/test.jsonl --tokenizer {folder}/tokenizer --mask-id 511 --out {out}",  # noqa: E501
    "tiny_gsm": "data/tiny_gsm.py --source {folder}/rows.jsonl --tokenizer {folder}/tokenizer --out {out} --workers 1",
    "export": "-m model.hub export {folder}/run {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_without_the_code_of_a_hostile_tokenizer(name, hostile, tmp_path):
    """Standard input is `yes`, and variables that older libraries obey ask for trust."""
    arguments = COMMANDS[name].format(folder=hostile, out=tmp_path / "out").split()
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_TRUST_REMOTE_CODE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    result = run_python(*arguments, input=hostile / "yes", **environment)
    assert not (hostile / "executed").exists()
    assert result.returncode == 0, result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    copied = [file for file in tmp_path.rglob("*.py") if "hostile" in file.read_text()]
    assert copied == []


# Models and data sets


def test_a_model_folder_executes_nothing(tmp_path, data_dir, monkeypatch):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, executed = tmp_path / "qwen2", tmp_path / "executed"
    settings = tiny_settings(dict(UNIFORM), data_dir)
    settings["model"] |= {"learned_positions": None, "init_from": str(folder)}
    shape = {key: settings["model"][key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())
    (folder / "tokenizer_config.json").write_text("{}")
    poison(folder, executed, auto_map=AUTO_MAP)
    config = own | {"auto_map": dict.fromkeys(AUTO_CLASSES, "hostile.Hostile"), "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(executed)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "yes").write_text("y\n" * 1000)
    arguments = ("train.py", "--config", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    result = run_python(*arguments, "training.max_steps=1", input=tmp_path / "yes")
    assert result.returncode == 0, result.stderr
    (folder / "model.safetensors").unlink()
    result = run_python(*arguments[:-1], tmp_path / "other", input=tmp_path / "yes")
    assert result.returncode == 2, "only safetensors are read"
    assert "Qwen2 model" in result.stderr
    assert not executed.exists()


@pytest.mark.parametrize("name", ["pandas", "json", "hostile"])
def test_a_name_of_a_data_set_has_an_owner(name, tmp_path, monkeypatch):
    """Others are file formats of the library, which reads files of the current folder then, or local scripts."""
    executed = tmp_path / "executed"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Malicious(executed)))
    (tmp_path / "hostile.py").write_text(f"open({str(executed)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="neither a folder nor OWNER/NAME"):
        load_hub(name, "train", "puzzle", "solution", 9)
    assert not executed.exists()


def test_a_script_in_the_folder_of_a_data_set_is_not_executed(tmp_path, monkeypatch):
    folder, executed = tmp_path / "boards", tmp_path / "executed"
    folder.mkdir()
    (folder / "boards.py").write_text(f"open({str(executed)!r}, 'w').close()\n")
    (folder / "train.csv").write_text("puzzle,solution\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    with pytest.raises(ValueError, match="Dataset scripts are no longer supported"):
        load_hub(str(folder), "train", "puzzle", "solution", 9)
    assert not executed.exists()


def test_the_library_of_data_sets_is_one_that_executes_no_scripts():
    """Version 4 removed them."""
    assert '"datasets>=4"' in (ROOT / "pyproject.toml").read_text()


# Calls

# Arguments that a call must give, with these values.
REQUIRED: dict[str, dict[str, object]] = {
    "from_pretrained": {"trust_remote_code": False},
    "load_dataset": {"trust_remote_code": False},
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
}
# Names that may occur nowhere: they unpickle, execute text, or let a file choose what is executed.
FORBIDDEN = {
    *AUTO_CLASSES, "load_from_disk", "read_pickle", "Unpickler", "marshal", "shelve", "dill", "cloudpickle", "joblib",
    "UnsafeLoader", "FullLoader", "unsafe_load", "full_load", "hf_hub_download", "get_class_from_dynamic_module",
}  # fmt: skip
# Python's own functions; the sandbox alone executes text, which models write.
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "torch.hub.load"}
ALLOWED = {("grader/sandbox_worker.py", "exec")}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls in a file, each with its dotted name as far as it has one."""
    for node in ast.walk(project_trees()[path]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def project_files() -> list[Path]:
    """Python files of the project without the tests."""
    return [path for path in project_trees() if "tests" not in path.parts]


def test_every_call_that_reads_foreign_files_says_that_nothing_is_executed():
    found = set()
    for path in project_files():
        for name, call in calls(path):
            for required, arguments in REQUIRED.items():
                if f".{name}".endswith(f".{required}"):
                    found.add(required)
                    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
                    wrong = {key for key, value in arguments.items() if given.get(key) != repr(value)}
                    assert not wrong, f"{path}, line {call.lineno}: {name} without {wrong}"
            if name.endswith("snapshot_download"):
                assert "allow_patterns" in {each.arg for each in call.keywords}, path
            if name.startswith("yaml.") and "load" in name:
                assert name == "yaml.load"
                assert ast.unparse(call.keywords[0]) == "Loader=_Loader", path
            own = str(path)
            assert name not in FORBIDDEN_CALLS or (own, name) in ALLOWED, f"{own}, line {call.lineno}: {name}"
    assert found == REQUIRED.keys(), "the walk finds the calls"


def test_the_loader_of_yaml_is_a_safe_one():
    from runtime.config_file import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_no_file_names_what_executes_foreign_code():
    for path in project_files():
        for node in ast.walk(project_trees()[path]):
            names: set[str] = set()
            if isinstance(node, ast.Name | ast.Attribute):
                names = {node.id if isinstance(node, ast.Name) else node.attr}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {part for alias in node.names for part in alias.name.split(".")}
            assert not names & FORBIDDEN, f"{path}: {names & FORBIDDEN}"
