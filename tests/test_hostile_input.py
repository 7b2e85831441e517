"""Damaged and hostile files, folders, settings and arguments, through the real command lines.

A command either works or ends with status 2 and one short message; it never ends in a traceback (an exception other
than SystemExit fails the test), never hangs and never takes much memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import PUMA, ROOT, UNIFORM, tiny_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.generate_sudoku
import data.sudoku
import data.tiny_gsm
import eval.evaluate
import eval.gsm8k_eval
import model.hub
import report.curves
import report.page
import report.runs
import results.run
import sampling
import train
from base.commands import MAX_LINES
from base.reading import MAX_MESSAGE
from config import ModelSettings
from data import hashes
from data.token_files import open_token_files
from data.word_problems import cached_word_problems
from model.hub import Pretrained, write_qwen2
from model.transformer import Transformer
from runtime.checkpoint import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore:checkpoint .*:RuntimeWarning")  # of damaged ones, hundreds

MAX_CPU_S, MAX_WALL_S, MAX_GROWTH_BYTES = 20.0, 120.0, 1 << 30
NO_TOKENIZER = "/nowhere/tokenizer"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What it printed last on standard error, from `error:` on."""
        return self.err[self.err.rfind("error:") :]


def call(main: Callable[[list[str]], None], *arguments: object) -> Ended:
    """Run a command in this process; an exception other than SystemExit passes. Time and memory are bounded."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{main.__module__} {arguments} hangs")

    out, err, status = io.StringIO(), io.StringIO(), 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.process_time()
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_WALL_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = int(end.code)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert "hangs" not in err.getvalue(), err.getvalue()
    assert time.process_time() - started < MAX_CPU_S, arguments
    assert memory("VmHWM") - before < MAX_GROWTH_BYTES, arguments
    return Ended(status, out.getvalue(), err.getvalue())


def memory(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def check_message(ended: Ended) -> None:
    """A command that refuses its input says so shortly, and sends nothing to the terminal that controls it."""
    assert "Traceback" not in ended.err
    lines = ended.message.removesuffix("\n").split("\n")
    assert lines[0].startswith("error: "), ended
    assert len(lines) <= MAX_LINES
    for line in lines:
        assert line.isprintable(), line
        assert len(line) <= MAX_MESSAGE + len("error: "), line


def refused(main: Callable[[list[str]], None], *arguments: object) -> str:
    """The message of a command that must refuse its input."""
    ended = call(main, *arguments)
    assert ended.status == 2, ended
    check_message(ended)
    return ended.message


# Good input


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """They take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda *_: None)
        patch.setattr(train, "write_page", lambda run_dir: run_dir / "report.html")
        patch.setattr(results.run, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of input."""
    folder = tmp_path_factory.mktemp("good")
    values = tiny_settings(PUMA, folder / "boards")
    values["training"] |= {"max_steps": 1, "ema_decay": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    train.main(["--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")])
    boards = np.load(next((folder / "boards").glob("*_train.npy")))
    np.save(folder / "boards.npy", boards)
    np.savez_compressed(folder / "boards.npz", puzzle=boards[:, :16], solution=boards[:, 16:])
    lines = ["".join(map(str, row[:16])) + "," + "".join(map(str, row[16:])) for row in boards[:5]]
    (folder / "boards.csv").write_text("puzzle,solution\n" + "\n".join(lines) + "\n")
    (folder / "cases.jsonl").write_text('{"completion": "no program", "gold": 18}\n' * 3)
    shutil.copy(ROOT / "results" / "sudoku_mini" / "records.json", folder / "records.json")
    shutil.copytree(cached_word_problems(folder, 40, 4, 0, 128), folder / "words")
    edit(folder / "words" / "meta.json", tokenizer=NO_TOKENIZER)  # the copy in the folder is used
    shape = ModelSettings(**values["model"]).model_copy(update={"learned_positions": None})
    network = Transformer(shape, causal=True, shifted=True)
    exported = Pretrained("test", shape, True, network.weights())
    write_qwen2(folder / "qwen", exported, causal=True, mask_id=5, eos_id=None, pad_id=None)
    return folder


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint the manifest that fits its files, as somebody who builds one by hand does."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def checkpoint_of(run_dir: Path) -> Path:
    """The newest checkpoint."""
    return max((run_dir / "checkpoints").glob("step_*"))


def sample(folder: Path, *options: str) -> tuple[Any, ...]:
    """Command that samples from the run in a folder."""
    return sampling.main, "--checkpoint", folder / "run", "--puzzle", "1" + "." * 15, *options


def resume(folder: Path) -> tuple[Any, ...]:
    """Command that resumes the run in a folder."""
    (folder / "run" / "final.json").unlink(missing_ok=True)
    return train.main, "--config", folder / "config.yaml", "--run-dir", folder / "run"


def train_words(folder: Path, **changes: Any) -> tuple[Any, ...]:
    """Command that trains on the tokenized word problems of a folder."""
    values = tiny_settings({"name": "autoregressive"}, folder)
    values["model"] |= {"vocab_size": 512, "learned_positions": None}
    words = folder / "words"
    values["data"] = {"dataset": "tiny_gsm", "data_dir": str(words), "n_held_out": 5, "max_len": 128}
    values["data"] |= {"test_source": str(words / "test.jsonl")} | changes
    values["training"]["max_steps"] = 1
    values["validation"] = {"n_examples": 1, "n_loss_rows": 1}
    (folder / "words.yaml").write_text(yaml.safe_dump(values))
    return train.main, "--config", folder / "words.yaml", "--run-dir", folder / "words_run"


def train_from_qwen(folder: Path) -> tuple[Any, ...]:
    """Command that starts a run from the Qwen2 folder."""
    values = tiny_settings({"name": "autoregressive"}, folder / "boards")
    values["model"] |= {"learned_positions": None, "init_from": str(folder / "qwen")}
    values["training"]["max_steps"] = 1
    values["validation"] = {"n_examples": 1, "n_loss_rows": 1}
    (folder / "qwen.yaml").write_text(yaml.safe_dump(values))
    return train.main, "--config", folder / "qwen.yaml", "--run-dir", folder / "qwen_run"


def train_on_boards(folder: Path, name: str) -> tuple[Any, ...]:
    """Command that trains on a file of boards."""
    values = tiny_settings(UNIFORM, folder)
    values["data"] = {"dataset": "sudoku", "size": 4, "source": "files"}
    values["data"] |= {key: str(folder / name) for key in ("train_file", "test_file")}
    values["training"]["max_steps"] = 1
    (folder / "boards.yaml").write_text(yaml.safe_dump(values))
    return train.main, "--config", folder / "boards.yaml", "--run-dir", folder / "boards_run"


def check_boards(folder: Path, name: str) -> tuple[Any, ...]:
    """Command that checks a file of boards."""
    return data.sudoku.main, "check", folder / name, "--size", "4"


def draw_records(folder: Path) -> tuple[Any, ...]:
    """Command that writes the table of an experiment from its records."""
    (folder / "sudoku_mini").mkdir()
    (folder / "records.json").rename(folder / "sudoku_mini" / "records.json")
    return results.run.main, "sudoku_mini", "--draw", "--out", folder


def tokenize(folder: Path) -> tuple[Any, ...]:
    """Command that finds its output complete."""
    job = ("--source", "word problems", "--tokenizer", NO_TOKENIZER, "--max-len", "128")
    return data.tiny_gsm.main, *job, "--out", folder / "words"


COMMANDS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "config.yaml": lambda folder: (train.main, "--config", folder / "config.yaml", "--run-dir", folder / "run"),
    "run/config.yaml": lambda folder: (train.main, "--config", folder / "config.yaml", "--run-dir", folder / "run"),
    "run/final.json": lambda folder: (train.main, "--config", folder / "config.yaml", "--run-dir", folder / "run"),
    "run/metrics.jsonl": resume,
    "run/checkpoints/*/manifest.json": sample,
    "run/checkpoints/*/config.yaml": sample,
    "run/checkpoints/*/model.safetensors": sample,
    "run/checkpoints/*/train.pt": resume,
    "run/checkpoints/*/rank_0.pt": resume,
    "boards.npy": lambda folder: check_boards(folder, "boards.npy"),
    "boards.npz": lambda folder: check_boards(folder, "boards.npz"),
    "boards.csv": lambda folder: check_boards(folder, "boards.csv"),
    "records.json": draw_records,
    "cases.jsonl": lambda folder: (
        eval.gsm8k_eval.main, "grade", folder / "cases.jsonl", "--out", folder / "out", "--workers", "1",
    ),
    "words/meta.json": tokenize,
    "words/labels.bin": train_words,
    "words/prompt_mask.bin": train_words,
    "words/test.jsonl": train_words,
    "words/tokenizer/tokenizer.json": train_words,
    "words/tokenizer/tokenizer_config.json": train_words,
    "qwen/config.json": train_from_qwen,
    "qwen/model.safetensors": train_from_qwen,
}  # fmt: skip


def show(folder: Path) -> tuple[Any, ...]:
    """Command that lists a run and writes its page."""

    def main(arguments: list[str]) -> None:
        report.runs.main(arguments)
        report.page.main(arguments)

    return main, folder / "run"


# Read by the list and the page.
RECORDS = (
    "run/config.yaml", "run/final.json", "run/history.json", "run/metrics.jsonl", "run/samples_*.jsonl",
    "run/traces.json",
)  # fmt: skip


def copy_input(good: Path, name: str, folder: Path) -> None:
    """Copy what the command of a file reads."""
    first = name.partition("/")[0]
    together = {"config.yaml": ("config.yaml", "run"), "run": ("config.yaml", "run"), "qwen": ("qwen", "boards")}
    for part in together.get(first, (first,)):
        if (good / part).is_dir():
            shutil.copytree(good / part, folder / part)
        else:
            shutil.copy(good / part, folder / part)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_undamaged_input_works(name, good, tmp_path):
    copy_input(good, name, tmp_path)
    if "checkpoints" in name:
        reseal(checkpoint_of(tmp_path / "run"))
    ended = call(*COMMANDS[name](tmp_path))
    assert ended.status == 0, ended


# Known attacks


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON or YAML file; `section__key` is a key of a section."""
    is_yaml = path.suffix == ".yaml"
    values = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
    for key, value in changes.items():
        section, _, setting = key.rpartition("__")
        (values[section] if section else values)[setting] = value
    path.write_text(yaml.safe_dump(values) if is_yaml else json.dumps(values))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, r"aliases \(\*name\) are not supported"),
        (MERGE_BOMB, r"aliases \(\*name\) are not supported"),
        ("&a [*a]", r"aliases \(\*name\) are not supported"),
        ("[" * 5000, "more than 1000 values or 10 levels"),
        ("a: " + "[" * 300 + "]" * 300, "more than 1000 values or 10 levels"),
        ("\n".join(f"k{i}: 1" for i in range(10_000)), "more than 1000 values or 10 levels"),
        ("a: '" + "x" * 10_000_000 + "'", "at most 1,048,576 are read"),
        ("!!python/object/apply:os.system ['id']", "could not determine a constructor"),
        ("max_steps: " + "9" * 5000, "4300 digits"),
        ("x" * 50_000, "must be a mapping"),
        ('"\\e[2J\\u202e": 1', r"\\x1b\[2J\\u202e"),
        ("\n".join(f"k{i}: 1" for i in range(400)), "and 37[0-9] more lines"),
    ],
)
def test_settings_of_any_kind_are_refused(content, reason, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    assert re.search(reason, refused(train.main, "--config", tmp_path / "a.yaml", "--run-dir", tmp_path / "run"))


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=1000000000",
        "model.num_hidden_layers=1000000000",
        "model.vocab_size=1000000000000",
        "model.learned_positions=1000000000000",
        "model.intermediate_size=9223372036854775807",
        "data.n_train=1000000000000000",
        "training.batch_size=1000000000000",
        "training.max_steps=99999999999999999999999999",
        "validation.tokens_per_step=[99999999999999999999999999]",
        "objective={name: puma, n_stages: 1000000000000}",
        "objective={name: puma, n_stages: 3, pool_batches: 100000000000}",
        "data={dataset: tiny_gsm, max_len: 8000000000000}",
        "data.data_dir=/dev/null/x",
        "data.data_dir=a\0b",
        f"x={'[' * 3000}",
        "x=&a [*a]",
        "\x1b[2J" * 1000,
    ],
)
def test_sizes_without_memory_and_wrong_overrides_are_refused(override, good, tmp_path):
    refused(train.main, "--config", good / "config.yaml", "--run-dir", tmp_path / "run", override)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 2**62},
        {"learned_positions": 10**12},
        {"num_hidden_layers": 2},
        {"vocab_size": 7},
        {"num_attention_heads": 1, "hidden_size": 10**6},
    ],
)
def test_the_settings_of_a_checkpoint_describe_its_weights(change, good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    checkpoint = checkpoint_of(tmp_path / "run")
    edit(checkpoint / "config.yaml", **{f"model__{key}": value for key, value in change.items()})
    reseal(checkpoint)
    assert "the settings describe another model" in refused(*sample(tmp_path))


@pytest.mark.parametrize("size", [5, 33, 10**12, 2**70, 0])
def test_a_block_size_that_does_not_divide_a_sequence_is_refused_before_sampling(size, good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    checkpoint = checkpoint_of(tmp_path / "run")
    edit(
        checkpoint / "config.yaml", objective={"name": "block_uniform", "block_size": size, "block_attention": "prefix"}
    )
    reseal(checkpoint)
    assert "block_size" in refused(*sample(tmp_path))


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("train", (), [1]),
        ("train", ("optimizer",), None),
        ("train", ("optimizer", "state", 0, "exp_avg"), torch.zeros(999)),
        ("train", ("optimizer", "state", 999), {"exp_avg": torch.zeros(1)}),
        ("train", ("data_fingerprint",), "\x1b[31m"),
        ("train", ("seconds",), "x"),
        ("rank_0", (), []),
        ("rank_0", ("loss_sum",), torch.zeros(4)),
        ("rank_0", ("n_summed",), None),
        ("rank_0", ("objective",), 1),
        ("rank_0", ("objective", "generator"), torch.zeros(3)),
        ("rank_0", ("objective", "queue", "n_drawn"), -5),
        ("rank_0", ("objective", "queue", "n_drawn"), 10**30),
        ("rank_0", ("objective", "queue", "left_behind"), ["x"]),
        ("rank_0", ("objective", "queue", "left_behind"), [-1]),
        ("rank_0", ("objective", "pool", "x0"), torch.zeros(3, 3)),
        ("rank_0", ("objective", "pool", "stage"), torch.zeros(16)),
    ],
)
def test_states_that_do_not_fit_a_run_are_refused(name, keys, value, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    checkpoint = checkpoint_of(tmp_path / "run")
    box: dict[Any, Any] = {"state": torch.load(checkpoint / f"{name}.pt")}
    place, path = box, ("state", *keys)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    torch.save(box["state"], checkpoint / f"{name}.pt")
    reseal(checkpoint)
    refused(*resume(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"num_attention_heads": 0},
        {"hidden_size": [1]},
        {"rope_parameters": [1]},
        {"next_token_shift": "\x1b[31m"},
        {"model_type": "x" * 10_000},
    ],
)
def test_the_config_of_a_qwen2_folder_describes_its_weights(change, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "qwen" / "config.json", **change)
    refused(*train_from_qwen(tmp_path))


