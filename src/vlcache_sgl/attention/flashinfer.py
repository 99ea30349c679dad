"""Attention over cells with FlashInfer's kernels: a cell is a page of one token.

`arena.unsqueeze(2)` is FlashInfer's paged cache `[pages, 2, page_size, heads, head_dim]` as it stands.  With a cell per
KV head, every (plane, request) is a sequence of its own, as in `triton_provider`.

* Decode: schedules of all layers are written by one kernel from lengths that never leave the device; the host plans
  once per batch size.
* Prefill without a prefix: attention over the new keys as they lie in the batch, no cells are gathered; one plan.
* Prefill behind a prefix: one causal call over the kept prefix and the new tokens, which are in the arena by then.
  Many query rows fill the device without cutting keys: one plan serves all layers, whatever they keep.  With few, keys
  are cut and schedules written as in decode.

The host never waits for the device, and after a change of rows only as `device_index` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_sgl.attention.base import HeadShape, Observe
from vlcache_sgl.attention.flashinfer_kernels import FlashInferKernels, Plan, natural
from vlcache_sgl.attention.grouping import join_groups, join_lse, split_groups, with_rows
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, Memory
from vlcache_sgl.memory.device_index import DeviceIndex, look_up
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.memory.scales import FP8


@dataclass(frozen=True)
class Planned:
    """What the layers of one forward read."""

    plan: Plan
    index: ResidencyIndex | None
    """Lists of cells of all layers; None: only new tokens are attended to."""
    schedules: torch.Tensor | None
    """`[layers, bytes]` uint8; None: the plan has one schedule for all layers."""

    def schedule(self, layer: int) -> torch.Tensor | None:
        return None if self.schedules is None else self.schedules[layer]


class FlashInferProvider:
    """FlashInfer over cells.

    Args:
        memory: arena, residency and rows.
        shape: the queries.
    """

    on_device = True
    lists = torch.int32

    def __init__(self, memory: Memory, shape: HeadShape) -> None:
        self._memory = memory
        kv_heads, dim = memory.arena.shape[2:]
        self._kernels = FlashInferKernels(shape.num_heads // memory.groups, kv_heads, dim, shape.dtype, memory.arena)
        self._kernels.check_schedules()
        # What is attended to is what is stored: of 8-bit floats that is not what the new keys are.
        self._narrow = memory.arena.dtype in FP8
        self._index = DeviceIndex(memory, self.lists)
        self._decode_plans: dict[int, Plan] = {}
        self._recorded: torch.Tensor | None = None
        self._spare = self._new_schedules(0)
        self._extend: tuple[ExtendBatch, Planned] | None = None
        self._decode: Planned | None = None

    def invalidate(self, row: int) -> None:
        self._index.invalidate(row)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def plan_extend(self, batch: ExtendBatch) -> None:
        for request in batch.requests:
            self._index.invalidate(request.row)
        counts = [request.count for request in batch.requests] * self._memory.groups
        if not any(request.begin for request in batch.requests) and not self._narrow:
            self._extend = (batch, Planned(self._kernels.plan_own(counts), None, None))
            return
        rows = [request.row for request in batch.requests]
        lengths = [request.begin + request.count for request in batch.requests]
        index = look_up(self._memory, torch.int32, rows, lengths, batch.rows, batch.seq_lens)
        plan = self._kernels.plan_whole(counts)
        schedules = None
        if not self._kernels.fills_the_gpu(plan):
            plan = self._kernels.plan_cut(counts)
            schedules = self._schedules(plan, index, recorded=False)
        self._extend = (batch, Planned(plan, index, schedules))

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
        batch, planned = self._extend
        groups, total = self._memory.groups, self._extend[0].requests[-1].tokens.stop
        q = split_groups(queries[:total], groups).contiguous()
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if batch.want_lse else None
        if planned.index is None:
            k, v = (split_groups(x[:total], groups) for x in (keys, values))
            out = self._kernels.run_own(planned.plan, q, k, v, scale, lse=lse)
        else:
            layer = self._memory.layer_of(planes)
            lists = planned.index.at(layer)
            schedule, scales = planned.schedule(layer), self._memory.scales_of(planes)
            out = self._kernels.run(planned.plan, schedule, q, *lists, scale, scales, causal=True, lse=lse)
        lse = None if lse is None else join_lse(natural(lse), groups)
        return with_rows(join_groups(out, groups), queries.shape[0]), lse

    # -- decode -----------------------------------------------------------------------------------------------------

    def plan_decode(self, batch: DecodeBatch) -> None:
        index = self._index.step(batch)
        plan = self._decode_plan(index.indptr.shape[1] - 1)
        self._decode = Planned(plan, index, self._schedules(plan, index, recorded=batch.recorded))

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        assert self._decode is not None
        assert self._decode.index is not None
        layer = self._memory.layer_of(planes)
        q = split_groups(queries, self._memory.groups).contiguous()
        lists = self._decode.index.at(layer)
        schedule, scales = self._decode.schedule(layer), self._memory.scales_of(planes)
        out = self._kernels.run(self._decode.plan, schedule, q, *lists, scale, scales, causal=False)
        return join_groups(out, self._memory.groups)

    def extend_in_window(
        self, layer: LayerCells, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        raise NotImplementedError("FlashInfer does not serve layers with a window")

    def decode_in_window(self, layer: LayerCells, queries: torch.Tensor, scale: float) -> torch.Tensor:
        raise NotImplementedError("FlashInfer does not serve layers with a window")

    def init_graphs(self, max_batch: int) -> None:
        self._index.reserve(max_batch)
        layout = self._decode_plan(self._memory.groups * max_batch).layout
        assert layout is not None
        self._recorded = self._new_schedules(layout.nbytes)

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        return self._index.fits(rows, lengths)

    # -- schedules --------------------------------------------------------------------------------------------------

    def _decode_plan(self, sequences: int) -> Plan:
        if sequences not in self._decode_plans:
            self._decode_plans[sequences] = self._kernels.plan_cut([1] * sequences)
        return self._decode_plans[sequences]

    def _schedules(self, plan: Plan, index: ResidencyIndex, *, recorded: bool) -> torch.Tensor:
        """The schedules of all layers: at a fixed address for recorded graphs, whose batch sizes take turns."""
        assert plan.layout is not None
        if recorded:
            assert self._recorded is not None
            schedules = self._recorded
        else:
            if self._spare.shape[1] < plan.layout.nbytes:
                self._spare = self._new_schedules(plan.layout.nbytes)
            schedules = self._spare
        self._kernels.write(plan, index.indptr, schedules)
        return schedules

    def _new_schedules(self, size: int) -> torch.Tensor:
        shape = (self._memory.num_layers, -(-size // 16) * 16)
        return torch.zeros(shape, dtype=torch.uint8, device=self._memory.arena.device)
