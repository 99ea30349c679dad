"""SGLang's attention backend over the arena: resolves cells once per forward, observes queries for scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from vlcache_sgl.runtime.arena import KVArena
from vlcache_sgl.runtime.attention import torch_provider
from vlcache_sgl.runtime.attention.decode_index import DecodeIndex, RowCells, collect
from vlcache_sgl.runtime.attention.torch_provider import Gather, prefix_keys_values
from vlcache_sgl.runtime.compressor import Compressor
from vlcache_sgl.runtime.requests import CompressionJob


@dataclass(frozen=True)
class ExtendRequest:
    """One request of a prefill batch."""

    tokens: slice
    """Its rows in the batch."""
    begin: int
    """Position of its first new token."""
    prefix: RowCells | None
    """Kept cells of its earlier tokens."""
    observed: CompressionJob | None
    """Its job when rows of this chunk vote."""


class ResidencyBackend(AttentionBackend):
    """Attention that reads and writes cells instead of slots."""

    def __init__(self, model_runner: Any, compressor: Compressor) -> None:
        super().__init__()
        self.arena: KVArena = model_runner.token_to_kv_pool
        self.token_to_kv_pool = self.arena
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.compressor = compressor
        self.index = DecodeIndex(self.arena.residency, self.req_to_token_pool.req_to_token)
        self._gather = Gather(self.arena.arena)
        self._write_cells = torch.empty(0)
        self._requests: list[ExtendRequest] = []
        self.jobs: list[CompressionJob | None] | None = None
        """Jobs of the forward that runs now, one per request; None when none is to be scored."""

    def support_triton(self) -> bool:
        return False

    # -- once per forward -------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if forward_batch.forward_mode.is_idle():
            return
        self._write_cells = self.arena.write_cells(forward_batch.out_cache_loc)
        rows = forward_batch.req_pool_indices.tolist()
        if forward_batch.forward_mode.is_decode():
            self.index.step(rows, forward_batch.seq_lens_cpu.tolist(), self._write_cells)
        else:
            self._requests = self._plan_extend(forward_batch, rows)

    def _plan_extend(self, forward_batch: Any, rows: list[int]) -> list[ExtendRequest]:
        jobs = self.jobs or [None] * len(rows)
        req_to_token = self.req_to_token_pool.req_to_token
        requests = []
        first = 0
        for row, begin, count, job in zip(
            rows, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, jobs, strict=True
        ):
            self.index.invalidate(row)
            prefix = collect(self.arena.residency, req_to_token[row, :begin].to(torch.int64)) if begin else None
            votes = job is not None and job.scoring is not None and job.scoring.rows_in(begin, begin + count)
            requests.append(ExtendRequest(slice(first, first + count), begin, prefix, job if votes else None))
            first += count
        return requests

    # -- once per layer ---------------------------------------------------------------------------------------------

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        planes = self.arena.planes_of(layer.layer_id)
        if save_kv_cache:
            self.arena.write(self._write_cells[planes], k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        keys = k.view(-1, layer.tp_k_head_num, layer.head_dim)
        values = v.view(-1, layer.tp_v_head_num, layer.head_dim)
        output = torch.empty_like(queries)
        for request in self._requests:
            part = request.tokens
            prefix = valid = None
            if request.prefix is not None:
                prefix, valid = prefix_keys_values(self._gather, request.prefix, planes)
            output[part] = torch_provider.extend(queries[part], keys[part], values[part], prefix, valid, layer.scaling)
            if request.observed is not None:
                self.compressor.observe(
                    request.observed, layer.layer_id, request.begin, queries[part], keys[part], prefix, layer.scaling
                )
        return output.view(q.shape[0], -1)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        planes = self.arena.planes_of(layer.layer_id)
        if save_kv_cache:
            self.arena.write(self._write_cells[planes], k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        output = torch_provider.decode(queries, self.index, planes, self._gather, layer.scaling)
        return output.reshape(queries.shape[0], -1)
