"""From virtual slots to memory: which cells each request of a batch owns in each plane.

`residency` maps (plane, virtual slot) to a cell or -1.  Attention kernels want ragged lists instead: these operations
turn `req_to_token`, sequence lengths and `residency` into `kv_indptr` and `kv_indices` of many planes at once.
"""

from __future__ import annotations

import torch

from vlcache_kernels.checks import Backend, check_device, check_index, check_shape, use_triton
from vlcache_kernels.residency_index import naive
from vlcache_kernels.residency_index.records import ResidencyIndex

__all__ = ["ResidencyIndex", "append_tokens", "residency_index"]


def residency_index(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    residency: torch.Tensor,
    planes: range | None = None,
    *,
    group: int = 1,
    out: ResidencyIndex | None = None,
    max_length: int | None = None,
    backend: Backend = "auto",
) -> ResidencyIndex:
    """Ragged cell lists of a batch for a range of planes.

    Args:
        req_to_token: `[max_reqs, max_len]` int32 or int64, virtual slots by request row and position.
        rows: `[B]` int, the batch's rows of `req_to_token`.
        lengths: `[B]` int, tokens of each request, `<= max_len`.
        residency: `[num_planes, num_slots]` int32, cell of (plane, slot), -1 = evicted.
        planes: consecutive planes to index, all of them by default.
        group: join this many consecutive planes into one list (the `G` planes of a layer): segment ``g * B + b`` of
            the joined list is request b in the layer's plane g, so that one attention call with `G * B` requests of
            `heads_per_cell` heads covers the layer.
        out: buffers to fill instead of new ones: fixed shapes and addresses and, with Triton, no host
            synchronisation, as a CUDA graph needs.  `indices` may be int64, for kernels that multiply indices by
            strides in the type of the index.  Cells beyond the capacity are dropped (`indptr` still counts them): give
            ``group * sum(lengths)`` at least.
        max_length: bound on `lengths`, known on the host; ``req_to_token.shape[1]`` by default.  It sizes the grid: a
            close bound saves programs that find nothing to do.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.

    Returns:
        `out`, or `indptr` `[lists, group * B + 1]` and `indices` `[lists, group * sum(lengths)]`, both int32, with
        ``lists = len(planes) / group``.  Kept cells stay in sequence order.
    """
    check_shape("req_to_token", req_to_token, (None, None))
    check_shape("rows", rows, (None,))
    check_shape("lengths", lengths, (rows.numel(),))
    for name, tensor in (("req_to_token", req_to_token), ("rows", rows), ("lengths", lengths)):
        check_index(name, tensor)
    planes = _check_planes(residency, planes, group)
    check_device(residency.device, req_to_token=req_to_token, rows=rows, lengths=lengths)
    lists, segments = len(planes) // group, group * rows.numel()
    if out is not None:
        _check_out(out, lists, segments)
    if not lists * segments:
        return _copy(ResidencyIndex.allocate(lists, segments, 0, residency.device), out)
    if not use_triton(backend, residency.device):
        return _copy(naive.residency_index(req_to_token, rows, lengths, residency, planes, group), out)
    from vlcache_kernels.residency_index import triton

    _check_rows(req_to_token=req_to_token, residency=residency)
    if out is None:
        total = int(lengths.sum())
        out = ResidencyIndex(
            torch.empty(lists, segments + 1, dtype=torch.int32, device=residency.device),
            torch.empty(lists, group * total, dtype=torch.int32, device=residency.device),
        )
        max_length = int(lengths.max()) if max_length is None else max_length
    bound = req_to_token.shape[1] if max_length is None else max_length
    triton.residency_index(req_to_token, rows, lengths, residency, planes, group, out, bound)
    return out


