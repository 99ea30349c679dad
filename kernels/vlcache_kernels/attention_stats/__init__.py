"""Statistics of attention probabilities, without storing the probabilities.

For given query rows: column sums, squares and maxima per KV head, the density of arXiv 2410.23317 equation 1, the
entropy.  Keys are the *owned* keys of the request, which may be evicted, after an optional *prefix*, which only enters
the normaliser, the density and the entropy.
"""

from __future__ import annotations

import torch

from vlcache_kernels.attention_stats import naive
from vlcache_kernels.attention_stats.records import AttentionStats, BatchStats, RowBatch, StatsRequest
from vlcache_kernels.checks import (
    FP8,
    Backend,
    check_cells,
    check_device,
    check_float,
    check_index,
    check_shape,
    use_triton,
)
from vlcache_kernels.residency_index.records import ResidencyIndex

__all__ = [
    "AttentionStats",
    "BatchStats",
    "ResidencyIndex",
    "RowBatch",
    "StatsRequest",
    "attention_stats",
    "batch_attention_stats",
]


def attention_stats(
    queries: torch.Tensor,
    keys: torch.Tensor,
    row_index: torch.Tensor,
    scale: float,
    *,
    want: StatsRequest,
    prefix_keys: torch.Tensor | None = None,
    prefix_valid: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> AttentionStats:
    """Statistics of one layer of one request from dense keys.

    Plain torch on every device, the choice for a CPU; on a GPU see `batch_attention_stats`.  Reads the `P + m` keys
    once per tile of rows; extra memory is one tile of logits.

    Args:
        queries: `[R, H, D]` float, post-RoPE query rows.
        keys: `[m, K, D]` float, post-RoPE owned keys in sequence order; `H` is a multiple of `K`.
        row_index: `[R]` int64; row r sees owned key j if and only if ``j <= row_index[r]``.  In ``[0, m)``.
        scale: factor of the logits, usually ``D ** -0.5``.
        want: which statistics.
        prefix_keys: `[P, K, D]` float, visible to every row.
        prefix_valid: `[K]` int, leading prefix keys that exist in each KV head (the rest is padding); None means all
            `P`.  Needed when heads were evicted separately.
        lse: `[H, R]` float32, log (natural) of the sum of exponentials over all visible keys, where an attention
            kernel has returned it; saves the normaliser, not the row maximum that `density` needs.

    Returns:
        Fields as documented in `AttentionStats`.

    Raises:
        ValueError, TypeError: for shapes, devices and types that do not fit.
    """
    _check(queries, keys, row_index, prefix_keys, prefix_valid, lse)
    return naive.attention_stats(
        queries, keys, row_index, scale, want=want, prefix_keys=prefix_keys, prefix_valid=prefix_valid, lse=lse
    )


def batch_attention_stats(
    queries: torch.Tensor,
    row_index: torch.Tensor,
    arena: torch.Tensor,
    index: ResidencyIndex,
    batch: RowBatch,
    scale: float,
    *,
    want: StatsRequest,
    lse: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> BatchStats:
    """Statistics of one layer for a batch of requests, keys read from the arena through cell indices.

    Bytes (Triton): one read of K, ``n * K * D`` elements plus 4 bytes of index per key and plane, for the normaliser,
    and one more for the columns, which leaves out the prefix unless the density is wanted.  With `lse` and neither
    density nor entropy: one read.  A read of 32k keys with 8 heads of 128 in bfloat16 is 67 MB and 0.13 MB of index.
    Rows beyond a row block (128 packed, fewer in float32) read the keys again, from the L2 cache if it holds them.
    Nothing of size rows x keys is written unless `probabilities` are wanted.

    Args:
        queries: `[T, H, D]` float32, bfloat16 or float16, post-RoPE query rows, request after request.
        row_index: `[T]` int; row r sees the whole prefix and owned key j if and only if ``j <= row_index[r]``.
        arena: `[num_cells, 2, heads_per_cell, D]`, contiguous, same type as `queries` or 8-bit floats, whose
            scale is to be in `scale`.
        index: one layer's list from `residency_index(..., group=G)` *before* eviction: `indptr` `[G * B + 1]`,
            `indices` `[*]`, int32.  Of each (plane, request) the last ``batch.owned[b]`` cells are the owned keys,
            what precedes them is the prefix, whose size may differ between planes.
        batch: sizes, made once by `RowBatch.build`.
        scale: factor of the logits, usually ``D ** -0.5``.
        want: which statistics.
        lse: `[H, T]` float32, natural logarithm of the sum of exponentials over all visible keys (FlashInfer returns
            base 2: multiply by ``ln 2``).
        backend: "auto" takes Triton on a GPU and the reference elsewhere.

    Returns:
        Flat over requests, see `BatchStats`.
    """
    check_shape("queries", queries, (batch.row_total, None, None))
    total_rows, num_heads, head_dim = queries.shape
    check_shape("row_index", row_index, (total_rows,))
    check_shape("arena", arena, (None, 2, None, head_dim))
    check_float("queries", queries)
    check_cells("arena", arena)
    if arena.dtype != queries.dtype and arena.dtype not in FP8:
        raise TypeError(f"arena is {arena.dtype}, queries are {queries.dtype}: expected the same or 8-bit floats")
    for name, tensor in (("row_index", row_index), ("indptr", index.indptr), ("indices", index.indices)):
        check_index(name, tensor)
    size = len(batch.owned)
    planes, rest = divmod(index.indptr.numel() - 1, size)
    if index.indptr.dim() != 1 or rest or planes < 1:
        raise ValueError(f"indptr has shape {list(index.indptr.shape)}, expected [G * {size} + 1]: one layer's list")
    if num_heads % (planes * arena.shape[2]):
        raise ValueError(f"{num_heads} query heads are not a multiple of {planes * arena.shape[2]} KV heads")
    if not arena.is_contiguous():
        raise ValueError("arena must be contiguous")
    if lse is not None:
        check_shape("lse", lse, (num_heads, total_rows))
    check_device(
        queries.device,
        row_index=row_index,
        arena=arena,
        indptr=index.indptr,
        indices=index.indices,
        batch=batch.row_indptr,
        lse=lse,
    )
    if not use_triton(backend, queries.device):
        return naive.batch_attention_stats(queries, row_index, arena, index, batch, scale, want=want, lse=lse)
    if queries.dtype == torch.float64:
        raise TypeError("queries are float64: the Triton kernels accumulate in float32; use backend='naive'")
    from vlcache_kernels.attention_stats import launch

    return launch.batch_attention_stats(
        queries,
        row_index,
        arena,
        index,
        batch,
        scale,
        want=want,
        lse=None if lse is None else lse.float().contiguous(),
    )


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    row_index: torch.Tensor,
    prefix_keys: torch.Tensor | None,
    prefix_valid: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    check_shape("queries", queries, (None, None, None))
    num_rows, num_heads, head_dim = queries.shape
    check_shape("keys", keys, (None, None, head_dim))
    num_kv_heads = keys.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    check_float("queries", queries)
    check_float("keys", keys)
    check_shape("row_index", row_index, (num_rows,))
    check_index("row_index", row_index)
    if prefix_keys is not None:
        check_shape("prefix_keys", prefix_keys, (None, num_kv_heads, head_dim))
        check_float("prefix_keys", prefix_keys)
    if prefix_valid is not None:
        if prefix_keys is None:
            raise ValueError("prefix_valid is given without prefix_keys")
        check_shape("prefix_valid", prefix_valid, (num_kv_heads,))
        check_index("prefix_valid", prefix_valid)
    if lse is not None:
        check_shape("lse", lse, (num_heads, num_rows))
    check_device(
        queries.device, keys=keys, row_index=row_index, prefix_keys=prefix_keys, prefix_valid=prefix_valid, lse=lse
    )
    if num_rows and not row_index.is_cuda:  # on a GPU this would wait for the stream
        low, high = int(row_index.min()), int(row_index.max())
        if low < 0 or high >= keys.shape[0]:
            raise ValueError(f"row_index spans [{low}, {high}], expected [0, {keys.shape[0]})")
