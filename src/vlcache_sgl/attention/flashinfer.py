"""Attention over cells with FlashInfer's public wrappers: a cell is a page of one token.

`arena.unsqueeze(2)` is FlashInfer's paged cache `[pages, 2, page_size, heads, head_dim]` as it stands.  A prefill is
one causal call over the kept prefix and the new tokens, which are in the arena by then.  With a cell per KV head, every
(plane, request) is a sequence of its own, as in `triton_provider`.

FlashInfer is planned on the host, from exact lengths.  Layers that hold equally many cells of every request share a
plan; then the indices, which always differ, are put into the one buffer that the plan names before each of these layers
runs.  With budgets that differ between layers there are as many plans per step as layers, about 0.1 ms each on the
host, which overlap scheduling hides behind the device as long as a step takes longer.

Lengths are counted up on the host; the host waits for results of the device only in a prefill and in the first step
after rows have changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_sgl.attention.base import HeadShape, Observe
from vlcache_sgl.attention.grouping import join_groups, join_lse, split_groups, with_rows
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, Memory
from vlcache_sgl.memory.device_index import DeviceIndex, look_up
from vlcache_sgl.memory.scales import FP8
from vlcache_sgl.streams import passed_event

WORKSPACE_BYTES = 384 << 20
"""For partial outputs, shared by all plans: SGLang's default.  FlashInfer says so when it is too small."""
PLAN_BYTES = 2 << 20
"""For the schedule of one plan: some numbers per tile of queries, 8 bytes per query."""
RECORDED_PLAN_BYTES = 256 << 10
"""For that of a recorded decode step, and 64 bytes per sequence: there is a pinned copy per layer and batch size."""
TENSOR_CORE_GROUP = 4
"""Query heads per KV head from which FlashInfer's tensor-core decode is faster, and always with cells of 8-bit floats;
SGLang's rule."""


@dataclass
class Planned:
    """Layers of equal lengths, with their plan."""

    wrapper: Any
    indices: list[torch.Tensor]
    """Per layer of the group, its cells; the plan names the first entry's memory or `shared`."""
    shared: torch.Tensor | None
    """Where the plan looks for indices when several layers share it."""

    def ready(self, number: int) -> Any:
        """The wrapper, for the `number`-th layer of the group."""
        if self.shared is not None:
            self.shared.copy_(self.indices[number])
        return self.wrapper


