"""Tokenize prompts and completions into flat files, which training memory-maps.

It writes the files of `data/token_files.py`. After an interruption the same call continues, and the result is the same,
byte for byte.

Shapes: N rows, L tokens per row.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from functools import partial
from io import FileIO
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from base.commands import say
from base.cores import count_cores
from base.files import alone, reported, walk, write_text
from base.reading import (
    MAX_INTEGER,
    check_columns,
    check_file,
    may_be_on_hub,
    parse_object,
    read_json,
    read_lines,
    reading,
)
from base.text import shorten
from data.hashes import cached_hash
from data.text import TOKENIZER_DIR, encode_rows, load_tokenizer
from data.token_files import LABELS_FILE, META_FILE, PROMPT_FILE, data_shape, read_meta, write_meta

PROGRESS_FILE = ".progress.json"
COLUMNS = ("question", "code")  # of TinyGSM
SPLITS = ("train", "test", "valid", "dev")  # how the names of their files begin
KINDS = (".jsonl", ".parquet", ".arrow")
CHUNK_ROWS = 500  # rows per task of a worker process: 1 MiB of labels
MAX_PENDING_CHUNKS = 4  # per worker
N_FIRST_CHUNKS = 40  # tokenized in a few seconds, less than worker processes of `train.py` take to import torch
SAVE_EVERY_S = 5.0
SAY_EVERY_S = 60.0  # where there is no progress bar
# Recorded in meta.json, so that a call never appends to rows that were encoded differently.
WHITE_SPACE = {"outer_white_space": "stripped"}
CONTENT = "dataset_sha256"  # key of the same kind: of the files of a local source; earlier calls did not record it

Rows = tuple[np.ndarray, np.ndarray, int]  # what `encode_rows` returns


@dataclass(frozen=True)
class Progress:
    """What an unfinished call has synced to disk."""

    n_read: int = 0  # rows of the source
    n_written: int = 0
    n_left_out: int = 0
    max_token_id: int = 0


def pretokenize(
    source: str,
    tokenizer_name: str,
    out: Path,
    max_len: int = 512,
    limit: int | None = None,
    n_workers: int | None = None,
    *,
    columns: tuple[str, str] = COLUMNS,
    split: str = "train",
    truncate: bool = True,
    eos_token: str | None = None,
    tokenizer_path_may_differ: bool = False,
) -> Progress:
    """Tokenize `source` into `out`, continuing an earlier call; interruptions do not change the result.

    One process writes at a time; others wait, and find what it has written.

    Args:
        source: see `read_rows`.
        tokenizer_name, eos_token: see `data.text.load_tokenizer`.
        limit: rows of the source to read; None: all.
        n_workers: processes; 1: this one; None: one per CPU core that this process may use, after the first
            `N_FIRST_CHUNKS` chunks, which this one tokenizes.
        columns: of the prompt and of the completion.
        split: of a data set on the Hub.
        truncate: see `data.text.encode_rows`.
        tokenizer_path_may_differ: from that of an earlier call; the name of `out` tells tokenizers apart.

    Raises:
        ValueError: bad source or tokenizer, or `out` was written with other arguments.
        WriteError: the files cannot be written; once they can, the same call continues.
    """
    if max_len % 8 or max_len < 8:
        raise ValueError(
            f"max_len {max_len} must be a positive multiple of 8: prompt_mask.bin has eight positions per byte"
        )
    if not source:
        raise ValueError("the source is empty: name a file, a folder or a Hugging Face data set")
    job = {"dataset": source, "tokenizer": tokenizer_name, "max_len": max_len, "limit": limit} | WHITE_SPACE
    if columns != COLUMNS:
        job["columns"] = list(columns)
    if not truncate:
        job["too_long"] = "left out"
    if hashes := source_hashes(source):
        job[CONTENT] = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]
    free = {"tokenizer"} if tokenizer_path_may_differ else set()
    done, finished = _read_progress(out, job, free)
    if finished:  # also where nothing can be written
        return done
    with alone(out):
        done, finished = _read_progress(out, job, free)
        if finished:  # meanwhile, by another process
            return done
        tokenizer = load_tokenizer(tokenizer_name, eos_token)
        work = partial(
            encode_rows, tokenizer.backend_tokenizer, tokenizer.eos_token_id, max_len=max_len, truncate=truncate
        )
        with reported(out / TOKENIZER_DIR):
            tokenizer.save_pretrained(out / TOKENIZER_DIR)  # creates `out` too
        chunks = _encode_chunks(read_rows(source, columns, split, done.n_read, limit), work, n_workers)
        done = _append_chunks(out, chunks, job, done, max_len=max_len, limit=limit)
        if done.n_written == 0:
            raise ValueError(f"{source} has no row that fits {max_len} tokens: raise max_len")
        facts = job | {"eos_id": tokenizer.eos_token_id, "num_left_out": done.n_left_out}
        write_meta(out, facts, done.n_written, done.max_token_id)
        (out / PROGRESS_FILE).unlink(missing_ok=True)
        return done


def _append_chunks(
    out: Path,
    chunks: Generator[Rows, None, None],
    job: dict[str, Any],
    done: Progress,
    *,
    max_len: int,
    limit: int | None,
) -> Progress:
    """Append encoded rows to the files of `out`, saving the progress every `SAVE_EVERY_S`; returns the final progress.

    Args:
        job: the arguments of the call, saved with the progress.
        done: progress of earlier calls; what the files have beyond it is cut off.
        limit: rows of the source that will have been read at the end; None: all.

    Raises:
        ValueError: a file is shorter than `done` says, or the source is bad.
        WriteError: the files cannot be written.
    """
    n_bytes = {LABELS_FILE: done.n_written * max_len * 4, PROMPT_FILE: done.n_written * max_len // 8}
    with (
        open(out / LABELS_FILE, "ab", buffering=0) as labels_file,  # so that closing them writes nothing
        open(out / PROMPT_FILE, "ab", buffering=0) as prompt_file,
        tqdm(total=limit, initial=done.n_read, desc="tokenizing", unit="row", unit_scale=True, disable=None) as bar,
        closing(chunks),  # stops the worker processes before anything else, also after an exception
    ):
        files = (labels_file, prompt_file)
        for file, size in zip(files, n_bytes.values(), strict=True):
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(f"{file.name} is shorter than {PROGRESS_FILE} records: delete {out} and start again")
            file.truncate(size)  # rows after the last save are written again
        saved_at, said_at = -SAVE_EVERY_S, time.monotonic()
        for labels, prompt_bits, n_left_out in chunks:
            _write(labels_file, labels)
            _write(prompt_file, prompt_bits)
            done = Progress(
                done.n_read + len(labels) + n_left_out,
                done.n_written + len(labels),
                done.n_left_out + n_left_out,
                max(done.max_token_id, int(labels.max(initial=0))),
            )
            bar.update(len(labels) + n_left_out)
            if bar.disable and time.monotonic() - said_at > SAY_EVERY_S:
                say(f"tokenized {done.n_read:,} rows")
                said_at = time.monotonic()
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _sync(files)
                write_text(out / PROGRESS_FILE, json.dumps({"job": job, "done": asdict(done)}))
                saved_at = time.monotonic()
        _sync(files)
    return done


def _read_progress(out: Path, job: dict[str, Any], free: set[str]) -> tuple[Progress, bool]:
    """Progress of earlier calls with the same arguments, except `free` ones, and whether they finished."""
    finished = (out / META_FILE).exists()
    if finished:
        meta = read_meta(out)
        # The published code strips and does not record it.
        unrecorded = {} if "num_left_out" in meta else WHITE_SPACE
        begun = {key: (unrecorded | meta).get(key) for key in job}
        n_left_out = meta.get("num_left_out") or 0
        n_written = data_shape(out, meta)[0]
        done = Progress(n_written + n_left_out, n_written, n_left_out, meta.get("max_token_id") or 0)
    elif (out / PROGRESS_FILE).exists():
        with reading(f"{out / PROGRESS_FILE}", f"delete {out.name} and start again"):
            content = read_json(out / PROGRESS_FILE)
            begun = {key: content["job"].get(key) for key in job}
            done = Progress(**content["done"])
            if any(type(count) is not int or not 0 <= count < MAX_INTEGER for count in astuple(done)):
                raise ValueError(f"it has other values than counts: {content['done']}")
    else:
        return Progress(), False
    if begun.get(CONTENT) is None:
        free = free | {CONTENT}
    differences = [
        f"{key} {begun[key]!r}, now {job[key]!r}" for key in job if key not in free and begun[key] != job[key]
    ]
    if differences:
        raise ValueError(f"{out} was written with {'; '.join(differences)}: choose another --out or delete it")
    return done, finished


def read_rows(
    source: str, columns: tuple[str, str], split: str = "train", n_skipped: int = 0, limit: int | None = None
) -> Iterator[tuple[list[str], list[str]]]:
    """Prompts and completions of a source in order, `CHUNK_ROWS` at a time.

    Files are read here and not by `datasets`. It guesses types in JSON: it reads text such as 2012-08-05 as a time, and
    gives back 2012-08-05 00:00:00. It takes the names of tables for patterns: it reads a1.parquet for a[1].parquet.

    Args:
        source: .jsonl or .parquet file, folder of such files or one that `Dataset.save_to_disk` wrote, or name of a
            Hugging Face data set.
        columns, split: see `pretokenize`.
        n_skipped: rows to leave out at the beginning.
        limit: rows to read, including those left out; None: all.

    Raises:
        ValueError: the source is missing, damaged or has other columns; the message names the first bad row.
    """
    path = Path(source)
    remedy = f"give .jsonl or .parquet files or a data set with {shorten(' and '.join(columns), 40)}"
    with reading(f"source {source!r}", remedy):
        if path.exists():
            files = find_files(path)
            read = _batches_of_lines if Path(files[0]).suffix == ".jsonl" else _batches_of_tables
            batches = read(files, columns, n_skipped, limit)
        elif is_on_hub(source):
            batches = _batches_of_dataset(source, n_skipped, limit, split)
        else:
            raise ValueError("it does not exist, and the name of a data set is OWNER/NAME")
        n_read = n_skipped
        for batch in batches:
            check_columns(columns, sorted(batch))
            for name in columns:
                wrong = next((i for i, value in enumerate(batch[name]) if not _is_text(value)), None)
                if wrong is not None:
                    raise ValueError(f"{name} of row {n_read + wrong} (from 0) is not text: {batch[name][wrong]!r}")
            prompts, completions = (batch[name] for name in columns)
            yield prompts, completions
            n_read += len(prompts)
        if n_read == 0:
            raise ValueError("it has no rows")


def is_on_hub(source: str) -> bool:
    """Whether a source is taken for the name of a data set on the Hub."""
    path = Path(source)
    return not path.exists() and path.suffix not in KINDS and may_be_on_hub(source)


def _batches_of_lines(
    files: list[str], columns: tuple[str, str], n_skipped: int, limit: int | None
) -> Iterator[dict[str, list[Any]]]:
    """Columns of the rows of .jsonl files, `CHUNK_ROWS` at a time; a value that a row lacks is None.

    The first chunk has all columns of the first row and no others, the next ones have `columns`.
    """
    lines, is_first = islice(_lines(files), n_skipped, limit), True
    while chunk := list(islice(lines, CHUNK_ROWS)):
        rows = []
        for name, number, line in chunk:
            with reading(f"source {name}, line {number}", "give one JSON object per line"):
                rows.append(parse_object(line))
        names = list(rows[0]) if is_first else columns
        yield {name: [row.get(name) for row in rows] for name in names}
        is_first = False


def _lines(files: list[str]) -> Iterator[tuple[str, int, bytes]]:
    """The lines of files that are not empty, each with its file and number."""
    for name in files:
        with reading(f"source {name}", "give one JSON object per line"):
            yield from ((name, number, line) for number, line in read_lines(Path(name)) if line.strip())


def _batches_of_tables(
    files: list[str], columns: tuple[str, str], n_skipped: int, limit: int | None
) -> Iterator[dict[str, list[Any]]]:
    """`columns` of the rows of .parquet or .arrow files, `CHUNK_ROWS` at a time."""
    rows = islice(_rows_of_tables(files, columns), n_skipped, limit)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield dict(zip(columns, map(list, zip(*chunk, strict=True)), strict=True))


def _rows_of_tables(files: list[str], columns: tuple[str, str]) -> Iterator[tuple[Any, ...]]:
    """The values of `columns` in each row of .parquet or .arrow files."""
    import pyarrow as pa  # slow to import, and only rows that are not tokenized yet need it
    import pyarrow.parquet as pq

    for name in files:
        with (
            reading(f"source {name}", f"give files with {shorten(' and '.join(columns), 40)}"),
            open(name, "rb") as file,
        ):
            if name.endswith(".parquet"):
                table = pq.ParquetFile(file)
                schema, batches = table.schema_arrow, table.iter_batches(CHUNK_ROWS, columns=list(columns))
            else:
                try:
                    table = batches = pa.ipc.open_stream(file)
                except pa.ArrowInvalid:  # the other of the two formats of Arrow
                    table = pa.ipc.open_file(file)
                    batches = map(table.get_batch, range(table.num_record_batches))
                schema = table.schema
            check_columns(columns, sorted(schema.names))
            for batch in batches:
                for start in range(0, batch.num_rows, CHUNK_ROWS):  # those of .arrow files may be large
                    part = batch.slice(start, CHUNK_ROWS)
                    yield from zip(*(part.column(column).to_pylist() for column in columns), strict=True)


def _batches_of_dataset(name: str, n_skipped: int, limit: int | None, split: str) -> Iterator[dict[str, list[Any]]]:
    """The same of a data set on the Hub."""
    from datasets import load_dataset  # slow to import, and only rows that are not tokenized yet need it

    rows = load_dataset(name, split=split, streaming=True, trust_remote_code=False)
    rows = rows if limit is None else rows.take(limit)
    yield from rows.skip(n_skipped).iter(batch_size=CHUNK_ROWS)


def _is_text(value: object) -> bool:
    """Whether a value is text that can be encoded: JSON can also have halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def source_hashes(source: str) -> list[str]:
    """The hashes of the files of a local source, in order; none of a data set on the Hub."""
    path = Path(source)
    if not path.exists():
        return []
    with reading(f"source {source!r}", "give .jsonl or .parquet files or a folder of them"):
        return [cached_hash(Path(file)) for file in find_files(path)]


