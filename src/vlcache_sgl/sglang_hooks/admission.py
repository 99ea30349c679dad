"""Which prompt may start now: SGLang's scheduler, told what memory is really there and when some comes back.

SGLang admits a prompt when its tokens fit beside what running requests may still decode, and looks again when a request
has left.  Here memory also comes back when a prefill ends, a prefix is worth what it holds and not its length, and a
prompt needs ten times for a moment what it keeps.  Under pressure, in this order: prefixes that nobody shares, shared
ones, a prompt that waits between its chunks, running requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sglang.srt.managers.schedule_batch import retract_all
from sglang.srt.managers.schedule_policy import AddReqResult, CacheAgnosticPolicy
from sglang.srt.mem_cache.common import match_kv_cache

from vlcache_sgl.sglang_hooks.facades import Req, ScheduleBatch, SchedulePolicy, Scheduler

logger = logging.getLogger(__name__)

MAX_OVERTAKEN = 4
"""Passes in which others may go before the first request of the queue."""
MAX_MATCHED = 32
"""Waiting requests whose prefix is looked up in one pass."""
OVERTAKEN_ATTRIBUTE = "vlcache_overtaken"
"""On SGLang's request: in how many passes others went first."""


def consider_request(original: Any, adder: Any, req: Req, *arguments: Any, **options: Any) -> Any:
    """Around SGLang deciding about one request: tell the budget which.

    SGLang knows one request between two chunks.  The chunk that ends with an image leaves room for others, of which the
    next may be cut too: it is the last of its pass.
    """
    adder.memory_budget.consider(req)
    result = original(adder, req, *arguments, **options)
    if not adder.memory_budget.cuts:
        return result
    adder.rem_input_tokens = 0
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens = 0
    return AddReqResult.OTHER if result is AddReqResult.CONTINUE else result


@contextmanager
def set_aside(scheduler: Scheduler, held: Sequence[Req]) -> Iterator[None]:
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


def reopen(scheduler: Scheduler, running_batch: ScheduleBatch) -> None:
    """Before prompts are admitted: SGLang closes a full batch until a request leaves; compression also makes room."""
    if scheduler.token_to_kv_pool_allocator.accounting.take_returned():
        running_batch.batch_is_full = False


def spare_waiting_prefixes(_: None, policy: SchedulePolicy, waiting_queue: list[Req], *__: Any, **___: Any) -> None:
    """After SGLang has ordered the queue: requests whose prefix may be pushed out go before the prompt that would.

    Once admitted they lock what they need, mostly in the same pass; those that are not have their prefixes marked as
    just used.  The first prompt is overtaken in `MAX_OVERTAKEN` passes at most.
    """
    tree = policy.tree_cache
    first_come = policy.policy == CacheAgnosticPolicy.FCFS and not policy.enable_priority_scheduling
    if len(waiting_queue) < 2 or tree.disable or not first_come:
        return  # any other order was asked for
    first = waiting_queue[0]
    overtaken = getattr(first, OVERTAKEN_ATTRIBUTE, 0)
    free = tree.token_to_kv_pool_allocator.accounting.free_physical_tokens()
    if overtaken >= MAX_OVERTAKEN or _own_tokens(first, tree) <= free:
        return
    hits = {id(req) for req in waiting_queue[:MAX_MATCHED] if _own_tokens(req, tree) < req.num_matched_prefix_tokens}
    if hits and id(first) not in hits:
        setattr(first, OVERTAKEN_ATTRIBUTE, overtaken + 1)
        waiting_queue.sort(key=lambda req: id(req) not in hits)


def _own_tokens(req: Req, tree: Any) -> int:
    """Tokens that a waiting request has to compute, as things are."""
    match_kv_cache(req, tree)
    return len(req.origin_input_ids) + len(req.output_ids) - int(req.num_matched_prefix_tokens)


def make_room(original: Any, scheduler: Scheduler, batch: ScheduleBatch) -> Any:
    """Around a decode step: a prompt parked between its chunks gives way before a running request does.

    It is the youngest and has answered nothing yet, and what it holds could otherwise cost the last running request
    its answer: SGLang retracts all but one, and aborts that one when even then nothing is free.
    """
    parked = scheduler.chunked_req
    if parked is not None and parked.kv.holds_kv and not parked.finished() and not batch.check_decode_mem():
        retract_parked(scheduler, parked, batch.reqs)
    return original(scheduler, batch)


def retract_parked(scheduler: Scheduler, req: Req, running: Sequence[Req]) -> None:
    """Send a prompt back to the queue in the middle of its prefill.

    Under overlap scheduling its last chunk may be in flight: SGLang drops the result of a retracted request, and on the
    device whoever gets its cells writes behind it.
    """
    retract_all(
        reqs=[req],
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
        offload_kv=False,
    )
    scheduler.chunked_req = None
    # More was decoded than expected: expect more before the next prompt starts.
    ratio = scheduler.new_token_ratio_tracker
    ratio.current = max(ratio.current, ratio.estimate_new_token_ratio_after_retract(running))
    logger.warning("KV cache is full: a prompt of %d tokens starts over later", len(req.origin_input_ids))
    scheduler._add_request_to_queue(req, is_retracted=True)
