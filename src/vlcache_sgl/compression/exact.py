"""Sharing without loss: a question sees all of a shared prefix, and keeps of it what it would have kept alone.

Every token of a prompt is copied to host memory before the arena gives it up.  The prefix tree owns slots of tokens
that are in host memory and have no cells; a request that finds them attends to them through `Staging` while it is
prefilled, its query rows score them, and what its policy keeps is brought back into cells of *private slots*, which its
row of `req_to_token` names from then on.  Nobody else reads private slots: an answer does not depend on who asked
before.

The order at the end of a forward is: copy the chunk to host memory; when the prompt is complete decide, give the kept
tokens private slots, and free everything else; otherwise free the chunk's cells, because the next chunk is served from
host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.host_pool import HostFull
from vlcache_sgl.memory.own_slots import OwnSlots
from vlcache_sgl.memory.residency import EVICTED, OutOfCells
from vlcache_sgl.memory.staging import Staging
from vlcache_sgl.recall.areas import Recall, RecallArea
from vlcache_sgl.streams import passed_event


class Room(Protocol):
    """What gives way when memory is needed: the prefix tree drops prefixes that nobody uses, as far as that goes."""

    def make_host_room(self, tokens: int) -> None:
        """Until so many tokens fit host memory."""

    def make_cells(self, cells: int) -> None:
        """Until so many cells are free."""

    def take_slots(self, count: int) -> torch.Tensor | None:
        """`[count]` int64, slots without cells; None: there are not so many."""

    def give_slots(self, slots: torch.Tensor) -> None:
        """Take back `slots`, with their cells."""


class OutOfMemory(RuntimeError):
    """What a request is to keep does not fit; its answer cannot be given."""


class HostMemory:
    """Moves tokens between arena and host memory for requests that share without loss.

    Args:
        accounting: of the arena; with host memory.
        room: is asked before memory is taken.
        recall: whether evicted tokens are to be found again while answers are decoded.
    """

    def __init__(self, accounting: CellAccounting, room: Room, *, recall: bool = False) -> None:
        assert accounting.host is not None
        self.host = accounting.host
        self._accounting = accounting
        self._residency = accounting.residency
        self._room = room
        self._arena = accounting.arena.raw
        self.staging = Staging(accounting.arena, self.host)
        self.recall = Recall(accounting.arena, self.host) if recall else None
        """Brings evicted tokens back while an answer is decoded; None: nothing is brought back."""
        self._staged_tokens = torch.zeros((), dtype=torch.int64, device=self._arena.device)

    @property
    def staged_tokens(self) -> int:
        """Tokens staged so far, counted once per forward; waits for the device."""
        return int(self._staged_tokens)

    @property
    def layers(self) -> int:
        """See `CellAccounting.num_layers`."""
        return self._accounting.num_layers

    def share_kept(self, counted: float, length: int) -> float:
        """Share of a prompt of `length` tokens that stays in the arena, `counted` of them in the counted layers."""
        arena = self._accounting.arena
        if arena.window is None:
            return counted
        inside = min(1.0, arena.window.tokens / length)
        return (arena.counted_planes * counted + arena.window.planes * inside) / arena.num_planes

    # -- one forward ------------------------------------------------------------------------------------------------

    def stage(self, prefixes: Sequence[torch.Tensor]) -> None:
        """Bring the prefixes of a prefill batch, slots `[tokens]` each, within reach of attention."""
        if prefixes:
            slots = torch.cat(list(prefixes)).to(torch.int64)
            self._make_cells(self.staging.cells_for(slots.numel()))
            self._staged_tokens += self.staging.begin(slots)

    def _make_cells(self, cells: int) -> None:
        """Let so many cells be free, as far as that goes."""
        if self._residency.free_cells < cells:
            self._accounting.settle()
        if self._residency.free_cells < cells:
            self._room.make_cells(cells)

    def write_back(self, slots: torch.Tensor) -> bool:
        """Copy a computed chunk, slots `[tokens]` resident in all planes, to host memory.

        Returns whether it is there: False when host memory is full of what requests use.
        """
        self._room.make_host_room(slots.numel())
        try:
            cells = self._residency.table[:, slots]
            self.host.store(slots, self._arena, cells)
        except HostFull:
            return False
        if self.recall is not None:
            self.recall.sketch(slots, cells)
        return True

    def release_chunk(self, slots: torch.Tensor) -> None:
        """Free the cells that the arena has of tokens which are in host memory."""
        nothing = torch.zeros((self._residency.num_planes, slots.numel()), dtype=torch.bool, device=slots.device)
        self._retire(slots, nothing)

    # -- the end of a prefill ---------------------------------------------------------------------------------------

    def settle(self, slots: torch.Tensor, keep: torch.Tensor, kept: int) -> OwnSlots:
        """Give a request cells of its own for what it keeps, and free what the arena still has of its prompt.

        Args:
            slots: `[length]` int64 of the prompt, each in host memory or resident in all planes.
            keep: `[planes, length]` bool.
            kept: how often it is set, known on the host, which therefore waits only where memory is short.

        Raises:
            OutOfMemory: too few slots or cells; the arena may have nothing of the prompt then.
        """
        private = self._room.take_slots(slots.numel())
        if private is None:
            raise OutOfMemory(f"{slots.numel()} slots are not free")
        residency = self._residency
        away = keep & (residency.table[:, slots] == EVICTED)
        residency.free.collect()
        if residency.free_cells < kept:
            self._make_cells(int(away.sum()))
        try:
            fresh = residency.take_for(away, kept)
        except OutOfCells as error:
            self.release_chunk(slots)
            self._room.give_slots(private)
            raise OutOfMemory(str(error)) from error
        freed = residency.move_kept(slots, private, keep, fresh)
        arena = self._arena.expand(len(fresh), *self._arena.shape)
        self.host.copy(slice(0, len(fresh)), slots, arena, fresh, away.sum())
        self._accounting.retire(freed, passed_event(slots.device))
        return OwnSlots(slots, private)

    def settle_with_area(
        self, slots: torch.Tensor, keep: torch.Tensor, kept: int, tokens: int
    ) -> tuple[OwnSlots, RecallArea]:
        """`settle`, with a recall area of `tokens` tokens per plane."""
        assert self.recall is not None
        candidates = self.recall.candidates(slots, keep)
        places = self.recall.places(candidates, tokens)
        own = self.settle(slots, keep | places, kept + tokens * len(keep))
        return own, self.recall.begin(own, candidates, places, tokens)

    def _retire(self, slots: torch.Tensor, keep: torch.Tensor) -> None:
        self._accounting.evict(slots, keep)