def find_files(path: Path) -> list[str]:
    """The files of rows in `path` (a file or folder), sorted.

    Raises:
        ValueError: there are none or several kinds, or they are several splits of a data set.
    """
    if (path / "state.json").exists():  # of `Dataset.save_to_disk`, which leaves files of its cache beside the rows
        saved = [path / file["filename"] for file in read_json(path / "state.json")["_data_files"]]
        for file in saved:
            check_file(file)
        return [str(file) for file in saved]
    splits = path / "dataset_dict.json"
    if splits.exists():
        names = read_json(splits).get("splits")
        raise ValueError(f"it holds the splits {names}: give the folder of one, such as {path}/train")
    files = [path]
    if path.is_dir():
        names = [(place, name) for place, folders, plain in walk(path) for name in (*folders, *plain)]
        files = sorted(Path(place, name) for place, name in names if not name.startswith("."))
    found = [file for file in files if file.suffix in KINDS]
    if not found:
        raise ValueError(f"{path}: no {' or '.join(KINDS)} file found")
    if len({file.suffix for file in found}) > 1:
        raise ValueError(f"{path} has several kinds of files ({', '.join(KINDS)}): give a folder with one kind")
    named = {name for file in found for name in SPLITS if file.name.lower().startswith(name)}
    if len(named) > 1:
        raise ValueError(f"{path} has files of several splits ({', '.join(sorted(named))}): give those of one")
    for file in found:
        check_file(file)
    return [str(file) for file in found]


