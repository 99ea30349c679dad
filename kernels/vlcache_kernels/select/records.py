"""What `select` returns."""

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
    freed: torch.Tensor | None = None
    """`[planes * m]` int32: cells of evicted tokens, by plane, in sequence order.  None without `cells`."""
    num_freed: torch.Tensor | None = None
    """`[1]` int32: valid entries of `freed`; the rest is undefined."""
