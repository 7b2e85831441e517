"""Own text: from files of pairs to rows, answers and verdicts."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, UNIFORM, tiny_settings
from docs_check import small_settings, write_small_qwen2

import sampling
import train
from data import text_pairs
from data.pretokenize import find_files
from data.questions import Question
from data.text import decode_completions, load_tokenizer, train_byte_pairs
from data.text_pairs import PIECES, Completion, TextData, TextSettings
from model.hub import load_model, pack_run
from runtime.checkpoint import find_checkpoint
from runtime.history import read_history
from sampling import load

VOCAB = 300
LENGTH = 32


def write_pairs(path: Path, n: int, columns: tuple[str, str] = ("prompt", "completion")) -> list[dict[str, str]]:
    """Words and the same words sorted; every tenth pair does not fit `LENGTH` tokens."""
    rng = random.Random(0)
    rows = []
    for number in range(n):
        words = ["".join(rng.choices("abc", k=2)) for _ in range(40 if number % 10 == 9 else 3)]
        rows.append(dict(zip(columns, (" ".join(words), " ".join(sorted(words))), strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def open_text(folder: Path, **changes: Any) -> TextData:
    settings = {"source": str(folder / "pairs.jsonl"), "data_dir": str(folder / "kept"), "max_len": LENGTH}
    return TextSettings(dataset="text", **{"n_held_out": 10} | settings | changes).open(VOCAB)


def test_rows_are_the_pairs_that_fit(tmp_path):
    rows = write_pairs(tmp_path / "pairs.jsonl", 60)
    data = open_text(tmp_path)
    fitting = [row for number, row in enumerate(rows) if number % 10 != 9]
    assert (len(data.train), len(data.validation), data.n_questions) == (44, 10, 10)
    assert [re.sub(r" of .*:", ":", line) for line in data.warnings()] == [
        "6 pairs are left out: they do not fit data.max_len 32"
    ]
    tokens, prompt_mask = data.train.rows(np.arange(44))
    for row, given, expected in zip(tokens, prompt_mask, fitting, strict=False):
        prompt, completion = (
            data.tokenizer(text, add_special_tokens=False).input_ids
            for text in (expected["prompt"], expected["completion"])
        )
        (newline,) = data.tokenizer("\n", add_special_tokens=False).input_ids
        ids = [*prompt, newline, *completion]
        assert row.tolist() == ids + [data.eos_id] * (LENGTH - len(ids))
        assert given.tolist() == [position <= len(prompt) for position in range(LENGTH)]
    assert np.array_equal(data.encode(fitting[0]["prompt"]) != data.mask_id, prompt_mask[0])


@pytest.mark.parametrize("kind", ["parquet", "folder", "on disk"])
def test_every_kind_of_source_gives_the_same_rows(kind, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = write_pairs(tmp_path / "pairs.jsonl", 40, ("text", "target"))
    (tmp_path / "parts").mkdir()
    write_pairs(tmp_path / "parts" / "all.jsonl", 40, ("text", "target"))
    other = Dataset.from_list(rows)
    other.to_parquet(str(tmp_path / "pairs.parquet"))
    DatasetDict({"train": other}).save_to_disk(str(tmp_path / "saved"))
    source = {"parquet": "pairs.parquet", "folder": "parts", "on disk": "saved/train"}[kind]
    columns = {"prompt_column": "text", "completion_column": "target", "n_held_out": 5}
    first, second = open_text(tmp_path, **columns), open_text(tmp_path, **columns, source=str(tmp_path / source))
    assert np.array_equal(first.all_rows.labels, second.all_rows.labels)
    assert np.array_equal(first.all_rows.prompt_bits, second.all_rows.prompt_bits)
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]: give the folder of one"):
        _ = open_text(tmp_path, **columns, source=str(tmp_path / "saved")).all_rows


def test_an_answer_must_be_the_completion_but_for_white_space(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    data = open_text(tmp_path)
    tokens, prompt_mask = data.test.rows(np.arange(3))
    answer = tokens.copy()
    completion = data.tokenizer.decode(tokens[1][~prompt_mask[1]], skip_special_tokens=True)
    spaced = data.tokenizer("  " + completion.replace(" ", "\n") + " \n", add_special_tokens=False).input_ids
    free = np.flatnonzero(~prompt_mask[1])
    answer[1][free] = data.eos_id
    answer[1][free[: len(spaced)]] = spaced
    wrong = np.flatnonzero(~prompt_mask[2])[0]
    answer[2][wrong] = data.tokenizer("c" if completion[:1] != "c" else "a", add_special_tokens=False).input_ids[0]
    judged = data.judge(answer, np.arange(3))
    assert judged.figures["accuracy"].tolist() == [1, 1, 0]
    assert [sample["verdict"] for sample in judged.samples] == ["right", "right", "wrong"]
    assert judged.samples[0]["prompt"] == data.question(0).text


def test_a_test_source_of_its_own(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "b\na", "completion": "a b"}) + "\n")
    data = open_text(tmp_path, test_source=str(tmp_path / "test.jsonl"))
    assert data.n_questions == 1
    assert data.question(0) == Question("b\na", "a b")
    assert data.prompts(np.array([0]))[0].tolist() == data.encode("b\na").tolist()
    assert data.difficulty(np.array([0]))["tokens"].tolist() == [2]


def test_the_tokenizer_may_be_named_by_another_path(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    data = open_text(tmp_path)
    data.tokenizer.save_pretrained(tmp_path / "copy")
    shutil.copy(Path(data.tokenizer_name) / "tokenizer.json", tmp_path / "copy" / "tokenizer.json")
    assert open_text(tmp_path, tokenizer=str(tmp_path / "copy")).folder == data.folder
    monkeypatch.chdir(tmp_path)
    assert open_text(tmp_path, tokenizer="copy").folder == data.folder


def test_a_verdict_on_a_foreign_answer_is_one_printable_line(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    data = open_text(tmp_path)
    tokens, _ = data.test.rows(np.array([0]))
    (verdict,) = data.verdicts(data.prompts(np.array([0])), tokens, ["a\n\x1b[31mb" + "c" * 500])
    assert verdict.reason.startswith("wrong; right is a \\x1b[31mbc")
    assert len(verdict.reason) < 130


def test_changed_pairs_are_tokenized_again(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    first = open_text(tmp_path).folder
    assert open_text(tmp_path).folder == first
    write_pairs(tmp_path / "pairs.jsonl", 50)
    assert open_text(tmp_path).folder != first


def test_a_tokenizer_is_trained_on_the_columns_that_are_read(tmp_path):
    rows = [row | {"note": "xyz xyz"} for row in write_pairs(tmp_path / "pairs.jsonl", 60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_completions, of_notes = (
        open_text(tmp_path, completion_column=column).tokenizer.get_vocab() for column in ("completion", "note")
    )
    assert "xyz" in of_notes.keys() - of_completions.keys()


def test_a_bare_tokenizer_file_needs_the_name_of_its_eos(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_pairs(tmp_path / "pairs.jsonl", 60)
    words = ["[SEP]", "\n", " ", *"abc", *(first + second for first in "abc" for second in "abc")]
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[SEP]"))
    bare.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    bare.save(str(tmp_path / "any.json"))
    chosen = {"tokenizer": str(tmp_path / "any.json"), "max_len": 16}
    with pytest.raises(ValueError, match=r"has no EOS token.* set data.eos_token"):
        _ = open_text(tmp_path, **chosen).all_rows
    with pytest.raises(ValueError, match=r"eos_token '\[EOS\]' is no token"):
        _ = open_text(tmp_path, **chosen, eos_token="[EOS]").all_rows
    data = open_text(tmp_path, **chosen, eos_token="[SEP]")
    assert data.eos_id == 0
    assert len(data.all_rows) == 54
    assert load_tokenizer(str(data.folder / "tokenizer")).eos_token == "[SEP]", "the copy knows it"


def lower_case_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = ["[SEP]", "\n", " ", "a", "b", "c", "[UNK]"]
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    bare.normalizer, bare.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("", "isolated")
    bare.save(str(path))
    return path


def test_a_verdict_compares_what_the_tokenizer_keeps(tmp_path):
    """As the accuracy of the test does."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    data = open_text(
        tmp_path, tokenizer=str(lower_case_tokenizer(tmp_path / "low.json")), eos_token="[SEP]", max_len=64
    )
    tokens, prompt_mask = data.test.rows(np.array([0]))
    gold = decode_completions(data.tokenizer, tokens, prompt_mask)[0].upper()
    prompts = np.where(prompt_mask, tokens, data.mask_id)
    assert [verdict.right for verdict in data.verdicts(prompts, tokens, [gold])] == [True]
    assert [verdict.right for verdict in data.verdicts(prompts, tokens, [gold + " a"])] == [False]


