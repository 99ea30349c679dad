# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention statistics for a batch, keys read from the arena through cell indices.

Three launches per layer, none of them stores ``Q K^T``:

1. `row_kernel` streams the keys and leaves, per row and key split, maximum, sum of exponentials and entropy term;
2. `merge_kernel` joins the splits into the row maximum and the log-sum-exp (a few kB);
3. `column_kernel` reads the keys again, recomputes the logits and reduces them over rows.  No float atomics: every
   column is written once by one program, so that results are the same in every run.

Bytes: with n visible keys, s bytes per element, one read of K is ``n * K * D * s`` plus ``4 * n`` of indices per plane.
Launch 1 reads K once from device memory (its programs for further row blocks run side by side and find the tile in
the L2 cache).  Launch 3 reads K once more, of the owned keys only unless the density is wanted.  Given the
log-sum-exp, and with neither density nor entropy wanted, launches 1 and 2 fall away and one read is all.

The `g` query heads of a KV head are packed with the rows: packed row ``p`` is row ``p // g``, head ``p % g``, so a key
tile is loaded once for all of them and one row still fills a matrix instruction.  Logits are in base 2 inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["total_rows", "batch", "splits"]
STRIDES = ["stride_qt", "stride_qh"]
LISTS = ["indptr", "indices", "row_index", "row_indptr", "owned_indptr"]
"""Lists of a batch begin anywhere in memory."""


