# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Residency index on a GPU: all planes at once, lengths stay on the device, no host synchronisation.

A list is what one attention call reads: one plane, or the `G` planes of a layer joined.  It holds ``Q = G * B``
segments; a segment is cut into chunks of `CHUNK` tokens, one program each.

Bytes per (plane, token): `count_kernel` and `write_kernel` each read 4 (slot, from cache after the first plane) and 4
(residency), and 4 are written per kept cell.  `append_kernel` reads and writes 4 per kept cell and nothing per evicted
one: against the K and V of a cell (4 kB with 8 heads of 128 in bf16) 0.2 %.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_kernels.residency_index.records import ResidencyIndex

# Tokens per program.  A prefix sum over 4096 is a few register shuffles per thread at 8 warps; smaller chunks would
# make every program of `write_kernel` sum more counts before its own.
CHUNK = 4096
# Counts that `write_kernel` adds up per step.
SCAN = 1024
# Segments that `append_kernel` adds up per step.
BLOCK_Q = 256


@triton.jit
def _cells_of_chunk(req_to_token, rows, lengths, residency, plane, b, c, stride_req, stride_plane, CHUNK: tl.constexpr):
    """`[CHUNK]` cells of the c-th chunk of request b in a plane, -1 where evicted or past the end."""
    i = c * CHUNK + tl.arange(0, CHUNK)
    inside = i < tl.load(lengths + b)
    row = tl.load(rows + b).to(tl.int64)
    slot = tl.load(req_to_token + row * stride_req + i, mask=inside, other=0).to(tl.int64)
    return tl.load(residency + plane.to(tl.int64) * stride_plane + slot, mask=inside, other=-1)


LENGTHS = ["first_plane", "batch", "group", "chunks", "stride_req", "stride_plane"]
LISTS = ["req_to_token", "rows", "lengths", "residency"]


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=[*LISTS, "counts"])
def count_kernel(
    req_to_token,  # [max_reqs, max_len] int, slots by position; row stride stride_req
    rows,  # [B] int
    lengths,  # [B] int
    residency,  # [planes, num_slots] int32; row stride stride_plane
    counts,  # out [lists, Q * chunks] int32, kept cells of each chunk
    first_plane,
    batch,  # B
    group,  # G
    chunks,  # chunks of the longest request
    stride_req,
    stride_plane,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of one segment of one list.  Chunks past the end of a request count 0."""
    j = tl.program_id(0)
    layer = tl.program_id(1)
    segment = j // chunks
    plane = first_plane + layer * group + segment // batch
    cell = _cells_of_chunk(
        req_to_token, rows, lengths, residency, plane, segment % batch, j % chunks, stride_req, stride_plane, CHUNK
    )
    tl.store(counts + layer.to(tl.int64) * tl.num_programs(0) + j, tl.sum((cell >= 0).to(tl.int32), 0))


@triton.jit(
    do_not_specialize=[*LENGTHS, "capacity"],
    do_not_specialize_on_alignment=[*LISTS, "counts", "indptr", "indices"],
)
def write_kernel(
    req_to_token,
    rows,
    lengths,
    residency,
    counts,  # [lists, Q * chunks] int32, as written by count_kernel
    indptr,  # out [lists, Q + 1] int32
    indices,  # out [lists, capacity] int32 or int64
    first_plane,
    batch,
    group,
    chunks,
    capacity,
    stride_req,
    stride_plane,
    CHUNK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: one chunk, as in count_kernel.  Its place is the sum of the counts before it in the list."""
    j = tl.program_id(0)
    layer = tl.program_id(1)
    segment = j // chunks
    plane = first_plane + layer * group + segment // batch
    total = tl.num_programs(0)
    before = tl.zeros([SCAN], tl.int32)
    for start in range(0, j, SCAN):
        other = start + tl.arange(0, SCAN)
        before += tl.load(counts + layer.to(tl.int64) * total + other, mask=other < j, other=0)
    base = tl.sum(before, 0)

    cell = _cells_of_chunk(
        req_to_token, rows, lengths, residency, plane, segment % batch, j % chunks, stride_req, stride_plane, CHUNK
    )
    kept = cell >= 0
    at = base + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices + layer.to(tl.int64) * capacity + at, cell, mask=kept & (at < capacity))

    segments = total // chunks
    if j % chunks == 0:
        tl.store(indptr + layer * (segments + 1) + segment, base)
    if j == total - 1:
        tl.store(indptr + layer * (segments + 1) + segments, base + tl.sum(kept.to(tl.int32), 0))


