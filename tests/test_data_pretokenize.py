"""Tokenized TinyGSM: layout, resume, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, run_python, started

from data import pretokenize as module
from data import tiny_gsm
from data.gsm8k import Problem, problem_file, read_problems
from data.pretokenize import pretokenize, read_rows
from data.stream import SequenceStream
from data.text import decode_completions, load_tokenizer
from data.token_files import FORMAT, open_token_files, read_meta, tokenizer_of, write_meta, write_token_files
from data.word_problems import generate_problems, train_tokenizer
from model.transformer import Transformer
from runtime.config_file import read_config

MAX_LEN = 64
QWEN = SHARED / "qwen2_tokenizer"
needs_shared = pytest.mark.skipif(not QWEN.is_dir(), reason="needs the Qwen2 tokenizer in ../shared/data")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(path)
    return path


def write_rows(path: Path, n_rows: int, seed: int = 1) -> list[dict[str, str]]:
    """Word problems as a .jsonl file; every tenth has a question that fills the sequence, every tenth cuts its code."""
    rows = [{"question": p.question, "code": p.code, "extra": "x"} for p in generate_problems(n_rows, seed)]
    for row in rows[3::10]:
        row["question"] = row["question"] * 4
    for row in rows[5::10]:
        row["question"] = row["question"] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def slow_row(tokenizer, row: dict[str, str]) -> tuple[list[int], list[bool]] | None:
    """Section "A sequence" of `data/text.py`, token by token; None if it is left out."""
    question, separator, code = (
        tokenizer.encode(text, add_special_tokens=False) for text in (row["question"], "\n", row["code"])
    )
    prompt = question + separator
    if len(prompt) > MAX_LEN - 2:
        return None
    ids = (prompt + code)[: MAX_LEN - 1]
    return (
        ids + [tokenizer.eos_token_id] * (MAX_LEN - len(ids)),
        [position < len(prompt) for position in range(MAX_LEN)],
    )


def test_files_hold_what_a_slow_loop_finds(tmp_path, tokenizer_dir):
    rows = write_rows(tmp_path / "rows.jsonl", 1203)
    done = pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), tmp_path / "out", MAX_LEN, n_workers=2)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    expected = [found for row in rows if (found := slow_row(tokenizer, row)) is not None]
    assert (done.n_read, done.n_written, done.n_left_out) == (1203, len(expected), 120)
    labels = np.fromfile(tmp_path / "out" / "labels.bin", dtype="<u4").reshape(-1, MAX_LEN)
    assert labels.tolist() == [ids for ids, _ in expected]
    assert any(row[-2] != tokenizer.eos_token_id for row in labels.tolist()), "no row was cut"
    assert (labels[:, -1] == tokenizer.eos_token_id).all()
    bits = np.fromfile(tmp_path / "out" / "prompt_mask.bin", dtype=np.uint8)
    position = 7  # bit 7 of byte 0 is position 7: little-endian order
    assert [bool(byte >> position & 1) for byte in bits[:: MAX_LEN // 8]] == [mask[position] for _, mask in expected]
    data = open_token_files(tmp_path / "out", MAX_LEN, len(tokenizer) - 1, len(tokenizer))
    tokens, prompt_mask = data.rows(np.arange(len(data)))
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [ids for ids, _ in expected]
    assert prompt_mask.tolist() == [mask for _, mask in expected]
    kept = [row for row in rows if slow_row(tokenizer, row) is not None]
    whole = [i for i, row in enumerate(tokens) if row[-2] == tokenizer.eos_token_id]
    programs = decode_completions(tokenizer, tokens[whole], prompt_mask[whole])
    assert programs == [kept[i]["code"] for i in whole]


def test_many_rows_are_shared_out_after_the_first(tmp_path, tokenizer_dir, monkeypatch):
    """As many rows as take longer than the start of worker processes; the files are the same."""
    write_rows(tmp_path / "rows.jsonl", 1203)
    arguments = (str(tmp_path / "rows.jsonl"), str(tokenizer_dir))
    started_workers: list[int] = []

    def start(n_workers: int, *options: Any) -> ProcessPoolExecutor:
        started_workers.append(n_workers)
        return ProcessPoolExecutor(n_workers, *options)

    monkeypatch.setattr(module, "ProcessPoolExecutor", start)
    monkeypatch.setattr(module, "count_cores", lambda: 2)
    monkeypatch.setattr(module, "CHUNK_ROWS", 100)
    monkeypatch.setattr(module, "MAX_PENDING_CHUNKS", 2)  # fewer than there are
    pretokenize(*arguments, tmp_path / "alone", MAX_LEN)
    assert started_workers == []
    monkeypatch.setattr(module, "N_FIRST_CHUNKS", 2)
    pretokenize(*arguments, tmp_path / "shared", MAX_LEN)
    assert started_workers == [2]
    for name in ("labels.bin", "prompt_mask.bin", "meta.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes(), name


def kill_worker(prompts: list[str], completions: list[str]) -> module.Rows:
    os._exit(9)


def test_a_worker_that_is_killed_ends_the_command_with_a_message():
    with pytest.raises(ChildProcessError, match="was killed"):
        list(module._encode_chunks(iter([(["a"], ["b"])] * 3), kill_worker, 2))


def test_white_space_around_the_texts_changes_nothing(tmp_path, tokenizer_dir):
    rows = [{"question": p.question, "code": p.code} for p in generate_problems(40, 1)]
    spaced = [{"question": f"\n  {row['question']} \t\n", "code": f"\n\n{row['code']}\r\n  "} for row in rows]
    for name, content in (("bare", rows), ("spaced", spaced)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        pretokenize(str(path), str(tokenizer_dir), tmp_path / name, MAX_LEN, n_workers=1)
    for file in ("labels.bin", "prompt_mask.bin"):
        assert (tmp_path / "spaced" / file).read_bytes() == (tmp_path / "bare" / file).read_bytes(), file
    tokens, prompt_mask = open_token_files(tmp_path / "spaced", MAX_LEN, 511, 512).rows(np.arange(40))
    programs = decode_completions(load_tokenizer(str(tokenizer_dir)), tokens, prompt_mask)
    assert "    return result" in programs[0], "inner white space is kept"
    assert programs == [row["code"] for row in rows]


def test_text_of_json_lines_is_read_as_it_is_written(tmp_path):
    """Also dates, which `datasets` takes for times; with a byte order mark, empty lines and other columns."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "5 Aug", "code": "2012-08-05"}\r\n\r\n')
    (tmp_path / "b.jsonl").write_text('\n{"id": 3, "code": "1.50", "question": "\\u00e9"}')
    chunks = list(read_rows(str(tmp_path), module.COLUMNS))
    assert chunks == [(["5 Aug", "\u00e9"], ["2012-08-05", "1.50"])]
    assert list(read_rows(str(tmp_path), module.COLUMNS, n_skipped=1)) == [(["\u00e9"], ["1.50"])]
    assert list(read_rows(str(tmp_path), module.COLUMNS, limit=1)) == [(["5 Aug"], ["2012-08-05"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "code": 3}', r"code of row 1 \(from 0\) is not text: 3\)"),
        ('{"question": "a", "code": true}', r"code of row 1 \(from 0\) is not text: True"),
        ('{"question": "a"}', r"code of row 1 \(from 0\) is not text: None"),
        ('{"question": "a", "code": "\\ud800"}', r"code of row 1 \(from 0\) is not text: '.ud800'"),
        ('{"question": "a", ', r"b\.jsonl, line 2 cannot be read \(it is not JSON"),
        ("[1]", r"b\.jsonl, line 2 cannot be read \(must be a JSON object, got list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "code": "b"}\n')
    (tmp_path / "b.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(tmp_path), module.COLUMNS))


def test_a_column_that_later_rows_lack_is_named_by_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    rows = [{"question": "a", "code": "b"}] * 4 + [{"question": "a", "id": "b"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"code of row 4 \(from 0\) is not text: None"):
        list(read_rows(str(tmp_path), module.COLUMNS))
    (tmp_path / "a.jsonl").write_text('{"id": "b", "question": "a"}\n')
    with pytest.raises(ValueError, match=r"it has no column \['code'\]; its columns are \['id', 'question'\]"):
        list(read_rows(str(tmp_path), module.COLUMNS))


def test_a_source_without_rows_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="it has no rows"):
        list(read_rows(str(tmp_path / "a.jsonl"), module.COLUMNS))


def test_folders_behind_links_are_read_once_and_hidden_files_not(tmp_path):
    for name in ("source/a", "other/deep", "source/.hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".b.jsonl").touch()
        (tmp_path / name / "b.jsonl").touch()
    (tmp_path / "source" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "circle").symlink_to(tmp_path / "source")
    found = module.find_files(tmp_path / "source")
    assert found == [str(tmp_path / "source" / name / "b.jsonl") for name in ("a", "link/deep")]


def test_a_source_that_has_changed_is_refused(tmp_path, tokenizer_dir):
    """After a finished call and after one that was interrupted; files that do not record the content are taken."""
    arguments = (str(tmp_path / "rows.jsonl"), str(tokenizer_dir), tmp_path / "out", MAX_LEN)
    write_rows(tmp_path / "rows.jsonl", 30)
    pretokenize(*arguments, n_workers=1)
    write_rows(tmp_path / "rows.jsonl", 30, seed=2)
    with pytest.raises(
        ValueError, match=r"was written with dataset_sha256 '\w+', now '\w+': choose another --out or delete"
    ):
        pretokenize(*arguments, n_workers=1)
    meta_file = tmp_path / "out" / "meta.json"
    meta = json.loads(meta_file.read_text())
    progress = {"n_read": 30, "n_written": 27, "n_left_out": 3, "max_token_id": 500}
    job = {
        key: meta[key] for key in ("dataset", "tokenizer", "max_len", "limit", "outer_white_space", "dataset_sha256")
    }
    meta_file.unlink()
    (tmp_path / "out" / ".progress.json").write_text(json.dumps({"job": job, "done": progress}))
    with pytest.raises(ValueError, match="was written with dataset_sha256"):
        pretokenize(*arguments, n_workers=1)
    meta_file.write_text(json.dumps({key: value for key, value in meta.items() if key != "dataset_sha256"}))
    assert pretokenize(*arguments, n_workers=1).n_read == 30


def test_meta_is_the_published_one(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    rows[19] = {"question": "1", "code": "2"}  # the last one lacks the highest token
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), tmp_path / "out", MAX_LEN, limit=20, n_workers=1)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["num_examples"] == 18
    assert meta["max_token_id"] == np.fromfile(tmp_path / "out" / "labels.bin", dtype="<u4").max()
    assert meta["max_len"] == MAX_LEN
    assert meta["eos_id"] == 0
    assert meta["sep"] == "\n"
    assert FORMAT.items() <= meta.items()
    assert tokenizer_of(tmp_path / "out") == str(tmp_path / "out" / "tokenizer")


def test_parquet_and_jsonl_folders_make_the_same_files(tmp_path, tokenizer_dir):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = write_rows(tmp_path / "all.jsonl", 700)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:333]))
    (tmp_path / "parts" / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[333:]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    contents = []
    for source in ("all.jsonl", "parts", "all.parquet"):
        pretokenize(str(tmp_path / source), str(tokenizer_dir), tmp_path / f"out_{source}", MAX_LEN, n_workers=1)
        contents.append([(tmp_path / f"out_{source}" / f).read_bytes() for f in ("labels.bin", "prompt_mask.bin")])
    assert contents[0] == contents[1] == contents[2]


def write_tables(folder: Path, tables: dict[str, dict[str, list[Any]]]) -> None:
    """Files of columns in a new folder, as their names say; an `.arrow` file has the format of `save_to_disk`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for name, columns in tables.items():
        table = pa.table({key: pa.array(values, pa.string()) for key, values in columns.items()})
        if name.endswith(".parquet"):
            pq.write_table(table, folder / name)
        else:
            kind = pa.ipc.new_stream if name.endswith("stream.arrow") else pa.ipc.new_file
            with open(folder / name, "wb") as file, kind(file, table.schema) as writer:
                writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_tables_are_read_by_their_names_as_they_are(kind, tmp_path):
    """`datasets` takes names for patterns: a[1] for a1."""
    names = [f"{name}.{kind}" for name in ("a*", "a1", "a::b", "a?", "a[1]")]
    folder = tmp_path / "of[1]*"
    write_tables(folder, {name: {"question": [name], "code": ["b"]} for name in names})
    assert list(read_rows(str(folder), module.COLUMNS)) == [(names, ["b"] * 5)]
    assert list(read_rows(str(folder / names[-1]), module.COLUMNS)) == [(names[-1:], ["b"])]
    assert list(read_rows(str(folder), module.COLUMNS, n_skipped=1, limit=3)) == [(names[1:3], ["b"] * 2)]


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow"])
def test_tables_may_be_empty_or_have_other_columns(kind, tmp_path):
    empty: dict[str, list[str]] = {"question": [], "code": []}
    tables = {f"0.{kind}": empty, f"1.{kind}": {"question": ["1"], "code": ["b"]}, f"2.{kind}": empty}
    write_tables(tmp_path / "a", {**tables, f"3.{kind}": {"id": ["c"], "code": ["b"], "question": ["3"]}})
    assert list(read_rows(str(tmp_path / "a"), module.COLUMNS)) == [(["1", "3"], ["b", "b"])]
    write_tables(tmp_path / "b", {**tables, f"3.{kind}": {"question": ["3"]}})
    with pytest.raises(ValueError, match=rf"source \S*b/3.{kind} cannot be read \(it has no column \['code'\]"):
        list(read_rows(str(tmp_path / "b"), module.COLUMNS))
    with pytest.raises(ValueError, match="it has no rows"):
        list(read_rows(str(tmp_path / f"a/0.{kind}"), module.COLUMNS))


def test_an_interrupted_call_continues(tmp_path, tokenizer_dir, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", 2200)
    arguments = (str(tmp_path / "rows.jsonl"), str(tokenizer_dir))
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    pretokenize(*arguments, straight, MAX_LEN, n_workers=1)
    read = module.read_rows
    starts = []

    def failing(source, columns, split, n_skipped, limit):
        starts.append(n_skipped)
        for number, chunk in enumerate(read(source, columns, split, n_skipped, limit)):
            if number == 2 and len(starts) < 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(module, "read_rows", failing)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "MAX_PENDING_CHUNKS", 1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretokenize(*arguments, broken, MAX_LEN, n_workers=1)
        assert not (broken / "meta.json").exists()
        with open(broken / "labels.bin", "ab") as file:
            file.write(b"half a row, written after the last save")
    pretokenize(*arguments, broken, MAX_LEN, n_workers=1)
    assert starts[0] == 0
    assert 0 < starts[1] < starts[2]
    for name in ("labels.bin", "prompt_mask.bin", "meta.json"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_killed_call_continues_and_leaves_no_process(tmp_path, tokenizer_dir):
    write_rows(tmp_path / "rows.jsonl", 1_100)
    slow = """
import time
from data import pretokenize, tiny_gsm
def write_and_wait(path, text, write_text=pretokenize.write_text):
    write_text(path, text)
    if path.name == pretokenize.PROGRESS_FILE:
        time.sleep(600)
pretokenize.write_text = write_and_wait
tiny_gsm.main()
"""
    command = ["data/tiny_gsm.py", "--source", tmp_path / "rows.jsonl", "--tokenizer", tokenizer_dir]
    command += ["--max-len", MAX_LEN, "--workers", 1, "--out"]
    killed = tmp_path / "killed"
    with started("-c", slow, *command[1:], killed, group=True) as process:
        while not (killed / ".progress.json").exists():
            assert process.poll() is None, "the call ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "meta.json").exists()
    n_read = json.loads((killed / ".progress.json").read_text())["done"]["n_read"]
    assert n_read == 500
    deadline = time.monotonic() + 120
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    for out in (killed, tmp_path / "straight"):
        result = run_python(*command, out)
        assert result.returncode == 0, result.stderr
        assert "990 rows, 110 left out (question too long)" in result.stdout
    for name in ("labels.bin", "prompt_mask.bin", "meta.json"):
        assert (killed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert run_python(*command, killed).stdout == f"{killed}: 990 rows, 110 left out (question too long)\n"


def group_is_alive(group: int) -> bool:
    """Whether a process group has members that have not ended."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.fixture
def files(tmp_path, tokenizer_dir) -> Path:
    """Tokenized rows to damage."""
    write_rows(tmp_path / "rows.jsonl", 50)
    pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), tmp_path / "out", MAX_LEN, n_workers=1)
    return tmp_path / "out"


