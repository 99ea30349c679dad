"""What `residency_index` returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ResidencyIndex(NamedTuple):
    """Ragged lists of resident cells, one per plane (per layer where planes are joined), `Q` segments each."""

    indptr: torch.Tensor
    """`[lists, Q + 1]` int32: segment q of list p owns ``indices[p, indptr[p, q] : indptr[p, q + 1]]``."""
    indices: torch.Tensor
    """`[lists, capacity]` int32 (int64 where such buffers were given): resident cells in sequence order; what lies
    after `indptr[p, Q]` is undefined."""

    def at(self, number: int) -> ResidencyIndex:
        """One list: `indptr` `[Q + 1]`, `indices` `[capacity]`; views."""
        return ResidencyIndex(self.indptr[number], self.indices[number])

    @classmethod
    def allocate(
        cls, lists: int, segments: int, capacity: int, device: torch.device | str, dtype: torch.dtype = torch.int32
    ) -> ResidencyIndex:
        """Buffers to be filled later, at fixed addresses (CUDA graphs); empty segments until then."""
        return cls(
            torch.zeros(lists, segments + 1, dtype=torch.int32, device=device),
            torch.zeros(lists, capacity, dtype=dtype, device=device),
        )
