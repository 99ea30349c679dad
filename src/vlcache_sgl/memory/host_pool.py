"""Host memory in which tokens lie whole, whatever the arena still has of them.

A *row* of the pool holds keys and values of one token in all planes.  `HostPool.rows` says which row holds a virtual
slot's token.  Where the device is a GPU the pool is pinned and the table lies on the device; on a CPU both are plain
memory.  Nothing here knows SGLang.

Invariants, checked by `HostPool.check_integrity`: every row is either free or the home of exactly one slot, and
rows used + rows free = rows total.
"""

from __future__ import annotations

import torch

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
        written, read: bytes copied to and from host memory so far.
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
        self._free = torch.empty(0, dtype=torch.int32)
        self.free_tokens = 0
        self.written = self.read = 0
        self.clear()

    @property
    def used_tokens(self) -> int:
        """Rows that hold a token."""
        return self.num_tokens - self.free_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one row."""
        return int(self.cells[:, 0].numel() * self.cells.element_size())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_tokens * self.token_bytes

    def clear(self) -> None:
        """Forget everything."""
        self.rows.fill_(NOWHERE)
        self._free = torch.arange(self.num_tokens - 1, -1, -1, dtype=torch.int32, device=self.device)
        self.free_tokens = self.num_tokens

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
        if count > self.free_tokens:
            raise HostFull(f"{count} tokens do not fit the {self.free_tokens} that are free in host memory")
        # Neighbouring tokens get neighbouring rows: reading them back reads runs.
        rows = self._free[self.free_tokens - count : self.free_tokens].flip(0)
        self.free_tokens -= count
        self.rows[slots] = rows
        places = self._host(rows)
        for target, source in zip(self.cells, cells, strict=True):
            target[places] = arena[source.to(torch.int64)].to(target.device)
        self.written += count * self.token_bytes

    def load(self, planes: slice, slots: torch.Tensor) -> torch.Tensor:
        """`[planes, tokens, 2, heads_per_cell, head_dim]` on the arena's device, of tokens that are stored."""
        rows = self._host(self.rows[slots])
        out = torch.stack([plane.index_select(0, rows) for plane in self.cells[planes]])
        self.read += out.nbytes
        return out.to(self.device, non_blocking=True)

    def drop(self, slots: torch.Tensor) -> None:
        """Free the rows of those of `slots` that have one."""
        rows = self.rows[slots]
        rows = rows[rows >= 0]
        count = rows.numel()
        self.rows[slots] = NOWHERE
        self._free[self.free_tokens : self.free_tokens + count] = rows
        self.free_tokens += count

    def has(self, slots: torch.Tensor) -> torch.Tensor:
        """`[tokens]` bool, which of `slots` are stored."""
        return self.rows[slots] >= 0

    def _host(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers where `cells` is indexed; waits for a GPU."""
        return rows.to("cpu", torch.int64)

    def check_integrity(self) -> list[str]:
        """Recount everything; returns what is wrong, empty when nothing is."""
        used = self.rows[self.rows >= 0].to(torch.int64)
        free = self._free[: self.free_tokens].to(torch.int64)
        uses = torch.bincount(torch.cat([used, free]), minlength=self.num_tokens)
        problems = []
        if bool((uses > 1).any()):
            problems.append(f"{int((uses > 1).sum())} rows of host memory are used twice")
        if bool((uses == 0).any()):
            problems.append(f"{int((uses == 0).sum())} rows of host memory are lost")
        return problems
