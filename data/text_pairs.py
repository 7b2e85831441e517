"""Text: pairs of a prompt and a completion from your own files, tokenized once and memory-mapped.

`dataset: text` reads two columns of a .jsonl or .parquet file, of a folder of such files or one that
`Dataset.save_to_disk` of Hugging Face wrote, or of a data set on the Hub. docs/own_data.md has an example.

A row is a prompt, a newline and a completion, padded with EOS (`data/text.py`). An answer is right if it equals the
completion; differences in white space do not count, and a token for unknown text (`<unk>`) equals nothing. Pairs that
do not fit `max_len` tokens are left out.

`PairSettings` and `PairDataSet` are also the base of TinyGSM (`data/tiny_gsm.py`), which judges answers in another way.

Shapes: B rows, L positions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import override

from base.commands import say
from base.files import make_once, making_folder, reported
from base.reading import reading
from base.text import escape, shorten
from data.dataset import AnswerVerdict, DataSet, DataSettings, JudgedAnswers
from data.hashes import hash_file
from data.pretokenize import pretokenize, read_rows, source_hashes
from data.questions import Question
from data.settings import FREE_ON_RESUME
from data.text import (
    MIN_TRAINED_VOCAB,
    SEPARATOR,
    TOKENIZER_DIR,
    TOKENIZER_FILE,
    check_tokens,
    completion_tokens,
    decode_completions,
    encode_completions,
    encode_prompts,
    encode_texts,
    find_tokenizer,
    load_tokenizer,
    prompt_fits,
    prompt_row,
    train_byte_pairs,
    unknown_id,
)
from data.token_files import TokenFileData, count_completions_with, count_shared_rows, open_token_files, read_meta

MAX_LENGTH = 1 << 20  # tokens per sequence
VERSION = 2  # of the files that are written; a new one when the same settings give other files
MAX_SHOWN_GOLD = 100  # characters of a right answer in a verdict
N_TOKENIZER_CHUNKS = 40  # of `data.pretokenize.CHUNK_ROWS` pairs, on which a tokenizer is trained
# What a token of a trained tokenizer spans at most: a digit with the space before it; a newline and an indent; a word
# with the space before it; signs; spaces. As of the hard word problems, but with the letters of all languages.
PIECES = r" ?\p{N}|\n {0,3}| ?[\p{L}\p{M}_]+| ?[^\p{L}\p{M}\p{N}_\s]+|\s+"


class PairSettings(DataSettings):
    """Base of data sets of tokenized pairs."""

    data_dir: str = Field(description="folder of the tokenized files", json_schema_extra=FREE_ON_RESUME)
    max_len: int = Field(512, ge=8, le=MAX_LENGTH, multiple_of=8, description="tokens per sequence")
    mask_id: int | None = Field(None, ge=0, description="the mask token; null: the model's last")
    n_held_out: int = Field(1000, gt=0, description="number of last rows that are used only for the validation loss")

    @property
    @override
    def length(self) -> int:
        """Tokens per sequence."""
        return self.max_len

    @property
    @override
    def min_vocab_size(self) -> int:
        """Smallest vocabulary with the mask token."""
        return (self.mask_id or 0) + 1

    @override
    def mask_id_in(self, vocab_size: int) -> int:
        """The mask token of a model with this vocabulary."""
        return vocab_size - 1 if self.mask_id is None else self.mask_id

    @override
    def with_tokenizer(self, folder: Path) -> PairSettings:
        """The same pairs; each data set of pairs has a setting `tokenizer`."""
        return self.model_copy(update={"tokenizer": str(folder)})


class PairDataSet(DataSet):
    """Base of data sets of tokenized pairs: rows, tokenizer, prompts."""

    settings: PairSettings
    takes_gold = True

    def __init__(self, settings: PairSettings, vocab_size: int) -> None:
        self.settings, self.vocab_size, self.mask_id = settings, vocab_size, settings.mask_id_in(vocab_size)

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of the tokenized rows, which may be written on first use."""

    @property
    @abstractmethod
    def tokenizer_name(self) -> str:
        """Folder, tokenizer.json or Hugging Face name of the tokenizer, which may be trained on first use."""

    @override
    def keep_tokenizer(self, run_dir: Path) -> None:
        folder, file = run_dir / TOKENIZER_DIR, find_tokenizer(self.tokenizer_name)
        tokenizer, content = self.tokenizer, file.read_bytes()  # first, since it may be the one that is replaced
        with reported(folder):
            if folder.exists():
                shutil.rmtree(folder)
        with making_folder(folder) as scratch:
            tokenizer.save_pretrained(scratch)
            # Byte for byte, since the folder of the tokenized rows is named after its hash.
            (scratch / TOKENIZER_FILE).write_bytes(content)

    @cached_property
    def all_rows(self) -> TokenFileData:
        """All rows."""
        data, n_held_out = self.open_rows(self.folder), self.settings.n_held_out
        if len(data) <= n_held_out:
            raise ValueError(f"data.n_held_out {n_held_out} must be less than the {len(data)} rows of {self.folder}")
        return data

    def open_rows(self, folder: Path) -> TokenFileData:
        """The rows in a folder of token files; raises ValueError if they do not fit the settings or the model."""
        return open_token_files(folder, self.settings.max_len, self.mask_id, self.vocab_size)

    @property
    @override
    def train(self) -> TokenFileData:
        """All rows but the last `n_held_out`."""
        return self.all_rows.part(slice(0, len(self.all_rows) - self.settings.n_held_out))

    @property
    @override
    def validation(self) -> TokenFileData:
        """The last `n_held_out` rows."""
        return self.all_rows.part(slice(len(self.all_rows) - self.settings.n_held_out, None))

    @property
    @override
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @override
    def encode(self, question: str) -> np.ndarray:
        """A prompt in words."""
        max_len = self.settings.max_len
        with reading("the prompt", "give text that the tokenizer of the model can encode"):
            question.encode()  # not so where it was no UTF-8
            ids = encode_prompts(self.tokenizer.backend_tokenizer, [question])[0]
        if not prompt_fits(len(ids), max_len):
            raise ValueError(f"the prompt has {len(ids)} tokens: at most {max_len - 2} fit data.max_len {max_len}")
        check_tokens(ids, self.mask_id, self.vocab_size, "the prompt")
        return prompt_row(ids, self.mask_id, max_len)

    def completion(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """The text after the prompt of one row, up to EOS; both arguments are int64 [L]."""
        return decode_completions(self.tokenizer, tokens[None], (prompt != self.mask_id)[None])[0]

    @override
    def show(self, prompt: np.ndarray, tokens: np.ndarray, order: np.ndarray) -> str:
        """The completion, with escapes for unprintable characters."""
        return escape(self.completion(prompt, tokens), keep="\n\t")


class TextSettings(PairSettings):
    """Pairs of a prompt and a completion."""

    dataset: Literal["text"]
    data_dir: str = Field(
        "data/generated",
        description="folder in which the tokenized files are kept",
        json_schema_extra=FREE_ON_RESUME,
    )
    source: str = Field(
        min_length=1,
        description="pairs to train on: a .jsonl or .parquet file, a folder of such files or of Dataset.save_to_disk, "
        "or a Hugging Face data set (its split train)",
    )
    test_source: str | None = Field(
        None,
        min_length=1,
        description="pairs to test on, the same kinds (of a Hugging Face data set its split test); null: the held-out "
        "rows",
    )
    prompt_column: str = Field("prompt", max_length=40, description="column of what is given")
    completion_column: str = Field("completion", max_length=40, description="column of what is to be written")
    tokenizer: str | None = Field(
        None,
        description="folder, tokenizer.json or Hugging Face name; null: byte pairs, trained on the first 20,000 pairs, "
        "model.vocab_size tokens (258: single bytes)",
    )
    eos_token: str | None = Field(
        None, description='token of `tokenizer` that ends a row, for one without EOS, e.g. "[SEP]"; null: its EOS'
    )

    @model_validator(mode="after")
    def _columns_and_eos_make_sense(self) -> TextSettings:
        problems = []
        if self.prompt_column == self.completion_column:
            problems.append(f"prompt_column and completion_column are both {self.prompt_column!r}: name two columns")
        if self.eos_token is not None and self.tokenizer is None:
            problems.append("eos_token: a tokenizer that is trained here has its own; leave it out or set tokenizer")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    @override
    def min_vocab_size(self) -> int:
        """Smallest vocabulary with the mask token, and with all bytes if the tokenizer is trained."""
        return max(super().min_vocab_size, MIN_TRAINED_VOCAB if self.tokenizer is None else 0)

    @override
    def describe(self) -> str:
        test = self.test_source or f"the last {self.n_held_out:,} pairs"
        return f"pairs of {self.prompt_column} and {self.completion_column} in {self.source}, tested on {test}"

    @property
    @override
    def trains_tokenizer(self) -> bool:
        return self.tokenizer is None

    @override
    def open(self, vocab_size: int) -> TextData:
        return TextData(self, vocab_size)


class Completion(NamedTuple):
    """A completion, decoded, since a tokenizer may not keep a text."""

    text: str
    is_known: bool  # without unknown tokens, which may stand for any text

    def equals(self, other: Completion) -> bool:
        """Whether both have the same known text, apart from white space."""
        return self.is_known and other.is_known and self.text.split() == other.text.split()


class TextData(PairDataSet):
    """Pairs to train on, and prompts whose completion must be met exactly, apart from white space."""

    question_noun = "prompts"
    settings: TextSettings

    @cached_property
    @override
    def folder(self) -> Path:
        return self._tokenized(self.settings.source, "train")

    @cached_property
    @override
    def test(self) -> TokenFileData:
        """The rows of the test."""
        source = self.settings.test_source
        return self.validation if source is None else self.open_rows(self._tokenized(source, "test"))

    @cached_property
    @override
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_name, self.settings.eos_token)

    @cached_property
    @override
    def tokenizer_name(self) -> str:
        """The tokenizer of the settings, or the folder of one that is trained on first use.

        Only a run that starts trains one: settings of a checkpoint name that of the run (`DataSettings.in_run`).
        """
        settings = self.settings
        if settings.tokenizer is not None:
            return settings.tokenizer
        columns = (settings.prompt_column, settings.completion_column)
        facts = [VERSION, _identity(settings.source), columns, self.vocab_size]
        folder = Path(settings.data_dir) / f"tokenizer_{_digest(facts)}"

        def train() -> None:
            say(f"training a tokenizer of {self.vocab_size} tokens in {folder}")
            chunks = islice(read_rows(settings.source, columns), N_TOKENIZER_CHUNKS)
            texts = (text for chunk in chunks for column in chunk for text in column)
            tokenizer = train_byte_pairs(texts, PIECES, self.vocab_size)
            with making_folder(folder) as scratch:
                tokenizer.save_pretrained(scratch)

        make_once(folder, folder.exists, train, "data.data_dir")
        return str(folder)

    def _tokenized(self, source: str, split: str) -> Path:
        """The folder of the rows of a source, which are tokenized on first use."""
        settings, name = self.settings, self.tokenizer_name
        columns = (settings.prompt_column, settings.completion_column)
        # EOS as it is, since a file beside tokenizer.json may name it.
        facts = [VERSION, _identity(source), split, columns, hash_file(find_tokenizer(name)), self.eos_id]
        folder = Path(settings.data_dir) / f"{split}_{settings.max_len}_{_digest(facts)}"
        pretokenize(
            source,
            name,
            folder,
            max_len=settings.max_len,
            columns=columns,
            split=split,
            truncate=False,
            eos_token=settings.eos_token,
            tokenizer_path_may_differ=True,
        )
        return folder

    @override
    def judge(self, tokens: np.ndarray, indices: np.ndarray) -> JudgedAnswers:
        """Whether the text equals that of the test row, see `Completion`."""
        expected, prompt_mask = self.test.rows(indices)
        answers, completions = (
            [self._read(each) for each in completion_tokens(self.eos_id, rows, prompt_mask)]
            for rows in (tokens, expected)
        )
        right = [answer.equals(wanted) for answer, wanted in zip(answers, completions, strict=True)]
        samples = [
            {
                "prompt": self._text(row[given]).strip(),
                "completion": wanted.text,
                "answer": answer.text,
                "verdict": "right" if is_right else "wrong",
            }
            for row, given, wanted, answer, is_right in zip(
                expected, prompt_mask, completions, answers, right, strict=True
            )
        ]
        return JudgedAnswers({"accuracy": np.array(right, dtype=np.float32)}, samples)

    @override
    def difficulty(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of the completion: the power of two below."""
        tokens, prompt_mask = self.test.rows(indices)
        n_tokens = ((tokens != self.test.eos_id) & ~prompt_mask).sum(1)
        return {"tokens": 2 ** np.log2(np.maximum(n_tokens, 1)).astype(np.int64)}

    @override
    def verdicts(
        self, prompts: np.ndarray, tokens: np.ndarray, golds: Sequence[str | None] | None = None
    ) -> list[AnswerVerdict]:
        """Right if the completion equals the gold one as the tokenizer encodes it, see `Completion`."""
        verdicts = []
        answers = completion_tokens(self.eos_id, tokens, prompts != self.mask_id)
        for ids, gold in zip(answers, golds or [None] * len(answers), strict=True):
            answer, right = self._read(ids), None
            if gold is not None:
                (wanted,) = encode_completions(self.tokenizer.backend_tokenizer, [gold])
                right = answer.equals(self._read(np.array(wanted, dtype=np.int64)))
            shown = shorten(escape(" ".join((gold or "").split())), MAX_SHOWN_GOLD)
            reason = {True: "right", False: f"wrong; right is {shown}", None: ""}[right]
            verdicts.append(AnswerVerdict(answer.text, right, reason, {"gold": gold}))
        return verdicts

    @override
    def question(self, index: int) -> Question:
        """A prompt of the test and its completion."""
        tokens, prompt_mask = self.test.rows(np.array([index]))
        return Question(
            self._text(tokens[0][prompt_mask[0]]).strip(), decode_completions(self.tokenizer, tokens, prompt_mask)[0]
        )

    @override
    def warnings(self) -> Sequence[str]:
        """Warn about pairs that do not fit, what the tokenizer does not know, and test pairs that are trained on."""
        counts = {folder: read_meta(folder).get("num_left_out") or 0 for folder in {self.folder, self.test.folder}}
        found = [
            f"{n:,} pairs are left out of {folder}: they do not fit data.max_len {self.settings.max_len}"
            for folder, n in sorted(counts.items())
            if n
        ]
        unknown = self._unknown_id
        separator = encode_texts(self.tokenizer.backend_tokenizer, [SEPARATOR])[0]
        if not separator or unknown in separator:
            given = self._text(np.array(separator)) if separator else "nothing"
            found.append(
                f"tokenizer {self.tokenizer_name!r} encodes the newline between prompt and completion as {given}, so "
                "nothing marks the end of a prompt: end all prompts with a word of their own, or take another tokenizer"
            )
        if unknown is not None:
            name = self._text(np.array([unknown]))
            for part, rows, effect in (
                ("training", self.train, ""),
                ("test", self.test, ", and no answer to them counts as right"),
            ):
                if n := count_completions_with(unknown, rows, part):
                    found.append(
                        f"{n:,} of the {len(rows):,} {part} completions have text that the tokenizer does not know: it "
                        f"becomes {name}{effect}"
                    )
        if n_shared := count_shared_rows(self.train, self.test):
            found.append(f"{n_shared:,} of the {len(self.test):,} test pairs are also in the training set")
        return found

    @cached_property
    def _unknown_id(self) -> int | None:
        return unknown_id(self.tokenizer)

    def _read(self, tokens: np.ndarray) -> Completion:
        """A completion from its tokens (int64)."""
        return Completion(self._text(tokens), self._unknown_id is None or self._unknown_id not in tokens)

    def _text(self, tokens: np.ndarray) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


def _identity(source: str) -> list[str]:
    """A source and its content: the hashes of its files; of a data set on the Hub only its name."""
    return [source, *source_hashes(source)]


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
