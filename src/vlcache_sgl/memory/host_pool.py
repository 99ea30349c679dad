"""Host memory in which tokens lie whole, whatever the arena still has of them.

A *row* of the pool holds keys and values of one token in all planes.  `HostPool.rows` says which row holds a virtual
slot's token.  Where the device is a GPU the pool is pinned and the table lies on the device: kernels find the rows
themselves, and the host need not know them.  On a CPU both are plain memory.  Nothing here knows SGLang.

Invariants, checked by `HostPool.check_integrity`: every row is either free or the home of exactly one slot, and
rows used + rows free = rows total.
"""

from __future__ import annotations

import torch

from vlcache_kernels.copy_cells import copy_cells
from vlcache_kernels.select import free_list
from vlcache_sgl.memory.free_stack import Freed, FreeStack
from vlcache_sgl.streams import StreamOrder, passed_event

NOWHERE = -1
"""Entry of `HostPool.rows` for a token that is not in host memory."""


class HostFull(RuntimeError):
    """Fewer rows are free than tokens are to be stored."""


class HostPool:
    """Rows for `num_tokens` tokens.

    Args:
        num_planes: layers times head groups, as of the arena.
        num_slots: virtual slots, the padding slot 0 not counted.
        num_tokens: rows.
        arena: `[cells + 1, 2, heads_per_cell, head_dim]`, `Arena.raw`, whose cells are stored; gives shape, dtype and
            device.

    Raises:
        MemoryError: the memory cannot be had, or not be pinned; the message is one line.

    Attributes:
        cells: `[planes, rows, 2, heads_per_cell, head_dim]` in host memory.
        rows: `[slots + 1]` int32 on the arena's device, the row of each slot's token, -1 for none.
        written: bytes copied to host memory so far.
    """

    def __init__(self, num_planes: int, num_slots: int, num_tokens: int, arena: torch.Tensor) -> None:
        self.num_tokens = num_tokens
        self.device = arena.device
        pinned = self.device.type != "cpu"
        try:
            self.cells = torch.empty(
                (num_planes, num_tokens, *arena.shape[1:]), dtype=arena.dtype, device="cpu", pin_memory=pinned
            )
        except RuntimeError as error:
            wanted = num_planes * num_tokens * arena[0].nbytes
            how = "pinned host memory" if pinned else "memory"
            raise MemoryError(f"{wanted / 2**30:.2f} GiB of {how} cannot be had: {error}") from error
        self.rows = torch.full((num_slots + 1,), NOWHERE, dtype=torch.int32, device=self.device)
        self._order = StreamOrder(self.device)
        # Counted where it is known: how many tokens of a forward are staged only the device knows.
        self._read_cells = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.written = 0
        self.clear()

    @property
    def free_tokens(self) -> int:
        """Rows that hold nothing; waits for those that are on their way back, so that ranks agree."""
        self._free.settle()
        return self._free.count

    def has_room(self, tokens: int) -> bool:
        """Whether so many rows hold nothing; waits only where that is not known."""
        self._free.collect()
        return tokens <= self._free.count or tokens <= self.free_tokens

    @property
    def used_tokens(self) -> int:
        """Rows that hold a token."""
        return self.num_tokens - self.free_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one row."""
        return int(self.cells[:, 0].numel() * self.cells.element_size())

    @property
    def _cell_bytes(self) -> int:
        return int(self.cells[0, 0].nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_tokens * self.token_bytes

    def clear(self) -> None:
        """Forget everything."""
        self.rows.fill_(NOWHERE)
        self._free = FreeStack(torch.arange(self.num_tokens - 1, -1, -1, dtype=torch.int32, device=self.device))

    def store(self, slots: torch.Tensor, arena: torch.Tensor, cells: torch.Tensor) -> None:
        """Copy tokens from the arena to rows of their own.

        Args:
            slots: `[tokens]` int64, not in host memory yet.
            arena: the arena's memory.
            cells: `[planes, tokens]` int, where they are in it, all of them.

        Raises:
            HostFull: too few rows are free; nothing has changed then.
        """
        count = slots.numel()
        if not self.has_room(count):
            raise HostFull(f"{count} tokens do not fit the {self.free_tokens} that are free in host memory")
        # Neighbouring tokens get neighbouring rows: reading them back reads runs.
        rows = self._free.take(count)
        with self._order.next():
            self.rows[slots] = rows
            planes = self.cells.shape[0]
            copy_cells(self.cells, rows.expand(planes, -1), arena.expand(planes, *arena.shape), cells)
        self.written += count * self.token_bytes

    @property
    def read(self) -> int:
        """Bytes copied from host memory so far; waits for the device."""
        return int(self._read_cells) * self._cell_bytes

    def copy(
        self, planes: slice, slots: torch.Tensor, out: torch.Tensor, to: torch.Tensor, wanted: torch.Tensor | int
    ) -> None:
        """Copy tokens that are stored to ``out[plane, to[plane, token]]``; does not wait.

        Args:
            planes: which.
            slots: `[tokens]` int64.
            out: `[planes, N, 2, heads_per_cell, head_dim]`, planes may lie on top of each other.
            to: `[planes, tokens]` int; -1: this one is not wanted.
            wanted: how many entries of `to` are not -1.
        """
        cells = self.cells[planes]
        with self._order.next():
            copy_cells(out, to, cells, self.rows[slots].expand(cells.shape[0], -1))
            self._read_cells += wanted

    def load(self, planes: slice, slots: torch.Tensor) -> torch.Tensor:
        """`[planes, tokens, 2, heads_per_cell, head_dim]` on the arena's device, of tokens that are stored."""
        cells = self.cells[planes]
        out = torch.empty((cells.shape[0], slots.numel(), *cells.shape[2:]), dtype=cells.dtype, device=self.device)
        to = torch.arange(slots.numel(), device=self.device).expand(cells.shape[0], -1)
        self.copy(planes, slots, out, to, to.numel())
        return out

    def drop(self, slots: torch.Tensor) -> None:
        """Free the rows of those of `slots` that have one; does not wait."""
        with self._order.next():
            rows = self.rows[slots][None]
            freed = free_list(torch.zeros(rows.shape, dtype=torch.bool, device=self.device), rows)
            self.rows.index_fill_(0, slots, NOWHERE)
        self._free.give_later(Freed.of(freed.cells, freed.length), passed_event(self.device))

    def has(self, slots: torch.Tensor) -> torch.Tensor:
        """`[tokens]` bool, which of `slots` are stored."""
        return self.rows[slots] >= 0

    def check_integrity(self) -> list[str]:
        """Recount everything; returns what is wrong, empty when nothing is."""
        used = self.rows[self.rows >= 0].to(torch.int64)
        self._free.settle()
        free = self._free.numbers.to(torch.int64)
        uses = torch.bincount(torch.cat([used, free]), minlength=self.num_tokens)
        problems = []
        if bool((uses > 1).any()):
            problems.append(f"{int((uses > 1).sum())} rows of host memory are used twice")
        if bool((uses == 0).any()):
            problems.append(f"{int((uses == 0).sum())} rows of host memory are lost")
        return problems
