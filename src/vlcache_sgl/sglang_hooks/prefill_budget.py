"""How many tokens SGLang's scheduler may admit to a prefill: what cells are really there."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from vlcache_sgl.memory.accounting import CellAccounting


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

    def _available_and_evictable(self) -> int:
        return min(int(super()._available_and_evictable()), self._accounting.evictable_physical_tokens())

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """A continuing prompt is asked for its next chunk by `fit_chunk`, which knows how long it is."""
        return chunk_limit

    def fit_chunk(self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int) -> int | None:
        """The next chunk of a continuing prompt; None parks it until running requests have given memory back.

        What they are expected to decode stays theirs.  All or nothing: a chunk of the few tokens that are left would
        cost a forward, and the running requests their next step.
        """
        if min(extend_input_len, chunk_limit) <= self.remaining_total:
            return chunk_limit
        # SGLang counts a chunk for the parked prompt if anything else is admitted in this pass: admit nothing.
        self._parked = True
        return None

    def has_capacity(self) -> bool:
        return not self._parked and bool(super().has_capacity())

    def check_prefill(self, **request: Any) -> tuple[bool, int | None]:
        return (False, None) if self._parked else super().check_prefill(**request)
