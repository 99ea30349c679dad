"""A question that lacks too much gets the picture back: its request starts over, and makes a better copy for all.

The reading of a question's prefill is there before its first token is published.  A request that trips the guard is
retracted, as SGLang does for want of memory, and queued again under the name of the next generation: the picture is
prefilled once more (its embedding comes from SGLang's multimodal cache), compressed with the new needs, and published.
Questions that trip on the same copy meanwhile wait for it: one recompute serves them all.

A question whose prefill finds enough, but whose first decode steps do not, is sent back as well.  What it looks up just
in time cannot be chosen before it is looked up: its picture is kept whole from then on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.compression.sharing.guard import FIRST_STEPS
from vlcache_sgl.compression.sharing.images import LEVELS, SharedImage, SharedImages, StaleCopy
from vlcache_sgl.compression.sharing.state import Phase
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.residency import EVICTED
from vlcache_sgl.sglang_hooks.admission import retract, set_aside, unsay
from vlcache_sgl.sglang_hooks.facades import Req, ScheduleBatch, Scheduler
from vlcache_sgl.sglang_hooks.jobs import job_of

logger = logging.getLogger(__name__)


class Expansions:
    """Acts on guard readings, on the scheduler's side.

    Args:
        scheduler: SGLang's.
        images: what is shared.
        threshold: share of a question's attention that may be missing.
        enforce: whether a trip has consequences.
        counters: where figures are kept.
    """

    def __init__(
        self, scheduler: Scheduler, images: SharedImages, threshold: float, enforce: bool, counters: Counters
    ) -> None:
        self._scheduler = scheduler
        self._images = images
        self._threshold = threshold
        self._enforce = enforce
        self._counters = counters
        self._returning: list[Any] = []
        """Retracted; queued again in the next pass, when SGLang has dropped the result of their forward."""

    # -- after a prefill --------------------------------------------------------------------------------------------

    def judge(self, batch: ScheduleBatch) -> None:
        """Read the guards of a prefill batch whose forward has ended and whose result is not published."""
        for req in batch.reqs:
            job = job_of(req)
            guard = job.sharing.guard if job is not None else None
            if job is None or guard is None or not guard.closed:
                continue
            job.sharing.guard = None
            missing = guard.missing
            trips = missing > self._threshold
            if math.isnan(missing):
                logger.error("the guard failed: %s", guard.failure)
                continue
            self._report_of(job).update(missing=round(missing, 4), tripped=trips)
            self._counters.guard_read(missing, trips)
            # SGLang finds a request's log-probabilities by counting tokens of those before it, retracted ones left out.
            alone = not batch.return_logprob or len(batch.reqs) == 1
            if trips and alone and self._may_retract(req, job):
                self._send_back(req, job, missing, "prefill")

    def judge_decode(self, batch: ScheduleBatch) -> None:
        """Read the guards of running requests whose first decode steps have been computed."""
        for req in batch.reqs:
            job = job_of(req)
            reading = job.sharing.decode_guard if job is not None else None
            if job is None or reading is None or reading.judged or not reading.complete:
                continue
            reading.judged = True
            missing = reading.missing
            if missing is None:
                logger.error("the guard failed in decode: %s", reading.failure)
                continue
            self.note_decode(job)
            guard = self._report_of(job)
            if missing <= self._threshold or guard["tripped"]:
                continue
            guard["tripped"] = True
            self._counters.guard_trips_in_decode += 1
            if self._may_retract(req, job):
                self._send_back(req, job, missing, "decode")
                unsay(req)

    def withholds(self, req: Req) -> bool:
        """Whether an answer's first tokens must wait until they are judged."""
        job = job_of(req)
        reading = None if job is None else job.sharing.decode_guard
        if job is None or reading is None or reading.judged:
            return False
        return self._enforce and job.sharing.trips < LEVELS and len(req.output_ids) <= FIRST_STEPS + 1

    def _report_of(self, job: CompressionJob) -> dict[str, Any]:
        """What the response says of the guard."""
        guard: dict[str, Any] = job.report.fields.setdefault("guard", {"threshold": self._threshold, "tripped": False})
        return guard

    def note_decode(self, job: CompressionJob) -> None:
        """Report the reading of the first decode steps, if they have been read."""
        missing = None if job.sharing.decode_guard is None else job.sharing.decode_guard.missing
        if missing is not None:
            self._report_of(job)["missing_in_decode"] = round(missing, 4)

    def _may_retract(self, req: Req, job: CompressionJob) -> bool:
        """Whether a trip has consequences, and anything is gained by them."""
        ended = req.is_retracted or req.finished() or req.to_finish is not None or not req.kv.holds_kv
        return self._enforce and not ended and job.sharing.trips < LEVELS

    def _send_back(self, req: Req, job: CompressionJob, missing: float, seen_in: Phase) -> None:
        """Let `req` start over, and its picture's next copy be larger: whole, where only decode shows what it needs."""
        image = job.sharing.image
        assert image is not None
        job.send_back(missing, seen_in)
        if job.sharing.generation == image.generation:
            image.tripped += LEVELS if seen_in == "decode" else 1
            if not self._leads_on(image):
                image.leader = req
                job.sharing.inherited = self._resident(req, job)
                self._counters.expansions += 1
        retract(self._scheduler, req)
        self._returning.append(req)

    def _resident(self, req: Req, job: CompressionJob) -> torch.Tensor:
        """`[L, end]` bool: what each layer has of the prompt up to the end of its pictures."""
        arena = self._scheduler.token_to_kv_pool_allocator.accounting.arena
        row = self._scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : job.asked.vision[-1].end]
        resident: torch.Tensor = arena.residency.table[:, row.to(torch.int64)] != EVICTED
        return resident.view(-1, arena.groups, row.numel()).any(1)

    def _leads_on(self, image: SharedImage) -> bool:
        """Whether the request that makes the next copy is still there; one that was aborted is forgotten."""
        leader = image.leader
        if leader is None:
            return False
        waits = any(leader is req for req in (*self._scheduler.waiting_queue, *self._returning))
        if not waits and not leader.kv.holds_kv:
            image.leader = None
        return image.leader is not None

    def published(self, req: Req, job: CompressionJob) -> None:
        """The prefix tree has the copy that `req` made."""
        image = job.sharing.image
        assert image is not None
        first = job.asked.vision[0]
        old_key = f"{job.sharing.base_key}{image.namespace(image.generation)}"
        copy = StaleCopy(req.origin_input_ids[: first.end], first, old_key, req.cache_salt)
        self._images.replaced(image, copy)
        if image.settled:
            logger.info("picture %d is kept whole from now on: too many questions missed parts of it", image.number)

    # -- before the next batch --------------------------------------------------------------------------------------

    def before_next_batch(self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None) -> None:
        """Take tripped requests out of the batches, queue those of before again."""
        returning, self._returning = self._returning, []
        for req in returning:
            self._scheduler._add_request_to_queue(req, is_retracted=True)
        self.judge_decode(running_batch)
        prefilled = last_batch if last_batch is not None and last_batch.forward_mode.is_extend() else None
        if prefilled is not None and self._scheduler.enable_overlap:
            self.judge(prefilled)
        for batch in (running_batch,) if prefilled is None else (running_batch, prefilled):
            gone = [req for req in batch.reqs if req.is_retracted and job_of(req) is not None]
            if gone:
                batch.filter_batch(reqs_to_exclude=gone)
                running_batch.batch_is_full = False

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """While SGLang chooses whom to start: requests that wait for a copy are out of its queue."""
        held = self.held()
        self.reclaim()
        with set_aside(self._scheduler, held):
            yield

    def held(self) -> list[Req]:
        """Waiting requests that must not start yet; gives the others the name of their picture's present copy."""
        held = []
        for req in self._scheduler.waiting_queue:
            job = job_of(req)
            image = None if job is None else job.sharing.image
            if job is None or image is None:
                continue
            if image.leader is not None and image.leader is not req and job.sharing.trips and self._leads_on(image):
                held.append(req)
            else:
                self.name(req, job)
        return held

    @staticmethod
    def name(req: Req, job: CompressionJob) -> None:
        """Let `req` look for, or publish, the right copy of its picture."""
        image = job.sharing.image
        if image is None or req.kv.holds_kv:
            return
        job.sharing.generation = image.generation + (image.leader is req)
        req.extra_key = f"{job.sharing.base_key}{image.namespace(job.sharing.generation)}"

    def reclaim(self) -> None:
        """Free the cells of replaced copies that nobody reads any more.

        Their slots stay in the prefix tree, without cells, until it drops them: nobody will look for them again.
        """
        tree, accounting = self._scheduler.tree_cache, self._scheduler.token_to_kv_pool_allocator.accounting
        for image in self._images.with_stale():
            for copy in list(image.stale):
                key = RadixKey(copy.tokens, copy.extra_key, cache_salt=copy.cache_salt)
                found = tree.match_prefix(MatchPrefixParams(key=key))
                slots = tree.path_device_indices(found.last_device_node)[copy.span.begin : found.device_prefix_len]
                if accounting.hollow(slots.to(torch.int64)):
                    image.stale.remove(copy)
