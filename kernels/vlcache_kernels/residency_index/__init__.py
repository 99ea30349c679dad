"""From virtual slots to memory: which cells each request of a batch owns in each plane.

`residency` maps (plane, virtual slot) to a cell or -1.  Attention kernels want ragged lists instead: this op turns
`req_to_token`, sequence lengths and `residency` into `kv_indptr` and `kv_indices` of many planes at once.
"""

from __future__ import annotations

import torch

from vlcache_kernels.checks import check_device, check_index, check_shape
from vlcache_kernels.residency_index import naive
from vlcache_kernels.residency_index.records import ResidencyIndex

__all__ = ["ResidencyIndex", "residency_index"]


def residency_index(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    residency: torch.Tensor,
    planes: range | None = None,
    *,
    group: int = 1,
) -> ResidencyIndex:
    """Ragged cell lists of a batch for a range of planes.

    Args:
        req_to_token: `[max_reqs, max_len]` int32 or int64, virtual slots by request row and position.
        rows: `[B]` int, the batch's rows of `req_to_token`.
        lengths: `[B]` int, tokens of each request, `<= max_len`.
        residency: `[num_planes, num_slots]` int32, cell of (plane, slot), -1 = evicted.
        planes: consecutive planes to index, all of them by default.
        group: join this many consecutive planes into one list (the `G` planes of a layer): request ``g * B + b`` of
            the joined list is request b in the layer's plane g, so that one attention call with `G * B` requests of
            `heads_per_cell` heads covers the layer.

    Returns:
        `indptr` `[len(planes) / group, group * B + 1]`, `indices` `[len(planes) / group, group * sum(lengths)]`, both
        int32.  Kept cells stay in sequence order.
    """
    check_shape("req_to_token", req_to_token, (None, None))
    check_shape("residency", residency, (None, None))
    check_shape("rows", rows, (None,))
    check_shape("lengths", lengths, (rows.numel(),))
    for name, tensor in (
        ("req_to_token", req_to_token),
        ("rows", rows),
        ("lengths", lengths),
        ("residency", residency),
    ):
        check_index(name, tensor)
    planes = range(residency.shape[0]) if planes is None else planes
    if planes.step != 1 or not 0 <= planes.start <= planes.stop <= residency.shape[0]:
        raise ValueError(f"planes {planes} is not a run of consecutive planes in [0, {residency.shape[0]})")
    if group < 1 or len(planes) % group:
        raise ValueError(f"{len(planes)} planes cannot be joined in groups of {group}")
    check_device(residency.device, req_to_token=req_to_token, rows=rows, lengths=lengths)
    return naive.residency_index(req_to_token, rows, lengths, residency, planes, group)
