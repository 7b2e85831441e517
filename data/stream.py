"""Rows of a data set in a seeded random order, shared out over ranks, for ever.

The stream of all ranks together is one endless list: the data set shuffled, then shuffled anew, and so on. Entry
number p belongs to rank p % n_ranks. So every row is handed out exactly once per epoch whatever the number of rows,
nothing is dropped at an epoch's end, ranks may draw at different speeds, and the whole state of a rank is how many
rows it has drawn.

When a run goes on with another number of ranks, the entries that nobody has drawn form a new list, which is shared out
in the same way: first those that slower ranks had left behind, then all from the farthest drawn entry on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import SequenceData


def fingerprint(data: SequenceData) -> str:
    """Tells data sets apart: a hash of the number of rows and of 64 rows spread over them."""
    tokens, prompt_mask = data.rows(np.linspace(0, len(data) - 1, 64).astype(np.int64))
    digest = hashlib.sha256(f"{len(data)} {data.length} {data.mask_id}".encode())
    digest.update(tokens.tobytes())
    digest.update(prompt_mask.tobytes())
    return digest.hexdigest()


class SequenceStream:
    """One rank's share of the endless shuffled list; `n_drawn` is its whole state but after a change of ranks."""

    def __init__(self, data: SequenceData, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        if len(data) == 0:
            raise ValueError("the training data holds no rows")
        self.data, self.seed, self.rank, self.n_ranks = data, seed, rank, n_ranks
        self.n_drawn = 0
        # The list of all ranks is `left_behind`, entries of the endless list, and then the endless list from `start`.
        self.left_behind, self.start = np.empty(0, dtype=np.int64), 0
        self.n_earlier = 0  # rows drawn from earlier lists that this rank counts
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def draw(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The next `n_rows` rows: tokens int64 [n, L] and prompt_mask bool [n, L], on the CPU."""
        places = (self.n_drawn + np.arange(n_rows)) * self.n_ranks + self.rank  # in the list of all ranks
        epochs, offsets = np.divmod(_entries(places, self.left_behind, self.start), len(self.data))
        indices = np.empty(n_rows, dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two where the draw crosses an epoch's end
            inside = epochs == epoch
            indices[inside] = self._shuffled(int(epoch))[offsets[inside]]
        self.n_drawn += n_rows
        tokens, prompt_mask = self.data.rows(indices)
        return torch.from_numpy(tokens), torch.from_numpy(prompt_mask)

    def state_dict(self) -> dict[str, Any]:
        """Rows drawn so far, and the list that they were drawn from."""
        return {
            "n_drawn": self.n_drawn,
            "left_behind": self.left_behind.tolist(),
            "start": self.start,
            "n_earlier": self.n_earlier,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.n_drawn, self.start, self.n_earlier = state["n_drawn"], state["start"], state["n_earlier"]
        self.left_behind = np.array(state["left_behind"], dtype=np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Order of the rows in an epoch, int64 [N]; the last one asked for is kept."""
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            self._epoch, self._order = epoch, order
        return self._order


def merge_streams(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What any other number of ranks goes on with, where ranks of these states stopped, in the order of ranks.

    It is the same for all of them, but `n_earlier`, all rows that have been drawn: one rank counts it, or each a part.
    """
    n_ranks, n_drawn = len(states), np.array([state["n_drawn"] for state in states])
    left_behind, start = np.array(states[0]["left_behind"], dtype=np.int64), states[0]["start"]
    farthest = (n_drawn * n_ranks + np.arange(n_ranks) - n_ranks)[n_drawn > 0]  # place of each rank's last row
    n_reached = int(farthest.max(initial=-1)) + 1
    places = np.arange(n_drawn.min() * n_ranks, n_reached)
    skipped = places[places // n_ranks >= n_drawn[places % n_ranks]]
    return {
        "n_drawn": 0,
        "left_behind": [*_entries(skipped, left_behind, start).tolist(), *left_behind[n_reached:].tolist()],
        "start": start + max(0, n_reached - len(left_behind)),
        "n_earlier": sum(state["n_drawn"] + state["n_earlier"] for state in states),
    }


def _entries(places: np.ndarray, left_behind: np.ndarray, start: int) -> np.ndarray:
    """Entries of the endless list at these places (int64 [n]) of the list of all ranks; int64 [n]."""
    entries = start + places - len(left_behind)
    listed = places < len(left_behind)
    entries[listed] = left_behind[places[listed]]
    return entries
