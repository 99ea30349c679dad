"""Copy cells from place to place by lists of numbers: within the arena, to pinned host memory and back.

A kernel of a GPU reads and writes pinned host memory by the numbers that it finds on the device: the host need not know
which rows are copied, so it never waits to learn them.
"""

from __future__ import annotations

import torch

from vlcache_kernels.checks import Backend, check_device, check_index, check_shape, use_triton
from vlcache_kernels.copy_cells import naive

__all__ = ["copy_cells"]


def copy_cells(
    out: torch.Tensor,
    to: torch.Tensor,
    source: torch.Tensor,
    numbers: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """``out[p, to[p, i]] = source[p, numbers[p, i]]`` for all planes p and tokens i; an entry of -1 on either side is
    skipped.  What is read and what is written must not overlap.

    Args:
        out: `[P, N, 2, heads_per_cell, D]` of any type, 8-bit floats as bytes; on the device of the lists, or in pinned
            host memory.  Planes may lie on top of each other (``arena.expand(P, ...)``); a cell itself is contiguous.
        to: `[P, n]` int32 or int64.
        source: `[P, M, 2, heads_per_cell, D]`, same type as `out`; where `out` may be.
        numbers: `[P, n]` int32 or int64, on the device of `to`.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.
    """
    planes, tokens = to.shape
    check_shape("out", out, (planes, None, 2, None, None))
    check_shape("source", source, (planes, None, *out.shape[2:]))
    check_shape("numbers", numbers, (planes, tokens))
    for name, tensor in (("out", out), ("source", source)):
        if not tensor[0].is_contiguous():
            raise ValueError(f"{name} must be contiguous within a plane")
        if tensor.device.type == "cpu" != to.device.type and not tensor.is_pinned():
            raise ValueError(f"{name} is in host memory that is not pinned: a kernel cannot reach it")
    if out.dtype != source.dtype:
        raise TypeError(f"source is {source.dtype}, out is {out.dtype}: expected the same")
    check_index("to", to)
    check_index("numbers", numbers)
    check_device(to.device, numbers=numbers)
    if not tokens:
        return
    if use_triton(backend, to.device):
        from vlcache_kernels.copy_cells import triton

        triton.copy_cells(out, to, source, numbers)
    else:
        naive.copy_cells(out, to, source, numbers)