def rewrite_meta(folder: Path, **changes: object) -> None:
    """Set facts of meta.json; None takes them out."""
    meta = read_meta(folder) | changes
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


@pytest.mark.parametrize("missing", ["num_examples", "max_len"])
def test_what_meta_lacks_follows_from_the_sizes(missing, files):
    rewrite_meta(files, max_token_id=None, num_left_out=None, limit=None, **{missing: None})
    data = open_token_files(files, MAX_LEN, 511, 512)
    assert len(data) == 45
    assert data.length == MAX_LEN


@pytest.mark.parametrize("eos_id", [3, None])
def test_rows_of_a_tokenizer_with_another_eos_are_refused(eos_id, files, tokenizer_dir):
    """What meta.json lacks follows from the rows, the last token of each of which is EOS."""
    settings = {"data_dir": str(files), "tokenizer": str(tokenizer_dir), "max_len": MAX_LEN, "n_held_out": 5}
    data = tiny_gsm.TinyGsmSettings(dataset="tiny_gsm", **settings).open(512)
    assert data.validation.eos_id == data.eos_id == 0
    if eos_id is None:
        labels = np.memmap(files / "labels.bin", dtype=np.uint32, mode="r+")
        labels[labels == 0] = 3
        labels.flush()
    rewrite_meta(files, eos_id=eos_id)
    with pytest.raises(ValueError, match=r"end in token 3, but EOS of .* is 0: set data.tokenizer to the tokenizer"):
        _ = tiny_gsm.TinyGsmSettings(dataset="tiny_gsm", **settings).open(512).validation


