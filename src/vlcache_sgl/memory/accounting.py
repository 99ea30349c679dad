"""Who holds the cells: requests, the prefix tree, or evictions that the device has not finished yet.

Streams.  On a GPU this object lives on the scheduler's stream, evictions happen on the stream of the forward.  What an
eviction has freed is handed over with an event of the forward's stream (`retire`); when the host next needs cells, it
reclaims it behind the event (`settle`), so that no cell is allocated while the forward that read it may still run, and
marks the handed over tensors as used on its own stream, so that their memory is not given to the forward's stream too
early.
"""

from __future__ import annotations

from typing import Any

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.residency import Eviction

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
        self._pending: list[tuple[Any, Eviction]] = []
        self._returned = False
        self.host: HostPool | None = None
        """Where tokens lie whole; None: without host memory."""

    def clear(self) -> None:
        """Nobody holds anything any more."""
        self._pending.clear()
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
        """Whether all cells of so many uncompressed tokens are free now."""
        return self.residency.free_cells >= tokens * self.residency.num_planes

    def release(self, slots: torch.Tensor) -> None:
        """Take back all cells of `slots` `[tokens]`, which nobody owns from now on."""
        self.settle()
        slots = slots.to(torch.int64)
        self.residency.detach(slots)
        if self.host is not None:
            self.host.drop(slots)
        self._in_tree[slots] = False
        self._evictable_cells = None

    # -- eviction: the device does it at the end of the prefill forward, the host learns of it here -----------------

    def retire(self, eviction: Eviction, done: Any | None) -> None:
        """Take note of evicted cells; `done` is the event after which they are really unused (None: now)."""
        self._pending.append((done, eviction))
        if done is None:
            self.settle()

    def settle(self) -> None:
        """Reclaim evicted cells, each after its event.

        Waits for events: tensor-parallel ranks must find the same number of free cells whenever they are asked, and an
        event may have passed on one of them only.  The wait is short, because the host has read the scores that the
        eviction followed from.
        """
        while self._pending:
            done, eviction = self._pending.pop(0)
            if done is not None:
                done.synchronize()
            if eviction.cells.device.type != "cpu":
                stream = torch.get_device_module(eviction.cells.device).current_stream()
                for tensor in (eviction.cells, eviction.slots, eviction.kept_planes):
                    tensor.record_stream(stream)
            self.residency.reclaim(eviction)
            self._evictable_cells = None
            self._returned = True

    def take_returned(self) -> bool:
        """Whether compression has given cells back since this was last asked."""
        self.settle()
        returned, self._returned = self._returned, False
        return returned

    # -- what the tree holds ----------------------------------------------------------------------------------------

    def adopt(self, slots: torch.Tensor) -> None:
        """The prefix tree now owns `slots`."""
        self._in_tree[slots] = True
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
        return int(self.residency.slot_cells[self._in_tree].sum())

    @property
    def request_cells(self) -> int:
        """Cells that requests hold for themselves: what no prefix tree node owns."""
        return self.residency.used_cells - self.tree_cells

    @property
    def evictable_cells(self) -> int:
        """Cells that evicting every unlocked tree node would give back."""
        if self._evictable_cells is None:
            evictable = self._in_tree & (self._locks == 0)
            self._evictable_cells = int(self.residency.slot_cells[evictable].sum())
        return self._evictable_cells

    def free_physical_tokens(self) -> int:
        """Uncompressed tokens that fit without evicting anything."""
        self.settle()
        return self.residency.free_cells // self.residency.num_planes

    def evictable_physical_tokens(self) -> int:
        """Uncompressed tokens that fit in free and evictable cells together."""
        self.settle()
        return (self.residency.free_cells + self.evictable_cells) // self.residency.num_planes

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
