# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sketch scores on a GPU: codes are read once, by row, and no key is ever unpacked to memory.

Per token and KV head ``D / 8 + 2`` bytes are read, every byte 8 times from the first cache, and ``4 H / K`` written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens of one program: with D = 128, signs of 64 tokens are 8192 numbers, which 4 warps hold in registers.
BLOCK_N = 64
# The least number of rows that a matrix product takes.
MIN_ROWS = 16


@triton.jit(do_not_specialize=["stride_b", "count"])
def score_kernel(
    queries,  # [B, H, D] float32, contiguous
    codes,  # [R, K, BYTES] uint8, contiguous
    rows,  # [B, n] int, row stride stride_b
    out,  # out [B, H, n] float32, contiguous
    stride_b,
    count,  # n
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # H / K
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of one request in one KV head."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    row = tl.load(rows + b * stride_b + n, mask=n < count, other=0).to(tl.int64)
    code = codes + (row * KV_HEADS + head) * (DIM // 8 + 2)
    inside = (n < count)[None, :] & (d < DIM)[:, None]
    byte = tl.load(code[None, :] + (d // 8)[:, None], mask=inside, other=0)
    signs = tl.where(((byte >> (d % 8).to(tl.uint8)[:, None]) & 1) == 1, 1.0, -1.0)  # [BLOCK_D, BLOCK]
    low = tl.load(code + DIM // 8, mask=n < count, other=0).to(tl.uint16)
    high = tl.load(code + DIM // 8 + 1, mask=n < count, other=0).to(tl.uint16)
    factor = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
    h = head * GROUP + g
    of_group = (g < GROUP)[:, None]
    asked = queries + (b * (KV_HEADS * GROUP) + h)[:, None] * DIM + d[None, :]
    q = tl.load(asked, mask=of_group & (d < DIM)[None, :], other=0.0)
    logits = tl.dot(q, signs, input_precision="ieee") * factor[None, :]
    to = out + (b * (KV_HEADS * GROUP) + h)[:, None] * count + n[None, :]
    tl.store(to, logits, mask=of_group & (n < count)[None, :])


def sketch_scores(queries: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `vlcache_kernels.sketch_scores.sketch_scores`: one launch."""
    batch, heads, dim = queries.shape
    kv_heads, count = codes.shape[1], rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((batch, heads, count), dtype=torch.float32, device=queries.device)
    group = heads // kv_heads
    score_kernel[(triton.cdiv(count, BLOCK_N), kv_heads, batch)](
        queries.float().contiguous(),
        codes,
        rows,
        out,
        rows.stride(0),
        count,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_G=max(MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_D=max(MIN_ROWS, triton.next_power_of_2(dim)),
        BLOCK=BLOCK_N,
        num_warps=4,
    )
    return out
