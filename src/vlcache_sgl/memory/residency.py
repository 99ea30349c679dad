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

from dataclasses import dataclass

import torch

from vlcache_kernels.select import free_list

EVICTED = -1
"""Entry of the residency table for a token that a plane does not keep."""
PADDING = 0
"""Slot and cell that padded tokens write to; never allocated."""


class OutOfCells(RuntimeError):
    """The caller did not reserve what it allocates."""


@dataclass(frozen=True)
class Eviction:
    """What one eviction freed; `Residency.reclaim` makes it allocatable again.

    Eviction and reclaiming are two steps because they happen at two times: the device evicts at the end of the
    prefill forward, the host learns of it when the result arrives.
    """

    cells: torch.Tensor
    """`[capacity]` int32, of which the first `count` are cells that no plane maps to any more."""
    count: torch.Tensor
    """`[1]` int32 on the host; on its way there until the device has evicted."""
    slots: torch.Tensor
    """`[tokens]` int64, the slots of the evicted range."""
    kept_planes: torch.Tensor
    """`[tokens]` int32, planes in which each slot still resides."""


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
        self._free = torch.empty(num_cells, dtype=torch.int32, device=self.device)
        self.slot_cells = torch.zeros(num_slots + 1, dtype=torch.int32, device=self.device)
        self.free_cells = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything: all cells are free, no slot resides anywhere."""
        self.table.fill_(EVICTED)
        self.table[:, PADDING] = PADDING
        # A stack of free cells; low numbers are handed out first, which keeps a young arena compact.
        self._free = torch.arange(self.num_cells, 0, -1, dtype=torch.int32, device=self.device)
        self.free_cells = self.num_cells
        self.slot_cells.zero_()

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
        self.slot_cells[slots] = self.num_planes

    def take(self, count: int) -> torch.Tensor:
        """`[count]` int32, cells that nothing is mapped to; `give` returns them.

        Raises:
            OutOfCells: fewer are free; nothing has changed then.
        """
        if count > self.free_cells:
            raise OutOfCells(f"{count} cells needed, {self.free_cells} free")
        self.free_cells -= count
        return self._free[self.free_cells : self.free_cells + count].flip(0)

    def give(self, cells: torch.Tensor) -> None:
        """Make `cells` `[count]` int32 free, which nothing is mapped to any more."""
        self._push(cells)

    def detach(self, slots: torch.Tensor) -> int:
        """Take back all cells of `slots` `[tokens]`; returns how many cells that were."""
        cells = self.table[:, slots].flatten()
        cells = cells[cells >= 0]
        self.table[:, slots] = EVICTED
        self.slot_cells[slots] = 0
        self._push(cells)
        return cells.numel()

    def move(self, slots: torch.Tensor, to: torch.Tensor) -> None:
        """The cells of `slots` `[tokens]` become those of the slots `to` `[tokens]`, which have none."""
        self.table[:, to] = self.table[:, slots]
        self.table[:, slots] = EVICTED
        self.slot_cells[to] = self.slot_cells[slots]
        self.slot_cells[slots] = 0

    def attach_kept(self, slots: torch.Tensor, keep: torch.Tensor) -> None:
        """Give `slots` `[tokens]`, which have no cells, fresh ones where `keep` `[planes, tokens]` is set.

        Raises:
            OutOfCells: too few are free; nothing has changed then.
        """
        cells = self.take(int(keep.sum()))
        table = torch.full(keep.shape, EVICTED, dtype=torch.int32, device=self.device)
        table[keep] = cells
        self.table[:, slots] = table
        self.slot_cells[slots] = keep.sum(0, dtype=torch.int32)

    def evict(self, slots: torch.Tensor, keep: torch.Tensor) -> Eviction:
        """Unmap what `keep` does not keep; the cells become free by `reclaim`.  Does not wait for the device.

        Args:
            slots: `[tokens]` int64, resident in all planes.
            keep: `[planes, tokens]` bool.
        """
        cells = self.table[:, slots]
        freed = free_list(keep, cells)
        self.table[:, slots] = torch.where(keep, cells, EVICTED)
        count = freed.length
        if count.device.type != "cpu":  # pinned, or the host would wait
            count = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(count, non_blocking=True)
        return Eviction(freed.cells, count, slots, (keep & (cells >= 0)).sum(0, dtype=torch.int32))

    def reclaim(self, eviction: Eviction) -> int:
        """Make evicted cells allocatable, after the device has evicted them; returns how many."""
        count = int(eviction.count)
        self.slot_cells[eviction.slots] = eviction.kept_planes
        self._push(eviction.cells[:count])
        return count

    def _push(self, cells: torch.Tensor) -> None:
        count = cells.numel()
        self._free[self.free_cells : self.free_cells + count] = cells
        self.free_cells += count

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
        free = self._free[: self.free_cells].to(torch.int64)
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
