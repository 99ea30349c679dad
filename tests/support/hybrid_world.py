"""The scheduler's life of a hybrid: `scheduler_world`, with SGLang's pool of states and its component of the tree.

A state is one number: which tokens it has seen.  Who goes on from a state that has seen others reads another number.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from scheduler_world import World
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.allocation import ensure_mamba_capacity
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from vlcache_sgl.sglang_hooks.jobs import job_of

STATES_PER_REQUEST = 5
RUNNING = 12
"""Requests that the world lets run at once."""


class HybridWorld(World):
    """One scheduler of a hybrid.

    Args:
        buffer: whether SGLang keeps states in the middle of chunks (``extra_buffer``), as its settings must say, and
            may schedule ahead of results.
        world: as of `World`.
    """

    rows: HybridReqToTokenPool

    def __init__(self, *, buffer: bool, states: int = STATES_PER_REQUEST * RUNNING, **world: Any) -> None:
        self.buffer, self.states = buffer, states
        super().__init__(**world)
        self.choice = replace(self.choice, share="policy")

    def _make_rows(self, max_context_len: int) -> HybridReqToTokenPool:
        shape = Mamba2StateShape.create(
            tp_world_size=1, intermediate_size=1, n_groups=1, num_heads=1, head_dim=1, state_size=1, conv_kernel=2
        )
        return HybridReqToTokenPool(
            size=16,
            mamba_size=self.states,
            mamba_spec_state_size=16,
            max_context_len=max_context_len,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=shape, layers=[0]),
            mamba_layer_ids=[0],
            enable_mamba_extra_buffer=self.buffer,
            enable_overlap_schedule=self.buffer,
        )

    def _components(self) -> dict[str, Any]:
        components = (ComponentType.FULL, ComponentType.MAMBA)
        return {"tree_components": components, "enable_mamba_extra_buffer": self.buffer}

    # -- states -------------------------------------------------------------------------------------------------------

    @property
    def _states(self) -> torch.Tensor:
        """`[slots]`, float32."""
        states: torch.Tensor = self.rows.mamba_pool.mamba_cache.temporal[0].view(-1)
        return states

    def _mark(self, req: Req, end: int) -> float:
        """What a state has seen, a whole number that float32 holds exactly."""
        tokens = [*req.origin_input_ids, *req.output_ids]
        return float(zlib.crc32(repr((req.extra_key, tokens[:end])).encode()) % 2**24)

    def _before_rows(self, reqs: list[Req]) -> None:
        ensure_mamba_capacity(self.rows, reqs, self.tree)

    def _compute_state(self, req: Req, begin: int, end: int) -> None:
        kv, states = req.kv, self._states
        if kv.mamba_cow_src_index is not None:
            states[kv.mamba_pool_idx] = states[kv.mamba_cow_src_index]
        elif kv.mamba_needs_clear:
            states[kv.mamba_pool_idx] = self._mark(req, 0)
        kv.mamba_cow_src_index, kv.mamba_needs_clear = None, False
        assert states[kv.mamba_pool_idx] == self._mark(req, begin), f"{req.rid} goes on from a state that saw others"
        if self.buffer and end == req.extend_end:
            batch = SimpleNamespace(
                tree_cache=self.tree,
                req_to_token_pool=self.rows,
                model_config=SimpleNamespace(hf_text_config=SimpleNamespace(mamba_chunk_size=self.tree.page_size * 4)),
            )
            entry = ScheduleBatch._mamba_radix_cache_v2_req_prepare_for_extend(batch, req)
            if entry.track_mask:
                slot = kv.mamba_ping_pong_track_buffer[entry.track_position]
                states[slot] = self._mark(req, kv.mamba_last_track_seqlen)
        states[kv.mamba_pool_idx] = self._mark(req, end)

    def _reject(self, req: Req) -> None:
        """As SGLang's scheduler does."""
        req.kv.mamba_cow_src_index, req.kv.mamba_needs_clear = None, False
        if req.kv.holds_mamba:
            self.rows.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
            req.kv.mamba_pool_idx = None

    def check(self) -> None:
        super().check()
        held = sum(self._held(req) for req in self.owners())
        tree = self.tree.mamba_evictable_size() + self.tree.mamba_protected_size()
        free = self.rows.mamba_allocator.available_size()
        assert free + tree + held == self.states, f"{free} states are free, {tree} in the tree, {held} held"
        for req in self.owners():
            assert self._states[req.kv.mamba_pool_idx] == self._mark(req, req.kv.kv_allocated_len)
            if (job := job_of(req)) is not None and job.state is not None:
                assert self._states[job.state.slot] == self._mark(req, job.state.end), "a kept state has changed"

    def _held(self, req: Req) -> int:
        tracking, job = req.kv.mamba_ping_pong_track_buffer, job_of(req)
        return (
            int(req.kv.holds_mamba)
            + (0 if tracking is None else len(tracking))
            + int(job is not None and job.state is not None)
        )