def test_sizes_that_do_not_fit_are_refused_with_both_numbers(files):
    rewrite_meta(files, num_examples=46)
    with pytest.raises(ValueError, match=rf"labels.bin has {45 * MAX_LEN * 4} bytes.* take {46 * MAX_LEN * 4}"):
        open_token_files(files, MAX_LEN, 511, 512)
    rewrite_meta(files, num_examples=45)
    with open(files / "prompt_mask.bin", "r+b") as file:
        file.truncate(45 * 8 - 1)
    with pytest.raises(ValueError, match=rf"prompt_mask.bin has {45 * 8 - 1} bytes.* take {45 * 8}"):
        open_token_files(files, MAX_LEN, 511, 512)
    rewrite_meta(files, num_examples=0)
    with pytest.raises(ValueError, match="has no rows"):
        open_token_files(files, MAX_LEN, 511, 512)


def test_what_the_published_files_hold_beyond_their_rows_is_ignored_with_a_warning(files):
    """They are allocated for the rows that the data set is said to have, 52 here, and padded with zeros."""
    expected = open_token_files(files, MAX_LEN, 511, 512)
    tokens, prompt_mask = expected.rows(np.arange(45))
    messages = []
    for name, row_bytes in (("labels.bin", MAX_LEN * 4), ("prompt_mask.bin", MAX_LEN // 8)):
        os.truncate(files / name, 52 * row_bytes)
        found = f"{files / name} has {52 * row_bytes} bytes, but the 45 rows of {MAX_LEN} tokens in meta.json take"
        messages.append(re.escape(f"{found} {45 * row_bytes}: the rest of the file is ignored"))
    with pytest.warns(UserWarning, match=messages[0]), pytest.warns(UserWarning, match=messages[1]):
        data = open_token_files(files, MAX_LEN, 511, 512)
    assert len(data) == 45
    again, mask_again = data.rows(np.arange(45))
    assert np.array_equal(again, tokens)
    assert np.array_equal(mask_again, prompt_mask)
    with pytest.raises(ValueError, match=r"labels\.bin has"):  # a second process wrote too
        write_meta(files, {"max_len": MAX_LEN}, 45, 511)


@pytest.mark.parametrize("missing", ["num_examples", "max_len"])
def test_files_that_are_longer_must_fit_where_a_number_follows_from_their_sizes(missing, files):
    rewrite_meta(files, **{missing: None})
    with open(files / "prompt_mask.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=rf"prompt_mask.bin has {45 * 8 + 1} bytes.* take {45 * 8}"):
        open_token_files(files, MAX_LEN, 511, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((128, 511, 512), f"rows of {MAX_LEN} tokens, but data.max_len is 128"),
        ((MAX_LEN, 0, 512), "contains the mask token 0"),
        ((MAX_LEN, 99, 100), r"contains token \d+, but model.vocab_size is 100"),
    ],
)
def test_data_that_does_not_fit_the_settings_is_refused(arguments, message, files):
    with pytest.raises(ValueError, match=message):
        open_token_files(files, *arguments)


@pytest.mark.parametrize("row", [0, 31])
def test_a_row_with_nothing_to_predict_is_refused_by_number(row, files, monkeypatch):
    monkeypatch.setattr("data.token_files.N_CHECKED", 10)
    bits = np.memmap(files / "prompt_mask.bin", dtype=np.uint8, mode="r+", shape=(45, MAX_LEN // 8))
    bits[row] = 255
    bits.flush()
    with pytest.raises(ValueError, match=f"row {row} "):
        open_token_files(files, MAX_LEN, 511, 512)


@pytest.mark.parametrize("row", [0, 44])
def test_the_mask_token_is_found_in_any_row(row, files, monkeypatch):
    monkeypatch.setattr("data.token_files.N_CHECKED", 10)
    labels = np.memmap(files / "labels.bin", dtype=np.uint32, mode="r+", shape=(45, MAX_LEN))
    labels[row, 0] = 511
    labels.flush()
    with pytest.raises(ValueError, match="contains the mask token 511"):
        open_token_files(files, MAX_LEN, 511, 512)


def test_unreadable_meta_is_refused(files):
    rewrite_meta(files, labels_dtype="uint16")
    with pytest.raises(ValueError, match="labels_dtype is 'uint16', but only 'uint32'"):
        open_token_files(files, MAX_LEN, 511, 512)
    (files / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        open_token_files(files, MAX_LEN, 511, 512)
    (files / "meta.json").unlink()
    with pytest.raises(ValueError, match="is missing: the tokenized data is unfinished"):
        open_token_files(files, MAX_LEN, 511, 512)


def test_the_stream_hands_out_every_row_once_per_epoch(files):
    data = open_token_files(files, MAX_LEN, 511, 512)
    stream = SequenceStream(data, seed=3)
    tokens, prompt_mask = stream.draw(len(data))
    assert sorted(map(tuple, tokens.tolist())) == sorted(map(tuple, data.labels.tolist()))
    assert (prompt_mask.sum(1) > 0).all()


def test_other_settings_are_refused_and_a_finished_call_does_nothing(files, tmp_path, tokenizer_dir):
    before = (files / "meta.json").stat().st_mtime_ns
    done = pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), files, MAX_LEN, n_workers=1)
    assert done.n_written == 45
    assert (files / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_len 64, now 128"):
        pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), files, 128)
    with pytest.raises(ValueError, match="limit None, now 20"):
        pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), files, MAX_LEN, limit=20)