def append_tokens(
    previous: ResidencyIndex,
    slots: torch.Tensor,
    residency: torch.Tensor,
    planes: range | None = None,
    *,
    group: int = 1,
    source: torch.Tensor | None = None,
    out: ResidencyIndex | None = None,
    max_length: int | None = None,
    backend: Backend = "auto",
) -> ResidencyIndex:
    """The index after one decode step: every request gains one token, requests may have left the batch.

    Costs 8 bytes per *kept* cell, where building anew costs 20 per token of the sequence, evicted or not.  Segments are
    moved (attention kernels want them without gaps), so the result cannot lie where `previous` does: keep two
    buffers and swap them.

    Args:
        previous: index of the same planes and `group` before the step.
        slots: `[B]` int, virtual slot of each request's new token; one without a cell (-1) adds nothing.
        residency: `[num_planes, num_slots]` int32.
        planes, group: as for `previous`.
        source: `[B]` int, which request of `previous` each one continues; None means the same batch.
        out: buffers to fill, not those of `previous`; None allocates the capacity of `previous` plus ``G * B``.
        max_length: bound on the kept cells of a segment after the step; the capacity of `out` by default.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.
    """
    check_shape("slots", slots, (None,))
    check_index("slots", slots)
    planes = _check_planes(residency, planes, group)
    check_device(residency.device, slots=slots, indptr=previous.indptr, indices=previous.indices, source=source)
    lists, segments = len(planes) // group, group * slots.numel()
    if previous.indptr.shape[0] != lists or (previous.indptr.shape[1] - 1) % group:
        raise ValueError(f"previous has indptr {list(previous.indptr.shape)}, expected [{lists}, {group} * B + 1]")
    if source is None:
        if previous.indptr.shape[1] - 1 != segments:
            raise ValueError(
                f"{slots.numel()} slots do not continue {(previous.indptr.shape[1] - 1) // group} requests"
            )
        source = torch.arange(slots.numel(), device=slots.device)
    check_shape("source", source, (slots.numel(),))
    check_index("source", source)
    if out is not None:
        _check_out(out, lists, segments)
        if out.indices.numel() and out.indices.data_ptr() == previous.indices.data_ptr():
            raise ValueError("out must not share memory with previous: segments move")
    if not lists * segments:
        return _copy(ResidencyIndex.allocate(lists, segments, 0, residency.device), out)
    if not use_triton(backend, residency.device):
        return _copy(naive.append_tokens(previous, slots, source, residency, planes, group), out)
    from vlcache_kernels.residency_index import triton

    _check_rows(residency=residency)
    if not (previous.indptr.is_contiguous() and previous.indices.is_contiguous()):
        raise ValueError("previous must be contiguous")
    if out is None:
        capacity = previous.indices.shape[1] + segments
        out = ResidencyIndex(
            torch.empty(lists, segments + 1, dtype=torch.int32, device=slots.device),
            torch.empty(lists, capacity, dtype=previous.indices.dtype, device=slots.device),
        )
    bound = out.indices.shape[1] if max_length is None else max_length
    triton.append_tokens(previous, slots, source, residency, planes, group, out, bound)
    return out


def _check_planes(residency: torch.Tensor, planes: range | None, group: int) -> range:
    check_shape("residency", residency, (None, None))
    if residency.dtype != torch.int32:
        raise TypeError(f"residency is {residency.dtype}, expected int32")
    planes = range(residency.shape[0]) if planes is None else planes
    if planes.step != 1 or not 0 <= planes.start <= planes.stop <= residency.shape[0]:
        raise ValueError(f"planes {planes} is not a run of consecutive planes in [0, {residency.shape[0]})")
    if group < 1 or len(planes) % group:
        raise ValueError(f"{len(planes)} planes cannot be joined in groups of {group}")
    return planes


def _check_rows(**tensors: torch.Tensor) -> None:
    """The kernels step through the last dimension one by one."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must be contiguous along its last dimension")


def _check_out(out: ResidencyIndex, lists: int, segments: int) -> None:
    check_shape("out.indptr", out.indptr, (lists, segments + 1))
    check_shape("out.indices", out.indices, (lists, None))
    if out.indptr.dtype != torch.int32:
        raise TypeError(f"out.indptr is {out.indptr.dtype}, expected int32")
    check_index("out.indices", out.indices)
    for name, tensor in (("out.indptr", out.indptr), ("out.indices", out.indices)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def _copy(found: ResidencyIndex, out: ResidencyIndex | None) -> ResidencyIndex:
    if out is None:
        return found
    width = min(found.indices.shape[1], out.indices.shape[1])
    out.indptr.copy_(found.indptr)
    out.indices[:, :width] = found.indices[:, :width]
    return out