def write_words(folder: Path, pairs: list[tuple[str, str]], words: str) -> dict[str, str]:
    """Pairs, and a tokenizer that knows these words alone; the settings that name it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs]
    (folder / "pairs.jsonl").write_text("".join(rows))
    known = ["<unk>", "<eos>", "<end>", *words.split(" ")]
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>").save_pretrained(folder / "words")
    return {"tokenizer": str(folder / "words")}


def test_a_word_that_the_tokenizer_does_not_know_equals_no_other(tmp_path):
    """Or answers to all prompts about names would be right."""
    pairs = [("who is it", f"Mr {name}") for name in ("Lee", "Lopez", "known", "Ito", "Olsen", "known")]
    data = open_text(tmp_path, **write_words(tmp_path, pairs, "Mr known who is it \n"), n_held_out=3)
    for _ in range(2):  # the second time from the cache
        training, test, *_ = data.warnings()
        assert training.startswith("2 of the 3 training completions")
        assert test.startswith("2 of the 3 test completions")
        assert "<unk>" in test
    tokens, _ = data.test.rows(np.arange(3))
    judged = data.judge(tokens, np.arange(3))
    assert judged.figures["accuracy"].tolist() == [0, 0, 1]
    prompts = data.prompts(np.arange(3))
    golds = ["Mr Ito", "Mr <unk>", "Mr known"]
    assert [verdict.right for verdict in data.verdicts(prompts, tokens, golds)] == [False, False, True]


def test_unknown_text_equals_nothing_on_either_side():
    known, unknown = (Completion("a <unk>", is_known) for is_known in (True, False))
    assert known.equals(known)
    assert not any(one.equals(other) for one, other in ((known, unknown), (unknown, known), (unknown, unknown)))


def test_unknown_words_of_each_part_are_counted_apart(tmp_path, monkeypatch):
    """Though all counts are cached beside the same rows."""
    monkeypatch.setattr("data.hashes.SETTLED_NS", -(10**18))
    pairs = [("who is it", f"Mr {name}") for name in ("Lee", "Lopez", "known", "known", "Olsen", "known")]
    words = write_words(tmp_path, pairs, "Mr known who is it \n")
    for n_held_out, in_training, in_test in ((3, "2 of the 3", "1 of the 3"), (5, "1 of the 1", "2 of the 5")):
        training, test, *_ = open_text(tmp_path, **words, n_held_out=n_held_out).warnings()
        assert (training[:10], test[:10]) == (in_training, in_test)


@pytest.mark.parametrize(("words", "n_warnings"), [("a b \n", 0), ("a b", 1)])
def test_a_newline_without_a_token_gives_a_warning(words, n_warnings, tmp_path):
    pairs = [(prompt, "b a") for prompt in ("a", "b", "a b")]
    data = open_text(tmp_path, **write_words(tmp_path, pairs, words), n_held_out=1)
    assert sum("the newline between prompt and completion as <unk>" in line for line in data.warnings()) == n_warnings


def test_rows_are_tokenized_again_with_another_eos(tmp_path):
    """Which only the file beside tokenizer.json names."""
    pairs = [(prompt, "b a") for prompt in ("a", "b", "a b")]
    chosen: dict[str, Any] = write_words(tmp_path, pairs, "a b \n") | {"n_held_out": 1}
    before = open_text(tmp_path, **chosen)
    assert (before.eos_id, before.train.labels[0, -1]) == (1, 1)
    beside = tmp_path / "words" / "tokenizer_config.json"
    beside.write_text(beside.read_text().replace("<eos>", "<end>"))
    after = open_text(tmp_path, **chosen)
    assert (after.eos_id, after.train.eos_id, after.train.labels[0, -1]) == (2, 2, 2)
    assert open_text(tmp_path, **chosen, eos_token="<end>").folder == after.folder != before.folder


def test_the_mask_may_be_a_token_of_the_tokenizer(tmp_path):
    """BERT's, which has a mask and no EOS, and drops newlines."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    write_pairs(tmp_path / "pairs.jsonl", 60)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc", *(f"##{letter}" for letter in "abc")]
    bert = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.decoder = decoders.WordPiece()
    bert.add_special_tokens(words[:5])
    bert.save(str(tmp_path / "bert.json"))
    settings = run_settings(tmp_path, tokenizer=str(tmp_path / "bert.json"), mask_id=4)
    settings["model"]["vocab_size"] = len(words)
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="the newline between prompt and completion as nothing"):
        train.main(["--config", str(tmp_path / "run.json"), "--run-dir", str(tmp_path / "run"), "data.eos_token=[SEP]"])
    trained = load(tmp_path / "run")
    assert trained.data.encode("ab [MASK]").tolist().count(4) == LENGTH - 5, "ab, brackets and an unknown word"
    assert (trained.complete("ab ca").tokens != 4).all()


