"""Fresh rows on the device, staged ahead of their use.

Shapes: n rows, L positions.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from data.stream import SequenceStream


class RowQueue:
    """Rows of a stream on the device, staged ahead, so that taking some needs no word from the device.

    How many sequences finish at a step is known on the device alone. So fresh rows wait there in a ring; `take` hands
    them out by a mask and counts on the device, and the host fills the ring up by the count of two steps ago, for which
    it never has to wait long. Every row is handed out in the stream's order, and none is lost at a restart: the state
    is the number handed out, whatever else had been staged.
    """

    def __init__(self, stream: SequenceStream, max_taken: int, device: torch.device) -> None:
        """Stage rows for `take`s of at most `max_taken` rows per step."""
        self.stream, self.max_taken, self.device = stream, max_taken, device
        self.n_lag = 2 if device.type == "cuda" else 0
        # `top_up` fills the ring unless more than n - max_taken rows are staged; n_lag steps later enough must be left.
        self.n_places = (self.n_lag + 2) * max_taken
        shape = (self.n_places, stream.data.length)
        self._x0 = torch.zeros(shape, dtype=torch.long, device=device)
        self._maskable = torch.zeros(shape, dtype=torch.bool, device=device)
        self._restart(0)

    def _restart(self, n_taken: int) -> None:
        self.n_taken = torch.tensor(n_taken, device=self.device)  # int64 scalar, rows handed out by this rank
        self._counts: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._n_staged = self._n_known = n_taken
        self.stream.n_drawn = n_taken
        self.top_up()

    @property
    def sequences_drawn(self) -> Tensor:
        """Rows handed out (int64 scalar) since the run began, whatever the number of ranks was at times."""
        return self.n_taken + self.stream.n_earlier

    def take(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Hand the next rows to the True entries of `wanted` (bool [n]).

        Returns:
            x0 int64 [n, L] and maskable bool [n, L]; what stands where `wanted` is False has no meaning.
        """
        places = (self.n_taken + wanted.cumsum(0) - 1) % self.n_places  # [n]
        self.n_taken += wanted.sum()
        return self._x0[places], self._maskable[places]

    def take_next(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The next `n_rows` rows: x0 int64 [n, L] and maskable bool [n, L]."""
        return self.take(torch.ones(n_rows, dtype=torch.bool, device=self.device))

    def top_up(self) -> None:
        """Stage more rows; called once after each step's takes."""
        count, event = self.n_taken, None
        if self.n_lag:
            count = torch.empty((), dtype=torch.long, pin_memory=True).copy_(self.n_taken, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._counts.append((count, event))
        while len(self._counts) > self.n_lag:
            count, event = self._counts.popleft()
            if event is not None:
                event.synchronize()
            self._n_known = int(count)
        n_free = self.n_places - (self._n_staged - self._n_known)
        if n_free < self.max_taken:
            return
        rows = [part.pin_memory() if self.n_lag else part for part in self.stream.draw(n_free)]
        first = self._n_staged % self.n_places
        n_before_end = min(n_free, self.n_places - first)
        for ring, fresh in zip((self._x0, self._maskable), (rows[0], ~rows[1]), strict=True):
            ring[first : first + n_before_end].copy_(fresh[:n_before_end], non_blocking=True)
            ring[: n_free - n_before_end].copy_(fresh[n_before_end:], non_blocking=True)
        self._n_staged += n_free

    def state_dict(self) -> dict[str, Any]:
        """State of the stream as if it had drawn just what was taken. Reads from the device."""
        return self.stream.state_dict() | {"n_drawn": int(self.n_taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.stream.load_state_dict(state)
        self._restart(self.stream.n_drawn)
