"""Tokens that are in host memory only, within reach of one forward's attention.

For the duration of a forward the slots of such tokens are mapped to cells that are borrowed from the arena.  Layers
share these cells: before a layer attends, `Staging.fill` sees to it that that layer's keys and values are there.  To
everything that reads cells by the residency table a staged token looks like any other.

On a GPU there are two sets of cells, one for even layers and one for odd ones.  While a layer is computed, a stream of
our own copies the next layer's keys and values into the other set.  The order, by events and without the host:

* the first copy waits for everything that the forward's stream was given before (`begin`): borrowed cells may have been
  read by it, and rows of host memory be written;
* a layer attends behind its copy (`fill`);
* a set is overwritten behind the attention that has read it: `fill` of the next layer comes after it on the forward's
  stream, and the copy waits for an event there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.residency import EVICTED, PADDING
from vlcache_sgl.streams import passed_event


def staged_layers(device: torch.device) -> int:
    """Layers whose keys and values are staged at a time: on a GPU one is copied while another is computed."""
    return 1 if device.type == "cpu" else 2


@dataclass
class Staged:
    """The tokens of one forward."""

    slots: torch.Tensor
    """`[tokens]` int64; the padding slot where a token need not be staged."""
    there: torch.Tensor
    """`[tokens]` bool, which need to be."""
    cells: torch.Tensor
    """`[sets, groups, tokens]` int32, -1 where nothing is staged."""
    count: torch.Tensor
    """`[]` int64 on the device, tokens that are staged."""
    copied: dict[int, Any] = field(default_factory=dict)
    """By layer, the event behind its copy (None on a CPU)."""


class Staging:
    """The staged tokens of the forward that runs now.

    Args:
        arena: lends the cells.
        host: where the tokens are.
    """

    def __init__(self, arena: Arena, host: HostPool) -> None:
        self._arena = arena
        self._residency = arena.residency
        self._host = host
        self._layers = arena.planes_of_layers
        self._places = {planes.start: place for place, planes in enumerate(self._layers)}
        self._staged: Staged | None = None
        self._owner = torch.zeros(self._residency.num_slots + 1, dtype=torch.int64, device=arena.device)
        self._stream = None if arena.device.type == "cpu" else torch.get_device_module(arena.device).Stream()

    @property
    def active(self) -> bool:
        """Whether anything may be staged."""
        return self._staged is not None

    @property
    def sets(self) -> int:
        """Layers whose keys and values are staged at a time."""
        return staged_layers(self._arena.device)

    def cells_for(self, tokens: int) -> int:
        """Cells that are borrowed for so many tokens of prefixes."""
        return self.sets * self._arena.planes_per_layer * tokens

    def begin(self, slots: torch.Tensor) -> torch.Tensor:
        """Map those of `slots` `[tokens]` that no plane has; they may repeat.  Does not wait for the device.

        Returns:
            `[]` int64 on the device, how many that are.

        Raises:
            OutOfCells: too few cells are free for all of them; nothing has changed then.
        """
        assert self._staged is None, "the forward before has not ended"
        count = slots.numel()
        cells = self._residency.borrow(self.cells_for(count)).view(self.sets, self._arena.planes_per_layer, count)
        # A slot that repeats is staged where it is named last: whoever finds its own number is that one.
        numbers = torch.arange(count, device=slots.device)
        self._owner[slots] = numbers
        there = (self._residency.table[0, slots] == EVICTED) & self._host.has(slots) & (self._owner[slots] == numbers)
        # The others write the padding slot's own cell to the padding slot.
        slots = torch.where(there, slots, PADDING)
        widths = [planes.stop - planes.start for planes in self._layers]
        by_layer = torch.cat([cells[place % self.sets, :width] for place, width in enumerate(widths)])
        self._residency.table[:, slots] = torch.where(there, by_layer, PADDING)
        self._staged = Staged(slots, there, torch.where(there, cells, EVICTED), there.sum())
        if self._stream is not None:
            self._stream.wait_stream(torch.get_device_module(self._arena.device).current_stream())
        self._copy(0)
        return self._staged.count

    def fill(self, planes: slice) -> None:
        """Before a layer attends, whose `planes` these are; layers come in order: its staged tokens are in place."""
        staged = self._staged
        if staged is None:
            return
        layer = self._places[planes.start]
        if layer not in staged.copied:
            self._copy(layer)
        if self._stream is None:
            return
        module = torch.get_device_module(self._arena.device)
        if layer + 1 < len(self._layers) and layer + 1 not in staged.copied:
            self._stream.wait_event(passed_event(self._arena.device))
            self._copy(layer + 1)
        module.current_stream().wait_event(staged.copied[layer])

    def _copy(self, layer: int) -> None:
        """Bring one layer's keys and values to its set of cells, on the stream of our own where there is one."""
        staged, planes = self._staged, self._layers[layer]
        assert staged is not None
        arena, width = self._arena.raw, planes.stop - planes.start
        target = (arena.expand(width, *arena.shape), staged.cells[layer % self.sets, :width], staged.count * width)
        if self._stream is None:
            self._host.copy(planes, staged.slots, *target)
            staged.copied = {layer: None}
            return
        with torch.get_device_module(self._arena.device).stream(self._stream):
            self._host.copy(planes, staged.slots, *target)
            staged.copied[layer] = passed_event(self._arena.device)

    def end(self) -> None:
        """The forward is over: nothing is staged any more."""
        staged, self._staged = self._staged, None
        if staged is None:
            return
        if self._stream is not None:
            # A forward that failed has left copies behind that it did not wait for.
            torch.get_device_module(self._arena.device).current_stream().wait_stream(self._stream)
        self._residency.table[:, staged.slots] = torch.where(staged.there, EVICTED, PADDING).to(torch.int32)
        self._residency.free.give_back()
