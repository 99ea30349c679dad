"""Residency index in plain torch: the reference, and what runs on a CPU."""

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


def append_tokens(
    previous: ResidencyIndex,
    slots: torch.Tensor,
    source: torch.Tensor,
    residency: torch.Tensor,
    planes: range,
    group: int,
) -> ResidencyIndex:
    """See `vlcache_kernels.residency_index.append_tokens`."""
    lists, batch = len(planes) // group, slots.numel()
    old_batch = (previous.indptr.shape[1] - 1) // group
    new = residency[planes.start : planes.stop].index_select(1, slots.to(torch.int64)).view(lists, group * batch)
    old = (torch.arange(group, device=slots.device)[:, None] * old_batch + source).view(-1).tolist()
    old_indptr, new_cells = previous.indptr.tolist(), new.tolist()
    found = []
    for number in range(lists):
        segments = []
        for q, cell in zip(old, new_cells[number], strict=True):
            begin, end = old_indptr[number][q : q + 2]
            added = new.new_tensor([cell] if cell >= 0 else [])
            segments.append(torch.cat([previous.indices[number, begin:end], added]))
        found.append(segments)
    sizes = torch.tensor([[segment.numel() for segment in segments] for segments in found])
    capacity = int(sizes.sum(1).max())
    out = ResidencyIndex.allocate(lists, group * batch, capacity, slots.device, previous.indices.dtype)
    out.indptr[:, 1:] = sizes.cumsum(1)
    for number, segments in enumerate(found):
        joined = torch.cat(segments)
        out.indices[number, : joined.numel()] = joined
    return out
