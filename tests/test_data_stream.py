"""SequenceStream: every row once per epoch over all ranks, whatever is drawn, and a state that resumes exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.addition import Addition, AdditionSettings
from data.dataset import ArrayData
from data.stream import SequenceStream, changed_sources, fingerprint, merge_streams


@dataclass
class RepeatedNumbers:
    """Row i holds the token i twice, so that a drawn row tells where it comes from; the first is the prompt."""

    n_rows: int
    length: int = 2
    mask_id: int = -1

    def __len__(self) -> int:
        return self.n_rows

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.repeat(indices.astype(np.int64)[:, None], self.length, axis=1)
        return tokens, np.arange(self.length) < np.ones((len(indices), 1))


def streams(n_rows: int, n_ranks: int, seed: int = 0) -> list[SequenceStream]:
    return [SequenceStream(RepeatedNumbers(n_rows), seed, rank, n_ranks) for rank in range(n_ranks)]


def draw(stream: SequenceStream, n_rows: int) -> list[int]:
    return stream.draw(n_rows)[0][:, 0].tolist()


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@settings(max_examples=60)
@given(n_rows=st.integers(1, 40), draws=sizes, seed=st.integers(0, 2**32 - 1))
def test_one_rank_gives_each_row_once_per_epoch(n_rows, draws, seed):
    (stream,) = streams(n_rows, 1, seed)
    drawn = [row for n in draws for row in draw(stream, n)]
    assert len(drawn) == sum(draws), "exactly the rows asked for"
    for start in range(0, len(drawn), n_rows):
        epoch = drawn[start : start + n_rows]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(n_rows))
    if len(drawn) >= n_rows:
        assert set(drawn[:n_rows]) == set(range(n_rows)), "a whole epoch wastes none"


@settings(max_examples=60)
@given(n_rows=st.integers(1, 40), n_ranks=st.integers(1, 7), draws=sizes, n_epochs=st.integers(1, 3))
def test_ranks_together_give_each_row_once_per_epoch(n_rows, n_ranks, draws, n_epochs):
    """However the ranks cut their draws: over all ranks, n epochs hold each row n times, up to the last round."""
    n_each = -(-n_rows * n_epochs // n_ranks)  # rows per rank until the epochs are over
    drawn = []
    for stream in streams(n_rows, n_ranks):
        own: list[int] = []
        turn = 0
        while len(own) < n_each:
            own += draw(stream, min(draws[turn % len(draws)] or 1, n_each - len(own)))
            turn += 1
        drawn.append(own)
    in_order = [row for rows in zip(*drawn, strict=True) for row in rows]
    assert Counter(in_order[: n_rows * n_epochs]) == dict.fromkeys(range(n_rows), n_epochs)
    for start in range(0, n_rows * n_epochs, n_rows):
        assert set(in_order[start : start + n_rows]) == set(range(n_rows))


@settings(max_examples=60)
@given(n_rows=st.integers(1, 40), n_drawn=st.lists(st.integers(0, 50), min_size=2, max_size=5))
def test_ranks_that_draw_at_different_speeds_share_no_row_of_an_epoch(n_rows, n_drawn):
    """PUMA's ranks retire different numbers of rows; none may get what another has had in the same epoch."""
    n_ranks = len(n_drawn)
    seen: set[tuple[int, int]] = set()  # (epoch, row)
    for rank, (stream, n) in enumerate(zip(streams(n_rows, n_ranks), n_drawn, strict=True)):
        for number, row in enumerate(draw(stream, n)):
            epoch = (number * n_ranks + rank) // n_rows
            assert (epoch, row) not in seen
            seen.add((epoch, row))
    assert len(seen) == sum(n_drawn)


@settings(max_examples=60)
@given(n_rows=st.integers(1, 40), n_ranks=st.integers(1, 4), before=sizes, after=sizes)
def test_the_state_resumes_exactly(n_rows, n_ranks, before, after):
    for rank, straight in enumerate(streams(n_rows, n_ranks)):
        for n in before:
            draw(straight, n)
        state = straight.state_dict()
        assert state == {"n_drawn": sum(before), "left_behind": [], "start": 0, "n_earlier": 0}
        resumed = SequenceStream(RepeatedNumbers(n_rows), 0, rank, n_ranks)
        draw(resumed, 3)  # what a fresh pool has drawn before its state is loaded
        resumed.load_state_dict(state)
        assert resumed.n_drawn == straight.n_drawn == sum(before)
        for n in after:
            assert draw(resumed, n) == draw(straight, n)


@settings(max_examples=60)
@given(cut=st.integers(0, 100))
def test_the_order_does_not_depend_on_how_draws_are_cut(cut):
    (whole,), (parts,) = streams(33, 1), streams(33, 1)
    assert draw(parts, cut) + draw(parts, 100 - cut) == draw(whole, 100)


def test_epochs_and_seeds_shuffle_differently():
    (first,), (second,) = streams(100, 1, seed=0), streams(100, 1, seed=1)
    epochs = [draw(first, 100), draw(first, 100), draw(second, 100)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(epochs[i], epochs[j], strict=True)) < 20
    assert epochs[0] != list(range(100))


