# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""FlashInfer's schedule on a GPU: lengths stay on the device, one launch for all layers.

Bytes: per list 4 per sequence and pass of the search, from the cache, and the schedule once: 13 bytes per block.  Time
is launch and latency: about 20 dependent passes over the lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlcache_kernels.attention_schedule.naive import MIN_CHUNK
from vlcache_kernels.attention_schedule.records import ScheduleLayout

# Sequences per step of the sums.
BLOCK_Q = 256
# Entries that a program writes per step.
BLOCK = 128


@triton.jit(
    do_not_specialize=[
        "sequences",
        "rows",
        "limit",
        "blocks",
        "stride_kv",
        "stride_out",
        "at_request",
        "at_qo_tile",
        "at_kv_tile",
        "at_merge",
        "at_outputs",
        "at_chunk",
        "at_total_rows",
        "at_mask",
    ],
    do_not_specialize_on_alignment=["kv_indptr", "qo_indptr"],
)
def schedule_kernel(
    kv_indptr,  # [lists, Q + 1] int32, row stride stride_kv
    qo_indptr,  # [Q + 1] int32
    words,  # out [lists, stride_out] int32
    flags,  # the same memory in bytes, [lists, 4 * stride_out]
    sequences,  # Q
    rows,  # R
    limit,
    blocks,
    stride_kv,
    stride_out,
    at_request,  # in words, like all places but the last
    at_qo_tile,
    at_kv_tile,
    at_merge,
    at_outputs,
    at_chunk,
    at_total_rows,
    at_mask,  # in bytes
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the entries of one sequence in one list; it finds their place by summing over those before it."""
    mine = tl.program_id(0)
    list_ = tl.program_id(1).to(tl.int64)
    kv_indptr += list_ * stride_kv
    words += list_ * stride_out
    flags += list_ * stride_out * 4

    high = tl.full([], 1, tl.int32)
    for start in range(0, sequences, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        begin = tl.load(kv_indptr + q, mask=q < sequences, other=0)
        end = tl.load(kv_indptr + q + 1, mask=q < sequences, other=0)
        high = tl.maximum(high, tl.max(end - begin, 0))
    low = tl.full([], MIN_CHUNK, tl.int32)
    while low < high:
        middle = (low + high) // 2
        count = tl.full([], 0, tl.int32)
        for start in range(0, sequences, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            inside = q < sequences
            kv = tl.load(kv_indptr + q + 1, mask=inside, other=0) - tl.load(kv_indptr + q, mask=inside, other=0)
            query = tl.load(qo_indptr + q + 1, mask=inside, other=0) - tl.load(qo_indptr + q, mask=inside, other=0)
            chunks = (tl.maximum(kv, 1) + middle - 1) // middle
            count += tl.sum((query * GROUP + TILE - 1) // TILE * chunks, 0)
        if count > limit:
            low = middle + 1
        else:
            high = middle

    before = tl.full([], 0, tl.int32)
    partial = tl.full([], 0, tl.int32)
    for start in range(0, mine, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        inside = q < mine
        kv = tl.load(kv_indptr + q + 1, mask=inside, other=0) - tl.load(kv_indptr + q, mask=inside, other=0)
        query = tl.load(qo_indptr + q + 1, mask=inside, other=0) - tl.load(qo_indptr + q, mask=inside, other=0)
        chunks = (tl.maximum(kv, 1) + low - 1) // low
        before += tl.sum((query * GROUP + TILE - 1) // TILE * chunks, 0)
        partial += tl.sum(query * chunks, 0)

    kv = tl.load(kv_indptr + mine + 1) - tl.load(kv_indptr + mine)
    first_row = tl.load(qo_indptr + mine)
    query = tl.load(qo_indptr + mine + 1) - first_row
    chunks = (tl.maximum(kv, 1) + low - 1) // low
    count = (query * GROUP + TILE - 1) // TILE * chunks
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = (i < count) & (before + i < blocks)
        tl.store(words + at_request + before + i, mine, mask=there)
        tl.store(words + at_qo_tile + before + i, i // chunks, mask=there)
        tl.store(words + at_kv_tile + before + i, i % chunks, mask=there)
        tl.store(flags + at_mask + before + i, 1, mask=there)
    for start in range(0, query, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(words + at_merge + first_row + i, partial + i * chunks, mask=i < query)
    tl.store(words + at_outputs + mine, partial)
    if mine == sequences - 1:
        tl.store(words + at_outputs + sequences, partial + query * chunks)
        tl.store(words + at_merge + first_row + query, partial + query * chunks)
        tl.store(words + at_chunk, low)
        tl.store(words + at_total_rows, rows)
        for start in range(before + count, blocks, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(flags + at_mask + i, 0, mask=i < blocks)


def write_schedules(
    kv_indptr: torch.Tensor, qo_indptr: torch.Tensor, layout: ScheduleLayout, out: torch.Tensor
) -> None:
    """See `vlcache_kernels.attention_schedule.write_schedules`: one launch."""
    lists, sequences = kv_indptr.shape[0], kv_indptr.shape[1] - 1
    words = out.view(torch.int32)
    places = (
        layout.request,
        layout.qo_tile,
        layout.kv_tile,
        layout.merge,
        layout.outputs,
        layout.chunk,
        layout.total_rows,
    )
    schedule_kernel[(sequences, lists)](
        kv_indptr,
        qo_indptr,
        words,
        out,
        sequences,
        layout.rows,
        layout.limit,
        layout.blocks,
        kv_indptr.stride(0),
        words.stride(0),
        *(place // 4 for place in places),
        layout.mask,
        GROUP=layout.group,
        TILE=layout.tile,
        MIN_CHUNK=MIN_CHUNK,
        BLOCK_Q=BLOCK_Q,
        BLOCK=BLOCK,
        num_warps=4,
    )
