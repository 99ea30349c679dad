"""Numbers that nobody uses: of cells in the arena, of rows in host memory.

The numbers are on the device, how many there are is known on the host.  What an operation of the device frees, and how
much, the host learns later: it *collects* what has arrived, without waiting, and *settles*, which waits for the rest,
only where an answer depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlcache_sgl.streams import StreamOrder, to_host


@dataclass(frozen=True)
class Freed:
    """Numbers that are on their way back."""

    numbers: torch.Tensor
    """`[capacity]` int32 on the device, of which the first `count` are free."""
    count: torch.Tensor
    """`[1]` int32 in host memory; on its way there until the device has done what frees them."""

    @classmethod
    def of(cls, numbers: torch.Tensor, count: torch.Tensor) -> Freed:
        """`count` `[1]` int32 on the device; does not wait for it."""
        return cls(numbers, to_host(count))


class FreeStack:
    """A stack of free numbers; the last one in is handed out first.

    Args:
        numbers: `[total]` int32, all of them free.

    Attributes:
        count: free numbers that the host knows of.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers
        self._order = StreamOrder(numbers.device)
        self._pending: list[tuple[Any | None, Freed]] = []
        self._lent = 0
        self.count = numbers.numel()

    @property
    def numbers(self) -> torch.Tensor:
        """`[count]`, the free numbers."""
        return self._numbers[: self.count]

    def take(self, count: int) -> torch.Tensor:
        """`[count]` int32, at most `self.count`; in descending order of the stack: neighbours stay neighbours."""
        assert not self._lent, "borrowed numbers have not come back"
        with self._order.next():
            taken = self._numbers[self.count - count : self.count].flip(0)
        self.count -= count
        return taken

    def borrow(self, count: int) -> torch.Tensor:
        """As `take`, for a while in which nobody takes or gives; `give_back` ends it."""
        borrowed = self.take(count)
        self._lent = count
        return borrowed

    def give_back(self) -> None:
        """What was borrowed is free again: its numbers still lie where they lay."""
        self.count += self._lent
        self._lent = 0

    def give_later(self, freed: Freed, done: Any | None) -> None:
        """`freed` is free when the event `done` has passed (None: now)."""
        self._pending.append((done, freed))
        if done is None:
            self.collect()

    def collect(self) -> None:
        """Take in what has arrived; does not wait.  While numbers are lent nothing is taken in."""
        if not self._lent:
            self._take_in(wait=False)

    def settle(self) -> None:
        """Take in everything; waits for events that have not passed."""
        self._take_in(wait=True)

    def _take_in(self, *, wait: bool) -> None:
        late = []
        for done, freed in self._pending:
            if done is not None and not done.query():
                if not wait:
                    late.append((done, freed))
                    continue
                done.synchronize()
            self._push(freed)
        self._pending = late

    def _push(self, freed: Freed) -> None:
        assert not self._lent, "borrowed numbers have not come back"
        count = int(freed.count)
        if freed.numbers.device.type != "cpu":  # made on another stream, whose allocator must not reuse it yet
            freed.numbers.record_stream(torch.get_device_module(freed.numbers.device).current_stream())
        with self._order.next():
            self._numbers[self.count : self.count + count] = freed.numbers[:count]
        self.count += count
