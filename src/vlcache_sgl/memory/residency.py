"""Cells, virtual slots and who holds them: the bookkeeping that makes eviction return memory.

A *cell* stores one token's K and V of one *plane*; a plane is a layer, or one KV head of a layer when heads have
cells of their own (plane = layer * groups + group).  A *virtual slot* names a token; `Residency.table` says in which
cell a plane keeps it.  Nothing here knows SGLang.

Invariants, checked by `Residency.check_integrity`:

* every cell but the padding cell 0 is either free or the home of exactly one (plane, slot);
* a free slot has no cells; ``slot_cells[s]`` counts the planes in which slot `s` resides;
* cells used + cells free = cells total.
"""

from __future__ import annotations

from typing import Any

import torch

from vlcache_kernels.select import free_list
from vlcache_sgl.memory.free_stack import Freed, FreeStack
from vlcache_sgl.streams import passed_event

EVICTED = -1
"""Entry of the residency table for a token that a plane does not keep."""
PADDING = 0
"""Slot and cell that padded tokens write to; never allocated."""


class OutOfCells(RuntimeError):
    """The caller did not reserve what it allocates."""


class Residency:
    """The table (plane, virtual slot) -> cell, with the free cells.

    Args:
        num_planes: layers times head groups.
        num_slots: virtual slots, the padding slot 0 not counted.
        num_cells: cells, the padding cell 0 not counted.
        device: where table and free list live.
    """

    def __init__(self, num_planes: int, num_slots: int, num_cells: int, device: torch.device | str = "cpu") -> None:
        if min(num_planes, num_slots, num_cells) < 1:
            raise ValueError("planes, slots and cells must all be at least 1")
        if num_cells >= 2**31:
            raise ValueError(f"{num_cells} cells do not fit 32-bit cell numbers")
        self.num_planes = num_planes
        self.num_slots = num_slots
        self.num_cells = num_cells
        self.device = torch.device(device)
        self.table = torch.full((num_planes, num_slots + 1), EVICTED, dtype=torch.int32, device=self.device)
        self.slot_cells = torch.zeros(num_slots + 1, dtype=torch.int32, device=self.device)
        self.clear()

    def clear(self) -> None:
        """Forget everything: all cells are free, no slot resides anywhere."""
        self.table.fill_(EVICTED)
        self.table[:, PADDING] = PADDING
        # A stack of free cells; low numbers are handed out first, which keeps a young arena compact.
        self.free = FreeStack(torch.arange(self.num_cells, 0, -1, dtype=torch.int32, device=self.device))
        self.slot_cells.zero_()

    @property
    def free_cells(self) -> int:
        """Cells that are allocatable now, as far as the host knows."""
        return self.free.count

    @property
    def used_cells(self) -> int:
        """Cells that are not allocatable, including evicted ones that are not reclaimed yet."""
        return self.num_cells - self.free_cells

    def attach(self, slots: torch.Tensor) -> None:
        """Give every slot of `slots` `[tokens]` a fresh cell in every plane.

        Raises:
            OutOfCells: when fewer than ``tokens * num_planes`` cells are free; nothing has changed then.
        """
        # Neighbouring tokens of one plane get neighbouring cells: attention then reads runs, not single rows.
        self.table[:, slots] = self.take(slots.numel() * self.num_planes).view(self.num_planes, slots.numel())
        # Filled, not assigned: a number that is assigned through an index is copied to a GPU by a copy that waits.
        self.slot_cells.index_fill_(0, slots, self.num_planes)

    def take(self, count: int) -> torch.Tensor:
        """`[count]` int32, cells that nothing is mapped to.

        Raises:
            OutOfCells: fewer are free; nothing has changed then.
        """
        self._require(count)
        return self.free.take(count)

    def borrow(self, count: int) -> torch.Tensor:
        """As `take`, see `FreeStack.borrow`."""
        self._require(count)
        return self.free.borrow(count)

    def _require(self, count: int) -> None:
        if count > self.free_cells:
            raise OutOfCells(f"{count} cells needed, {self.free_cells} free")

    def detach(self, slots: torch.Tensor) -> Freed:
        """Take all cells from `slots` `[tokens]`; they become free by `reclaim`.  Does not wait for the device."""
        cells = self.table[:, slots]
        freed = free_list(torch.zeros(cells.shape, dtype=torch.bool, device=self.device), cells)
        self.table.index_fill_(1, slots, EVICTED)
        self.slot_cells.index_fill_(0, slots, 0)
        return Freed.of(freed.cells, freed.length)

    def take_for(self, wanted: torch.Tensor, most: int) -> torch.Tensor:
        """A fresh cell for every entry of `wanted`, bool of any shape, that is set; int32, -1 elsewhere.

        Args:
            most: a bound on how many that are, known on the host.  Where so many are not free the device is asked,
                and waited for.

        Raises:
            OutOfCells: too few are free; nothing has changed then.
        """
        if most > self.free_cells:
            most = int(wanted.sum())
        cells = self.take(most)
        if not most:
            return torch.full(wanted.shape, EVICTED, dtype=torch.int32, device=self.device)
        number = wanted.flatten().cumsum(0)
        fresh = torch.where(wanted, cells[(number - 1).clamp(min=0).view(wanted.shape)], EVICTED)
        self.reclaim(Freed.of(cells.flip(0), (most - number[-1:]).to(torch.int32)), passed_event(self.device))
        return fresh

    def move_kept(self, slots: torch.Tensor, to: torch.Tensor, keep: torch.Tensor, fresh: torch.Tensor) -> Freed:
        """What `keep` `[planes, tokens]` keeps of `slots` `[tokens]` becomes that of the slots `to`, which have no
        cells; the rest becomes free by `reclaim`.  `slots` have no cells afterwards.

        Args:
            fresh: `[planes, tokens]` int32, cells for tokens that have none, -1 elsewhere.
        """
        old = self.table[:, slots]
        self.table[:, to] = torch.where(keep, torch.maximum(old, fresh), EVICTED)
        self.slot_cells[to] = keep.sum(0, dtype=torch.int32)
        self.table.index_fill_(1, slots, EVICTED)
        self.slot_cells.index_fill_(0, slots, 0)
        freed = free_list(keep, old)
        return Freed.of(freed.cells, freed.length)

    def evict(self, slots: torch.Tensor, keep: torch.Tensor) -> Freed:
        """Unmap what `keep` does not keep; the cells become free by `reclaim`.  Does not wait for the device.

        Eviction and reclaiming are two steps because they happen at two times: the device evicts at the end of the
        prefill forward, the host learns of it when the count arrives.

        Args:
            slots: `[tokens]` int64.
            keep: `[planes, tokens]` bool.
        """
        cells = self.table[:, slots]
        freed = free_list(keep, cells)
        self.table[:, slots] = torch.where(keep, cells, EVICTED)
        self.slot_cells[slots] = (keep & (cells >= 0)).sum(0, dtype=torch.int32)
        return Freed.of(freed.cells, freed.length)

    def reclaim(self, freed: Freed, done: Any | None = None) -> None:
        """Make freed cells allocatable when the event `done` has passed (None: now)."""
        self.free.give_later(freed, done)

    def cells_of(self, plane: int | slice, slots: torch.Tensor) -> torch.Tensor:
        """Cells of `slots` in one plane `[tokens]` or several `[planes, tokens]`, int32, -1 where evicted."""
        return self.table[plane, slots] if isinstance(plane, int) else self.table[plane][:, slots]

    def count_cells(self, slots: torch.Tensor) -> int:
        """Cells that `slots` hold."""
        return int(self.slot_cells[slots].sum())

    def check_integrity(self) -> list[str]:
        """Recount everything; returns what is wrong, empty when nothing is.

        Reads the whole table: not for hot paths.
        """
        problems: list[str] = []
        mapped = self.table[:, 1:]
        resident = mapped[mapped >= 0].to(torch.int64)
        free = self.free.numbers.to(torch.int64)
        uses = torch.bincount(torch.cat([resident, free]), minlength=self.num_cells + 1)
        if int(uses[PADDING]) != 0:
            problems.append("the padding cell is mapped or free")
        if bool((uses[1:] > 1).any()):
            problems.append(f"{int((uses[1:] > 1).sum())} cells are used twice")
        if bool((uses[1:] == 0).any()):
            problems.append(f"{int((uses[1:] == 0).sum())} cells are lost")
        counts = (mapped >= 0).sum(0, dtype=torch.int32)
        if not torch.equal(counts, self.slot_cells[1:]):
            problems.append(f"{int((counts != self.slot_cells[1:]).sum())} slots have a wrong cell count")
        return problems