def test_files_that_do_not_record_whether_texts_were_stripped_are_not_continued(tmp_path, tokenizer_dir, files):
    """Those of the published code do not either, but it strips."""
    arguments = (str(tmp_path / "rows.jsonl"), str(tokenizer_dir))
    message = "outer_white_space None, now 'stripped'"
    job = {"dataset": arguments[0], "tokenizer": arguments[1], "max_len": MAX_LEN, "limit": None}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".progress.json").write_text(json.dumps({"job": job, "done": {}}))
    with pytest.raises(ValueError, match=message):
        pretokenize(*arguments, tmp_path / "begun", MAX_LEN, n_workers=1)
    rewrite_meta(files, outer_white_space=None)
    with pytest.raises(ValueError, match=message):
        pretokenize(*arguments, files, MAX_LEN, n_workers=1)
    assert len(open_token_files(files, MAX_LEN, 511, 512)) == 45, "training still reads them"
    rewrite_meta(files, num_left_out=None)  # as in a folder of the published code
    assert pretokenize(*arguments, files, MAX_LEN, n_workers=1).n_written == 45


def test_the_search_for_rows_of_prompts_alone_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("data.hashes.SETTLED_NS", -(10**18))
    prompt_bits = np.array([[1], [255], [0]], dtype=np.uint8)
    write_token_files(tmp_path, np.ones((3, 8), dtype=np.uint32), prompt_bits, {"eos_id": 1})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row 1 \(from 0\) is all prompt"):
            open_token_files(tmp_path, 8, 6, 7)
        monkeypatch.setattr("data.token_files.N_CHECKED", None)  # a second search would fail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ('{"question": "a", "program": "b"}\n', r"no column \['code'\]"),
        ('{"question": "a", "code": null}\n', "code of row 0 .* is not text"),
        ('{"question": "a", ', "cannot be read"),
    ],
)
def test_bad_sources_end_with_one_message(content, message, tmp_path, tokenizer_dir, capsys):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        tiny_gsm.main(f"--source {path} --tokenizer {tokenizer_dir} --out {tmp_path / 'out'} --workers 1".split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "meta.json").exists()