@triton.jit(do_not_specialize=[*SIZES, *STRIDES], do_not_specialize_on_alignment=LISTS)
def row_kernel(
    queries,  # [T, H, D]; element strides stride_qt, stride_qh, 1
    arena,  # [num_cells, 2, heads_per_cell, D], contiguous, as `queries` or 8-bit floats; keys are [:, 0]
    indptr,  # [G * B + 1] int32, cells of (plane, request)
    indices,  # [...] int32, cells in sequence order
    row_index,  # [T] int, last visible owned key of each row
    row_indptr,  # [B + 1] int32
    owned_indptr,  # [B + 1] int32
    part_max,  # out [splits, H, T] float32, base-2 logit
    part_sum,  # out [splits, H, T] float32, sum of 2**(logit - max)
    part_dot,  # out [splits, H, T] float32, sum of 2**(logit - max) * (logit - max); only with ENTROPY
    scale2,  # scale * log2(e)
    total_rows,  # T
    batch,  # B
    splits,
    stride_qt,
    stride_qh,
    GROUP: tl.constexpr,  # query heads per KV head, g
    KV_HEADS: tl.constexpr,  # K
    HEADS_PER_CELL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two; the rest is masked and costs no memory traffic
    BLOCK_M: tl.constexpr,  # packed rows
    BLOCK_N: tl.constexpr,  # keys
    ENTROPY: tl.constexpr,
    ALIGN: tl.constexpr,  # divides stride_qt and stride_qh: rows are then read in vectors
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter reads bfloat16 operands of a product as integers
):
    """One program: BLOCK_M packed rows of one (request, KV head) against one split of its keys.

    Row blocks vary fastest, so that the programs that read the same keys run at the same time.
    """
    stride_qt = tl.multiple_of(stride_qt, ALIGN)
    stride_qh = tl.multiple_of(stride_qh, ALIGN)
    split = tl.program_id(1)
    kv_head = tl.program_id(2) % KV_HEADS
    b = tl.program_id(2) // KV_HEADS
    row_begin = tl.load(row_indptr + b)
    packed = (tl.load(row_indptr + b + 1) - row_begin) * GROUP
    if tl.program_id(0) * BLOCK_M >= packed:
        return
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = row_begin + p // GROUP
    head = kv_head * GROUP + p % GROUP

    segment = (kv_head // HEADS_PER_CELL) * batch + b
    first = tl.load(indptr + segment)
    n = tl.load(indptr + segment + 1) - first
    prefix = n - (tl.load(owned_indptr + b + 1) - tl.load(owned_indptr + b))
    limit = tl.load(row_index + row, mask=p < packed, other=-1).to(tl.int32) + prefix
    limit = tl.where(p < packed, limit, -1)

    per_split = tl.cdiv(tl.cdiv(n, splits), BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(tl.minimum(begin + per_split, n), tl.max(limit, 0) + 1)

    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        queries + row.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
        mask=(p < packed)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float32)
    keys = arena + (kv_head % HEADS_PER_CELL) * D
    for start in range(begin, end, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        cell = tl.load(indices + first + pos, mask=pos < end, other=0).to(tl.int64)
        k = tl.load(
            keys + cell[:, None] * (2 * HEADS_PER_CELL * D) + d[None, :],
            mask=(pos < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        k = k.to(q.dtype)  # 8-bit floats; nothing for others
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2  # [BLOCK_M, BLOCK_N]
        visible = (pos[None, :] <= limit[:, None]) & (pos < end)[None, :]
        logit = tl.where(visible, logit, float("-inf"))
        new_high = tl.maximum(high, tl.max(logit, 1))
        # A row that has seen nothing yet keeps maximum -inf; subtracting 0 instead keeps NaN out.
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        weight = tl.exp2(logit - base[:, None])
        shrink = tl.exp2(high - base)
        if ENTROPY:
            step = tl.where(high == float("-inf"), 0.0, high - base)
            term = tl.where(visible, weight * (logit - base[:, None]), 0.0)
            dot = shrink * (dot + total * step) + tl.sum(term, 1)
        total = total * shrink + tl.sum(weight, 1)
        high = new_high

    at = (split * KV_HEADS * GROUP + head).to(tl.int64) * total_rows + row
    tl.store(part_max + at, high, mask=p < packed)
    tl.store(part_sum + at, total, mask=p < packed)
    if ENTROPY:
        tl.store(part_dot + at, dot, mask=p < packed)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS)
def merge_kernel(
    part_max,  # [splits, H, T] float32, as written by row_kernel
    part_sum,
    part_dot,
    indptr,
    row_index,
    row_indptr,
    owned_indptr,
    row_max,  # out [H, T] float32, base 2; +inf for a row that sees nothing
    row_lse,  # out [H, T] float32, base 2; +inf for a row that sees nothing
    entropy_sum,  # out [K, B] float32, nats; only with ENTROPY
    kept,  # out [K, B] int64, set to 0 for column_kernel
    visible,  # out [K, B] int64, counted over query heads like `kept`
    total_rows,
    batch,
    splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PER_CELL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # splits rounded up to a power of two
    ENTROPY: tl.constexpr,
):
    """One program: all rows of one (request, KV head), BLOCK_M packed rows at a time with all their splits.

    Few programs with little data; their time is launch and latency, not bytes.
    """
    b = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_begin = tl.load(row_indptr + b)
    packed = (tl.load(row_indptr + b + 1) - row_begin) * GROUP
    segment = (kv_head // HEADS_PER_CELL) * batch + b
    n = tl.load(indptr + segment + 1) - tl.load(indptr + segment)
    prefix = n - (tl.load(owned_indptr + b + 1) - tl.load(owned_indptr + b))
    split = tl.arange(0, BLOCK_SPLITS)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_M], tl.int64)
    for start in range(0, packed, BLOCK_M):
        p = start + tl.arange(0, BLOCK_M)
        row = row_begin + p // GROUP
        head = kv_head * GROUP + p % GROUP
        at = (split[:, None] * KV_HEADS * GROUP + head[None, :]).to(tl.int64) * total_rows + row[None, :]
        inside = (split < splits)[:, None] & (p < packed)[None, :]
        high = tl.load(part_max + at, mask=inside, other=float("-inf"))
        total = tl.load(part_sum + at, mask=inside, other=0.0)
        top = tl.max(high, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(high - base[None, :])
        joined = tl.sum(total * shrink, 0)
        sees = joined > 0
        log = tl.log2(tl.where(sees, joined, 1.0))
        out = head.to(tl.int64) * total_rows + row
        tl.store(row_max + out, tl.where(sees, top, float("inf")), mask=p < packed)
        tl.store(row_lse + out, tl.where(sees, top + log, float("inf")), mask=p < packed)
        if ENTROPY:
            dot = tl.load(part_dot + at, mask=inside, other=0.0)
            step = tl.where(high == float("-inf"), 0.0, high - base[None, :])
            dot = tl.sum(shrink * (dot + total * step), 0)
            entropy += tl.where(sees, log - dot / tl.where(sees, joined, 1.0), 0.0)
        limit = tl.load(row_index + row, mask=p < packed, other=-1).to(tl.int64) + prefix + 1
        seen += tl.where(p < packed, limit, 0)
    if ENTROPY:
        # ln 2 turns base 2 into nats.
        tl.store(entropy_sum + kv_head * batch + b, tl.sum(entropy, 0) * 0.6931471805599453 / GROUP)
    tl.store(kept + kv_head * batch + b, 0)
    tl.store(visible + kv_head * batch + b, tl.sum(seen, 0))


@triton.jit(
    do_not_specialize=["total_rows", "total_owned", "batch", *STRIDES],
    do_not_specialize_on_alignment=[
        *LISTS,
        "row_max",
        "row_lse",
        "column_sum",
        "column_square_sum",
        "column_max",
        "kept",
        "probabilities",
        "probability_base",
    ],
)
def column_kernel(
    queries,
    arena,
    indptr,
    indices,
    row_index,
    row_indptr,
    owned_indptr,
    row_max,  # [H, T] float32, base 2; only with DENSITY
    row_lse,  # [H, T] float32; base 2, or natural with GIVEN_LSE
    column_sum,  # out [K, M] float32; only with SUM
    column_square_sum,  # out [K, M] float32; only with SQUARE
    column_max,  # out [K, M] float32; only with MAX
    kept,  # in and out [K, B] int64; only with DENSITY
    probabilities,  # out, by request [H, R, m] float32 one after the other; only with PROBABILITIES
    probability_base,  # [B] int64, where each request begins in it
    scale2,
    log2_threshold,  # log2(p)
    total_rows,
    total_owned,  # M
    batch,
    stride_qt,
    stride_qh,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PER_CELL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM: tl.constexpr,
    SQUARE: tl.constexpr,
    MAX: tl.constexpr,
    DENSITY: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    GIVEN_LSE: tl.constexpr,
    SKIP: tl.constexpr,  # look for the first row that sees a key of the block: worth it with many rows
    BLOCK_R: tl.constexpr,  # rows per step of that search
    ALIGN: tl.constexpr,  # divides stride_qt and stride_qh: rows are then read in vectors
    UPCAST: tl.constexpr,
):
    """One program: BLOCK_N keys of one (request, KV head), loaded once, against all packed rows in turn.

    Keys are the rows of the product, so that the reduction over queries stays within a warp.  Without DENSITY the
    prefix is left out.  With SKIP, row blocks before the first row that sees a key of the block are left out: half of
    the work when all rows are query rows.  The loop has no branch, so that loads of queries run ahead.
    """
    stride_qt = tl.multiple_of(stride_qt, ALIGN)
    stride_qh = tl.multiple_of(stride_qh, ALIGN)
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    segment = (kv_head // HEADS_PER_CELL) * batch + b
    first = tl.load(indptr + segment)
    n = tl.load(indptr + segment + 1) - first
    owned_begin = tl.load(owned_indptr + b)
    owned = tl.load(owned_indptr + b + 1) - owned_begin
    prefix = n - owned
    start = tl.program_id(0) * BLOCK_N
    if not DENSITY:
        start += prefix
    if start >= n:
        return
    row_begin = tl.load(row_indptr + b)
    rows = tl.load(row_indptr + b + 1) - row_begin

    pos = start + tl.arange(0, BLOCK_N)
    # Negative where owned keys have no cell: slots may be freed while a forward of theirs is in flight.
    there = (pos >= 0) & (pos < n)
    d = tl.arange(0, BLOCK_D)
    cell = tl.load(indices + first + pos, mask=there, other=0).to(tl.int64)
    k = tl.load(
        arena + cell[:, None] * (2 * HEADS_PER_CELL * D) + (kv_head % HEADS_PER_CELL) * D + d[None, :],
        mask=there[:, None] & (d < D)[None, :],
        other=0.0,
    )
    # 8-bit floats, and what is multiplied in float32; nothing for others.
    k = k.to(tl.float32) if UPCAST else k.to(queries.dtype.element_ty)
    acc_sum = tl.zeros([BLOCK_N], tl.float32)
    acc_square = tl.zeros([BLOCK_N], tl.float32)
    acc_max = tl.zeros([BLOCK_N], tl.float32)
    acc_kept = tl.zeros([BLOCK_N], tl.int32)
    first_row = 0
    if SKIP:
        first_row = rows
        for r in range(0, rows, BLOCK_R):
            row = r + tl.arange(0, BLOCK_R)
            limit = tl.load(row_index + row_begin + row, mask=row < rows, other=-1).to(tl.int32) + prefix
            sees = (row < rows) & (limit >= start)
            first_row = tl.minimum(first_row, tl.min(tl.where(sees, row, rows), 0))
    for packed in range(first_row * GROUP // BLOCK_M * BLOCK_M, rows * GROUP, BLOCK_M):
        p = packed + tl.arange(0, BLOCK_M)
        inside = p < rows * GROUP
        row = row_begin + p // GROUP
        head = kv_head * GROUP + p % GROUP
        limit = tl.load(row_index + row, mask=inside, other=-1).to(tl.int32) + prefix
        limit = tl.where(inside, limit, -1)
        q = tl.load(
            queries + row.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if UPCAST:
            q = q.to(tl.float32)
        logit = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2  # [BLOCK_N, BLOCK_M]
        visible = (pos[:, None] <= limit[None, :]) & there[:, None]
        logit = tl.where(visible, logit, float("-inf"))
        at = head.to(tl.int64) * total_rows + row
        lse = tl.load(row_lse + at, mask=inside, other=float("inf"))
        if GIVEN_LSE:
            lse = lse * 1.4426950408889634  # log2(e)
        weight = tl.exp2(logit - lse[None, :])
        if SUM:
            acc_sum += tl.sum(weight, 1)
        if SQUARE:
            acc_square += tl.sum(weight * weight, 1)
        if MAX:
            acc_max = tl.maximum(acc_max, tl.max(weight, 1))
        if DENSITY:
            high = tl.load(row_max + at, mask=inside, other=float("inf"))
            # At p = 1 the maximum itself must count: both launches may round it differently by some ulps.
            slack = tl.abs(high) * 1e-6
            passes = visible & (logit >= (high + log2_threshold - slack)[None, :])
            acc_kept += tl.sum(passes.to(tl.int32), 1)
        if PROBABILITIES:
            base = tl.load(probability_base + b) + (head.to(tl.int64) * rows + p // GROUP) * owned
            tl.store(
                probabilities + base[None, :] + (pos - prefix)[:, None],
                weight,
                mask=inside[None, :] & ((pos >= prefix) & there)[:, None],
            )
    out = kv_head.to(tl.int64) * total_owned + owned_begin + pos - prefix
    mine = (pos >= prefix) & there
    if SUM:
        tl.store(column_sum + out, acc_sum / GROUP, mask=mine)
    if SQUARE:
        tl.store(column_square_sum + out, acc_square / GROUP, mask=mine)
    if MAX:
        tl.store(column_max + out, acc_max, mask=mine)
    if DENSITY:
        tl.atomic_add(kept + kv_head * batch + b, tl.sum(acc_kept, 0).to(tl.int64), sem="relaxed")
