"""Which tokens of a prompt stay: the `k` best of every plane, exactly and reproducibly; and which cells become free.

Order: higher tier first, then higher score, then lower position.  The result is sorted by position.
"""

from __future__ import annotations

import torch

from vlcache_kernels.checks import Backend, check_device, check_index, check_shape, use_triton
from vlcache_kernels.select import naive
from vlcache_kernels.select.records import FreeList, Selection

__all__ = ["FreeList", "Selection", "free_list", "select"]


def select(
    scores: torch.Tensor,
    k: torch.Tensor,
    *,
    tiers: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> Selection:
    """Keep the `k[p]` first tokens of plane p in the order (tier, score, position).

    Args:
        scores: `[planes, m]` float32, higher = keep, no NaN.
        k: `[planes]` int, tokens to keep, clamped to `[0, m]`; stays on the device.
        tiers: `[m]` or `[planes, m]` int8 in [0, 15], higher is kept first whatever the scores (for instance 2 = sink
            and recent tokens, 1 = text, 0 = vision); None means all 0.  A tier larger than `k` is cut by score.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.

    Returns:
        Fields as documented in `Selection`.
    """
    check_shape("scores", scores, (None, None))
    planes, owned = scores.shape
    if scores.dtype != torch.float32:
        raise TypeError(f"scores is {scores.dtype}, expected float32")
    check_shape("k", k, (planes,))
    check_index("k", k)
    if tiers is not None:
        check_shape("tiers", tiers, (owned,) if tiers.dim() == 1 else (planes, owned))
        if tiers.dtype != torch.int8:
            raise TypeError(f"tiers is {tiers.dtype}, expected int8")
        if owned and not tiers.is_cuda:  # on a GPU this would wait for the stream
            low, high = int(tiers.min()), int(tiers.max())
            if low < 0 or high > 15:
                raise ValueError(f"tiers span [{low}, {high}], expected [0, 15]")
    check_device(scores.device, k=k, tiers=tiers)
    if use_triton(backend, scores.device) and planes and owned:
        from vlcache_kernels.select import triton

        return triton.select(scores, k, tiers)
    return naive.select(scores, k, tiers)


def free_list(keep: torch.Tensor, cells: torch.Tensor, *, backend: Backend = "auto") -> FreeList:
    """Cells of tokens that are not kept, side by side.

    Apart from `select`, because with tensor parallelism all ranks select together and each frees its own cells.

    Args:
        keep: `[planes, m]` bool.
        cells: `[planes, m]` int32, the cell of each token, -1 where there is none.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.

    Returns:
        Fields as documented in `FreeList`; with Triton no host synchronisation.
    """
    check_shape("keep", keep, (None, None))
    if keep.dtype != torch.bool:
        raise TypeError(f"keep is {keep.dtype}, expected bool")
    check_shape("cells", cells, tuple(keep.shape))
    check_index("cells", cells)
    check_device(keep.device, cells=cells)
    if use_triton(backend, keep.device) and keep.numel():
        from vlcache_kernels.select import triton

        return triton.free_list(keep, cells)
    return naive.free_list(keep, cells)
