"""Texts with holes as rows to fill: `def f(): <3> return x` has a hole of three tokens.

    row = encode_template("def f(): <3> return x", data, config)
    samples = build_sampler(config, data.eos_id)(model, torch.from_numpy(row)[None], config.mask_id, rule)

A full model predicts a masked position from all that is given around it, so a hole needs nothing but masks.
"""

from __future__ import annotations

import re

import numpy as np

from base.reading import reading
from base.text import shorten
from config import BlockSettings, Config
from data.dataset import DataSet
from data.text import check_tokens, encode_texts

HOLE = re.compile(r"<(\d{1,6})>")


def encode_template(template: str, data: DataSet, config: Config) -> np.ndarray:
    """A row (int64 [L]) of the tokens of a template, with mask tokens in its holes and EOS behind it.

    Text between holes is encoded as it is, piece by piece, so tokens never span the edge of a hole. Write the whole
    row, as the model was trained: for TinyGSM the question, a newline and the program.

    Raises:
        ValueError: the model is causal or fills block by block, its data are not text, or the template has no hole, a
            hole of no token, or more tokens than a row.
    """
    check_infills(config)
    if data.tokenizer is None:
        raise ValueError(f"a template needs a model of text: data set {config.data.dataset!r} has no tokenizer")
    pieces = HOLE.split(template)  # text, number, text, ..., text
    sizes = [int(size) for size in pieces[1::2]]
    shown = shorten(template, 60)
    if not sizes:
        raise ValueError(f"template {shown!r} has no hole: write <3> for a hole of three tokens")
    if 0 in sizes:
        raise ValueError(f"template {shown!r} has a hole of no token: write <1> or more")
    with reading("the template", "give text that the tokenizer of the model can encode"):
        texts = encode_texts(data.tokenizer.backend_tokenizer, pieces[::2])
    length, n_tokens = config.data.length, sum(sizes) + sum(len(ids) for ids in texts)
    if n_tokens > length - 1:  # the last token is EOS, as in every row
        raise ValueError(f"template {shown!r} has {n_tokens} tokens: at most {length - 1} fit a row of {length}")
    row = np.full(length, data.eos_id, dtype=np.int64)
    place = 0
    for ids, size in zip(texts, [*sizes, 0], strict=True):
        check_tokens(ids, config.mask_id, config.model.vocab_size, "the template")
        row[place : place + len(ids)] = ids
        place += len(ids)
        row[place : place + size] = config.mask_id
        place += size
    return row


def check_infills(config: Config) -> None:
    """Raise ValueError if the model cannot use what is given behind a hole."""
    if config.causal:
        raise ValueError(
            "a causal model sees no token behind a hole: sample it from a prompt, or use a masked diffusion model"
        )
    if isinstance(config.objective, BlockSettings):
        raise ValueError(
            f"objective {config.objective.name!r} fills block by block and sees nothing behind the block: sample it "
            "from a prompt, or use a model of objective uniform or puma"
        )
