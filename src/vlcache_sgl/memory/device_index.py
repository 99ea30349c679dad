"""Which cells each request attends to, in the form that GPU kernels read: ragged lists, one per layer, on the device.

Of the counted layers; `window_index` has those of layers with a window.

The counterpart of `decode_index` for devices that the host must not wait for.  A list holds the layer's
``groups * batch`` segments without gaps, plane by plane.  From one step of some requests to the next of the same ones,
or of fewer, segments are moved and extended, which costs some bytes per *kept* cell; otherwise they are looked up anew.

Sizes.  How many cells a list holds is known to the device only, so buffers are laid out by what the host can tell for
certain: no more than all tokens.  Where that would be too much, kept cells are counted, which waits for the device,
once per request whose row has changed.
"""

from __future__ import annotations

from typing import Any

import torch

from vlcache_kernels.residency_index import ResidencyIndex, append_tokens, residency_index
from vlcache_sgl.memory.batches import DecodeBatch, Memory
from vlcache_sgl.streams import to_device

LOOSE_ENTRIES = 1 << 24
"""Index entries of all layers together (64 or 128 MB) up to which a buffer may be laid out for all tokens."""
GROWTH = 1.25
"""A buffer that has become too small grows by this factor at least."""


class DeviceIndex:
    """Ragged cell lists, built and kept up to date without waiting for the device.

    Args:
        memory: residency and request rows.
        dtype: of `indices`: int32 for FlashInfer; int64 for SGLang's Triton kernels, which multiply indices by
            strides in the type of the index.

    Attributes:
        current: `indptr` `[layers, G * B + 1]` int32 and `indices` `[layers, capacity]` of the last step.
    """

    def __init__(self, memory: Memory, dtype: torch.dtype) -> None:
        self._memory = memory
        self._dtype = dtype
        self._device = memory.arena.device
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._padding = 0
        self._stale: set[int] = set()
        self._kept: dict[int, tuple[int, int]] = {}
        self._buffers: list[torch.Tensor] = [self._new_indices(0), self._new_indices(0)]
        self._fixed: torch.Tensor | None = None
        self._capacity = 0
        self._fixed_indptr: dict[int, torch.Tensor] = {}
        self._nothing = torch.full((memory.residency.num_planes, 1), -1, dtype=torch.int32, device=self._device)
        self._numbers = torch.arange(0, device=self._device)
        self.current: ResidencyIndex | None = None

    # -- what graphs read -------------------------------------------------------------------------------------------

    def reserve(self, max_batch: int) -> None:
        """Lay out the buffer that captured graphs read, for up to `max_batch` requests.

        Per layer it holds twice what fits the arena if layers kept equally much: shared prefixes are listed once per
        request, and layers may keep different numbers of tokens.  What goes beyond is served without graphs.
        """
        memory = self._memory
        tokens = memory.residency.num_cells // len(memory.counted_planes)
        self._capacity = memory.groups * min(2 * tokens, max_batch * memory.req_to_token.shape[1])
        self._fixed = self._new_indices(self._capacity + memory.groups * max_batch)  # with room for padding

    def fits(self, rows: list[int], lengths: list[int]) -> bool:
        """Whether these requests, `lengths` tokens long, fit what is reserved.

        With a cell per KV head ranks may hold different numbers of cells; the answer is then given from lengths alone,
        because all ranks must give the same.
        """
        if self._memory.groups * sum(lengths) <= self._capacity:
            return True
        return self._memory.groups == 1 and self._count(rows, lengths) <= self._capacity

    # -- decode -----------------------------------------------------------------------------------------------------

    def invalidate(self, row: int) -> None:
        """The slots of request row `row` have changed: look them up anew."""
        self._stale.add(row)
        self._kept.pop(row, None)

    def step(self, batch: DecodeBatch) -> ResidencyIndex:
        """The lists of one decode step; valid until the next."""
        source = self._source(batch)
        if source is None:
            self.current = self._anew(batch)
        else:
            self.current = self._continued(batch, source)
        self._rows, self._lengths, self._padding = list(batch.rows), list(batch.lengths), batch.padding
        self._stale.difference_update(batch.rows)
        return self.current

    def _source(self, batch: DecodeBatch) -> list[int] | None:
        """Which request of the last step each one continues; None when one of them is new or has changed."""
        if self.current is None:
            return None
        known = {row: number for number, row in enumerate(self._rows) if row not in self._stale}
        source = []
        for row, length in zip(batch.rows, batch.lengths, strict=True):
            number = known.get(row)
            if number is None or self._lengths[number] != length - 1:
                return None
            source.append(number)
        if batch.padding and not self._padding:
            return None
        # Any padding continues any other; its own, so that a batch that stays the same names every number in order.
        last = len(self._rows) + self._padding - 1
        return source + [min(len(self._rows) + number, last) for number in range(batch.padding)]

    def _anew(self, batch: DecodeBatch) -> ResidencyIndex:
        lengths = _with_padding(batch)
        out = self._output(batch, self._room(batch))
        _look_up(self._memory, batch.row_tensor, batch.length_tensor, out, max(lengths))
        return out

    def _continued(self, batch: DecodeBatch, source: list[int]) -> ResidencyIndex:
        assert self.current is not None
        groups, longest, room = self._memory.groups, max(_with_padding(batch)), self._room(batch)
        target = self._output(batch, room)
        # Segments move, so they cannot be extended where they lie.
        direct = target.indices is not self.current.indices
        out = target if direct else ResidencyIndex(torch.empty_like(target.indptr), self._spare(room))
        numbers = self._arange(len(source))
        same = source == list(range(len(self._rows) + self._padding))
        origin = numbers if same else to_device(torch.tensor(source), self._device)
        # A table of its own: the kernel looks new tokens up by number, here those of this step.
        options: dict[str, Any] = {"planes": self._memory.counted_planes, "group": groups, "max_length": longest}
        append_tokens(self.current, numbers, batch.new_cells, source=origin, out=out, **options)
        if not direct:
            # Extended by nothing: the lists are only moved to where graphs read them.
            nothing = torch.zeros_like(numbers)
            append_tokens(out, nothing, self._nothing, source=numbers, out=target, **options)
        return target

    # -- buffers ----------------------------------------------------------------------------------------------------

    def _output(self, batch: DecodeBatch, room: int) -> ResidencyIndex:
        size = len(batch.rows) + batch.padding
        if not batch.recorded:
            return ResidencyIndex(self._new_indptr(size), self._spare(room))
        if self._fixed is None or room > self._fixed.shape[1]:
            raise RuntimeError(f"{room} cells per layer do not fit the index that CUDA graphs read: ask `fits` first")
        if size not in self._fixed_indptr:
            self._fixed_indptr[size] = self._new_indptr(size)
        return ResidencyIndex(self._fixed_indptr[size], self._fixed)

    def _spare(self, room: int) -> torch.Tensor:
        """A buffer of at least `room` entries per layer that does not hold the current lists."""
        number = 0 if self.current is None or self.current.indices is not self._buffers[0] else 1
        if self._buffers[number].shape[1] < room:
            self._buffers[number] = self._new_indices(max(room, int(GROWTH * self._buffers[number].shape[1])))
        return self._buffers[number]

    def _room(self, batch: DecodeBatch) -> int:
        """Entries per layer that surely suffice."""
        groups, lengths = self._memory.groups, _with_padding(batch)
        enough = LOOSE_ENTRIES // self._memory.num_layers
        if batch.recorded and self._fixed is not None:
            enough = self._fixed.shape[1]
        if groups * sum(lengths) <= enough:
            return groups * sum(lengths)
        return self._count(batch.rows, batch.lengths) + groups * batch.padding

    def _count(self, rows: list[int], lengths: list[int]) -> int:
        """Kept cells of the layer that keeps most, or more; waits for the device for rows that have changed."""
        total = 0
        for row, length in zip(rows, lengths, strict=True):
            if row not in self._kept:
                self._kept[row] = (length, _count_row(self._memory, row, length))
            at, kept = self._kept[row]
            total += kept + self._memory.groups * max(0, length - at)
        return total

    def _arange(self, count: int) -> torch.Tensor:
        if self._numbers.numel() < count:
            self._numbers = torch.arange(2 * count, device=self._device)
        return self._numbers[:count]

    def _new_indices(self, capacity: int) -> torch.Tensor:
        # Zeros: what lies behind the lists may be prefetched, and must then name a cell that exists.
        return torch.zeros(self._memory.num_layers, capacity, dtype=self._dtype, device=self._device)

    def _new_indptr(self, size: int) -> torch.Tensor:
        shape = (self._memory.num_layers, self._memory.groups * size + 1)
        return torch.empty(shape, dtype=torch.int32, device=self._device)


