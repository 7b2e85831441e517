"""Rows of a data set in a seeded random order, shared out over ranks, for ever.

The stream of all ranks together is one endless list: the data set shuffled, then shuffled anew, and so on. Entry
number p belongs to rank p % n_ranks. So every row is handed out exactly once per epoch whatever the number of rows,
nothing is dropped at an epoch's end, ranks may draw at different speeds, and the whole state of a rank is how many
rows it has drawn.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

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
    """One rank's share of the endless shuffled list; `n_drawn` is its whole state."""

    def __init__(self, data: SequenceData, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        if len(data) == 0:
            raise ValueError("the training data holds no rows")
        self.data, self.seed, self.rank, self.n_ranks = data, seed, rank, n_ranks
        self.n_drawn = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def draw(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The next `n_rows` rows: tokens int64 [n, L] and prompt_mask bool [n, L], on the CPU."""
        places = (self.n_drawn + np.arange(n_rows)) * self.n_ranks + self.rank  # in the list of all ranks
        epochs, offsets = np.divmod(places, len(self.data))
        indices = np.empty(n_rows, dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two where the draw crosses an epoch's end
            inside = epochs == epoch
            indices[inside] = self._shuffled(int(epoch))[offsets[inside]]
        self.n_drawn += n_rows
        tokens, prompt_mask = self.data.rows(indices)
        return torch.from_numpy(tokens), torch.from_numpy(prompt_mask)

    def state_dict(self) -> dict[str, int]:
        """Rows drawn so far."""
        return {"n_drawn": self.n_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Undo `state_dict`."""
        self.n_drawn = state["n_drawn"]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Order of the rows in an epoch, int64 [N]; the last one asked for is kept."""
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            self._epoch, self._order = epoch, order
        return self._order
