# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Exact selection on a GPU: k differs by plane and stays on the device, no host synchronisation.

The k-th largest key is found two bits at a time, by counting keys at or above three candidates per pass: 16 passes
over the scores of a plane, 18 with tiers.  They are in the L2 cache after the first (128k scores are 512 kB).  Device
memory sees each score once, ``4 * m`` bytes per plane, and ``1 + 4`` bytes of result per token.  The free list takes
two launches over ``1 + 4`` bytes per token, the second time from the cache, and writes 4 per evicted one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_kernels.select.records import FreeList, Selection

# Tokens per step of a program: 4 per thread at 32 warps; one program per plane, so a multiprocessor has nothing else.
BLOCK = 4096
TIER_BITS = 4
# Planes that `free_kernel` adds up per step.
BLOCK_PLANES = 256


@triton.jit
def _sort_keys(scores, tiers, i, owned, HAS_TIERS: tl.constexpr, BLOCK: tl.constexpr):
    """`[BLOCK]` int64 keys that compare like (tier, score), -1 past the end.

    A float's bits compare like the float once the lower 31 are flipped for negative numbers.
    """
    x = tl.load(scores + i, mask=i < owned, other=0.0)
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 ties with 0.0
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    if HAS_TIERS:
        key += tl.load(tiers + i, mask=i < owned, other=0).to(tl.int64) << 32
    return tl.where(i < owned, key, -1)


@triton.jit(
    do_not_specialize=["owned", "stride_scores", "stride_tiers"],
    do_not_specialize_on_alignment=["scores", "k", "tiers", "keep", "positions", "counts"],
)
def select_kernel(
    scores,  # [planes, m] float32, row stride stride_scores
    k,  # [planes] int
    tiers,  # [m] or [planes, m] int8, row stride stride_tiers (0 if shared); only with HAS_TIERS
    keep,  # out [planes, m] bool as int8
    positions,  # out [planes, m] int32
    counts,  # out [planes] int32
    owned,  # m
    stride_scores,
    stride_tiers,
    HAS_TIERS: tl.constexpr,
    KEY_BITS: tl.constexpr,  # even
    BLOCK: tl.constexpr,
):
    """One program: one plane.  Finds the k-th largest key, then writes what is above it and the first that tie."""
    plane = tl.program_id(0).to(tl.int64)
    scores += plane * stride_scores
    tiers += plane * stride_tiers
    wanted = tl.minimum(tl.maximum(tl.load(k + plane), 0), owned).to(tl.int32)

    # Invariant: at least `wanted` keys are >= threshold.
    threshold = tl.full([], 0, tl.int64)
    for step in range(0, KEY_BITS, 2):
        unit = tl.full([], 1, tl.int64) << (KEY_BITS - 2 - step)
        one = tl.zeros([BLOCK], tl.int32)
        two = tl.zeros([BLOCK], tl.int32)
        three = tl.zeros([BLOCK], tl.int32)
        for start in range(0, owned, BLOCK):
            key = _sort_keys(scores, tiers, start + tl.arange(0, BLOCK), owned, HAS_TIERS, BLOCK)
            one += (key >= threshold + unit).to(tl.int32)
            two += (key >= threshold + 2 * unit).to(tl.int32)
            three += (key >= threshold + 3 * unit).to(tl.int32)
        digit = (
            (tl.sum(one, 0) >= wanted).to(tl.int64)
            + (tl.sum(two, 0) >= wanted).to(tl.int64)
            + (tl.sum(three, 0) >= wanted).to(tl.int64)
        )
        threshold += digit * unit

    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, owned, BLOCK):
        key = _sort_keys(scores, tiers, start + tl.arange(0, BLOCK), owned, HAS_TIERS, BLOCK)
        above += (key > threshold).to(tl.int32)
    ties = wanted - tl.sum(above, 0)  # how many of the keys equal to the threshold stay: the first ones

    equal_before = tl.full([], 0, tl.int32)
    kept_before = tl.full([], 0, tl.int32)
    for start in range(0, owned, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _sort_keys(scores, tiers, i, owned, HAS_TIERS, BLOCK)
        equal = (key == threshold).to(tl.int32)
        stays = (key > threshold) | ((equal == 1) & (equal_before + tl.cumsum(equal, 0) <= ties))
        stays = stays & (i < owned)
        rank = kept_before + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(keep + plane * owned + i, stays.to(tl.int8), mask=i < owned)
        tl.store(positions + plane * owned + rank, i, mask=stays)
        tl.store(positions + plane * owned + i, -1, mask=(i >= wanted) & (i < owned))
        equal_before += tl.sum(equal, 0)
        kept_before += tl.sum(stays.to(tl.int32), 0)
    tl.store(counts + plane, wanted)


@triton.jit(
    do_not_specialize=["owned", "stride_keep", "stride_cells"],
    do_not_specialize_on_alignment=["keep", "cells", "evicted"],
)
def evicted_kernel(
    keep,  # [planes, m] bool as int8, row stride stride_keep
    cells,  # [planes, m] int, row stride stride_cells
    evicted,  # out [planes] int32, cells that become free
    owned,
    stride_keep,
    stride_cells,
    BLOCK: tl.constexpr,
):
    """One program: how many cells of one plane become free."""
    plane = tl.program_id(0).to(tl.int64)
    free = tl.zeros([BLOCK], tl.int32)
    for start in range(0, owned, BLOCK):
        i = start + tl.arange(0, BLOCK)
        cell = tl.load(cells + plane * stride_cells + i, mask=i < owned, other=-1)
        stays = tl.load(keep + plane * stride_keep + i, mask=i < owned, other=1)
        free += ((stays == 0) & (cell >= 0)).to(tl.int32)
    tl.store(evicted + plane, tl.sum(free, 0))


@triton.jit(
    do_not_specialize=["owned", "planes", "stride_keep", "stride_cells"],
    do_not_specialize_on_alignment=["keep", "cells", "evicted", "freed", "num_freed"],
)
def free_kernel(
    keep,  # [planes, m] bool as int8, row stride stride_keep
    cells,  # [planes, m] int, row stride stride_cells
    evicted,  # [planes] int32
    freed,  # out [planes * m] int32
    num_freed,  # out [1] int32
    owned,
    planes,
    stride_keep,
    stride_cells,
    BLOCK_PLANES: tl.constexpr,  # planes per step of the sum
    BLOCK: tl.constexpr,
):
    """One program: the evicted cells of one plane, after those of the planes before it."""
    plane = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK_PLANES], tl.int32)
    for start in range(0, plane, BLOCK_PLANES):
        p = start + tl.arange(0, BLOCK_PLANES)
        before += tl.load(evicted + p, mask=p < plane, other=0)
    base = tl.sum(before, 0)
    for start in range(0, owned, BLOCK):
        i = start + tl.arange(0, BLOCK)
        cell = tl.load(cells + plane * stride_cells + i, mask=i < owned, other=-1).to(tl.int32)
        stays = tl.load(keep + plane * stride_keep + i, mask=i < owned, other=1)
        free = ((stays == 0) & (cell >= 0)).to(tl.int32)
        tl.store(freed + base + tl.cumsum(free, 0) - 1, cell, mask=free == 1)
        base += tl.sum(free, 0)
    if plane == planes - 1:
        tl.store(num_freed, base)