def test_no_source_is_not_the_current_folder(tmp_path):
    with pytest.raises(ValueError, match="the source is empty: name a file"):
        pretokenize("", "", tmp_path)


def test_a_misspelled_folder_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"source 'data/my_pairs' cannot be read \(it does not exist"):
        next(module.read_rows("data/my_pairs", ("question", "code")))


@needs_shared
def test_the_separator_is_a_token_of_its_own_and_special_text_is_text(tmp_path):
    rows = [{"question": "How many <|im_start|> are left?", "code": "def f():\n    return 1<|endoftext|>"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretokenize(str(tmp_path / "rows.jsonl"), str(QWEN), tmp_path / "out", 64, n_workers=1)
    data = open_token_files(tmp_path / "out", 64, 151644, 151645)
    tokens, prompt_mask = data.rows(np.array([1]))
    assert tokens[0][prompt_mask[0]][-2:].tolist() == [30, 198], "'?' and the newline must not become one token"
    answer = tokens[0][~prompt_mask[0]]
    assert list(answer).index(151643) == len(answer) - (answer == 151643).sum(), "EOS stands at the end alone"


@needs_shared
def test_real_questions_and_programs_come_back(tmp_path):
    source = SHARED / "tinygsm_like" / "tinygsm_questions_programs.jsonl"
    done = pretokenize(str(source), str(QWEN), tmp_path / "out", 512, limit=600, n_workers=1)
    assert done.n_written == 600
    data = open_token_files(tmp_path / "out", 512, 151644, 151645)
    tokens, prompt_mask = data.rows(np.arange(600))
    programs = decode_completions(load_tokenizer(str(QWEN)), tokens, prompt_mask)
    with open(source, encoding="utf-8") as file:
        codes = [json.loads(next(file))["code"] for _ in range(600)]
    cut = [i for i in range(600) if programs[i] != codes[i]]
    assert all(codes[i].startswith(programs[i].rstrip("\ufffd")) and tokens[i, -2] != 151643 for i in cut)
    assert len(cut) < 30
    assert os.path.getsize(tmp_path / "out" / "labels.bin") == 600 * 512 * 4


def test_a_data_set_of_the_hub_is_streamed_and_gsm8k_is_fetched_with_it(tmp_path, tokenizer_dir, monkeypatch, capsys):
    """Training nodes often have no network."""
    import datasets

    rows, fetched = write_rows(tmp_path / "rows.jsonl", 1100), []

    def load_dataset(name, *subset, **options):
        if subset:
            fetched.append(name)
            return [{"question": "Q", "answer": "#### 1"}]
        assert (name, options) == (
            "TinyGSM/TinyGSM",
            {"split": "train", "streaming": True, "trust_remote_code": False},
        )
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    pretokenize(str(tmp_path / "rows.jsonl"), str(tokenizer_dir), tmp_path / "local", MAX_LEN, 1050, n_workers=1)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    numbers = ("--max-len", str(MAX_LEN), "--limit", "1050", "--workers", "1")
    for _ in range(2):
        tiny_gsm.main(["--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "hub"), *numbers])
    assert capsys.readouterr().out.count("945 rows, 105 left out") == 2
    assert fetched == ["openai/gsm8k"]
    assert read_problems(problem_file("openai/gsm8k", tmp_path / "hub")) == [Problem("Q", "1")]
    assert read_meta(tmp_path / "hub")["num_examples"] == 945
    for name in ("labels.bin", "prompt_mask.bin"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    rest = read_rows("TinyGSM/TinyGSM", ("question", "code"), n_skipped=1000, limit=1050)
    assert [question for questions, _ in rest for question in questions] == [row["question"] for row in rows[1000:1050]]


def test_a_finished_call_does_not_need_its_files_nor_the_hub(tmp_path, tokenizer_dir, monkeypatch, capsys):
    monkeypatch.setattr(tiny_gsm, "problem_file", None)  # a call would fail
    write_rows(tmp_path / "rows.jsonl", 30)
    for _ in range(2):
        tiny_gsm.main(f"--source {tmp_path}/rows.jsonl --tokenizer {tokenizer_dir} --out {tmp_path}/out".split())
        (tmp_path / "rows.jsonl").unlink(missing_ok=True)
    assert capsys.readouterr().out.count("30 rows") == 2


def test_the_papers_settings():
    puma, baseline = (read_config(ROOT / "yaml_files" / f"tinygsm_{name}.yaml") for name in ("puma", "baseline"))
    assert (puma.model, puma.training, puma.validation) == (baseline.model, baseline.training, baseline.validation)
    assert puma.mask_id == 151644
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in Transformer(puma.model).parameters())
    assert n_parameters == pytest.approx(125e6, rel=0.01)
    steps = [0, 59_999, 60_000, 329_999, 330_000, 900_000]
    assert [puma.objective.n_stages_at(step) for step in steps] == [12, 12, 15, 39, 42, 42]
