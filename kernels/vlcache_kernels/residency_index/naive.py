"""Residency index in plain torch: the reference, and the implementation on a CPU."""

from __future__ import annotations

import torch

from vlcache_kernels.residency_index.records import ResidencyIndex


def residency_index(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    residency: torch.Tensor,
    planes: range,
    group: int,
) -> ResidencyIndex:
    """See `vlcache_kernels.residency_index.residency_index`; reads `lengths` on the host."""
    device = residency.device
    batch, layers = rows.numel(), len(planes) // group
    counts = lengths.tolist()
    total = sum(counts)
    slots = [req_to_token[row, :count] for row, count in zip(rows.tolist(), counts, strict=True)]
    flat = torch.cat(slots).to(torch.int64) if slots else torch.zeros(0, dtype=torch.int64, device=device)
    owner = torch.repeat_interleave(torch.arange(batch, device=device), torch.tensor(counts, device=device).long())

    # A layer's requests are its planes' requests one after the other: index (plane of the layer, position).
    cells = residency[planes.start : planes.stop].index_select(1, flat).view(layers, group * total)
    request = (torch.arange(group, device=device)[:, None] * batch + owner).view(group * total)
    kept = cells >= 0
    sizes = torch.zeros(layers, group * batch, dtype=torch.int64, device=device)
    sizes.index_add_(1, request, kept.to(torch.int64))
    indptr = torch.zeros(layers, group * batch + 1, dtype=torch.int32, device=device)
    indptr[:, 1:] = sizes.cumsum(1)
    indices = torch.zeros(layers, group * total, dtype=torch.int32, device=device)
    layer, source = kept.nonzero(as_tuple=True)
    target = (kept.cumsum(1) - 1)[layer, source]
    indices[layer, target] = cells[layer, source].to(torch.int32)
    return ResidencyIndex(indptr, indices)