def _encode_chunks(
    chunks: Iterator[tuple[list[str], list[str]]],
    work: Callable[[list[str], list[str]], Rows],
    n_workers: int | None,
) -> Generator[Rows, None, None]:
    """`work` on each chunk in worker processes, in order, with a bounded number of pending chunks.

    Raises:
        ChildProcessError: a worker process was killed.
    """
    if n_workers is None:
        n_workers = count_cores()
        yield from (work(*chunk) for chunk in islice(chunks, N_FIRST_CHUNKS))
        following = next(chunks, None)
        if following is None:
            return
        chunks = chain([following], chunks)
    if n_workers == 1:
        yield from (work(*chunk) for chunk in chunks)
        return
    executor = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _start_worker, (work,))
    pending: deque[Future[Rows]] = deque()
    try:
        for prompts, completions in chunks:
            pending.append(executor.submit(_work, prompts, completions))
            if len(pending) >= MAX_PENDING_CHUNKS * n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that tokenizes was killed, perhaps for want of memory; the same command continues"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_encode: Callable[[list[str], list[str]], Rows]  # of a worker process


def _start_worker(encode: Callable[[list[str], list[str]], Rows]) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    _encode = encode


def _follow_parent() -> None:
    """Exit when the parent exits, also if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(prompts: list[str], completions: list[str]) -> Rows:
    return _encode(prompts, completions)


def _write(file: FileIO, array: np.ndarray) -> None:
    """Append an array to an unbuffered file. Raises WriteError."""
    content = array.tobytes()
    with reported(Path(file.name)):
        while content:  # a write to a nearly full disk may be partial
            content = content[file.write(content) :]


def _sync(files: tuple[FileIO, ...]) -> None:
    """Sync files to disk. Raises WriteError."""
    for file in files:
        with reported(Path(file.name)):
            os.fsync(file.fileno())
