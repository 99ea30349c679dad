"""Selection in plain torch: the reference, and what runs on a CPU."""

from __future__ import annotations

import torch

from vlcache_kernels.select.records import FreeList, Selection


def select(scores: torch.Tensor, k: torch.Tensor, tiers: torch.Tensor | None) -> Selection:
    """See `vlcache_kernels.select.select`.

    A partial sort finds the k-th largest key, and ties are counted from the left: on a CPU two to ten times as fast as
    a stable sort of everything, which would give the same.
    """
    planes, owned = scores.shape
    counts = k.to(torch.int64).clamp(0, owned)[:, None]
    order = _sort_keys(scores)
    if tiers is not None:
        order += tiers.to(torch.int64) << 32
    most = int(counts.max()) if planes else 0
    keep = torch.zeros(planes, owned, dtype=torch.bool, device=scores.device)
    if most:
        threshold = order.topk(most, dim=1).values.gather(1, (counts - 1).clamp(min=0))
        above, tied = order > threshold, order == threshold
        room = counts - above.sum(1, keepdim=True)
        # Of a plane that keeps nothing, what is above the threshold of k = 1 does not count either.
        keep = (above | (tied & (tied.cumsum(1) <= room))) & (counts > 0)
    positions = torch.full((planes, owned), -1, dtype=torch.int32, device=scores.device)
    positions[torch.arange(owned, device=scores.device) < counts] = keep.nonzero()[:, 1].to(torch.int32)
    return Selection(keep, positions, counts[:, 0].to(torch.int32))


def _sort_keys(scores: torch.Tensor) -> torch.Tensor:
    """int64 in `[-2^31, 2^31)` in the same order as the float32 values; -0.0 and 0.0 are equal."""
    bits = (scores + 0.0).contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def free_list(keep: torch.Tensor, cells: torch.Tensor) -> FreeList:
    """See `vlcache_kernels.select.free_list`; exactly as long as it has entries."""
    freed = cells[~keep & (cells >= 0)].to(torch.int32)
    return FreeList(freed, torch.tensor([freed.numel()], dtype=torch.int32, device=freed.device))
