"""Compile our kernels when a server starts, so that no request waits for a compiler.

A kernel has one variant per model and kind of statistics (`vlcache_kernels.variants`), so one launch of each will do.
All of them work on the padding request, which changes nothing.  Kernels of attention itself are compiled when graphs
are captured.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vlcache_kernels.arena_write import arena_write
from vlcache_kernels.attention_stats import RowBatch, StatsRequest, batch_attention_stats
from vlcache_kernels.copy_cells import copy_cells
from vlcache_kernels.residency_index import ResidencyIndex, append_tokens
from vlcache_kernels.select import free_list, select
from vlcache_sgl.attention.base import HeadShape
from vlcache_sgl.memory.batches import Memory
from vlcache_sgl.memory.device_index import look_up
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.memory.scales import as_bytes
from vlcache_sgl.memory.window_index import WindowIndex


def compile_kernels(memory: Memory, shape: HeadShape, lists: torch.dtype, wants: Iterable[StatsRequest]) -> None:
    """Launch every kernel once.

    Args:
        memory: the server's.
        shape: of its queries.
        lists: type of the lists that its attention reads.
        wants: statistics that its default policy asks for.
    """
    device, layers, planes = memory.arena.device, memory.num_layers, memory.residency.num_planes
    one = torch.ones(1, dtype=torch.int64, device=device)
    padding = torch.zeros(1, dtype=torch.int64, device=device)
    nowhere = torch.full((planes, 1), -1, dtype=torch.int32, device=device)
    for dtype in {lists, torch.int32}:  # statistics read 32 bits
        index = look_up(memory, dtype, [0], [1], padding, one)
        room = torch.zeros(layers, 2 * memory.groups, dtype=dtype, device=device)
        out = ResidencyIndex(torch.empty_like(index.indptr), room)
        counted, group = memory.counted_planes, memory.groups
        append_tokens(index, padding, nowhere, counted, source=padding, out=out, group=group, max_length=1)
    heads, dim = memory.arena.shape[2:]
    new = torch.zeros(1, memory.groups * heads, dim, dtype=shape.dtype, device=device)
    arena_write(memory.arena, new, new, padding, nowhere[: memory.groups])
    if memory.window is not None:
        window = WindowIndex(memory, lists)
        window.before(padding, one, [1])
        first = memory.window_planes.start
        planes_of_layer = slice(first, first + window.groups)
        layer = LayerCells(0, planes_of_layer, memory.window.heads_per_cell, memory.window.head_dim)
        new = torch.zeros(1, memory.window.kv_heads, layer.head_dim, dtype=shape.dtype, device=device)
        arena_write(layer.view(memory.arena), new, new, padding, nowhere[planes_of_layer])
    found = select(torch.zeros(planes, 1, device=device), padding.expand(planes))
    tiers = torch.zeros(planes, 1, dtype=torch.int8, device=device)
    select(torch.zeros(planes, 1, device=device), padding.expand(planes), tiers=tiers)
    free_list(found.keep, nowhere)
    cells = as_bytes(memory.arena)
    copy_cells(cells.expand(planes, *cells.shape), nowhere, cells.expand(planes, *cells.shape), nowhere)
    lists_of_layer = look_up(memory, torch.int32, [0], [1], padding, one).at(0)
    queries = torch.zeros(1, shape.num_heads, dim, dtype=shape.dtype, device=device)
    if memory.arena.dtype.itemsize > 1:
        queries = queries.to(memory.arena.dtype)
    for want in wants:
        batch = RowBatch.build([1], [1], [1], device)
        known = [None] if want.density is not None or want.entropy else [None, queries.new_zeros(shape.num_heads, 1)]
        for lse in known:
            batch_attention_stats(queries, padding, memory.arena, lists_of_layer, batch, 1.0, want=want, lse=lse)
