"""Sharing without loss, on the scheduler's side: host memory of the right size, who may use it, what it is charged.

See `compression/exact.py` for what happens to tokens.
"""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from vlcache_sgl.api import Prompt
from vlcache_sgl.api.prompt import select_rows
from vlcache_sgl.capacity import POOLS_IN_HOST, RESERVED_TOKENS, KVShape, longest_answer
from vlcache_sgl.compression.exact import HostMemory
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.config import ConfigError, HostSize, KVConfig
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator, evict_until
from vlcache_sgl.sglang_hooks.facades import Req
from vlcache_sgl.sglang_hooks.jobs import job_of
from vlcache_sgl.sglang_hooks.prefill_budget import HostCharge

MIN_CHUNK = 32
"""Tokens of the smallest prefill chunk that a prompt larger than the arena is cut into."""
SHARE_OF_FREE = 0.25
"""With ``auto``, the most of the machine's free memory that is taken, per rank."""


def host_tokens(size: HostSize, shape: KVShape, pool_tokens: int) -> int:
    """Tokens that host memory holds, on one rank; 0: there is none.

    Args:
        size: what the user has said.
        shape: of one token.
        pool_tokens: uncompressed tokens of the KV pool.
    """
    if size == "off":
        return 0
    if size != "auto":
        return int(size) // shape.token_bytes
    free = psutil.virtual_memory().available * SHARE_OF_FREE
    return min(POOLS_IN_HOST * pool_tokens, int(free) // shape.token_bytes)


class TreeRoom:
    """`Room`: the prefix tree gives way, least recently used first.

    Args:
        allocator: of slots and cells.
    """

    def __init__(self, allocator: VirtualSlotAllocator) -> None:
        self._allocator = allocator
        self._accounting = allocator.accounting
        self.tree: Any = None
        """SGLang's; None until it is built."""

    def make_host_room(self, tokens: int) -> None:
        host = self._accounting.host
        assert host is not None
        if not host.has_room(tokens):
            evict_until(self.tree, lambda: tokens - host.free_tokens)

    def make_cells(self, cells: int) -> None:
        evict_until(self.tree, lambda: self._accounting.tokens_to_evict(cells))

    def take_slots(self, count: int) -> torch.Tensor | None:
        evict_until(self.tree, lambda: count - int(self._allocator.available_size()))
        return self._allocator.alloc_bare(count)

    def give_slots(self, slots: torch.Tensor) -> None:
        self._allocator.free(slots)


class HostSharing:
    """One scheduler's host memory.

    Args:
        memory: moves tokens.
        room: is told of the prefix tree.
        physical_tokens: uncompressed tokens of the arena.
        model: what policies are told of the model.
    """

    def __init__(self, memory: HostMemory, room: TreeRoom, physical_tokens: int, model: Prompt) -> None:
        self.memory = memory
        self._room = room
        self._physical = physical_tokens
        self._model = model

    @classmethod
    def build(cls, config: KVConfig, tokens: int, allocator: VirtualSlotAllocator, model: Prompt) -> HostSharing | None:
        """Host memory for `tokens` tokens; None: there is none.

        Raises:
            ConfigError: it cannot be had.
        """
        if tokens < 1:
            return None
        accounting = allocator.accounting
        residency = accounting.residency
        try:
            accounting.host = HostPool(residency.num_planes, residency.num_slots, tokens, accounting.arena.raw)
        except MemoryError as error:
            raise ConfigError(f"--kv-host-memory {config.host_memory}: {error}") from error
        room = TreeRoom(allocator)
        memory = HostMemory(accounting, room, recall=config.recall > 0)
        return cls(memory, room, accounting.physical_tokens, model)

    def attach(self, tree: Any) -> None:
        """The prefix tree exists now."""
        self._room.tree = tree

    # -- requests ---------------------------------------------------------------------------------------------------

    def admits(self, job: CompressionJob) -> bool:
        """Whether host memory can hold the prompt at all."""
        return job.asked.length <= self.memory.host.num_tokens

    def begin(self, req: Req, job: CompressionJob) -> None:
        """Let `req` share without loss."""
        vision = job.asked.vision
        prompt = replace(self._model, length=job.asked.length, start=vision[0].begin if vision else 0, vision=vision)
        rows = [select_rows(need.rows, prompt) for need in job.asked.choice.policy.needs if need.rows.kind != "none"]
        first_row = min((span.begin for span in rows if span.end > span.begin), default=job.asked.length)
        owned = prompt.owned
        kept = job.asked.choice.budget.target(owned, job.asked.length, self._model.num_layers) / self._model.num_layers
        if getattr(job.asked.choice.policy.allocator, "budget_sum", "exact") == "free" or owned < job.asked.min_tokens:
            kept = owned
        length = max(1, job.asked.length)
        ratio = self.memory.share_kept(min(1.0, (prompt.start + kept + job.asked.choice.recall) / length), length)

        def abort(message: str, status: HTTPStatus) -> None:
            req.to_finish = FINISH_ABORT(message, status, status.phrase.replace(" ", ""))

        job.host = HostShare(first_row=first_row, ratio=ratio, abort=abort)

    def fit(self, req: Req, job: CompressionJob | None) -> str | None:
        """Shorten the answer of `req` to what fits behind its prompt; or say why not even the prompt fits."""
        length, wanted = len(req.origin_input_ids), req.sampling_params.max_new_tokens
        if job is None or job.host is None:
            room = longest_answer(length, wanted, self._physical)
            if room is None:
                return f"the prompt has {length} tokens, and the KV cache holds {self._physical} uncompressed"
        else:
            charge = HostCharge.of(job, self.memory.layers, self.memory.staging.sets)
            room = self._physical - RESERVED_TOKENS - MIN_CHUNK - charge.beside(last=False)
            if room < 1:
                return (
                    f"the prompt has {length} tokens, of which {charge.kept} are kept: with a chunk and a staged layer "
                    f"more than the {self._physical} that the KV cache holds uncompressed"
                )
        req.sampling_params.max_new_tokens = min(wanted, room)
        req.sampling_params.min_new_tokens = min(req.sampling_params.min_new_tokens, room)
        return None

    def limit_hit(self, result: int, req: Req, *_: Any) -> int:
        """After SGLang has said how much of a prompt may come from the prefix cache: no query row."""
        job = job_of(req)
        return int(result) if job is None or job.host is None else min(int(result), job.host.first_row)


def prefix_positions(req: Req, end: int, device: torch.device) -> torch.Tensor:
    """Rotary positions of the first `end` tokens of a prompt, `[end]` or `[3, end]`."""
    mrope = None if req.multimodal_inputs is None else req.multimodal_inputs.mrope_positions
    if mrope is None:
        return torch.arange(end, device=device)
    positions: torch.Tensor = mrope[:, :end].to(device)
    return positions
