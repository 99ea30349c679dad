"""Tokens that are in host memory only, within reach of one forward's attention.

For the duration of a forward the slots of such tokens are mapped to cells that are borrowed from the arena.  All layers
share these cells: before a layer attends, `Staging.fill` copies that layer's keys and values there.  To everything that
reads cells by the residency table a staged token looks like any other.
"""

from __future__ import annotations

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.residency import EVICTED


class Staging:
    """The staged tokens of the forward that runs now.

    Args:
        arena: lends the cells.
        host: where the tokens are.
    """

    def __init__(self, arena: Arena, host: HostPool) -> None:
        self._arena = arena.raw
        self._residency = arena.residency
        self._layers = arena.planes_of_layers
        self._most = arena.planes_per_layer
        self._host = host
        self._slots: torch.Tensor | None = None
        self._cells = torch.empty(0)

    @property
    def active(self) -> bool:
        """Whether anything is staged."""
        return self._slots is not None

    def begin(self, slots: torch.Tensor) -> int:
        """Map those of `slots` `[tokens]` that no plane has; they may repeat.  Returns how many that are.

        Raises:
            OutOfCells: too few cells are free.
        """
        assert self._slots is None, "the forward before has not ended"
        slots = torch.unique(slots)
        slots = slots[(self._residency.table[0, slots] == EVICTED) & self._host.has(slots)]
        if not slots.numel():
            return 0
        cells = self._residency.take(self._most * slots.numel()).view(self._most, -1)
        for planes in self._layers:
            self._residency.table[planes, slots] = cells[: planes.stop - planes.start]
        self._slots, self._cells = slots, cells.to(torch.int64)
        return int(slots.numel())

    def fill(self, planes: slice) -> None:
        """Copy one layer's keys and values of the staged tokens to their cells; `planes` are the layer's."""
        if self._slots is not None:
            self._arena[self._cells[: planes.stop - planes.start]] = self._host.load(planes, self._slots)

    def end(self) -> None:
        """The forward is over: nothing is staged any more."""
        if self._slots is None:
            return
        self._residency.table[:, self._slots] = EVICTED
        self._residency.give(self._cells.flatten().to(torch.int32))
        self._slots = None
