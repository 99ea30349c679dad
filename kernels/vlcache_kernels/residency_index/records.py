"""What `residency_index` returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ResidencyIndex(NamedTuple):
    """Ragged lists of resident cells, one row per plane (per layer where planes are joined), `B` requests each."""

    indptr: torch.Tensor
    """`[planes, B + 1]` int32: request b of plane p owns ``indices[p, indptr[p, b] : indptr[p, b + 1]]``."""
    indices: torch.Tensor
    """`[planes, total]` int32: resident cells in sequence order; what lies after `indptr[p, B]` is 0 (padding cell)."""
