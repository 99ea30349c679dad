"""Launches the kernels of `triton.py`: block sizes, grids, outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from vlcache_kernels.attention_stats.records import BatchStats, RowBatch, StatsRequest
from vlcache_kernels.attention_stats.triton import column_kernel, merge_kernel, row_kernel
from vlcache_kernels.residency_index.records import ResidencyIndex
from vlcache_kernels.variants import alignment

LOG2E = math.log2(math.e)
INTERPRETED = not isinstance(row_kernel, triton.JITFunction)
# Programs of launch 1 that are wanted at least: two per multiprocessor of an H200 (132), so that long prompts with few
# rows are split along the keys.
TARGET_PROGRAMS = 264
MAX_SPLITS = 64


class Tile(NamedTuple):
    """Block sizes; powers of two, at least 16 (the smallest side of a matrix instruction)."""

    rows: int
    keys: int
    warps: int
    stages: int


def row_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Blocks of `row_kernel`, from the compiler's resource report for sm_90; not tuned: no GPU was at hand.

    A key tile of 128 x 128 bf16 is 32 kB.  Three stages of it leave room for two blocks on a Hopper multiprocessor
    (228 kB), and 128 rows at 8 warps need 128 registers per thread, which allows two as well.  The same for any number
    of query rows, so that one variant is compiled: few rows waste arithmetic, and reading the keys takes longer.
    """
    if dtype == torch.float32:  # no matrix instruction at full precision: more than this spills registers
        return Tile(32, 32, 8, 2) if head_dim <= 128 else Tile(16, 16, 4, 2)
    if head_dim > 256:  # fits the 99 kB of devices that are no Hopper, too
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 4, 3) if head_dim > 128 else Tile(128, 128, 8, 3)


def column_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Blocks of `column_kernel`: fewer rows at a time, because it holds a tile of logits beside its keys."""
    if dtype == torch.float32 or head_dim > 256:
        return Tile(32, 32, 4, 2)
    return Tile(64, 64 if head_dim > 128 else 128, 8, 2)


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
    tiles: tuple[Tile, Tile] | None = None,
    splits: int | None = None,
) -> BatchStats:
    """See `vlcache_kernels.attention_stats.batch_attention_stats`; no host synchronisation.

    `tiles` (of the row and the column kernel) and `splits` override the heuristics, for tests and tuning.
    """
    total_rows, num_heads, head_dim = queries.shape
    heads_per_cell = arena.shape[2]
    size = len(batch.owned)
    num_kv_heads = (index.indptr.numel() - 1) // size * heads_per_cell
    group = num_heads // num_kv_heads
    packed = max(batch.rows) * group
    by_rows, by_columns = tiles or (row_tile(head_dim, queries.dtype), column_tile(head_dim, queries.dtype))
    align = alignment(head_dim)
    if queries.stride(2) != 1 or queries.stride(0) % align or queries.stride(1) % align:
        queries = queries.contiguous()
    indptr, indices, row_index = index.indptr.contiguous(), index.indices.contiguous(), row_index.contiguous()
    device = queries.device

    def new(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> torch.Tensor:
        # One element stands for an output that is not wanted: a kernel argument must be a tensor, never read.
        return torch.empty(shape if wanted else (1,), dtype=dtype, device=device)

    density = want.density is not None
    total_owned = sum(batch.owned)
    row_max, row_lse = new(num_heads, total_rows), lse
    kept, visible = (new(num_kv_heads, size, dtype=torch.int64) for _ in range(2))
    entropy_sum = new(num_kv_heads, size, wanted=want.entropy)
    shared: dict[str, Any] = {
        "GROUP": group,
        "KV_HEADS": num_kv_heads,
        "HEADS_PER_CELL": heads_per_cell,
    }
    reading: dict[str, Any] = {
        **shared,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ALIGN": align,
        "UPCAST": INTERPRETED,
    }
    strides = (queries.stride(0), queries.stride(1))
    pointers = (row_index, batch.row_indptr, batch.owned_indptr)

    if density or want.entropy or (row_lse is None and want.columns):
        row_blocks = max(1, triton.cdiv(packed, by_rows.rows))
        if splits is None:
            splits = triton.cdiv(TARGET_PROGRAMS, row_blocks * size * num_kv_heads)
            splits = max(1, min(splits, MAX_SPLITS, triton.cdiv(batch.max_visible, 2 * by_rows.keys)))
        row_lse = new(num_heads, total_rows)
        parts = new(3, splits, num_heads, total_rows)
        row_kernel[(row_blocks, splits, size * num_kv_heads)](
            queries,
            arena,
            indptr,
            indices,
            *pointers,
            *parts.unbind(),
            scale * LOG2E,
            total_rows,
            size,
            splits,
            *strides,
            **reading,
            **_options(by_rows),
            ENTROPY=want.entropy,
        )
        merge_kernel[(size, num_kv_heads)](
            *parts.unbind(),
            indptr,
            *pointers,
            row_max,
            row_lse,
            entropy_sum,
            kept,
            visible,
            total_rows,
            size,
            splits,
            **shared,
            BLOCK_M=2048 // MAX_SPLITS,  # rows x splits fit the registers
            num_warps=4,
            BLOCK_SPLITS=MAX_SPLITS,
            ENTROPY=want.entropy,
        )
        lse = None

    column_sum = new(num_kv_heads, total_owned, wanted=want.column_sum)
    column_square_sum = new(num_kv_heads, total_owned, wanted=want.column_square_sum)
    column_max = new(num_kv_heads, total_owned, wanted=want.column_max)
    sizes = [num_heads * rows * owned for rows, owned in zip(batch.rows, batch.owned, strict=True)]
    flat = new(sum(sizes), wanted=want.probabilities)
    base = torch.zeros(size, dtype=torch.int64)
    if want.probabilities:
        base[1:] = torch.tensor(sizes).cumsum(0)[:-1]
    if want.columns or density:
        columns = batch.max_visible if density else max(batch.owned)
        column_kernel[(triton.cdiv(columns, by_columns.keys), num_kv_heads, size)](
            queries,
            arena,
            indptr,
            indices,
            *pointers,
            row_max,
            row_lse,
            column_sum,
            column_square_sum,
            column_max,
            kept,
            flat,
            base.to(device, non_blocking=True) if want.probabilities else kept,
            scale * LOG2E,
            math.log2(want.density) if want.density is not None else 0.0,
            total_rows,
            total_owned,
            size,
            *strides,
            **reading,
            **_options(by_columns),
            SUM=want.column_sum,
            SQUARE=want.column_square_sum,
            MAX=want.column_max,
            DENSITY=density,
            PROBABILITIES=want.probabilities,
            GIVEN_LSE=lse is not None,
            SKIP=not want.probabilities,
            BLOCK_R=256,
        )
    return BatchStats(
        batch,
        column_sum=column_sum if want.column_sum else None,
        column_square_sum=column_square_sum if want.column_square_sum else None,
        column_max=column_max if want.column_max else None,
        kept=kept if density else None,
        visible=visible if density else None,
        entropy_sum=entropy_sum if want.entropy else None,
        probabilities=tuple(
            part.view(num_heads, rows, owned)
            for part, rows, owned in zip(torch.split(flat, sizes), batch.rows, batch.owned, strict=True)
        )
        if want.probabilities
        else None,
    )


def _options(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
