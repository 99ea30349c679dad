"""Which cells layers with a window attend to, in the form that GPU kernels read: ragged lists, on the device.

Such a layer keeps the last tokens of a request without a gap, and sees of them as many as its window holds.  So the
lists follow from positions alone: how long each is, the host knows, and a step looks them up anew, which reads 12
bytes per token of a window and plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlcache_kernels.residency_index import ResidencyIndex, residency_index
from vlcache_sgl.memory.batches import DecodeBatch, Memory
from vlcache_sgl.memory.layers import LayerCells


class WindowIndex:
    """Cell lists of the last tokens of each request.

    One list serves all layers that share their cells.  It holds ``G * B`` segments plane by plane, with `G` planes per
    layer, as the lists of `DeviceIndex` do.

    Args:
        memory: residency and request rows, of a model with a window.
        dtype: of `indices`, see `DeviceIndex`.
    """

    def __init__(self, memory: Memory, dtype: torch.dtype) -> None:
        assert memory.window is not None
        self._memory = memory
        self._dtype = dtype
        self._device = memory.arena.device
        self.groups = memory.window.planes_per_layer
        """Planes of a layer."""
        self.tokens = memory.window.tokens
        """How many tokens before its own a token sees."""
        self.lists = len(memory.window_planes) // self.groups
        self._fixed: torch.Tensor | None = None
        self._fixed_indptr: dict[int, torch.Tensor] = {}

    def number(self, layer: LayerCells) -> int:
        """Which of the lists is a layer's."""
        return (int(layer.planes.start) - self._memory.window_planes.start) // self.groups

    def reserve(self, max_batch: int) -> None:
        """Lay out what captured graphs read, for up to `max_batch` requests: any fits."""
        context = int(self._memory.req_to_token.shape[1])
        self._fixed = self._new_indices(self.groups * max_batch * min(self.tokens + 1, context))

    def before(self, rows: torch.Tensor, begins: torch.Tensor, lengths: Sequence[int]) -> ResidencyIndex:
        """The lists of what new tokens may see of the positions before them.

        Args:
            rows: `[B]` int on the device.
            begins: `[B]` int on the device, positions of the first new tokens.
            lengths: the same, on the host.
        """
        seen = [min(length, self.tokens) for length in lengths]
        out = ResidencyIndex(self._new_indptr(len(seen)), self._new_indices(self.groups * sum(seen)))
        return self._look_up(rows, begins, seen, self.tokens, out)

    def step(self, batch: DecodeBatch) -> ResidencyIndex:
        """The lists of one decode step, its own tokens included; of a recorded one at fixed addresses."""
        seen = [min(length, self.tokens + 1) for length in batch.lengths] + [1] * batch.padding
        if batch.recorded:
            assert self._fixed is not None
            if len(seen) not in self._fixed_indptr:
                self._fixed_indptr[len(seen)] = self._new_indptr(len(seen))
            out = ResidencyIndex(self._fixed_indptr[len(seen)], self._fixed)
        else:
            out = ResidencyIndex(self._new_indptr(len(seen)), self._new_indices(self.groups * sum(seen)))
        return self._look_up(batch.row_tensor, batch.length_tensor, seen, self.tokens + 1, out)

    def _look_up(
        self, rows: torch.Tensor, ends: torch.Tensor, seen: Sequence[int], most: int, out: ResidencyIndex
    ) -> ResidencyIndex:
        """Fill `out` with the last `seen` tokens, at most `most`, in front of `ends`."""
        memory, width = self._memory, max(1, *seen)
        counts = ends.clamp(max=most)
        places = (ends - counts)[:, None] + torch.arange(width, device=self._device)
        last = memory.req_to_token.shape[1] - 1  # of what lies behind a request nothing is used
        slots = memory.req_to_token[rows[:, None], places.clamp(max=last)]
        numbers = torch.arange(len(seen), device=self._device)
        table, planes, group = memory.residency.table, memory.window_planes, self.groups
        return residency_index(slots, numbers, counts, table, planes, group=group, out=out, max_length=width)

    def _new_indices(self, capacity: int) -> torch.Tensor:
        # Zeros: see `DeviceIndex`.
        return torch.zeros(self.lists, max(1, capacity), dtype=self._dtype, device=self._device)

    def _new_indptr(self, size: int) -> torch.Tensor:
        return torch.empty(self.lists, self.groups * size + 1, dtype=torch.int32, device=self._device)
