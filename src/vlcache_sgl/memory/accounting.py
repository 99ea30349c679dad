"""Who holds the cells: requests, the prefix tree, or evictions that the device has not finished yet.

Streams.  On a GPU this object lives on the scheduler's stream, evictions happen on the stream of the forward.  What an
eviction has freed is handed over with an event of the forward's stream (`retire`), and becomes free when the host finds
that the event has passed, so that no cell is allocated while the forward that read it may still run.  The host waits
for an event only where an answer depends on it; operations on the scheduler's stream wait for it there.
"""

from __future__ import annotations

from typing import Any

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.free_stack import Freed
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.streams import StreamOrder, passed_event

FULL_CHECK_ENTRIES = 4_000_000
"""Residency tables up to this size are recounted whenever a server is idle; of larger ones only totals are checked."""


class CellAccounting:
    """Counts the cells of an arena by holder, and takes back what evictions have freed.

    Args:
        arena: whose cells are counted.
        physical_tokens: uncompressed tokens that it holds.
    """

    def __init__(self, arena: Arena, physical_tokens: int) -> None:
        self.arena = arena
        self.residency = arena.residency
        self.physical_tokens = physical_tokens
        slots = self.residency.num_slots + 1
        # Which slots the prefix tree owns, and how many locks cover each: tells what eviction could give back.
        self._in_tree = torch.zeros(slots, dtype=torch.bool, device=arena.device)
        self._locks = torch.zeros(slots, dtype=torch.int32, device=arena.device)
        self._evictable_cells: int | None = None
        # Slots change hands on two streams: a prompt may be retracted whose eviction is still queued.
        self._order = StreamOrder(arena.device)
        self._returned = False
        self.host: HostPool | None = None
        """Where tokens lie whole; None: without host memory."""

    def clear(self) -> None:
        """Nobody holds anything any more."""
        self.residency.clear()
        if self.host is not None:
            self.host.clear()
        self.forget_tree()

    @property
    def num_layers(self) -> int:
        """Layers of this rank: a token of one of them takes at most this part of an uncompressed token."""
        return self.residency.num_planes // self.arena.planes_per_layer

    # -- cells of slots ---------------------------------------------------------------------------------------------

    def has_room(self, tokens: int) -> bool:
        """Whether all cells of so many uncompressed tokens are free.

        Tensor-parallel ranks get the same answer, though an event may have passed on one of them only: who has not
        enough waits.
        """
        needed = tokens * self.residency.num_planes
        self.residency.free.collect()
        if self.residency.free_cells < needed:
            self.settle()
        return self.residency.free_cells >= needed

    def release(self, slots: torch.Tensor) -> None:
        """Take back all cells of `slots` `[tokens]`, which nobody owns from now on."""
        slots = slots.to(torch.int64)
        with self._order.next():
            freed = self.residency.detach(slots)
        self.residency.reclaim(freed, passed_event(slots.device))
        if self.host is not None:
            self.host.drop(slots)
        self._in_tree.index_fill_(0, slots, False)
        self._evictable_cells = None

    # -- eviction: the device does it at the end of the prefill forward, the host learns of it later ----------------

    def evict(self, slots: torch.Tensor, keep: torch.Tensor) -> Any | None:
        """`Residency.evict` on the forward's stream; the event behind it (None on a CPU).

        The cells come back when the host finds that it has passed.
        """
        with self._order.next():
            freed = self.residency.evict(slots, keep)
        done = passed_event(slots.device)
        self.retire(freed, done)
        return done

    def retire(self, freed: Freed, done: Any | None) -> None:
        """Take note of evicted cells; `done` is the event after which they are really unused (None: now)."""
        self.residency.reclaim(freed, done)
        self._evictable_cells = None
        self._returned = True

    def settle(self) -> None:
        """Reclaim all evicted cells, each after its event, for which this waits.

        The wait for an eviction is short, because the host has read the scores that it followed from.
        """
        self.residency.free.settle()

    def take_returned(self) -> bool:
        """Whether compression gives cells back since this was last asked; ranks get the same answer."""
        returned, self._returned = self._returned, False
        return returned

    # -- what the tree holds ----------------------------------------------------------------------------------------

    def adopt(self, slots: torch.Tensor) -> None:
        """The prefix tree now owns `slots`."""
        self._in_tree.index_fill_(0, slots.to(torch.int64), True)
        self._evictable_cells = None

    def lock(self, slots: torch.Tensor, delta: int) -> None:
        """One more (+1) or one fewer (-1) request relies on the tree's `slots`."""
        self._locks[slots] += delta
        self._evictable_cells = None

    def forget_tree(self) -> None:
        """The tree was reset."""
        self._in_tree.zero_()
        self._locks.zero_()
        self._evictable_cells = None

    @property
    def tree_cells(self) -> int:
        """Cells held by the prefix tree, locked or not."""
        return int((self.residency.slot_cells * self._in_tree).sum())

    @property
    def request_cells(self) -> int:
        """Cells that requests hold for themselves: what no prefix tree node owns."""
        return self.residency.used_cells - self.tree_cells

    @property
    def evictable_cells(self) -> int:
        """Cells that evicting every unlocked tree node would give back."""
        if self._evictable_cells is None:
            evictable = self._in_tree & (self._locks == 0)
            # A product, not a mask: for the shape of a masked tensor the host would wait a second time.
            self._evictable_cells = int((self.residency.slot_cells * evictable).sum())
        return self._evictable_cells

    def tokens_to_evict(self, cells: int) -> int:
        """Uncompressed tokens that the tree must give back until `cells` are free; 0 when it has no cell to give.

        Prefixes in host memory have none, and stay.
        """
        missing = cells - self.residency.free_cells
        return -(-missing // self.residency.num_planes) if missing > 0 and self.evictable_cells else 0

    def free_physical_tokens(self) -> int:
        """Uncompressed tokens that fit without evicting anything."""
        self.settle()
        return self.residency.free_cells // self.residency.num_planes

    def evictable_physical_tokens(self) -> int:
        """Uncompressed tokens that fit in free and evictable cells together."""
        evictable = self.evictable_cells  # first: once the host has waited for it, most events have passed
        self.settle()
        return (self.residency.free_cells + evictable) // self.residency.num_planes

    def verify(self) -> list[str]:
        """Recount; returns what is wrong, empty when nothing is."""
        self.settle()
        residency = self.residency
        counted = int(residency.slot_cells.sum())
        problems = []
        if counted != residency.used_cells:
            problems.append(f"{counted} cells are resident but {residency.used_cells} are used")
        if residency.table.numel() <= FULL_CHECK_ENTRIES:
            problems += residency.check_integrity()
            problems += [] if self.host is None else self.host.check_integrity()
        return problems