def _with_padding(batch: DecodeBatch) -> list[int]:
    return batch.lengths + [1] * batch.padding


def look_up(
    memory: Memory,
    dtype: torch.dtype,
    rows: list[int],
    lengths: list[int],
    row_tensor: torch.Tensor,
    length_tensor: torch.Tensor,
) -> ResidencyIndex:
    """The lists of the first `lengths` positions of `rows`, of all layers, in memory of their own.

    Args:
        dtype: of `indices`.
        row_tensor, length_tensor: `rows` and `lengths` on the device.
    """
    layers, device = memory.num_layers, memory.arena.device
    room = memory.groups * sum(lengths)
    if room * layers > LOOSE_ENTRIES:
        room = sum(_count_row(memory, row, length) for row, length in zip(rows, lengths, strict=True))
    out = ResidencyIndex(
        torch.empty(layers, memory.groups * len(rows) + 1, dtype=torch.int32, device=device),
        torch.zeros(layers, max(1, room), dtype=dtype, device=device),  # zeros: see `DeviceIndex._new_indices`
    )
    _look_up(memory, row_tensor, length_tensor, out, max(1, *lengths))
    return out


def _count_row(memory: Memory, row: int, length: int) -> int:
    """Cells that the layer with most keeps of the first `length` positions; waits for the device."""
    counted = memory.residency.table[: memory.counted_planes.stop]
    cells = counted[:, memory.req_to_token[row, :length].to(torch.int64)]
    kept = (cells >= 0).sum(1).view(-1, memory.groups).sum(1)
    return int(kept.max()) if length else 0


def _look_up(memory: Memory, rows: torch.Tensor, lengths: torch.Tensor, out: ResidencyIndex, longest: int) -> None:
    """Fill `out` with the kept cells of the first `lengths` positions of `rows`."""
    planes, group = memory.counted_planes, memory.groups
    residency_index(
        memory.req_to_token, rows, lengths, memory.residency.table, planes, group=group, out=out, max_length=longest
    )