def test_a_completion_with_the_end_of_all_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "a b c"}\n')
    tokenizer = str(lower_case_tokenizer(tmp_path / "low.json"))
    with pytest.raises(ValueError, match="the EOS token 4 occurs in 'a b c': choose another EOS token"):
        _ = open_text(tmp_path, tokenizer=tokenizer, eos_token="b").all_rows


def test_test_pairs_that_are_trained_on_give_a_warning(tmp_path):
    rows = write_pairs(tmp_path / "pairs.jsonl", 60)
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(rows[i]) + "\n" for i in (3, 5, 3)) + json.dumps({"prompt": "c c", "completion": "c c"})
    )
    data = open_text(tmp_path, test_source=str(tmp_path / "test.jsonl"))
    for _ in range(2):  # the second time from the cache
        assert data.warnings()[-1] == "3 of the 4 test pairs are also in the training set"
    assert "in the training set" not in str(open_text(tmp_path).warnings())


def test_a_run_on_pairs_that_it_is_tested_on_says_so(tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    settings = run_settings(tmp_path, test_source=str(tmp_path / "pairs.jsonl"))
    run_dir = run_text(tmp_path, settings, "run")
    assert re.search(r"^solved [\d.]+% of \d+ test prompts$", capsys.readouterr().out, re.MULTILINE)
    (session,) = read_history(run_dir)
    assert any("test pairs are also in the training set" in warning for warning in session["data_warnings"])


def test_hidden_files_and_caches_are_no_rows_and_splits_are_not_mixed(tmp_path):
    from datasets import Dataset

    folder = tmp_path / "rows"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", "b.jsonl"):
        write_pairs(folder / name, 5)
    assert find_files(folder) == [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    (folder / "a.jsonl").rename(folder / "train.jsonl")
    (folder / "b.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"has files of several splits \(test, train\): give those of one"):
        find_files(folder)
    saved = tmp_path / "saved"
    Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).save_to_disk(saved)
    expected = find_files(saved)
    (saved / "cache-0123.arrow").write_bytes(b"of Dataset.map")
    assert find_files(saved) == expected
    assert len(expected) == 1


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {"source": "nowhere.jsonl"}, "source 'nowhere.jsonl' cannot be read"),
        ('{"prompt": "a"}', {}, r"no column \['completion'\]"),
        ('{"prompt": "a", "completion": 5}', {}, "completion of row 0 .* is not text: 5"),
        ('{"prompt": "a", "completion": "b"}', {}, "n_held_out 10 must be less than the 1 rows"),
        ('{"prompt": "a", "completion": "%s"}' % ("a b c " * 40), {}, "has no row that fits 32 tokens"),
    ],
)
def test_bad_sources(content, changes, message, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        _ = open_text(tmp_path, **changes).all_rows


def test_the_page_trains(tmp_path, monkeypatch, capsys):
    """The lines of Python in docs/own_data.md write what the YAML file reads; the run is small."""
    (code,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("20_000", "300"), {})
    settings = yaml.safe_load((ROOT / "yaml_files" / "text_sorting_puma.yaml").read_text())
    small = tiny_settings(settings["objective"], tmp_path)
    small["data"] = settings["data"] | {"n_held_out": 20}
    small["model"] = settings["model"] | {"num_hidden_layers": 1}
    small["training"]["max_steps"] = 1
    Path("run.yaml").write_text(yaml.safe_dump(small))
    train.main(["--config", "run.yaml", "--run-dir", "run"])
    assert re.search(r"solved [\d.]+% of 10 test prompts", capsys.readouterr().out)


# Runs keep their tokenizer


def run_settings(folder: Path, **data: Any) -> dict[str, Any]:
    """A run of seconds on the pairs in `folder`."""
    settings = tiny_settings(dict(UNIFORM), folder)
    settings["model"] |= {"vocab_size": VOCAB, "learned_positions": None}
    settings["data"] = {
        "dataset": "text",
        "source": str(folder / "pairs.jsonl"),
        "data_dir": str(folder / "kept"),
        "max_len": LENGTH,
        "n_held_out": 10,
    } | data
    settings["training"] |= {"max_steps": 2, "batch_size": 4, "eval_every": 100, "save_every": 1}
    settings["validation"] = {"n_examples": 1, "n_loss_rows": 2, "tokens_per_step": [16]}
    return settings


def run_text(folder: Path, settings: dict[str, Any], name: str = "run") -> Path:
    (folder / f"{name}.json").write_text(json.dumps(settings))
    train.main(["--config", str(folder / f"{name}.json"), "--run-dir", str(folder / name)])
    return folder / name


def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no tokenizer may be trained."""

    def fail(*_: Any) -> None:
        raise AssertionError("a tokenizer is trained")

    monkeypatch.setattr(text_pairs, "train_byte_pairs", fail)


def test_a_run_keeps_its_tokenizer_when_its_pairs_change_and_go(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    run_dir = run_text(tmp_path, run_settings(tmp_path))
    prompt = load(run_dir).data.encode("ab ca")
    without_training(monkeypatch)
    rows = [{"prompt": f"toad {number}", "completion": "owl"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.array_equal(load(run_dir).data.encode("ab ca"), prompt)
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    monkeypatch.chdir(checkpoint)
    for path in (checkpoint, Path(), Path("../step_00000001"), f"{run_dir}@1"):
        assert np.array_equal(load(path).data.encode("ab ca"), prompt), path
    loaded = load_model(str(run_dir))
    assert loaded.config.open_data().load(train=False).question(0).text == "toad 30", "evaluated on what is there now"
    assert load_model(str(run_dir), ["data.tokenizer=other"]).config.data.tokenizer == "other"
    (tmp_path / "pairs.jsonl").unlink()
    shutil.rmtree(tmp_path / "kept")
    pack_run(str(run_dir), tmp_path / "packed")
    moved = run_dir.rename(tmp_path / "moved")
    for path in (moved, tmp_path / "packed"):
        trained = load(path)
        assert np.array_equal(trained.data.encode("ab ca"), prompt), path
        assert trained.complete("ab ca").nfe > 0
    shutil.rmtree(moved / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer is missing, the tokenizer that was trained for the run"):
        load(moved)


def test_the_rows_of_a_run_are_not_tokenized_again(tmp_path, tokenizer_on_the_hub, monkeypatch):
    """Neither with a trained tokenizer nor with one from the Hub."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    for name, tokenizer in (("trained", None), ("fetched", tokenizer_on_the_hub)):
        run_dir = run_text(tmp_path, run_settings(tmp_path, tokenizer=tokenizer), name)
        before = sorted((tmp_path / "kept").iterdir())
        config = load_model(str(run_dir)).config
        assert config.data.model_dump()["tokenizer"] == str(run_dir / "tokenizer")
        config.open_data().load(train=True)
        assert sorted((tmp_path / "kept").iterdir()) == before, name


@pytest.fixture
def tokenizer_on_the_hub(tmp_path, monkeypatch) -> str:
    """The name of a tokenizer whose file this code would write in another way."""
    import huggingface_hub

    folder = tmp_path / "cache"
    train_byte_pairs(["ab bc", "c a"] * 20, PIECES, VOCAB - 1).save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return "some/where"


def test_a_run_resumes_with_its_tokenizer_and_not_on_other_pairs(tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    settings = run_settings(tmp_path)
    straight = run_text(tmp_path, settings, "straight")
    with monkeypatch.context() as patch:
        patch.setattr(train, "is_due", lambda run, every: sys.exit(1) if run.step == 2 else every == 1)
        with pytest.raises(SystemExit):
            run_text(tmp_path, settings)
    shutil.rmtree(tmp_path / "kept")
    without_training(monkeypatch)
    pairs = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(pairs.replace("a", "b"))
    with pytest.raises(SystemExit) as stop:
        run_text(tmp_path, settings)
    assert stop.value.code == 2
    assert "the training data has changed since checkpoint" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text(pairs)
    weights = find_checkpoint(run_text(tmp_path, settings)).weights("ema")
    for name, tensor in find_checkpoint(straight).weights("ema").items():
        assert torch.equal(tensor, weights[name]), name


def test_a_run_that_starts_from_another_takes_its_tokenizer(tmp_path, monkeypatch, capsys):
    """On other pairs too; another tokenizer is refused."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    settings = run_settings(tmp_path) | {"objective": {"name": "autoregressive"}}
    settings["validation"] = {"n_examples": 1, "n_loss_rows": 2}
    source = run_text(tmp_path, settings, "arm")
    settings = run_settings(tmp_path, source=str(tmp_path / "other.jsonl"))
    (tmp_path / "other.jsonl").write_text((json.dumps({"prompt": "toad owl", "completion": "owl toad"}) + "\n") * 40)
    settings["model"]["init_from"] = str(source)
    with monkeypatch.context() as patch:
        without_training(patch)
        for name, start in (("run", source), ("step", source / "checkpoints" / "step_00000001"), ("at", f"{source}@1")):
            settings["model"]["init_from"] = str(start)
            run_dir = run_text(tmp_path, settings, name)
            kept = [folder / "tokenizer" / "tokenizer.json" for folder in (source, run_dir)]
            assert kept[0].read_bytes() == kept[1].read_bytes(), name
    train_byte_pairs(["toad owl"] * 20, PIECES, VOCAB).save_pretrained(tmp_path / "toads")
    settings["data"]["tokenizer"] = str(tmp_path / "toads")
    with pytest.raises(SystemExit) as stop:
        run_text(tmp_path, settings, "refused")
    assert stop.value.code == 2
    assert f"Set data.tokenizer: {source / 'tokenizer'}" in capsys.readouterr().err
    settings["data"]["tokenizer"] = None
    shutil.rmtree(source / "tokenizer")
    settings["model"]["init_from"] = str(source)
    with pytest.raises(SystemExit):
        run_text(tmp_path, settings, "bare")
    assert f"{source}: copy its own into that run as tokenizer/, or" in capsys.readouterr().err


def test_a_qwen2_folder_needs_its_tokenizer_named(tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    qwen = write_qwen2(tmp_path / "qwen")
    settings = run_settings(tmp_path)
    settings["model"] |= {"init_from": str(qwen), "vocab_size": VOCAB + 1}
    with monkeypatch.context() as patch:
        without_training(patch)
        with pytest.raises(SystemExit) as stop:
            run_text(tmp_path, settings)
    assert stop.value.code == 2
    assert f"set data.tokenizer: {qwen}" in capsys.readouterr().err
    settings["data"]["tokenizer"] = str(qwen)
    run_dir = run_text(tmp_path, settings)
    shutil.rmtree(qwen)
    assert load(run_dir).complete("ab ca").nfe > 0


def write_qwen2(folder: Path) -> Path:
    """A random model of transformers that fits `run_settings`, with a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = tiny_settings({}, folder)["model"]
    del shape["learned_positions"]
    Qwen2ForCausalLM(
        Qwen2Config(**shape | {"vocab_size": VOCAB, "num_key_value_heads": 2, "rope_theta": 10000.0})
    ).save_pretrained(folder)
    train_byte_pairs(["ab bc", "c a"] * 20, PIECES, VOCAB).save_pretrained(folder)
    return folder


def test_the_page_starts_from_a_pretrained_model(tmp_path, monkeypatch, capsys):
    """The YAML file of docs/own_data.md, with a tiny model in place of Qwen2, on text without prompts."""
    write_small_qwen2(tmp_path / "Qwen" / "Qwen2-0.5B")
    settings = small_settings(yaml.safe_load((ROOT / "yaml_files" / "text_qwen2_puma.yaml").read_text()))
    settings["model"]["vocab_size"] = 520
    settings["data"]["source"] = "free.jsonl"
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "", "completion": f"Anna has {number} books"} for number in range(40)]
    Path("free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_text(tmp_path, settings)
    sampling.main(["--checkpoint", "run", "--prompt", ""])
    assert "network forward evaluations" in capsys.readouterr().out
    _, prompt_mask = load("run").data.test.rows(np.arange(20))
    assert (prompt_mask.sum(1) == 1).all(), "the newline that follows the prompt"


def test_data_can_be_prepared_beforehand(tmp_path, monkeypatch, capsys):
    """As the run needs them, with overrides, and without a run directory."""
    write_pairs(tmp_path / "pairs.jsonl", 60)
    settings = run_settings(tmp_path, n_held_out=20)
    (tmp_path / "run.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    train.main(["--config", "run.json", "--prepare", "data.n_held_out=10"])
    assert "44 training sequences" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    without_training(monkeypatch)
    before = sorted((tmp_path / "kept").iterdir())
    run_text(tmp_path, settings)
    assert sorted((tmp_path / "kept").iterdir()) == before
