"""Virtual slots for SGLang, cells for us: every capacity question is answered by what is physically there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from vlcache_sgl.capacity import longest_answer
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.sglang_hooks.arena import arena_of
from vlcache_sgl.sglang_hooks.prefill_budget import CellPrefillBudget


def evict_until(tree: Any, missing: Callable[[], int]) -> None:
    """Drop prefixes of `tree`, least recently used first, until no tokens are `missing` or nothing can be dropped.

    A compressed token gives back fewer cells than planes, so it may take several rounds.
    """
    while (tokens := missing()) > 0:
        if tree.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted == 0:
            return


class VirtualSlotAllocator(TokenToKVPoolAllocator):
    """Allocates virtual slots together with one cell per plane.

    ``available_size()`` counts virtual slots, as SGLang's leak checks expect; whether cells suffice is asked through
    the capacity hooks that SGLang has for byte-accounted pools.

    Args:
        pool: SGLang's KV pool, the arena or with the arena in it.

    Attributes:
        accounting: who holds the cells.
    """

    def __init__(self, pool: Any, *, physical_tokens: int, need_sort: bool) -> None:
        self.accounting = CellAccounting(arena_of(pool).arena, physical_tokens)
        super().__init__(pool.size, pool.dtype, pool.device, pool, need_sort)

    def clear(self) -> None:
        super().clear()
        self.accounting.clear()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if not self.accounting.has_room(need_size):
            return None
        slots: torch.Tensor | None = super().alloc(need_size)
        if slots is not None:
            self.accounting.residency.attach(slots)
        return slots

    def alloc_bare(self, count: int) -> torch.Tensor | None:
        """`[count]` int64, slots without cells; None: there are not so many."""
        slots: torch.Tensor | None = super().alloc(count)
        return slots

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel() and self.free_group is None:
            self.accounting.release(free_index)
        super().free(free_index)

    # -- capacity hooks of the scheduler ----------------------------------------------------------------------------

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> CellPrefillBudget:
        return CellPrefillBudget(self, self.accounting, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool:
        if self.can_allocate(num_tokens):  # where compression is about to give back enough, this waits for it
            return True
        super().evict_to_free_tokens(tree_cache, num_tokens)
        if tree_cache is not None and tree_cache.supports_prefix_sharing():
            cells = num_tokens * self.accounting.residency.num_planes
            evict_until(tree_cache, lambda: self.accounting.tokens_to_evict(cells))
        return self.can_allocate(num_tokens)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `num_tokens` slots and all their cells are free now."""
        return bool(self.available_size() >= num_tokens) and self.accounting.has_room(num_tokens)

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        return self.evict_to_free_tokens(tree_cache, num_tokens)

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int | None:
        if self.accounting.host is not None:
            return max_new_tokens  # `HostSharing.fit` decides, which knows how much of the prompt stays
        capacity = min(token_capacity, self.accounting.physical_tokens)
        return longest_answer(input_tokens, max_new_tokens, capacity)

    def verify_byte_accounting(self) -> list[str]:
        return self.accounting.verify()
