"""Decode attention over ragged cells, to measure with: FlashInfer where it can be imported, else a kernel of our own.

What a server launches is measured too (`served`), where its kernels are there: FlashInfer's with our schedules, and
SGLang's Triton kernels.  The kernel of our own is a yardstick on a machine that has only PyTorch and Triton: it splits
the keys of a request over programs and joins the parts in a second launch.

Bytes: K and V of every kept cell once, ``4 * D`` bytes per cell and head in 16-bit types, and its 4 bytes of index.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

TARGET_PROGRAMS = 528  # four per multiprocessor of an H200
MAX_SPLITS = 64
BLOCK_N = 64


@triton.jit
def split_kernel(
    queries,  # [B, H, D], contiguous
    arena,  # [num_cells, 2, K, D], contiguous
    indptr,  # [B + 1] int32
    indices,  # [...] int32
    part_out,  # out [splits, B, H, D] float32, not yet divided by the sum
    part_max,  # out [splits, B, H] float32, base 2
    part_sum,  # out [splits, B, H] float32
    scale2,  # scale * log2(e)
    splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # GROUP rounded up to a power of two, at least 16
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter reads bfloat16 operands of a product as integers
):
    """One program: all query heads of one (request, KV head), one split of its cells."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    first = tl.load(indptr + b)
    n = tl.load(indptr + b + 1) - first
    per_split = tl.cdiv(tl.cdiv(n, splits), BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, n)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    head = b * (KV_HEADS * GROUP) + kv_head * GROUP + g
    q = tl.load(queries + head[:, None] * D + d[None, :], mask=(g < GROUP)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    high = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    out = tl.zeros([BLOCK_G, D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        cell = tl.load(indices + first + pos, mask=pos < end, other=0).to(tl.int64)
        at = arena + cell[:, None] * (2 * KV_HEADS * D) + kv_head * D + d[None, :]
        k = tl.load(at, mask=(pos < end)[:, None], other=0.0)
        v = tl.load(at + KV_HEADS * D, mask=(pos < end)[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logit = tl.where((pos < end)[None, :], tl.dot(q, tl.trans(k)) * scale2, float("-inf"))
        new_high = tl.maximum(high, tl.max(logit, 1))  # finite: a block holds at least one cell
        weight = tl.exp2(logit - new_high[:, None])
        shrink = tl.exp2(high - new_high)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        high = new_high
    part = split * (tl.num_programs(2) * KV_HEADS * GROUP) + head
    tl.store(part_out + part.to(tl.int64)[:, None] * D + d[None, :], out, mask=(g < GROUP)[:, None])
    tl.store(part_max + part, high, mask=g < GROUP)
    tl.store(part_sum + part, total, mask=g < GROUP)


@triton.jit
def join_kernel(
    part_out,  # [splits, B * H, D] float32
    part_max,  # [splits, B * H] float32
    part_sum,
    out,  # out [B * H, D]
    splits,
    D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program: one query head of one request."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    s = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, D)
    high = tl.load(part_max + s * heads + head, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(high - tl.max(high, 0))
    total = tl.sum(tl.load(part_sum + s * heads + head, mask=s < splits, other=0.0) * weight, 0)
    part = tl.load(part_out + (s * heads + head)[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / total
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty))


def triton_decode(
    queries: torch.Tensor, arena: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, longest: int
) -> Callable[[], torch.Tensor]:
    """A call that attends `queries` `[B, H, D]` to each request's cells: at least one, at most `longest`."""
    batch, heads, head_dim = queries.shape
    kv_heads = arena.shape[2]
    splits = max(1, min(MAX_SPLITS, TARGET_PROGRAMS // (batch * kv_heads), triton.cdiv(longest, 2 * BLOCK_N)))
    # A split without a cell leaves maximum -inf; `join_kernel` gives it weight 0.
    part_out = queries.new_empty(splits, batch, heads, head_dim, dtype=torch.float32)
    part_max, part_sum = (part_out.new_empty(splits, batch, heads) for _ in range(2))
    out = torch.empty_like(queries)

    def call() -> torch.Tensor:
        split_kernel[(splits, kv_heads, batch)](
            queries,
            arena,
            indptr,
            indices,
            part_out,
            part_max,
            part_sum,
            head_dim**-0.5 * math.log2(math.e),
            splits,
            GROUP=heads // kv_heads,
            KV_HEADS=kv_heads,
            D=head_dim,
            BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
            BLOCK_N=BLOCK_N,
            UPCAST=not isinstance(split_kernel, triton.JITFunction),
            num_warps=4,
            num_stages=3,
        )
        join_kernel[(batch * heads,)](
            part_out,
            part_max,
            part_sum,
            out,
            splits,
            D=head_dim,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
        return out

    return call


def flashinfer_decode(
    queries: torch.Tensor,
    arena: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    longest: int,
) -> Callable[[], torch.Tensor]:
    """The same with FlashInfer: pages of one cell, planned now, so that the call is the attention alone."""
    import flashinfer

    batch, heads, head_dim = queries.shape
    kv_heads = arena.shape[2]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(queries.device), "NHD", use_tensor_cores=heads // kv_heads > 2
    )
    wrapper.plan(
        indptr,
        indices[: int(indptr[-1])],
        torch.ones(batch, dtype=torch.int32, device=queries.device),
        heads,
        kv_heads,
        head_dim,
        1,
        q_data_type=queries.dtype,
        kv_data_type=arena.dtype,
    )
    pages = arena.unsqueeze(2)  # [num_cells, 2, 1, K, D]
    return lambda: wrapper.run(queries, pages)


def fa3_decode(
    queries: torch.Tensor, arena: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, longest: int
) -> Callable[[], torch.Tensor]:
    """The same with FlashAttention 3 of `sgl_kernel`: pages of one cell, a rectangular table made now."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    lengths = indptr.diff()
    table = torch.zeros(len(lengths), longest, dtype=torch.int32, device=queries.device)
    for row, (begin, end) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
        table[row, : end - begin] = indices[begin:end]
    keys, values = arena.unsqueeze(2).unbind(1)  # [num_cells, 1, K, D], strided views
    scale = queries.shape[2] ** -0.5

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_attn_with_kvcache(
            queries[:, None],
            keys,
            values,
            cache_seqlens=lengths,
            page_table=table,
            softmax_scale=scale,
            causal=True,
        )
        return out[:, 0]

    return call


def served(name: str) -> Callable[..., Callable[[], torch.Tensor]]:
    """The attention that a server with this provider launches; planned now, so that the call is the attention alone."""

    def provider(
        queries: torch.Tensor, arena: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, longest: int
    ) -> Callable[[], torch.Tensor]:
        from vlcache_sgl.attention.base import HeadShape
        from vlcache_sgl.attention.factory import make_provider
        from vlcache_sgl.memory.batches import DecodeBatch, Memory
        from vlcache_sgl.memory.residency import Residency
        from vlcache_sgl.sglang_hooks.triton_kernels import attention_kernels

        device, lengths = queries.device, indptr.diff()
        residency = Residency(1, indices.numel(), arena.shape[0] - 1, device)
        residency.table[0, 1:] = indices  # slots lie one after another
        slots = torch.arange(longest, device=device) + 1 + indptr[:-1, None]
        table = torch.nn.functional.pad(slots.clamp(max=indices.numel()).to(torch.int32), (0, 0, 1, 0))
        memory = Memory(arena, residency, table, groups=1)
        attention = make_provider(name, memory, HeadShape(queries.shape[1], queries.dtype), attention_kernels)
        rows = torch.arange(1, len(lengths) + 1, device=device)
        new = residency.table[:, (indptr[1:]).long()]
        attention.plan_decode(DecodeBatch(rows.tolist(), lengths.tolist(), rows, lengths, new))
        scale = queries.shape[2] ** -0.5
        return lambda: attention.decode(slice(0, 1), queries, scale)

    return provider


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """One for all wrappers: they run in turn."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def reference_decode(
    queries: torch.Tensor, arena: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """`[B, H, D]` float64."""
    group = queries.shape[1] // arena.shape[2]
    found = []
    for b, (begin, end) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
        keys, values = arena[indices[begin:end].long()].double().repeat_interleave(group, 2).unbind(1)
        logits = torch.einsum("hd,nhd->hn", queries[b].double(), keys) * queries.shape[2] ** -0.5
        found.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), values))
    return torch.stack(found)


def providers() -> dict[str, Callable[..., Callable[[], torch.Tensor]]]:
    """What there is on this machine, by name."""
    found: dict[str, Callable[..., Callable[[], torch.Tensor]]] = {"triton": triton_decode}
    if torch.cuda.is_available():
        for name, package, provider in (
            ("served flashinfer", "flashinfer.prefill", served("flashinfer")),
            ("served triton", "sglang.kernels.ops.attention.decode_attention", served("triton")),
            ("flashinfer", "flashinfer.decode", flashinfer_decode),
            ("fa3", "sgl_kernel.flash_attn", fa3_decode),
        ):
            try:
                importlib.import_module(package)
            except Exception:  # its import runs code of the driver: whatever it raises, it cannot be used
                continue
            found[name] = provider
    return found
