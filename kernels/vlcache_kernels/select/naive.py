"""Selection in plain torch: the reference, and what runs on a CPU."""

from __future__ import annotations

import torch

from vlcache_kernels.select.records import Selection


def select(scores: torch.Tensor, k: torch.Tensor, tiers: torch.Tensor | None, cells: torch.Tensor | None) -> Selection:
    """See `vlcache_kernels.select.select`."""
    planes, owned = scores.shape
    counts = k.to(torch.int64).clamp(0, owned)
    # Two stable sorts, the more important key last: ties of (tier, score) stay in sequence order.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    if tiers is not None:
        by_score = tiers.expand(planes, owned).gather(1, order)
        order = order.gather(1, torch.sort(by_score, dim=1, descending=True, stable=True).indices)
    first = torch.arange(owned, device=scores.device) < counts[:, None]
    keep = torch.zeros(planes, owned, dtype=torch.bool, device=scores.device).scatter_(1, order, first)

    positions = torch.full((planes, owned), -1, dtype=torch.int32, device=scores.device)
    positions[first] = keep.nonzero()[:, 1].to(torch.int32)
    if cells is None:
        return Selection(keep, positions, counts.to(torch.int32))
    evicted = cells[~keep & (cells >= 0)]
    freed = torch.zeros(planes * owned, dtype=torch.int32, device=scores.device)
    freed[: evicted.numel()] = evicted
    num_freed = torch.tensor([evicted.numel()], dtype=torch.int32, device=scores.device)
    return Selection(keep, positions, counts.to(torch.int32), freed, num_freed)
