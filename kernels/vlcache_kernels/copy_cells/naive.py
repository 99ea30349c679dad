"""Copying cells in plain torch: the reference, and what runs on a CPU."""

from __future__ import annotations

import torch


def copy_cells(out: torch.Tensor, to: torch.Tensor, source: torch.Tensor, numbers: torch.Tensor) -> None:
    """See `vlcache_kernels.copy_cells.copy_cells`."""
    for plane in range(to.shape[0]):
        there = (to[plane] >= 0) & (numbers[plane] >= 0)
        out[plane, to[plane, there].to(torch.int64)] = source[plane, numbers[plane, there].to(torch.int64)]