def npy(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """A .npy file that claims an array of this shape, and holds 512 bytes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(512)


@pytest.mark.parametrize(
    "content",
    [
        npy((10**15, 32), "<f8"),
        npy((10**10, 32)),
        npy((-1, 32)),
        npy((10**12, 32), "|V0"),
        npy((16, 32), "|O"),
        npy((16, 32), "|S1"),
        npy((), "<f8"),
        npy((512,)),
        npy((1,) * 40),
        b"",
        b"\x80\x04cos\nsystem\n.",
    ],
)
def test_arrays_hold_what_they_claim(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    refused(*check_boards(tmp_path, "a.npy"))


def test_archives_hold_what_they_claim(tmp_path):
    def message(*contents: bytes) -> str:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in zip(("puzzle.npy", "solution.npy"), contents, strict=True):
                file.writestr(name, content)
        return refused(*check_boards(tmp_path, "a.npz"))

    zeros = npy((2 << 20, 16)) + bytes(32 << 20)  # compress to a thousandth
    assert "it claims to hold" in message(zeros, zeros)
    assert "shorter than its header says" in message(npy((10**14, 16)), npy((10**14, 16)))
    message(npy((10**14, 16), "|O"), b"")
    message(b"", b"")


def replace_by(path: Path, kind: str) -> None:
    """Put something else than a file at a path."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_file_is_not_read(name, kind, good, tmp_path):
    copy_input(good, name, tmp_path)
    arguments = COMMANDS[name](tmp_path)  # one of them moves a file
    replace_by((*tmp_path.glob(name), *tmp_path.glob(f"*/{name}"))[0], kind)
    ended = call(*arguments)
    if name == "run/final.json":  # it is written again, except over a folder
        assert ended.status == (1 if kind == "folder" else 0), ended
    elif ended.status:
        assert ended.status == 2, ended
        check_message(ended)
    else:  # a file that is there in complete runs alone, or another checkpoint, or none where nothing was trained yet
        assert kind == "missing" or "checkpoints" in name, ended


@pytest.mark.parametrize(
    ("row", "token", "reason"),
    [
        (20_011, 512, "contains token 512, but model.vocab_size is 512: set at least 513"),
        (39_999, 2**32 - 1, "contains token 4294967295"),  # used for the validation loss
        (20_007, 511, "contains the mask token 511"),
    ],
)
def test_every_row_is_checked_for_tokens_that_the_model_does_not_have(row, token, reason, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    words = tmp_path / "words"
    for name in ("labels.bin", "prompt_mask.bin"):
        (words / name).write_bytes((words / name).read_bytes() * 1000)
    labels = np.fromfile(words / "labels.bin", dtype=np.uint32).reshape(-1, 128)
    labels[row, 3] = token
    labels.tofile(words / "labels.bin")
    edit(words / "meta.json", num_examples=len(labels))
    assert reason in refused(*train_words(tmp_path))


def test_the_check_of_all_rows_is_cached_until_the_file_changes(good, tmp_path, monkeypatch):
    shutil.copytree(good / "words", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(hashes, "SETTLED_NS", -1)
    assert len(open_token_files(tmp_path, 128, 511, 512)) == 40
    (cache,) = tmp_path.glob(".labels.bin.scan_511.json")
    edit(cache, highest=600)
    with pytest.raises(ValueError, match="contains token 600"):  # the file is not read
        open_token_files(tmp_path, 128, 511, 512)
    with pytest.raises(ValueError, match="contains the mask token"):
        open_token_files(tmp_path, 128, int(np.fromfile(tmp_path / "labels.bin", dtype=np.uint32)[0]), 512)
    for damage in (b"", b"[" * 100_000, b'{"facts": 1}'):
        cache.write_bytes(damage)
        assert len(open_token_files(tmp_path, 128, 511, 512)) == 40
    labels = bytearray((tmp_path / "labels.bin").read_bytes())
    labels[:2] = (511).to_bytes(2, "little")
    (tmp_path / "labels.bin").write_bytes(labels)
    with pytest.raises(ValueError, match="contains the mask token 511"):
        open_token_files(tmp_path, 128, 511, 512)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("x", "#### " + "9" * 101, "the answer is not a number"),
        ("x", "#### " + "9" * 5000, "the answer is not a number"),
        ("x", "####" + " " * 100_000 + "y", "no number after"),
        ("\ud800", "#### 1", "cannot be read"),
        ("x " * 10_000_000, "#### 1", "line 1 has more than"),
    ],
)
def test_questions_without_a_usable_answer_are_refused(question, answer, reason, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / "words" / "test.jsonl").write_text(json.dumps({"question": question, "answer": answer}) + "\n")
    assert reason in refused(*train_words(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "words" / "tokenizer" / "tokenizer.json"
    values = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"].append({"id": 512, "content": "Anna has"} | flags)
    path.write_text(json.dumps(values))
    (tmp_path / "words" / "test.jsonl").write_text('{"question": "Anna has 5 books.", "answer": "#### 5"}\n')
    assert "token 512 occurs in the question 'Anna has 5 books.'" in refused(*train_words(tmp_path))


SAMPLE = (sampling.main, "--checkpoint", "RUN", "--puzzle")


@pytest.mark.parametrize(
    "command",
    [
        (*SAMPLE, "1" * 16, "--seed", "9" * 5000),
        (*SAMPLE, "1" * 16, "--tokens-per-step", "9" * 30),
        (*SAMPLE, "1" * 16, "--temperature", "nan"),
        (*SAMPLE, "\x1b[2J\u202e" * 1000),
        (*SAMPLE, "\udcff" * 16),
        (sampling.main, "--checkpoint", "a\0b", "--puzzle", "1" * 16),
        (sampling.main, "--checkpoint", "x" * 5000, "--puzzle", "1" * 16),
        (train.main, "--config", "a\x1b[31mb"),
        (eval.evaluate.main, "RUN", "validation.n_examples=" + "9" * 30),
        (eval.gsm8k_eval.main, "grade", "a\0b", "--out", "b"),
        (eval.gsm8k_eval.main, "grade", "a", "--out", "b", "--workers", "9" * 30),
        (eval.gsm8k_eval.main, "prompts", "a", "--tokenizer", "b", "--mask-id", "-1", "--out", "c"),
        (data.generate_sudoku.main, "--count", "1000000000000000", "--out", "a.csv"),
        (data.generate_sudoku.main, "--count", "5", "--workers", "9" * 30, "--out", "a.csv"),
        (data.tiny_gsm.main, "--out", "a", "--max-len", "9" * 30),
        (data.tiny_gsm.main, "--out", "a\0b", "--source", "a.jsonl", "--tokenizer", NO_TOKENIZER),
        (report.curves.main, "a\0b"),
        (report.curves.main, "x" * 5000),
        (results.run.main, "sudoku_mini", "--jobs", "9" * 5000),
        (model.hub.main, "export", "RUN", "/dev/null/\x1b[31m"),
    ],
)
def test_arguments_of_any_kind_are_refused(command, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*(good / "run" if argument == "RUN" else argument for argument in command))


def test_pictures_of_any_records_are_drawn(tmp_path):
    """Values that are no numbers are left out, and names of figures are no formulas."""
    row = {"step": 1, "seconds": 1.0, "sequences_distinct": 1, "validation/loss": 1.0}
    rows = [[1], {"step": "x"}, row | {"train/loss": "x"}, row | {"validation/accuracy/\x1b$\\frac{": 0.5}]
    rows += [row | {"train/loss": 1e308}, row | {"seconds": None}, row | {"train/loss": [1]}, {"step": 10**400}]
    lines = ["[" * 100_000, "\0", *map(json.dumps, rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    ended = call(report.curves.main, tmp_path, "--out", tmp_path / "a.png")
    assert ended.status == 0, ended
    assert (tmp_path / "a.png").stat().st_size > 10_000


# Mutations

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, 10**9, 10**12, 2**70, 1e308, -1e-320, float("inf"), float("nan"), "", "x" * 2000,
    "\x1b[2J\x9b\u202e\n\r\a", "\ud800", "../..", "/dev/zero", [], [[[]]], {}, {"a": 1}, [1] * 300,
)  # fmt: skip
JUNK = (b"\0", b"[" * 5000, b"\x1b[31m", b"\xff", b"9" * 5000, b"1e999", b"NaN", b"\xe2\x80\xae", b"\n" * 50, b'"')


@st.composite
def mutated(draw: st.DrawFn, content: bytes, kind: str) -> bytes:
    """A mutation of a good file."""
    how = draw(
        st.sampled_from(
            ("flip", "cut", "insert", "values", "values") if kind != "binary" else ("flip", "cut", "insert")
        )
    )
    place = draw(st.floats(0, 1, exclude_max=True))
    if how == "values":
        return with_wrong_value(draw, content, kind)
    if how == "cut":
        return content[: int(place * len(content))]
    if how == "insert":
        at = int(place * len(content))
        return content[:at] + draw(st.sampled_from(JUNK)) + content[at:]
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # Half of them in the first kilobyte, where headers are.
        n_bytes = draw(st.sampled_from((len(content), min(len(content), 1000))))
        damaged[draw(st.integers(0, n_bytes - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def with_wrong_value(draw: st.DrawFn, content: bytes, kind: str) -> bytes:
    """A JSON or YAML file in which one value, key or the whole is another."""
    values = (
        yaml.safe_load(content)
        if kind == "yaml"
        else json.loads(content.split(b"\n")[0] if kind == "jsonl" else content)
    )
    node, wrong = values, draw(st.sampled_from(WRONG))
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans())):
            break
        node = node[key]
    change = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "whole")))
    if change == "whole":
        values = wrong
    elif change == "remove":
        del node[key]
    elif change == "add" and isinstance(node, dict):
        node[draw(st.sampled_from(("x" * 500, "\x1b[31m\u202e", "", "model")))] = wrong
    else:
        node[key] = wrong
    text = yaml.safe_dump(values) if kind == "yaml" else json.dumps(values)
    return text.encode(errors="surrogatepass") + (b"\n" + content if kind == "jsonl" else b"")


def kind_of(name: str) -> str:
    """How a file can be mutated beyond its bytes."""
    return {".yaml": "yaml", ".json": "json", ".jsonl": "jsonl"}.get(Path(name).suffix, "binary")


def check_mutation(
    name: str, good: Path, folder: Path, content: bytes, command: Callable[[Path], tuple[Any, ...]]
) -> None:
    """Run a command that reads a file, with another content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_input(good, name, folder)
    (path,) = folder.glob(name)
    path.write_bytes(content)
    if "checkpoints" in name and path.name != "manifest.json":
        reseal(path.parent)
    ended = call(*command(folder))
    assert ended.status in (0, 2) or (ended.status == 1 and "diverged" in ended.err), ended
    if ended.status:
        check_message(ended)


def run_property(
    name: str, good: Path, folder: Path, n_examples: int, command: Callable[[Path], tuple[Any, ...]] | None = None
) -> None:
    """Mutate one kind of file. Nothing of it is random, but the files hold paths, times and digests, which differ."""
    (path,) = good.glob(name)

    @settings(
        max_examples=n_examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(path.read_bytes(), kind_of(name)))
    def check(content: bytes) -> None:
        check_mutation(name, good, folder, content, command or COMMANDS[name])

    check()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mutated_file_is_read_or_refused(name, good, tmp_path):
    # Those of the word problems sample a program and run it.
    run_property(name, good, tmp_path / "mutated", 3 if name.startswith("words/") else 6)


@pytest.mark.filterwarnings("ignore:.*history.json cannot be read:RuntimeWarning")
@pytest.mark.parametrize("name", RECORDS)
def test_a_run_with_a_mutated_file_is_shown_or_refused(name, good, tmp_path, monkeypatch):
    if name != "run/metrics.jsonl":
        monkeypatch.setattr(report.page, "_draw", lambda *_, **__: "")
    run_property(name, good, tmp_path / "mutated", 6, show)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*history.json cannot be read:RuntimeWarning")
@pytest.mark.parametrize("name", RECORDS)
def test_runs_with_many_mutated_files_are_shown_or_refused(name, good, tmp_path):
    run_property(name, good, tmp_path / "mutated", 25, show)


# Read by the same functions as other files of COMMANDS.
READ_ALIKE = {
    "run/config.yaml",
    "run/checkpoints/*/config.yaml",
    "run/checkpoints/*/rank_0.pt",
    "words/prompt_mask.bin",
    "words/tokenizer/tokenizer_config.json",
    "qwen/model.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_mutated_files_are_read_or_refused(name, good, tmp_path):
    assert COMMANDS.keys() > READ_ALIKE
    run_property(name, good, tmp_path / "mutated", 25 if name in READ_ALIKE else 75)
