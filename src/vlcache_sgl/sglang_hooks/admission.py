"""Which prompt may start now: SGLang's scheduler, told what memory is really there and when some comes back.

SGLang admits a prompt when its tokens fit beside what running requests may still decode, and looks again when a request
has left.  Here memory also comes back when a prefill ends, a prefix is worth what it holds and not its length, and a
prompt needs ten times for a moment what it keeps.  Under pressure, in this order: prefixes that nobody shares, shared
ones, a prompt that waits between its chunks, running requests.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import retract_all
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from vlcache_sgl.scoring.job import CompressionJob, job_of

if TYPE_CHECKING:
    from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator

logger = logging.getLogger(__name__)

MOST_OVERTAKEN = 4
"""Passes in which others may go before the first request of the queue."""
MOST_MATCHED = 32
"""Waiting requests whose prefix is looked up in one pass."""
OVERTAKEN_ATTRIBUTE = "vlcache_overtaken"
"""On SGLang's request: in how many passes others went first."""


class CellPrefillBudget(PrefillBudget):
    """Admission by physical tokens: a prompt needs all its cells until its prefill has ended and it is compressed."""

    def __init__(self, allocator: VirtualSlotAllocator, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._parked = False
        self._charge: HostCharge | None = None
        # Beyond `total_offset`, which counts memory: what admitted prompts take of slots and of host memory.
        self._slots = self._host_tokens = 0

    def consider(self, req: Any) -> None:
        """The next questions and reservations are about `req`."""
        job = job_of(req)
        self._charge = None if job is None or job.host is None else HostCharge.of(job, self.allocator.arena.layer_num)

    def _available_and_evictable(self) -> int:
        physical: int = self.allocator.evictable_physical_tokens()
        return min(int(super()._available_and_evictable()) - self._slots, physical)

    def _chunk(self, charge: HostCharge, extend_input_len: int, limit: int | None, others: int) -> tuple[int, int]:
        """The next chunk of a prompt that shares without loss, and tokens that must be free beside it.

        A chunk is made smaller only where it would not fit an empty arena either.
        """
        chunk = extend_input_len if limit is None else min(extend_input_len, limit)
        beside = charge.beside(extend_input_len, chunk) + others
        if chunk + beside >= self.allocator.physical_tokens:
            beside = charge.beside(extend_input_len, 0) + others
            chunk = max(1, min(chunk, self.allocator.physical_tokens - beside - 1))
        return chunk, beside

    def check_prefill(
        self, *, extend_input_len: int, total_tokens: int, chunk_limit: int | None, **request: Any
    ) -> tuple[bool, int | None]:
        if self._parked:
            return False, None
        if self._charge is None:
            fits: tuple[bool, int | None] = super().check_prefill(
                extend_input_len=extend_input_len, total_tokens=total_tokens, chunk_limit=chunk_limit, **request
            )
            return fits
        chunk, beside = self._chunk(self._charge, extend_input_len, chunk_limit, total_tokens - extend_input_len)
        host = self.allocator.host
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
            beside = self._charge.beside(extend_input_len, extend_input_len if max_new_tokens else 0)
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


@dataclass(frozen=True)
class HostCharge:
    """What a prompt that shares without loss takes beside the chunk that is computed, in uncompressed tokens."""

    length: int
    layers: int
    kept: int
    """Tokens that it keeps at most, averaged over layers."""

    @classmethod
    def of(cls, job: CompressionJob, layers: int) -> HostCharge:
        """For a request with `job.host`."""
        assert job.host is not None
        return cls(job.length, layers, math.ceil(job.host.ratio * job.length))

    def beside(self, extend_input_len: int, chunk: int) -> int:
        """While a chunk of the `extend_input_len` tokens that are to be computed runs, the tokens before it are staged
        for one layer after another; at the end, what is kept of them takes cells."""
        earlier = self.length - extend_input_len if chunk >= extend_input_len else self.length
        return max(math.ceil(earlier / self.layers), min(earlier, self.kept))


def consider_request(adder: Any, req: Any, *_: Any, **__: Any) -> None:
    """Before SGLang decides about one request: tell the budget which."""
    adder.memory_budget.consider(req)


@contextmanager
def set_aside(scheduler: Any, held: Sequence[Any]) -> Iterator[None]:
    """While SGLang chooses whom to start: `held` requests are out of its queue, where an abort finds them otherwise."""
    if not held:
        yield
        return
    waiting = {id(req) for req in held}
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if id(req) not in waiting]
    try:
        yield
    finally:
        scheduler.waiting_queue = [*held, *scheduler.waiting_queue]


