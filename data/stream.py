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
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class SequenceData(Protocol):
    """What a data set offers."""

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        ...

    @property
    def mask_id(self) -> int:
        """The mask token, which no sequence holds."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends a sequence and pads it; None where all are of one length."""
        ...

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [n, L]) and prompt mask (bool [n, L]) of the rows with these indices."""
        ...


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
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def draw(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The next `n_rows` rows: tokens int64 [n, L] and prompt_mask bool [n, L], on the CPU."""
        places = (self.n_drawn + np.arange(n_rows)) * self.n_ranks + self.rank  # in the list of all ranks
        epochs, offsets = np.divmod(self._entries(places), len(self.data))
        indices = np.empty(n_rows, dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two where the draw crosses an epoch's end
            inside = epochs == epoch
            indices[inside] = self._shuffled(int(epoch))[offsets[inside]]
        self.n_drawn += n_rows
        tokens, prompt_mask = self.data.rows(indices)
        return torch.from_numpy(tokens), torch.from_numpy(prompt_mask)

    def state_dict(self) -> dict[str, Any]:
        """Rows drawn so far, and the list that they were drawn from."""
        return {"n_drawn": self.n_drawn, "left_behind": self.left_behind.tolist(), "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.n_drawn, self.start = state["n_drawn"], state["start"]
        self.left_behind = np.array(state["left_behind"], dtype=np.int64)

    def load_other_ranks(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on where another number of ranks stopped, whose states these are, in the order of their ranks."""
        n_ranks, n_drawn = len(states), np.array([state["n_drawn"] for state in states])
        self.load_state_dict(states[0])
        n_reached = int((n_drawn * n_ranks + np.arange(n_ranks) - n_ranks)[n_drawn > 0].max(initial=-1)) + 1
        places = np.arange(n_reached)
        skipped = places[places // n_ranks >= n_drawn[places % n_ranks]]
        self.left_behind = np.concatenate([self._entries(skipped), self.left_behind[n_reached:]])
        self.start += max(0, n_reached - len(states[0]["left_behind"]))
        self.n_drawn = 0

    def _entries(self, places: np.ndarray) -> np.ndarray:
        """Entries of the endless list at these places (int64 [n]) of the list of all ranks; int64 [n]."""
        n_left = len(self.left_behind)
        entries = self.start + places - n_left
        listed = places < n_left
        entries[listed] = self.left_behind[places[listed]]
        return entries

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Order of the rows in an epoch, int64 [N]; the last one asked for is kept."""
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            self._epoch, self._order = epoch, order
        return self._order