@triton.jit(
    do_not_specialize=[
        "first_plane",
        "batch",
        "old_batch",
        "group",
        "chunks",
        "old_capacity",
        "capacity",
        "stride_plane",
    ],
    do_not_specialize_on_alignment=[
        "old_indptr",
        "old_indices",
        "slots",
        "source",
        "residency",
        "indptr",
        "indices",
    ],
)
def append_kernel(
    old_indptr,  # [lists, G * B_old + 1] int32
    old_indices,  # [lists, old_capacity] int32 or int64
    slots,  # [B] int, the new token of each request
    source,  # [B] int, which old request each one continues
    residency,  # [planes, num_slots] int32; row stride stride_plane
    indptr,  # out [lists, Q + 1] int32
    indices,  # out [lists, capacity] int32 or int64
    first_plane,
    batch,  # B
    old_batch,  # B_old
    group,  # G
    chunks,
    old_capacity,
    capacity,
    stride_plane,
    BLOCK_Q: tl.constexpr,  # segments per step of the sums
    CHUNK: tl.constexpr,
):
    """One program: CHUNK cells of one segment, moved to their new place; the last one adds the new cell.

    Every program finds its place itself: it sums the sizes of all segments before its own, old size plus one where the
    new token has a cell.
    """
    j = tl.program_id(0)
    layer = tl.program_id(1)
    segment = j // chunks
    segments = batch * group
    old_row = old_indptr + layer * (group * old_batch + 1)

    before = tl.zeros([BLOCK_Q], tl.int32)
    last = j == tl.num_programs(0) - 1
    for start in range(0, segment, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        b = q % batch
        plane = first_plane + layer * group + q // batch
        old = (q // batch) * old_batch + tl.load(source + b, mask=q < segment, other=0).to(tl.int32)
        begin = tl.load(old_row + old, mask=q < segment, other=0)
        size = tl.load(old_row + old + 1, mask=q < segment, other=0) - begin
        slot = tl.load(slots + b, mask=q < segment, other=0).to(tl.int64)
        new = tl.load(residency + plane.to(tl.int64) * stride_plane + slot, mask=q < segment, other=-1)
        before += size + (new >= 0).to(tl.int32)
    base = tl.sum(before, 0)

    plane = first_plane + layer * group + segment // batch
    old = (segment // batch) * old_batch + tl.load(source + segment % batch).to(tl.int32)
    from_ = tl.load(old_row + old)
    length = tl.load(old_row + old + 1) - from_
    slot = tl.load(slots + segment % batch).to(tl.int64)
    cell = tl.load(residency + plane.to(tl.int64) * stride_plane + slot)

    i = (j % chunks) * CHUNK + tl.arange(0, CHUNK)
    moved = tl.load(old_indices + layer.to(tl.int64) * old_capacity + from_ + i, mask=i < length, other=0)
    moved = tl.where(i == length, cell, moved)
    end = tl.where(cell >= 0, length + 1, length)
    tl.store(indices + layer.to(tl.int64) * capacity + base + i, moved, mask=(i < end) & (base + i < capacity))
    if j % chunks == 0:
        tl.store(indptr + layer * (segments + 1) + segment, base)
    if last:
        tl.store(indptr + layer * (segments + 1) + segments, base + end)


def residency_index(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    residency: torch.Tensor,
    planes: range,
    group: int,
    out: ResidencyIndex,
    max_length: int,
    *,
    chunk: int = CHUNK,
) -> None:
    """See `vlcache_kernels.residency_index.residency_index`: two launches, whatever the number of planes."""
    lists, segments = out.indptr.shape[0], out.indptr.shape[1] - 1
    chunks = max(1, triton.cdiv(max_length, chunk))
    grid = (segments * chunks, lists)
    counts = torch.empty(lists, segments * chunks, dtype=torch.int32, device=residency.device)
    # One type, whatever the caller counts in: types are variants.
    rows, lengths = (numbers.to(torch.int64).contiguous() for numbers in (rows, lengths))
    inputs = (req_to_token, rows, lengths, residency, counts)
    sizes = (planes.start, rows.numel(), group, chunks)
    strides = (req_to_token.stride(0), residency.stride(0))
    count_kernel[grid](*inputs, *sizes, *strides, CHUNK=chunk, num_warps=8)
    write_kernel[grid](*inputs, *out, *sizes, out.indices.shape[1], *strides, CHUNK=chunk, SCAN=SCAN, num_warps=8)


def append_tokens(
    previous: ResidencyIndex,
    slots: torch.Tensor,
    source: torch.Tensor,
    residency: torch.Tensor,
    planes: range,
    group: int,
    out: ResidencyIndex,
    max_length: int,
    *,
    chunk: int = CHUNK,
) -> None:
    """See `vlcache_kernels.residency_index.append_tokens`: one launch."""
    lists, segments = out.indptr.shape[0], out.indptr.shape[1] - 1
    chunks = max(1, triton.cdiv(max_length, chunk))
    append_kernel[(segments * chunks, lists)](
        *previous,
        slots.to(torch.int64).contiguous(),
        source.to(torch.int64).contiguous(),
        residency,
        *out,
        planes.start,
        slots.numel(),
        (previous.indptr.shape[1] - 1) // group,
        group,
        chunks,
        previous.indices.shape[1],
        out.indices.shape[1],
        residency.stride(0),
        BLOCK_Q=BLOCK_Q,
        CHUNK=chunk,
        num_warps=8,
    )
