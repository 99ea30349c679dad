"""Attention over cells with SGLang's own Triton kernels: its extend and decode attention, our lists of cells.

Both kernels take ragged lists of rows of a key and a value buffer; here the rows are cells, K and V two strided views
of the arena, and every layer has lists of its own.  With a cell per KV head, every (plane, request) is a sequence of
its own with the query heads of that KV head: queries are regrouped from `[T, H, D]` to `[G * T, H / G, D]`.  Layers
with a window divide cells their own way, and their lists end with the window.

The host never waits for the device, and after a change of rows only as `device_index` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_sgl.attention.base import AttentionKernels, HeadShape, Observe
from vlcache_sgl.attention.grouping import join_groups, join_lse, split_groups, with_rows
from vlcache_sgl.attention.parts import DecodePlan, Parts
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, Memory
from vlcache_sgl.memory.device_index import DeviceIndex, look_up
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.memory.scales import Scales
from vlcache_sgl.memory.window_index import WindowIndex


@dataclass(frozen=True)
class Buffers:
    """Where one layer's keys and values are: two views of the arena, `[cells, heads, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor
    groups: int
    """Cells of a token."""
    scales: Scales
    window: int = -1
    """How many tokens before its own a token sees; -1: all."""


@dataclass(frozen=True)
class ExtendPlan:
    """What the layers of a kind read in one prefill."""

    index: ResidencyIndex
    """What precedes the new tokens."""
    starts: torch.Tensor
    """`[Q + 1]`, the first query row of each sequence."""


class TritonProvider:
    """SGLang's Triton attention over cells.

    Args:
        memory: arena, residency and rows.
        shape: the queries.
        kernels: SGLang's.
        kv_splits: parts that one sequence's keys may be cut into in any batch; in small ones they may be more.
    """

    on_device = True
    lists = torch.int64

    def __init__(self, memory: Memory, shape: HeadShape, kernels: AttentionKernels, *, kv_splits: int = 8) -> None:
        self._memory = memory
        device, dims = memory.arena.device, memory.arena.shape
        self._index = DeviceIndex(memory, self.lists)
        self._parts = Parts(shape.num_heads // memory.groups, dims[2], dims[3], kv_splits, device)
        self._window: WindowIndex | None = None
        if memory.window is not None:
            self._window, window = WindowIndex(memory, self.lists), memory.window
            heads = shape.num_heads // window.planes_per_layer
            self._window_parts = Parts(heads, window.heads_per_cell, window.head_dim, kv_splits, device)
        self._batch: ExtendBatch | None = None
        self._extend: ExtendPlan | None = None
        self._extend_window: ExtendPlan | None = None
        self._decode: DecodePlan | None = None
        self._decode_window: DecodePlan | None = None
        self._extend_kernel, self._decode_kernel = kernels

    def invalidate(self, row: int) -> None:
        self._index.invalidate(row)

    def _counted(self, planes: slice) -> Buffers:
        arena, memory = self._memory.arena, self._memory
        return Buffers(arena[:, 0], arena[:, 1], memory.groups, memory.scales_of(planes))

    def _in_window(self, layer: LayerCells) -> Buffers:
        assert layer.window is not None
        both, groups = layer.view(self._memory.arena), layer.planes.stop - layer.planes.start
        return Buffers(both[:, 0], both[:, 1], groups, self._memory.scales_in_window(layer), layer.window)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def plan_extend(self, batch: ExtendBatch) -> None:
        for request in batch.requests:
            self._index.invalidate(request.row)
        rows, begins = [r.row for r in batch.requests], [r.begin for r in batch.requests]
        index = look_up(self._memory, torch.int64, rows, begins, batch.rows, batch.prefix_lens)
        self._batch = batch
        self._extend = ExtendPlan(index, _starts(batch, self._memory.groups))
        if self._window is not None:
            index = self._window.before(batch.rows, batch.prefix_lens, begins)
            self._extend_window = ExtendPlan(index, _starts(batch, self._window.groups))

    def extend(
        self,
        planes: slice,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        observe: Observe,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._extend is not None
        number = self._memory.layer_of(planes)
        return self._run_extend(self._extend, number, self._counted(planes), queries, keys, values, scale)

    def extend_in_window(
        self, layer: LayerCells, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        assert self._extend_window is not None
        assert self._window is not None
        number = self._window.number(layer)
        return self._run_extend(self._extend_window, number, self._in_window(layer), queries, keys, values, scale)[0]

    def _run_extend(
        self,
        plan: ExtendPlan,
        number: int,
        cells: Buffers,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._batch is not None
        lists, groups = plan.index.at(number), cells.groups
        total = self._batch.requests[-1].tokens.stop
        q, k, v = (split_groups(x[:total], groups) for x in (queries, keys, values))
        out, lse = torch.empty_like(q), None
        if self._batch.want_lse and cells.window < 0:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._extend_kernel(
            q,
            k,
            v,
            out,
            cells.keys,
            cells.values,
            plan.starts,
            lists.indptr,
            lists.indices,
            None,  # custom mask
            True,  # causal
            None,
            max(request.count for request in self._batch.requests),
            cells.scales.key,
            cells.scales.value,
            sm_scale=scale,
            sliding_window_size=cells.window,
            lse_extend=lse,
        )
        return with_rows(join_groups(out, groups), queries.shape[0]), join_lse(lse, groups)

    # -- decode -----------------------------------------------------------------------------------------------------

    def plan_decode(self, batch: DecodeBatch) -> None:
        self._decode = self._parts.plan(self._index.step(batch), batch.recorded)
        if self._window is not None:
            self._decode_window = self._window_parts.plan(self._window.step(batch), batch.recorded)

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        assert self._decode is not None
        return self._run_decode(self._decode, self._memory.layer_of(planes), self._counted(planes), queries, scale)

    def decode_in_window(self, layer: LayerCells, queries: torch.Tensor, scale: float) -> torch.Tensor:
        assert self._decode_window is not None
        assert self._window is not None
        number = self._window.number(layer)  # the list ends where the window does: nothing is left to mask
        return self._run_decode(self._decode_window, number, self._in_window(layer), queries, scale)

    def _run_decode(
        self, plan: DecodePlan, number: int, cells: Buffers, queries: torch.Tensor, scale: float
    ) -> torch.Tensor:
        lists = plan.index.at(number)
        q = split_groups(queries, cells.groups)
        out = torch.empty_like(q)
        self._decode_kernel(
            q,
            cells.keys,
            cells.values,
            out,
            lists.indptr,
            lists.indices,
            *plan.partial,
            plan.parts[number],
            plan.partial[0].shape[2],
            scale,
            cells.scales.key,
            cells.scales.value,
        )
        return join_groups(out, cells.groups)

    def init_graphs(self, max_batch: int) -> None:
        self._index.reserve(max_batch)
        self._parts.reserve(self._memory.num_layers, self._memory.groups * max_batch)
        if self._window is not None:
            self._window.reserve(max_batch)
            self._window_parts.reserve(self._window.lists, self._window.groups * max_batch)

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        return self._index.fits(rows, lengths)


def _starts(batch: ExtendBatch, groups: int) -> torch.Tensor:
    """`[G * B + 1]`: sequence g * B + b has its queries at g * T + first row of b."""
    total = batch.requests[-1].tokens.stop
    ends = (batch.seq_lens - batch.prefix_lens).cumsum(0)
    numbers = torch.arange(groups, device=ends.device)[:, None] * total
    return torch.nn.functional.pad((numbers + ends).flatten(), (1, 0))
