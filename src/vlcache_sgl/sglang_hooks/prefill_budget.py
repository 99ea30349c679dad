"""How many tokens SGLang's scheduler may admit to a prefill: what cells are really there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.staging import staged_layers
from vlcache_sgl.sglang_hooks.facades import Req
from vlcache_sgl.sglang_hooks.image_states import tokens_to_image_end
from vlcache_sgl.sglang_hooks.jobs import job_of


@dataclass(frozen=True)
class HostCharge:
    """What a prompt that shares without loss takes beside the chunk that is computed, in uncompressed tokens."""

    length: int
    prefix: int
    """Tokens before what is computed next."""
    layers: int
    kept: int
    """Tokens that it keeps at most, averaged over layers."""
    staged: int = 1
    """Layers that are staged at a time."""

    @classmethod
    def of(cls, job: CompressionJob, layers: int, staged: int, prefix: int = 0) -> HostCharge:
        """For a request with `job.host`; `staged`: layers that are staged at a time."""
        assert job.host is not None
        return cls(job.asked.length, prefix, layers, math.ceil(job.host.ratio * job.asked.length), staged)

    def beside(self, *, last: bool) -> int:
        """While a chunk runs, the tokens before it are staged for some layers at a time; at the end of the `last`
        one, what is kept of them takes cells."""
        earlier = self.prefix if last else max(self.prefix, self.length)
        return max(math.ceil(self.staged * earlier / self.layers), min(earlier, self.kept))


class CellPrefillBudget(PrefillBudget):
    """Admission by physical tokens: a prompt needs all its cells until its prefill has ended and it is compressed."""

    def __init__(
        self,
        allocator: TokenToKVPoolAllocator,
        accounting: CellAccounting,
        tree_cache: Any,
        *,
        num_mixed_decode_tokens: int = 0,
    ) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._accounting = accounting
        self._parked = False
        self._charge: HostCharge | None = None
        self._cut: int | None = None
        # Beyond `total_offset`, which counts memory: what admitted prompts take of slots and of host memory.
        self._slots = self._host_tokens = 0

    def consider(self, req: Req) -> None:
        """The next questions and reservations are about `req`."""
        job = job_of(req)
        self._cut = tokens_to_image_end(self.tree_cache, req)
        self._charge = (
            None
            if job is None or job.host is None
            else HostCharge.of(
                job, self._accounting.num_layers, staged_layers(self._accounting.arena.device), int(req.prefix_len)
            )
        )

    def _available_and_evictable(self) -> int:
        slots = int(super()._available_and_evictable()) - self._slots
        return min(slots, self._accounting.evictable_physical_tokens())

    @property
    def cuts(self) -> bool:
        """Whether the next chunk of the request that was considered last goes no further than its image."""
        return self._cut is not None

    def _until_cut(self, extend_input_len: int, limit: int | None) -> int | None:
        """The chunk's largest length, where it must not go beyond the end of the image."""
        if self._cut is None or self._cut >= extend_input_len:
            return limit
        return self._cut if limit is None else min(limit, self._cut)

    def _chunk(self, charge: HostCharge, extend_input_len: int, limit: int | None, others: int) -> tuple[int, int]:
        """The next chunk of a prompt that shares without loss, and tokens that must be free beside it.

        A chunk is made smaller only where it would not fit an empty arena either.
        """
        chunk = extend_input_len if limit is None else min(extend_input_len, limit)
        beside = charge.beside(last=chunk >= extend_input_len) + others
        if chunk + beside >= self._accounting.physical_tokens:
            beside = charge.beside(last=False) + others
            chunk = max(1, min(chunk, self._accounting.physical_tokens - beside - 1))
        return chunk, beside

    def check_prefill(
        self, *, extend_input_len: int, total_tokens: int, chunk_limit: int | None, **request: Any
    ) -> tuple[bool, int | None]:
        if self._parked:
            return False, None
        chunk_limit = self._until_cut(extend_input_len, chunk_limit)
        if self._charge is None:
            fits: tuple[bool, int | None] = super().check_prefill(
                extend_input_len=extend_input_len, total_tokens=total_tokens, chunk_limit=chunk_limit, **request
            )
            return fits
        chunk, beside = self._chunk(self._charge, extend_input_len, chunk_limit, total_tokens - extend_input_len)
        host = self._accounting.host
        assert host is not None
        slots = int(super()._available_and_evictable()) - self.total_offset - self._slots
        enough = (
            chunk + beside < self.remaining_total
            and total_tokens + self._charge.length < slots
            and extend_input_len + self._host_tokens <= host.free_tokens + int(self.tree_cache.evictable_size())
        )
        return (True, chunk if chunk < extend_input_len else chunk_limit) if enough else (False, None)

    def reserve(self, extend_input_len: int, max_new_tokens: int, **options: Any) -> None:
        super().reserve(extend_input_len, max_new_tokens, **options)
        if self._charge is not None:
            beside = self._charge.beside(last=max_new_tokens > 0)
            self.total_offset += beside
            self.current_offset += beside
            self._slots += self._charge.length
            self._host_tokens += self._charge.length

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """A continuing prompt is asked for its next chunk by `fit_chunk`, which knows how long it is."""
        return chunk_limit

    def fit_chunk(self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int) -> int | None:
        """The next chunk of a continuing prompt; None parks it until running requests have given memory back.

        What they are expected to decode stays theirs.  All or nothing: a chunk of the few tokens that are left would
        cost a forward, and the running requests their next step.
        """
        limit = self._until_cut(extend_input_len, chunk_limit)
        assert limit is not None
        chunk_limit = limit
        if self._charge is not None:
            chunk, beside = self._chunk(self._charge, extend_input_len, chunk_limit, 0)
            if chunk + beside <= self.remaining_total:
                return chunk
        elif min(extend_input_len, chunk_limit) <= self.remaining_total:
            return chunk_limit
        # SGLang counts a chunk for the parked prompt if anything else is admitted in this pass: admit nothing.
        self._parked = True
        return None

    def has_capacity(self) -> bool:
        return not self._parked and bool(super().has_capacity())
