"""SGLang's attention backend over the arena: resolves cells once per forward, observes queries for scoring.

Streams.  SGLang's scheduler allocates slots, and with them cells, on its own stream, while the forward before still
runs on another.  Everything that both touch (`req_to_token`, the residency table) is read here in
`init_forward_metadata*`, that is before the first kernel of a replayed graph; SGLang's barrier, which keeps the
scheduler's writes behind the reads of the running forward, therefore holds for the table as for its own buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from vlcache_kernels.arena_write import arena_write
from vlcache_kernels.attention_stats import StatsRequest
from vlcache_sgl.attention.base import HeadShape, Provider
from vlcache_sgl.attention.factory import make_provider
from vlcache_sgl.attention.warm_up import compile_kernels
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.compression.measured import Measured
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, ExtendRequest, Memory
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.recall.areas import Recall, RecallArea
from vlcache_sgl.scoring.batch import BatchScoring
from vlcache_sgl.sglang_hooks import triton_kernels
from vlcache_sgl.sglang_hooks.arena import arena_of, scales_of
from vlcache_sgl.sglang_hooks.facades import AttentionLayer, ForwardBatch, GraphForwardBatch, ModelRunner
from vlcache_sgl.streams import to_device


class ResidencyBackend(AttentionBackend):
    """Attention that reads and writes cells instead of slots.

    Args:
        model_runner: SGLang's.
        compressor: is shown the queries of the rows that policies ask for.
        provider: the kernels to use, by the name of the backend of SGLang whose place this one takes.
        num_heads: query heads of this rank.
    """

    def __init__(self, model_runner: ModelRunner, compressor: Compressor, provider: str, num_heads: int) -> None:
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.arena: Arena = arena_of(self.token_to_kv_pool).arena
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.compressor = compressor
        self._memory = Memory(
            self.arena.cells,
            self.arena.residency,
            self.req_to_token_pool.req_to_token,
            self.arena.groups,
            self.arena.scales,
            self.arena.window,
        )
        self._shape = HeadShape(num_heads, model_runner.dtype)
        splits = int(getattr(model_runner.server_args, "triton_attention_num_kv_splits", None) or 8)
        self.provider: Provider = make_provider(
            provider, self._memory, self._shape, triton_kernels.attention_kernels, kv_splits=splits
        )
        # Where this forward writes, `[planes, tokens]`: int64 for torch, int32 (-1: nowhere) for kernels of a device.
        self._cells = torch.empty(0)
        self._numbers = torch.empty(0, dtype=torch.int64)
        # The same at fixed addresses, for graphs: `[planes, most requests]` and 0, 1, 2, ...
        self._graph_cells = self._graph_numbers = torch.empty(0)
        self._requests: tuple[ExtendRequest, ...] = ()
        self._observed: list[CompressionJob | None] = []
        self._batch_scoring: BatchScoring | None = None
        self._watched: list[tuple[int, Measured, torch.Tensor]] = []
        self.jobs: list[CompressionJob | None] | None = None
        """Jobs of the forward that runs now, one per request; None when none is to be scored."""
        self._area_rows = torch.empty(0, dtype=torch.int64)
        self.areas: list[tuple[int, RecallArea]] = []
        """Of requests of the forward that runs now which decode and get evicted tokens back, with the rows of their
        tokens in it."""
        self.rows: list[int] | None = None
        """Request rows of the forward that runs now, where the host knows them: asking the device would wait for it."""

    def compile_kernels(self, wants: Callable[[], Iterable[StatsRequest]]) -> None:
        """Compile what a GPU runs, before requests come; `wants` says which statistics the default policy asks for."""
        if self.provider.lists is not None:
            compile_kernels(self._memory, self._shape, self.provider.lists, wants())
            if self.compressor.host is not None and self.compressor.host.recall is not None:
                self.compressor.host.recall.compile_kernels(self._shape.num_heads)

    def support_triton(self) -> bool:
        return self.provider.on_device

    def invalidate(self, row: int) -> None:
        """The slots of a request row have changed."""
        self.provider.invalidate(row)

    def fits_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether the recorded buffers hold what this decode step reads; beyond that it runs without a graph."""
        if self.areas:
            return False  # what is brought back is decided on the host
        lengths = forward_batch.seq_lens_cpu.tolist()
        return self.provider.fits_graph(self._rows_of(forward_batch), lengths)

    def _cells_of(self, layer: AttentionLayer) -> LayerCells:
        """Where the layer's tokens are, its scales known; SGLang reads them from the layer each time, too."""
        where = self.arena.layer(layer.layer_id)
        self.arena.set_scales(where, scales_of(layer))
        return where

    # -- once per forward -------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode.is_idle():
            return
        slots = forward_batch.out_cache_loc
        self._cells = self.arena.write_cells(slots)
        if self.provider.on_device:
            self._cells = self._cells.to(torch.int32)
            self._numbers = torch.arange(slots.numel(), device=slots.device)
        self._batch_scoring = None
        self._watched = []
        if self.areas:
            self._recall.step([area for _, area in self.areas])
            self._area_rows = to_device(torch.tensor([row for row, _ in self.areas]), self.arena.device)
        if forward_batch.forward_mode.is_decode():
            self._plan_decode(forward_batch, self._cells)
            self._plan_watched(forward_batch)
        else:
            self._plan_extend(forward_batch)

    def _plan_decode(
        self,
        forward_batch: ForwardBatch | GraphForwardBatch,
        cells: torch.Tensor,
        padding: int = 0,
        recorded: bool = False,
    ) -> None:
        real = forward_batch.batch_size - padding
        self.provider.plan_decode(
            DecodeBatch(
                rows=self._rows_of(forward_batch)[:real] if real else [],
                lengths=forward_batch.seq_lens_cpu[:real].tolist(),
                row_tensor=forward_batch.req_pool_indices,
                length_tensor=forward_batch.seq_lens,
                new_cells=cells,
                padding=padding,
                recorded=recorded,
            )
        )

    def _plan_extend(self, forward_batch: ForwardBatch) -> None:
        rows = self._rows_of(forward_batch)
        jobs = self.jobs or [None] * len(rows)
        requests, self._observed = [], []
        first = 0
        for row, begin, count, job in zip(
            rows, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, jobs, strict=True
        ):
            observed = (
                job is not None
                and job.progress.scoring is not None
                and job.progress.scoring.rows_in(begin, begin + count)
            )
            requests.append(ExtendRequest(row, slice(first, first + count), int(begin), observed))
            self._observed.append(job if observed else None)
            first += count
        self._requests = tuple(requests)
        if self.provider.on_device and any(request.observed for request in requests):
            self._batch_scoring = self.compressor.plan_batch(
                self._memory, self._requests, [None if job is None else job.progress.scoring for job in self._observed]
            )
        self.provider.plan_extend(
            ExtendBatch(
                self._requests,
                forward_batch.req_pool_indices,
                forward_batch.extend_prefix_lens,
                forward_batch.seq_lens,
                want_lse=self._batch_scoring is not None and self._batch_scoring.takes_lse,
            )
        )

    def _plan_watched(self, forward_batch: ForwardBatch) -> None:
        """Look up the cells of requests whose attention is looked at: few."""
        for number, (row, job) in enumerate(zip(self._rows_of(forward_batch), self.jobs or (), strict=False)):
            if job is not None and job.report.measured is not None:
                slots = self.req_to_token_pool.req_to_token[row, : int(forward_batch.seq_lens_cpu[number])]
                self._watched.append((number, job.report.measured, self.arena.write_cells(slots.to(torch.int64))))

    @property
    def _recall(self) -> Recall:
        """Where there are areas, there is recall."""
        assert self.compressor.host is not None
        assert self.compressor.host.recall is not None
        return self.compressor.host.recall

    def _refresh_areas(self, layer: LayerCells, queries: torch.Tensor) -> None:
        """Bring back what one layer needs for `queries` `[rows, H, D]`."""
        if self.areas:
            self._recall.refresh(layer.planes, queries.index_select(0, self._area_rows))

    def _rows_of(self, forward_batch: ForwardBatch | GraphForwardBatch) -> list[int]:
        if self.rows is not None and len(self.rows) <= forward_batch.batch_size:
            return self.rows
        rows: list[int] = forward_batch.req_pool_indices.tolist()  # waits for the device: warm-up only
        return rows

    # -- CUDA graphs of decode --------------------------------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        device = self.arena.device
        self._graph_cells = torch.full((self.arena.num_planes, max_bs), -1, dtype=torch.int32, device=device)
        self._graph_numbers = torch.arange(max_bs, device=device)
        self.provider.init_graphs(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padded requests are row 0 of `req_to_token`, whose first slot is the padding slot, which has one cell."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: GraphForwardBatch, in_capture: bool = False) -> None:
        """Fill what the graph of this batch size reads: cells to write to and lists, at fixed addresses."""
        size = forward_batch.batch_size
        padding = size if in_capture else forward_batch.num_padding
        cells = self._graph_cells[:, :size]
        cells[:, size - padding :] = -1
        if padding < size:
            slots = forward_batch.out_cache_loc[: size - padding]
            cells[:, : size - padding] = self.arena.write_cells(slots)
        self._cells, self._numbers = cells, self._graph_numbers[:size]
        self._plan_decode(forward_batch, cells, padding, recorded=True)

    # -- once per layer ---------------------------------------------------------------------------------------------

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        _require_plain(options)
        where = self._cells_of(layer)
        queries = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        if k is not None:
            keys = k.view(-1, layer.tp_k_head_num, layer.head_dim)
            values = v.view(-1, layer.tp_v_head_num, layer.head_dim)
            if save_kv_cache:
                self._write(where, keys, values)
        if k is None or (save_kv_cache and keys.dtype != self.arena.cells.dtype):
            # What is attended to, now and by later chunks and requests, is what cells hold.  Of a layer without keys of
            # its own they are another layer's.
            keys, values = self.arena.read(where, self._cells[where.planes], queries.dtype).unbind(1)

        def observe(number: int, prefix: torch.Tensor | None, valid: torch.Tensor | None) -> None:
            job, request = self._observed[number], self._requests[number]
            assert job is not None
            if k is None:  # another layer's keys, which its own rows have voted on
                return
            part = request.tokens
            self.compressor.observe(
                job, where.number, request.begin, queries[part], keys[part], prefix, valid, layer.scaling
            )

        if self.compressor.host is not None:
            self.compressor.host.staging.fill(where.planes)
        if where.window is not None:
            output = self.provider.extend_in_window(where, queries, keys, values, layer.scaling)
            return output.view(q.shape[0], -1)
        self._refresh_areas(where, queries)
        output, lse = self.provider.extend(where.planes, queries, keys, values, layer.scaling, observe)
        if self._batch_scoring is not None:
            self.compressor.observe_batch(self._batch_scoring, where.planes, queries, layer.scaling, lse)
        return output.view(q.shape[0], -1)

    def forward_decode(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        _require_plain(options)
        where = self._cells_of(layer)
        if save_kv_cache and k is not None:
            shape = (-1, layer.tp_k_head_num, layer.head_dim)
            self._write(where, k.view(shape), v.view(shape))
        queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        if where.window is not None:
            return self.provider.decode_in_window(where, queries, layer.scaling).reshape(queries.shape[0], -1)
        for number, measured, cells in self._watched:
            keys = self.arena.read(where, cells[where.planes], queries.dtype)[:, 0]
            measured.observe(where.number, queries[number], keys, layer.scaling)
        self._refresh_areas(where, queries)
        output = self.provider.decode(where.planes, queries, layer.scaling)
        return output.reshape(queries.shape[0], -1)

    def _write(self, layer: LayerCells, keys: torch.Tensor, values: torch.Tensor) -> None:
        cells = self._cells[layer.planes]
        if not self.provider.on_device:
            self.arena.write(cells, keys, values, layer)
            return
        # The kernel looks a token up in the table it is given: here the tokens of this forward, in order.
        tokens, scales = cells.shape[1], self.arena.scales_of(layer)
        arena_write(
            layer.view(self.arena.cells),
            keys[:tokens],
            values[:tokens],
            self._numbers,
            cells,
            key_scale=scales.key,
            value_scale=scales.value,
        )


def _require_plain(options: dict[str, Any]) -> None:
    """Refuse what would be left out silently: attention sinks, score modifications and the like."""
    asked = [name for name, value in options.items() if value is not None]
    if asked:
        raise NotImplementedError(f"--kv-policy does not support attention with {', '.join(asked)}")