def select(scores: torch.Tensor, k: torch.Tensor, tiers: torch.Tensor | None, *, block: int = BLOCK) -> Selection:
    """See `vlcache_kernels.select.select`: one launch."""
    planes, owned = scores.shape
    device = scores.device
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    keep = torch.empty(planes, owned, dtype=torch.int8, device=device)
    positions = torch.empty(planes, owned, dtype=torch.int32, device=device)
    counts = torch.empty(planes, dtype=torch.int32, device=device)
    # A kernel argument must be a tensor: `scores` stands in for tiers that are not read.
    tiers_ = scores if tiers is None else tiers if tiers.stride(-1) == 1 else tiers.contiguous()
    select_kernel[(planes,)](
        scores,
        k.contiguous(),
        tiers_,
        keep,
        positions,
        counts,
        owned,
        scores.stride(0),
        tiers_.stride(0) if tiers_.dim() == 2 else 0,
        HAS_TIERS=tiers is not None,
        KEY_BITS=32 if tiers is None else 32 + TIER_BITS,
        **_block(block),
    )
    return Selection(keep.view(torch.bool), positions, counts)


def free_list(keep: torch.Tensor, cells: torch.Tensor, *, block: int = BLOCK) -> FreeList:
    """See `vlcache_kernels.select.free_list`: two launches."""
    planes, owned = keep.shape
    keep, cells = (x if x.stride(1) == 1 else x.contiguous() for x in (keep, cells))
    keep = keep.view(torch.int8)
    evicted = torch.empty(planes, dtype=torch.int32, device=keep.device)
    freed = torch.empty(planes * owned, dtype=torch.int32, device=keep.device)
    count = torch.empty(1, dtype=torch.int32, device=keep.device)
    strides = (keep.stride(0), cells.stride(0))
    options = _block(block)
    evicted_kernel[(planes,)](keep, cells, evicted, owned, *strides, **options)
    free_kernel[(planes,)](
        keep,
        cells,
        evicted,
        freed,
        count,
        owned,
        planes,
        *strides,
        BLOCK_PLANES=BLOCK_PLANES,
        **options,
    )
    return FreeList(freed, count)


def _block(block: int) -> dict[str, int]:
    """Tokens per step, and the warps for it."""
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 32}
