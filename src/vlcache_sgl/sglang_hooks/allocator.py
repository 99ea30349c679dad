"""Virtual slots for SGLang, cells for us: every capacity question is answered by what is physically there.

Streams.  On a GPU this object lives on the scheduler's stream, evictions happen on the stream of the forward.  What an
eviction has freed is handed over with an event of the forward's stream (`retire`); when the host next needs cells, it
reclaims it behind the event (`settle`), so that no cell is allocated while the forward that read it may still run, and
marks the handed over tensors as used on its own stream, so that their memory is not given to the forward's stream too
early.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from vlcache_sgl.capacity import longest_answer
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.residency import Eviction
from vlcache_sgl.sglang_hooks.admission import CellPrefillBudget
from vlcache_sgl.sglang_hooks.arena import KVArena

FULL_CHECK_ENTRIES = 4_000_000
"""Residency tables up to this size are recounted whenever SGLang is idle; of larger ones only totals are checked."""


class VirtualSlotAllocator(TokenToKVPoolAllocator):
    """Allocates virtual slots together with one cell per plane.

    ``available_size()`` counts virtual slots, as SGLang's leak checks expect; whether cells suffice is asked through
    the capacity hooks that SGLang has for byte-accounted pools.
    """

    def __init__(self, arena: KVArena, *, physical_tokens: int, need_sort: bool) -> None:
        self.arena = arena
        self.residency = arena.residency
        self.physical_tokens = physical_tokens
        slots = arena.size + 1
        # Which slots the prefix tree owns, and how many locks cover each: tells what eviction could give back.
        self._in_tree = torch.zeros(slots, dtype=torch.bool, device=arena.device)
        self._locks = torch.zeros(slots, dtype=torch.int32, device=arena.device)
        self._evictable_cells: int | None = None
        self._pending: list[tuple[Any, Eviction]] = []
        self._returned = False
        self.host: HostPool | None = None
        """Where the prefix tree's tokens are; None: without host memory."""
        super().__init__(arena.size, arena.dtype, arena.device, arena, need_sort)

    # -- allocation ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        super().clear()
        self._pending.clear()
        self.residency.clear()
        if self.host is not None:
            self.host.clear()
        self.forget_tree()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        self.settle()
        if need_size * self.residency.num_planes > self.residency.free_cells:
            return None
        slots: torch.Tensor | None = super().alloc(need_size)
        if slots is not None:
            self.residency.attach(slots)
        return slots

    def alloc_bare(self, count: int) -> torch.Tensor | None:
        """Slots `[count]` without cells; None: there are not so many."""
        slots: torch.Tensor | None = super().alloc(count)
        return slots

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel() and self.free_group is None:
            self.settle()
            slots = free_index.to(torch.int64)
            self.residency.detach(slots)
            if self.host is not None:
                self.host.drop(slots)
            self._in_tree[slots] = False
            self._evictable_cells = None
        super().free(free_index)

    # -- eviction: the device does it at the end of the prefill forward, the host learns of it here -----------------

    def retire(self, eviction: Eviction, done: Any | None) -> None:
        """Take note of evicted cells; `done` is the event after which they are really unused (None: now)."""
        self._pending.append((done, eviction))
        if done is None:
            self.settle()

    def settle(self) -> None:
        """Reclaim evicted cells, each after its event.

        Waits for events: tensor-parallel ranks must find the same number of free cells whenever they are asked, and an
        event may have passed on one of them only.  The wait is short, because the host has read the scores that the
        eviction followed from.
        """
        while self._pending:
            done, eviction = self._pending.pop(0)
            if done is not None:
                done.synchronize()
            if eviction.cells.device.type != "cpu":
                stream = torch.get_device_module(eviction.cells.device).current_stream()
                for tensor in (eviction.cells, eviction.slots, eviction.kept_planes):
                    tensor.record_stream(stream)
            self.residency.reclaim(eviction)
            self._evictable_cells = None
            self._returned = True

    def take_returned(self) -> bool:
        """Whether compression has given cells back since this was last asked."""
        self.settle()
        returned, self._returned = self._returned, False
        return returned

    # -- what the tree holds ----------------------------------------------------------------------------------------

    def adopt(self, slots: torch.Tensor) -> None:
        """The prefix tree now owns `slots`."""
        self._in_tree[slots] = True
        self._evictable_cells = None

    def lock(self, slots: torch.Tensor, delta: int) -> None:
        """One more (+1) or one fewer (-1) request relies on the tree's `slots`."""
        self._locks[slots] += delta
        self._evictable_cells = None

    def forget_tree(self) -> None:
        """The tree was reset."""
        self._in_tree.zero_()
        self._locks.zero_()
        self._evictable_cells = None

    def hollow(self, slots: torch.Tensor) -> bool:
        """Free the cells of the tree's `slots` `[tokens]`, which nobody will look for again, unless they are in use.

        The slots stay the tree's.  Returns whether that was done.
        """
        if bool((self._locks[slots] > 0).any()):
            return False
        self.settle()
        self.residency.detach(slots)
        self._evictable_cells = None
        self._returned = True
        return True

    @property
    def tree_cells(self) -> int:
        """Cells held by the prefix tree, locked or not."""
        return int(self.residency.slot_cells[self._in_tree].sum())

    @property
    def request_cells(self) -> int:
        """Cells that requests hold for themselves: what no prefix tree node owns."""
        return self.residency.used_cells - self.tree_cells

    @property
    def evictable_cells(self) -> int:
        """Cells that evicting every unlocked tree node would give back."""
        if self._evictable_cells is None:
            evictable = self._in_tree & (self._locks == 0)
            self._evictable_cells = int(self.residency.slot_cells[evictable].sum())
        return self._evictable_cells

    def free_physical_tokens(self) -> int:
        """Uncompressed tokens that fit without evicting anything."""
        self.settle()
        return self.residency.free_cells // self.residency.num_planes

    def evictable_physical_tokens(self) -> int:
        """Uncompressed tokens that fit in free and evictable cells together."""
        self.settle()
        return (self.residency.free_cells + self.evictable_cells) // self.residency.num_planes

    # -- capacity hooks of the scheduler ----------------------------------------------------------------------------

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> CellPrefillBudget:
        return CellPrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool:
        if not self.can_allocate(num_tokens):
            # What compression is about to give back goes before what somebody may still use.
            self.settle()
        super().evict_to_free_tokens(tree_cache, num_tokens)
        planes = self.residency.num_planes
        if tree_cache is not None and tree_cache.supports_prefix_sharing():
            # A compressed token gives back fewer cells than planes, so it may take several rounds.
            # What is in host memory only gives back none, and stays.
            while self.evictable_cells and (missing := num_tokens * planes - self.residency.free_cells) > 0:
                evicted = tree_cache.evict(EvictParams(num_tokens=-(-missing // planes)))
                if evicted.num_tokens_evicted == 0:
                    break
        return self.can_allocate(num_tokens)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `num_tokens` slots and all their cells are free now."""
        enough_slots = self.available_size() >= num_tokens
        return bool(enough_slots and self.residency.free_cells >= num_tokens * self.residency.num_planes)

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
        capacity = min(token_capacity, self.physical_tokens)
        if self.host is not None and longest_answer(input_tokens, max_new_tokens, capacity) is None:
            return max_new_tokens  # host memory may hold it: decided where the request's budget is known
        return longest_answer(input_tokens, max_new_tokens, capacity)

    def verify_byte_accounting(self) -> list[str]:
        self.settle()
        residency = self.residency
        counted = int(residency.slot_cells.sum())
        problems = []
        if counted != residency.used_cells:
            problems.append(f"{counted} cells are resident but {residency.used_cells} are used")
        if residency.table.numel() <= FULL_CHECK_ENTRIES:
            problems += residency.check_integrity()
            problems += [] if self.host is None else self.host.check_integrity()
        return problems
