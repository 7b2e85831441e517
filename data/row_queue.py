"""Fresh rows on the device, prefetched before they are needed.

Shapes: n rows, L positions.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from data.stream import SequenceStream


class RowQueue:
    """Rows of a stream, prefetched to the device, so that taking rows needs no host sync.

    Only the device knows how many sequences finish in a step. So fresh rows wait in a ring buffer on the device.
    `take` selects rows by a mask and counts them on the device; the host refills the ring from the count of two steps
    ago, which the device has usually computed by then. Rows are taken in the stream's order, and a restart loses none:
    the state is the number of rows taken, not prefetched.
    """

    def __init__(self, stream: SequenceStream, max_taken: int, device: torch.device) -> None:
        """Prefetch the first rows; at most `max_taken` rows may be taken per step."""
        self.stream, self.max_taken, self.device = stream, max_taken, device
        self.n_lag = 2 if device.type == "cuda" else 0
        # `top_up` adds nothing while fewer than max_taken slots are free; n_lag steps later max_taken rows must remain.
        self.n_slots = (self.n_lag + 2) * max_taken
        shape = (self.n_slots, stream.data.length)
        self._x0 = torch.zeros(shape, dtype=torch.long, device=device)
        self._maskable = torch.zeros(shape, dtype=torch.bool, device=device)
        self._restart(0)

    def _restart(self, n_taken: int) -> None:
        self.n_taken = torch.tensor(n_taken, device=self.device)  # int64 scalar, rows taken on this rank
        self._pending_counts: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._n_prefetched = self._n_known_taken = n_taken
        self.stream.n_drawn = n_taken
        self.top_up()

    @property
    def sequences_drawn(self) -> Tensor:
        """Rows taken since the run began (int64 scalar), including those before a change of ranks."""
        return self.n_taken + self.stream.n_earlier

    def take(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Take one row for each True entry of `wanted` (bool [n]).

        Returns:
            x0 int64 [n, L] and maskable bool [n, L]; rows where `wanted` is False are undefined.
        """
        slots = (self.n_taken + wanted.cumsum(0) - 1) % self.n_slots  # [n]
        self.n_taken += wanted.sum()
        return self._x0[slots], self._maskable[slots]

    def take_next(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Take the next `n_rows` rows: x0 int64 [n, L] and maskable bool [n, L]."""
        return self.take(torch.ones(n_rows, dtype=torch.bool, device=self.device))

    def top_up(self) -> None:
        """Prefetch more rows; call once per step, after the rows of the step are taken."""
        count, event = self.n_taken, None
        if self.n_lag:
            count = torch.empty((), dtype=torch.long, pin_memory=True).copy_(self.n_taken, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending_counts.append((count, event))
        while len(self._pending_counts) > self.n_lag:
            count, event = self._pending_counts.popleft()
            if event is not None:
                event.synchronize()
            self._n_known_taken = int(count)
        n_free = self.n_slots - (self._n_prefetched - self._n_known_taken)
        if n_free < self.max_taken:
            return
        tokens, prompt_mask = self.stream.draw(n_free)
        rows = [part.pin_memory() if self.n_lag else part for part in (tokens, ~prompt_mask)]
        first = self._n_prefetched % self.n_slots
        n_before_end = min(n_free, self.n_slots - first)
        for ring, fresh in zip((self._x0, self._maskable), rows, strict=True):
            ring[first : first + n_before_end].copy_(fresh[:n_before_end], non_blocking=True)
            ring[: n_free - n_before_end].copy_(fresh[n_before_end:], non_blocking=True)
        self._n_prefetched += n_free

    def state_dict(self) -> dict[str, Any]:
        """State of the stream as if it had drawn exactly the rows taken. This is a host sync."""
        return self.stream.state_dict() | {"n_drawn": int(self.n_taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.stream.load_state_dict(state)
        self._restart(self.stream.n_drawn)