class FlashInferProvider:
    """FlashInfer over cells.

    Args:
        memory: arena, residency and rows.
        shape: the queries.
    """

    on_device = True

    def __init__(self, memory: Memory, shape: HeadShape) -> None:
        self._memory = memory
        self._library = _library()
        self._pages = memory.arena.unsqueeze(2)
        self._heads = shape.num_heads // memory.groups
        self._kv_heads, self._dim = memory.arena.shape[2:]
        self._types = {"q_data_type": shape.dtype, "kv_data_type": memory.arena.dtype}
        device = memory.arena.device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._index = DeviceIndex(memory, torch.int32, exact=True)
        self._prefill_wrappers: list[Any] = []
        self._decode_wrappers: list[Any] = []
        self._recorded: dict[int, list[Any]] = {}
        self._schedules: list[torch.Tensor] = []
        self._extend: tuple[ExtendBatch, list[tuple[Planned, int]]] | None = None
        self._decode: list[tuple[Planned, int]] = []
        self._fetched: Any | None = None

    def invalidate(self, row: int) -> None:
        self._index.invalidate(row)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def plan_extend(self, batch: ExtendBatch) -> None:
        requests = batch.requests
        for request in requests:
            self._index.invalidate(request.row)
        lengths = [request.begin + request.count for request in requests]
        rows = [request.row for request in requests]
        index = look_up(self._memory, torch.int32, rows, lengths, batch.rows, batch.seq_lens)
        counts = torch.tensor([request.count for request in requests] * self._memory.groups, dtype=torch.int32)
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

        def plan(wrapper: Any, indptr: torch.Tensor, indices: torch.Tensor) -> None:
            self._plan(wrapper, starts, indptr, indices, causal=True)

        with self._staging():
            planned = self._plan_layers(index, index.indptr.cpu(), self._prefill_wrappers, self._new_prefill, plan)
        self._extend = (batch, planned)

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
        groups = self._memory.groups
        q = split_groups(queries[: batch.requests[-1].tokens.stop], groups).contiguous()
        group, number = planned[self._memory.layer_of(planes)]
        arguments = self._arguments(planes, q, scale)
        lse = None
        if batch.want_lse:
            out, lse = group.ready(number).run(q, self._pages, return_lse=True, lse_base="ln", **arguments)
        else:
            out = group.ready(number).run(q, self._pages, **arguments)
        return with_rows(join_groups(out, groups), queries.shape[0]), join_lse(lse, groups)

    # -- decode -----------------------------------------------------------------------------------------------------

    def plan_decode(self, batch: DecodeBatch) -> None:
        index = self._index.step(batch)
        with self._staging():
            self._plan_step(batch, index)

    def _plan_step(self, batch: DecodeBatch, index: ResidencyIndex) -> None:
        if not batch.recorded:
            self._decode = self._plan_layers(
                index, self._index.host, self._decode_wrappers, self._new_decode, self._plan
            )
            return
        size = index.indptr.shape[1] - 1
        if size not in self._recorded:
            self._recorded[size] = [self._new_recorded(index.at(layer), layer) for layer in range(len(index.indptr))]
        self._decode = []
        for layer, wrapper in enumerate(self._recorded[size]):
            # The buffers are the lists themselves: there are no indices to copy, and `indptr` is copied onto itself.
            indices = index.indices[layer]
            self._plan(wrapper, self._index.host[layer], indices[:0])
            self._decode.append((Planned(wrapper, [indices], None), 0))

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        group, number = self._decode[self._memory.layer_of(planes)]
        q = split_groups(queries, self._memory.groups).contiguous()
        out = group.ready(number).run(q, self._pages, **self._arguments(planes, q, scale))
        return join_groups(out, self._memory.groups)

    def init_graphs(self, max_batch: int) -> None:
        self._index.reserve(max_batch)
        # A graph holds the addresses of a layer's schedule; batch sizes take turns, so they share it.
        size = RECORDED_PLAN_BYTES + 64 * max_batch * self._memory.groups
        device = self._memory.arena.device
        self._schedules = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self._memory.num_layers)]

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        return self._index.fits(rows, lengths)

    def _arguments(self, planes: slice, q: torch.Tensor, scale: float) -> dict[str, Any]:
        """What differs between layers that share a plan, which is made with scale 1: `q_scale` multiplies it."""
        scales = self._memory.scales_of(planes)
        return {"q_scale": scale, "k_scale": scales.key, "v_scale": scales.value, "out": torch.empty_like(q)}

    # -- plans ------------------------------------------------------------------------------------------------------

    def _plan_layers(
        self, index: ResidencyIndex, host: torch.Tensor, wrappers: list[Any], new: Any, plan: Any
    ) -> list[tuple[Planned, int]]:
        """One plan per distinct row of `host`; for each layer its group and its number in it."""
        layers_of: dict[bytes, list[int]] = {}
        for layer, indptr in enumerate(host):
            layers_of.setdefault(indptr.numpy().tobytes(), []).append(layer)
        planned: list[tuple[Planned, int] | None] = [None] * len(host)
        for number, layers in enumerate(layers_of.values()):
            if number == len(wrappers):
                wrappers.append(new())
            indptr = host[layers[0]]
            indices = [index.indices[layer, : int(indptr[-1])] for layer in layers]
            shared = torch.empty_like(indices[0]) if len(layers) > 1 else None
            plan(wrappers[number], indptr, indices[0] if shared is None else shared)
            group = Planned(wrappers[number], indices, shared)
            for place, layer in enumerate(layers):
                planned[layer] = (group, place)
        return [entry for entry in planned if entry is not None]

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        """Around planning: a wrapper's schedule goes to the device from one pinned buffer, by a copy that is queued.

        Under overlap scheduling the host may be a step ahead: the schedule of the step before must have been fetched
        before it is overwritten.  It is fetched when that step begins, so the device never runs dry for this.
        """
        if self._fetched is not None:
            self._fetched.synchronize()
        yield
        self._fetched = passed_event(self._memory.arena.device)

    def _plan(self, wrapper: Any, *arguments: torch.Tensor, **options: Any) -> None:
        """Plan a wrapper; all but the indices on the host, so that nothing is read back."""
        sequences = arguments[-2].numel() - 1
        ones = torch.ones(sequences, dtype=torch.int32)
        sizes = (self._heads, self._kv_heads, self._dim, 1)
        wrapper.plan(*arguments, ones, *sizes, sm_scale=1.0, **self._types, **options)

    def _new_prefill(self) -> Any:
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        return self._shrink(wrapper)

    def _new_decode(self) -> Any:
        return self._shrink(self._decode_wrapper())

    def _decode_wrapper(self, **buffers: Any) -> Any:
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_tensor_cores=self._heads >= TENSOR_CORE_GROUP * self._kv_heads or self._pages.dtype in FP8,
            backend="fa2",
            **buffers,
        )

    def _new_recorded(self, lists: ResidencyIndex, layer: int) -> Any:
        wrapper = self._decode_wrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=lists.indptr,
            paged_kv_indices_buffer=lists.indices,
            paged_kv_last_page_len_buffer=torch.ones(
                lists.indptr.numel() - 1, dtype=torch.int32, device=lists.indptr.device
            ),
        )
        return self._shrink(wrapper, self._schedules[layer])

    def _shrink(self, wrapper: Any, schedule: torch.Tensor | None = None) -> Any:
        """Instead of the 8 MB on the device, and as many pinned, that every wrapper comes with."""
        if schedule is None:
            schedule = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=self._workspace.device)
        wrapper.reset_workspace_buffer(self._workspace, schedule)
        return wrapper


def _library() -> Any:
    import flashinfer

    return flashinfer