def test_what_is_drawn_is_tokens_and_prompt_mask():
    (stream,) = streams(5, 1)
    tokens, prompt_mask = stream.draw(4)
    assert tokens.dtype == torch.int64
    assert prompt_mask.dtype == torch.bool
    assert tokens.shape == prompt_mask.shape == (4, 2)
    nothing, _ = stream.draw(0)
    assert nothing.shape == (0, 2)


def test_a_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        SequenceStream(RepeatedNumbers(0), 0)


def array_data(n_rows: int, length: int = 2, **changes: Any) -> ArrayData:
    tokens = np.arange(n_rows * length).reshape(n_rows, length)
    return replace(ArrayData(tokens, tokens % length == 0, mask_id=-1, source="a file"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros((3, 2), dtype=np.uint8)}, r"a file: tokens is uint8 \[3, 2\], needed is int64 \[N, L\]"),
        ({"prompt_mask": np.zeros((3, 3), dtype=bool)}, r"prompt_mask is bool \[3, 3\], needed is bool"),
        ({"prompt_mask": np.zeros((3, 2))}, "prompt_mask is float64"),
        ({"mask_id": 3}, r"row 1 \(from 0\) has the mask token 3"),
        ({"tokens": np.array([[0, 1], [2, 3], [4, -5]])}, r"row 2 \(from 0\) has a token below 0"),
        ({"prompt_mask": np.array([[True, False], [True, True], [True, True]])}, r"row 1 \(from 0\) is all prompt"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(changes, message):
    data = array_data(3)
    with pytest.raises(ValueError, match=message):
        replace(data, **changes)
    data.check_vocabulary(6)
    with pytest.raises(ValueError, match=r"row 2 \(from 0\) has a token that model\.vocab_size 5 does not have"):
        data.check_vocabulary(5)


@pytest.mark.parametrize("n_rows", [1, 5, 1000])
def test_the_fingerprint_tells_data_sets_apart(n_rows):
    data = array_data(n_rows)
    own = fingerprint(data)
    assert changed_sources(fingerprint(array_data(n_rows)), own) == []
    others = (
        array_data(n_rows + 1),
        array_data(n_rows, 3),
        array_data(n_rows, mask_id=-2),
        array_data(n_rows, eos_id=0),
    )
    for other in others:
        assert changed_sources(fingerprint(other), own) == ["a file"]


@settings(max_examples=60)
@given(n_rows=st.integers(1, 500), part=st.sampled_from(["tokens", "prompt_mask"]), where=st.integers(0, 10**6))
def test_the_fingerprint_covers_every_token_and_every_position_of_the_prompts(n_rows, part, where):
    data, other = array_data(n_rows), array_data(n_rows)
    content = getattr(other, part).reshape(-1)
    content[where % content.size] ^= 1
    assert changed_sources(fingerprint(other), fingerprint(data)) == ["a file"]


def test_of_several_sources_the_changed_ones_are_named_wherever_they_are_now():
    before, now = {"old/a": "1", "old/b": "2"}, {"new/a": "1", "new/b": "3"}
    assert changed_sources(now, before) == ["new/b"]
    assert changed_sources(before, before) == []
    assert changed_sources(now, {"old/a": "1"}) == ["new/a", "new/b"]


@settings(max_examples=150)
@given(
    n_rows=st.integers(1, 40),
    chain=st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=5), min_size=1, max_size=6),
)
def test_a_change_of_ranks_loses_no_row_and_repeats_none(n_rows, chain):
    """Each list says how much every rank draws before the next number of ranks; the last one draws all the rest."""
    drawn: list[int] = []
    state = SequenceStream(RepeatedNumbers(n_rows), 0).state_dict()
    for n_each in chain:
        n_before, states = len(drawn), []
        for rank, n in enumerate(n_each):
            stream = SequenceStream(RepeatedNumbers(n_rows), 0, rank, len(n_each))
            stream.load_state_dict(state | {"n_earlier": 0})
            drawn += draw(stream, n)
            states.append(stream.state_dict())
        state = merge_streams(states)
        assert state["n_earlier"] == len(drawn) - n_before
    (last,), (undisturbed,) = streams(n_rows, 1), streams(n_rows, 1)
    last.load_state_dict(state)
    drawn += draw(last, len(state["left_behind"]) + 2 * n_rows)
    assert Counter(drawn) == Counter(draw(undisturbed, len(drawn)))


def test_four_two_one_and_four_ranks_draw_each_epoch_in_the_same_order():
    """Ranks that draw alike, as the baseline's do: rank by rank in turn, the list is the undisturbed one."""
    drawn, state = [], streams(50, 1)[0].state_dict()
    for n_ranks in (4, 2, 1, 4):
        ranks = streams(50, n_ranks)
        for stream in ranks:
            stream.load_state_dict(state)
        rows = [draw(stream, 40 // n_ranks) for stream in ranks]
        drawn += [row for turn in zip(*rows, strict=True) for row in turn]
        state = merge_streams([stream.state_dict() for stream in ranks])
        assert state["left_behind"] == []
    assert drawn == draw(streams(50, 1)[0], 160)


def test_rows_that_end_in_another_token_than_the_data_set_says_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and `sampling.py` would end answers at different places."""
    data = AdditionSettings(dataset="addition", n_test=10).open(20)
    data.load(train=False)
    monkeypatch.setattr(Addition, "eos_id", 3)
    with pytest.raises(ValueError, match=r"Addition.eos_id is 3, but the rows of the validation have eos_id None"):
        data.load(train=False)
