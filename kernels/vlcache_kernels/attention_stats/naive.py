"""Attention statistics in plain torch: the reference, and what runs on a CPU.

One BLAS product per tile of rows; a tile's logits are dropped before the next, so `[H, R, n]` is never stored.
"""

from __future__ import annotations

import math

import torch

from vlcache_kernels.attention_stats.records import AttentionStats, BatchStats, RowBatch, StatsRequest
from vlcache_kernels.residency_index.records import ResidencyIndex

# Logits of one tile.  2**20 float32 are 4 MB: the tile stays in a core's caches between the product, the softmax and
# the column sums (measured on one core: 2**19 to 2**21 are alike, 2**22 and more are 1.5 to 8 times slower).
TILE_ELEMENTS = 1 << 20
# Below this many packed rows the BLAS product degenerates into matrix-vector products.
MIN_TILE_ROWS = 8


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
    """See `vlcache_kernels.attention_stats.attention_stats`; arithmetic in float64 if `queries` is, else float32."""
    num_rows, num_heads, head_dim = queries.shape
    owned, num_kv_heads = keys.shape[0], keys.shape[1]
    group = num_heads // num_kv_heads
    prefix = 0 if prefix_keys is None else prefix_keys.shape[0]
    device = queries.device
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32

    visible_keys = keys if prefix_keys is None else torch.cat([prefix_keys, keys])
    keys_t = visible_keys.to(dtype).permute(1, 2, 0)  # [K, D, P + m]
    packed = (queries.to(dtype) * scale).view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    packed_lse = None if lse is None else lse.to(dtype).view(num_kv_heads, group, num_rows)
    hidden = None  # [K, 1, P] padding of ragged prefixes
    prefix_count = torch.full((num_kv_heads,), prefix, device=device)
    if prefix_valid is not None:
        prefix_count = prefix_valid.to(torch.int64)
        hidden = (torch.arange(prefix, device=device) >= prefix_valid[:, None])[:, None]

    def columns(wanted: bool) -> torch.Tensor | None:
        return torch.zeros(num_kv_heads, owned, dtype=dtype, device=device) if wanted else None

    column_sum = columns(want.column_sum)
    column_square_sum = columns(want.column_square_sum)
    column_max = columns(want.column_max)
    kept = None if want.density is None else torch.zeros(num_kv_heads, dtype=torch.int64, device=device)
    entropy_sum = torch.zeros(num_kv_heads, dtype=dtype, device=device) if want.entropy else None
    probabilities = torch.zeros(num_heads, num_rows, owned, device=device) if want.probabilities else None

    step = max(MIN_TILE_ROWS, TILE_ELEMENTS // max(1, num_heads * (prefix + owned)))
    for begin in range(0, num_rows, step):
        index = row_index[begin : begin + step]
        tile = index.numel()
        lowest, width = int(index.min()), int(index.max()) + 1  # no row of the tile sees owned keys from `width` on
        rows = packed[:, :, begin : begin + tile].reshape(num_kv_heads, group * tile, head_dim)
        logits = torch.bmm(rows, keys_t[:, :, : prefix + width])
        if hidden is not None:
            logits[:, :, :prefix].masked_fill_(hidden, -torch.inf)
        if lowest + 1 < width:
            future = torch.arange(lowest + 1, width, device=device) > index[:, None]
            tail = logits.view(num_kv_heads, group, tile, -1)[..., prefix + lowest + 1 :]
            tail.masked_fill_(future, -torch.inf)

        if kept is not None and want.density is not None:
            threshold = logits.amax(-1, keepdim=True) + math.log(want.density)
            kept += (logits >= threshold).sum(dim=(1, 2))
        if not (want.columns or want.entropy):
            continue
        if packed_lse is None:
            p = torch.softmax(logits, dim=-1)
        else:
            p = (logits - packed_lse[:, :, begin : begin + tile].reshape(num_kv_heads, -1, 1)).exp_()
        if entropy_sum is not None:
            entropy_sum += torch.special.entr(p).sum(dim=(1, 2)) / group
        p = p[:, :, prefix:]
        if probabilities is not None:
            probabilities[:, begin : begin + tile, :width] = p.reshape(num_heads, tile, width)
        if column_sum is not None:
            column_sum[:, :width] += p.sum(1) / group
        if column_max is not None:
            column_max[:, :width] = torch.maximum(column_max[:, :width], p.amax(1))
        if column_square_sum is not None:
            column_square_sum[:, :width] += p.square().sum(1) / group

    visible = None if kept is None else group * (prefix_count * num_rows + (row_index + 1).sum())
    return AttentionStats(
        rows=num_rows,
        column_sum=_float32(column_sum),
        column_square_sum=_float32(column_square_sum),
        column_max=_float32(column_max),
        kept=kept,
        visible=visible,
        entropy_sum=_float32(entropy_sum),
        probabilities=probabilities,
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
) -> BatchStats:
    """See `vlcache_kernels.attention_stats.batch_attention_stats`: one request after the other, keys gathered."""
    size = len(batch.owned)
    group = (index.indptr.numel() - 1) // max(1, size)
    indptr = index.indptr.tolist()
    found = []
    row = 0
    for b, (count, owned) in enumerate(zip(batch.rows, batch.owned, strict=True)):
        cells = [index.indices[indptr[g * size + b] : indptr[g * size + b + 1]] for g in range(group)]
        prefix_count = torch.tensor([c.numel() - owned for c in cells], device=arena.device)
        longest = int(prefix_count.max())
        prefix = arena.new_zeros(longest, group, *arena.shape[2:])
        for g, c in enumerate(cells):
            prefix[: c.numel() - owned, g] = arena[c[: c.numel() - owned].long(), 0]
        keys = torch.stack([arena[c[c.numel() - owned :].long(), 0] for c in cells], dim=1)
        found.append(
            attention_stats(
                queries[row : row + count],
                keys.flatten(1, 2),
                row_index[row : row + count],
                scale,
                want=want,
                prefix_keys=prefix.flatten(1, 2),
                prefix_valid=prefix_count.repeat_interleave(arena.shape[2]),
                lse=None if lse is None else lse[:, row : row + count],
            )
        )
        row += count
    return BatchStats.join(found, batch)


def _float32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.float32)
