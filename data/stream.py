"""Rows of a data set in a seeded random order, without end, split over ranks.

All ranks share one endless list: the data set shuffled, then shuffled again, and so on. Entry i belongs to rank
i % n_ranks. So each row is drawn exactly once per epoch for any number of rows, no row is dropped at the end of an
epoch, ranks may draw at different speeds, and the state of a rank is the number of rows that it has drawn.

When a run resumes with another number of ranks, the entries not yet drawn form a new list, which is split in the same
way: first the entries that slower ranks have not reached, then all entries after the last one drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import SequenceData


def fingerprint(data: SequenceData) -> dict[str, str]:
    """Identify a data set: a hash (hex) of each of its sources, of all rows and their format, by the source's name."""
    layout = f"{len(data)} {data.length} {data.mask_id} {data.eos_id}"
    return {name: hashlib.sha256(f"{layout} {digest}".encode()).hexdigest() for name, digest in data.hashes().items()}


def changed_sources(now: dict[str, str], before: dict[str, str]) -> list[str]:
    """Names of the sources that differ between the fingerprint `now` of a data set and an earlier one.

    Sources are compared in order and not by name, since files may be in another folder now.
    """
    if len(before) != len(now):
        return list(now)
    return [name for (name, digest), saved in zip(now.items(), before.values(), strict=True) if digest != saved]


class SequenceStream:
    """One rank's part of the endless shuffled list. Its state: `n_drawn`, and the list if the ranks have changed."""

    def __init__(self, data: SequenceData, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        if len(data) == 0:
            raise ValueError("the training data has no rows")
        self.data, self.seed, self.rank, self.n_ranks = data, seed, rank, n_ranks
        self.n_drawn = 0
        # The list of all ranks: the entries `left_behind` of the endless list, then the endless list from `start`.
        self.left_behind, self.start = np.empty(0, dtype=np.int64), 0
        self.n_earlier = 0  # rows drawn from earlier lists, as far as this rank counts them
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def draw(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The next `n_rows` rows: tokens int64 [n, L] and prompt_mask bool [n, L], on the CPU."""
        offsets = (self.n_drawn + np.arange(n_rows)) * self.n_ranks + self.rank  # in the list of all ranks
        epochs, epoch_offsets = np.divmod(_entries(offsets, self.left_behind, self.start), len(self.data))
        indices = np.empty(n_rows, dtype=np.int64)
        for epoch in np.unique(epochs):  # several if the draw crosses the end of an epoch
            inside = epochs == epoch
            indices[inside] = self._shuffled(int(epoch))[epoch_offsets[inside]]
        self.n_drawn += n_rows
        tokens, prompt_mask = self.data.rows(indices)
        return torch.from_numpy(tokens), torch.from_numpy(prompt_mask)

    def state_dict(self) -> dict[str, Any]:
        """The number of rows drawn, and the list that they were drawn from."""
        return {
            "n_drawn": self.n_drawn,
            "left_behind": self.left_behind.tolist(),
            "start": self.start,
            "n_earlier": self.n_earlier,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.n_drawn, self.start, self.n_earlier = state["n_drawn"], state["start"], state["n_earlier"]
        self.left_behind = np.array(state["left_behind"], dtype=np.int64)
        if min(self.n_drawn, self.start, self.n_earlier, *self.left_behind) < 0:
            raise ValueError("a number of rows is negative")

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Row order of an epoch, int64 [N]; the last one is cached."""
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            self._epoch, self._order = epoch, order
        return self._order


def merge_streams(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state from which any number of ranks continues after ranks with `states` (in the order of ranks).

    It is the same for all new ranks except `n_earlier`, the number of all rows drawn: one rank counts it, or each a
    part.
    """
    n_ranks, n_drawn = len(states), np.array([state["n_drawn"] for state in states])
    left_behind, start = np.array(states[0]["left_behind"], dtype=np.int64), states[0]["start"]
    farthest = (n_drawn * n_ranks + np.arange(n_ranks) - n_ranks)[n_drawn > 0]  # offset of each rank's last row
    n_reached = int(farthest.max(initial=-1)) + 1
    offsets = np.arange(n_drawn.min() * n_ranks, n_reached)
    skipped = offsets[offsets // n_ranks >= n_drawn[offsets % n_ranks]]
    return {
        "n_drawn": 0,
        "left_behind": [*_entries(skipped, left_behind, start).tolist(), *left_behind[n_reached:].tolist()],
        "start": start + max(0, n_reached - len(left_behind)),
        "n_earlier": sum(state["n_drawn"] + state["n_earlier"] for state in states),
    }


def _entries(offsets: np.ndarray, left_behind: np.ndarray, start: int) -> np.ndarray:
    """Convert offsets in the list of all ranks to entries of the endless list; both int64 [n]."""
    entries = start + offsets - len(left_behind)
    listed = offsets < len(left_behind)
    entries[listed] = left_behind[offsets[listed]]
    return entries
