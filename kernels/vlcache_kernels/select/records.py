"""What `select` and `free_list` return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """Which owned tokens stay, per plane."""

    keep: torch.Tensor
    """`[planes, m]` bool."""
    positions: torch.Tensor
    """`[planes, m]` int32: kept positions ascending, then -1; the first ``counts[p]`` of row p are valid."""
    counts: torch.Tensor
    """`[planes]` int32: tokens kept, `k` clamped to `[0, m]`."""


class FreeList(NamedTuple):
    """Cells that an eviction frees, by plane, in sequence order."""

    cells: torch.Tensor
    """`[capacity]` int32, at most ``planes * m``; what lies behind the valid ones is undefined."""
    length: torch.Tensor
    """`[1]` int32: valid entries of `cells`."""