def reopen(scheduler: Any, running_batch: Any) -> None:
    """Before prompts are admitted: SGLang closes a full batch until a request leaves; compression also makes room."""
    if scheduler.token_to_kv_pool_allocator.take_returned():
        running_batch.batch_is_full = False


def spare_waiting_prefixes(_: None, policy: Any, waiting_queue: list[Any], *__: Any, **___: Any) -> None:
    """After SGLang has ordered the queue: requests whose prefix may be pushed out go before the prompt that would.

    Once admitted they lock what they need, mostly in the same pass; those that are not have their prefixes marked as
    just used.  The first prompt is overtaken in `MOST_OVERTAKEN` passes at most.
    """
    tree = policy.tree_cache
    first_come = policy.policy == CacheAgnosticPolicy.FCFS and not policy.enable_priority_scheduling
    if len(waiting_queue) < 2 or tree.disable or not first_come:
        return  # any other order was asked for
    first = waiting_queue[0]
    overtaken = getattr(first, OVERTAKEN_ATTRIBUTE, 0)
    free = tree.token_to_kv_pool_allocator.free_physical_tokens()
    if overtaken >= MOST_OVERTAKEN or _own_tokens(first, tree) <= free:
        return
    hits = {id(req) for req in waiting_queue[:MOST_MATCHED] if _own_tokens(req, tree) < req.num_matched_prefix_tokens}
    if hits and id(first) not in hits:
        setattr(first, OVERTAKEN_ATTRIBUTE, overtaken + 1)
        waiting_queue.sort(key=lambda req: id(req) not in hits)


def _own_tokens(req: Any, tree: Any) -> int:
    """Tokens that a waiting request has to compute, as things are."""
    match_kv_cache(req, tree)
    return len(req.origin_input_ids) + len(req.output_ids) - int(req.num_matched_prefix_tokens)


def make_room(original: Any, scheduler: Any, batch: Any) -> Any:
    """Around a decode step: a prompt parked between its chunks gives way before a running request does.

    It is the youngest and has answered nothing yet, and what it holds could otherwise cost the last running request
    its answer: SGLang retracts all but one, and aborts that one when even then nothing is free.
    """
    parked = scheduler.chunked_req
    if parked is not None and parked.kv.holds_kv and not parked.finished() and not batch.check_decode_mem():
        retract_parked(scheduler, parked, batch.reqs)
    return original(scheduler, batch)


def retract_parked(scheduler: Any, req: Any, running: Sequence[Any]) -> None:
    """Send a prompt back to the queue in the middle of its prefill.

    Under overlap scheduling its last chunk may be in flight: SGLang drops the result of a retracted request, and on the
    device whoever gets its cells writes behind it.
    """
    retract(scheduler, req)
    scheduler.chunked_req = None
    # More was decoded than expected: expect more before the next prompt starts.
    ratio = scheduler.new_token_ratio_tracker
    ratio.current = max(ratio.current, ratio.estimate_new_token_ratio_after_retract(running))
    logger.warning("KV cache is full: a prompt of %d tokens starts over later", len(req.origin_input_ids))
    scheduler._add_request_to_queue(req, is_retracted=True)


def unsay(req: Any) -> None:
    """Let a retracted request answer from the beginning, unless somebody has heard some of its answer.

    What it has said stays, too, where more than its text depends on it.
    """
    heard = req.send_token_offset > 0
    if heard or req.grammar is not None or req.return_logprob or req.return_hidden_states or req.require_reasoning:
        return
    req.output_ids = array("q")


def retract(scheduler: Any, req: Any) -> None:
    """Release what a request holds, as SGLang does for want of memory; the caller queues it again."""
    retract_all(
        reqs=[req],
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
        offload_kv=False,
    )
