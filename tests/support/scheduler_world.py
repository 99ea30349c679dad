"""A scheduler's life over the real allocator, arena, residency, admission and SGLang's tree, without a model.

What the model's forward would do is one number per cell: which token of which prefix, in which plane.  Whoever reads a
cell that was freed, or handed to somebody else, reads another number.
"""

from __future__ import annotations

import random
from array import array
from typing import Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req, release_req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder, SchedulePolicy
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.allocation import alloc_token_slots
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams
from world_checks import attend, check, marks
from world_parts import Batch, Event, LaggingHostMemory

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.capacity import longest_answer
from vlcache_sgl.compression.job import CompressionJob, ReadingState
from vlcache_sgl.config import config_from
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.sglang_hooks import admission
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.arena import KVArena
from vlcache_sgl.sglang_hooks.host_sharing import HostSharing, TreeRoom
from vlcache_sgl.sglang_hooks.jobs import give_job, job_of
from vlcache_sgl.sglang_hooks.prefix_tree import CompressedPrefixTree
from vlcache_sgl.sglang_hooks.second_reading import SecondReadings

PLANES = 3
SLOTS = 500
HEAD_DIM = 8
MIN_TOKENS = 8


class World:
    """One scheduler over real parts.  Names as on SGLang's `Scheduler`, because the hooks are given this."""

    def __init__(
        self, physical: int = 96, chunk: int = 24, eviction_policy: str = "slru", host: int = 0, recall: int = 0
    ) -> None:
        """`physical`: uncompressed tokens that the arena holds; `host`: tokens that host memory holds; `recall`: how
        many of those that are evicted come back in a decode step."""
        pool = KVArena(
            num_cells=physical * PLANES,
            groups=1,
            size=SLOTS,
            page_size=1,
            dtype=torch.float32,
            head_num=1,
            head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            layer_num=PLANES,
            device="cpu",
            enable_memory_saver=False,
            start_layer=0,
            end_layer=PLANES - 1,
            enable_alt_stream=False,
        )
        self.arena = pool.arena
        self.allocator = VirtualSlotAllocator(pool, physical_tokens=physical, need_sort=False)
        self.rows = self._make_rows(max_context_len=4 * physical)
        self.tree = CompressedPrefixTree(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                eviction_policy=eviction_policy,
                **self._components(),
            )
        )
        self.token_to_kv_pool_allocator, self.req_to_token_pool, self.tree_cache = self.allocator, self.rows, self.tree
        self.policy = SchedulePolicy("fcfs", self.tree, False, False, False)
        self.new_token_ratio_tracker = NewTokenRatioTracker(init=0.5, min=0.1, decay=0.01, current=0.3)
        config = config_from({"kv_policy": "vlcache", "kv_recall": recall})
        assert config is not None
        self.choice = Choices(config).default
        self.chunk = chunk
        self.waiting: list[Req] = []
        self.chunked_req: Req | None = None
        self.batch = Batch(self)
        self.evictions: list[tuple[Event, torch.Tensor]] = []
        """With the cells that a forward may read until the event has passed."""
        self.late_share = 0.0
        """Of the compressions whose end the host learns of later."""
        self.random = random.Random(0)
        self.tokenizer = None
        self.disaggregation_mode = DisaggregationMode.NULL
        self.max_req_input_len = physical
        self.processed_tokens_counter = 0
        self.readings = SecondReadings(self)
        self.host: HostSharing | None = None
        self.room: TreeRoom = TreeRoom(self.allocator)
        if host:
            accounting = self.allocator.accounting
            accounting.host = HostPool(PLANES, SLOTS, host, self.arena.cells)
            model = Prompt(0, 0, (), PLANES, 1, 1, 1)
            self.host = HostSharing(LaggingHostMemory(self, recall=recall > 0), self.room, physical, model)
            self.host.attach(self.tree)
        self.unpublished: list[Req] = []
        """Their prefill has ended, its result comes with the next step's: as under overlap scheduling."""
        self.aborted_for_memory = 0
        self.served = 0
        self.running = 12
        """Requests that run at once, at most."""
        self.names = 0

    # -- what hybrids have beside it ----------------------------------------------------------------------------------

    def _make_rows(self, max_context_len: int) -> ReqToTokenPool:
        return ReqToTokenPool(size=16, max_context_len=max_context_len, device="cpu", enable_memory_saver=False)

    def _components(self) -> dict[str, Any]:
        """Of the prefix tree."""
        return {"tree_components": (ComponentType.FULL,)}

    def _before_rows(self, reqs: list[Req]) -> None:
        """Room for what requests get together with their rows."""

    def _compute_state(self, req: Req, begin: int, end: int) -> None:
        """Tokens ``[begin, end)`` have been computed."""

    def _reject(self, req: Req) -> None:
        """SGLang did not let `req` start, after it had looked for its prefix."""

    # -- what a client does -------------------------------------------------------------------------------------------

    def submit(
        self,
        ids: tuple[int, ...],
        *,
        key: str | None = None,
        compress: bool = True,
        tokens: int = 4,
        image: Span | None = None,
        twice: bool = False,
        exact: bool = False,
    ) -> Req | None:
        """Queue a request; None when it is refused because it can never fit.

        Args:
            image: where an image lies.
            twice: whether its policy reads the prompt twice.
            exact: whether its prefix is shared without loss, in host memory.
        """
        if exact:
            return self._submit_exact(ids, key, tokens, image)
        room = longest_answer(len(ids), tokens, self.allocator.accounting.physical_tokens)
        if room is None:
            return None
        self.names += 1
        req = Req(str(self.names), "", array("q", ids), SamplingParams(max_new_tokens=room), extra_key=key)
        if compress:
            vision = () if image is None else (image,)
            job = CompressionJob(Asked(self.choice, vision, len(ids), MIN_TOKENS))
            give_job(req, job)
            req.extra_key = f"{key or ''}|kv"
            if twice:
                job.reading = ReadingState()
        self.waiting.append(req)
        return req

    def _submit_exact(self, ids: tuple[int, ...], key: str | None, tokens: int, image: Span | None) -> Req | None:
        assert self.host is not None
        self.names += 1
        req = Req(str(self.names), "", array("q", ids), SamplingParams(max_new_tokens=tokens))
        job = CompressionJob(Asked(self.choice, () if image is None else (image,), len(ids), MIN_TOKENS))
        if not self.host.admits(job):
            return None
        self.host.begin(req, job)
        assert job.host is not None
        job.host.first_row = max(0, len(ids) - self.random.randint(1, 4))
        if self.host.fit(req, job) is not None:
            return None
        give_job(req, job)
        req.extra_key = f"{key or ''}|kv|exact"
        most = req._compute_max_prefix_len
        req._compute_max_prefix_len = lambda length: self.host.limit_hit(most(length), req)
        self.waiting.append(req)
        return req

    def init_req_max_new_tokens(self, req: Req) -> None:
        physical = self.allocator.accounting.physical_tokens
        if longest_answer(len(req.origin_input_ids), 1, physical) is None:
            req.to_finish = FINISH_ABORT("too long")

    @property
    def waiting_queue(self) -> list[Req]:
        """As SGLang calls it."""
        return self.waiting

    @waiting_queue.setter
    def waiting_queue(self, waiting: list[Req]) -> None:
        self.waiting = waiting

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        job = job_of(req)
        if job is not None:
            job.restart()
        self.waiting.append(req)

    # -- one step of the scheduler ------------------------------------------------------------------------------------

    def prefill(self) -> bool:
        """Admit prompts and compute them, as SGLang's loop does; whether anything was computed."""
        admission.reopen(self, self.batch)
        with self.readings.holding_back():
            return self._prefill()

    def _prefill(self) -> bool:
        self._publish()
        if not self.batch.reqs:
            self.batch.batch_is_full = False
        if (self.batch.batch_is_full or not self.waiting) and self.chunked_req is None:
            return False
        self.policy.calc_priority(self.waiting, self.batch)
        admission.spare_waiting_prefixes(None, self.policy, self.waiting)
        adder = PrefillAdder(
            1,
            self.tree,
            self.allocator,
            self.batch,
            self.new_token_ratio_tracker.current,
            10_000,
            self.chunk,
        )
        if self.chunked_req is not None:
            self.chunked_req.init_next_round_input()
            self.chunked_req = admission.consider_request(PrefillAdder.add_chunked_req, adder, self.chunked_req)
        for req in list(self.waiting):
            if (
                adder.budget_state() == AddReqResult.OTHER
                or len(self.batch.reqs) + len(adder.can_run_list) >= self.running
            ):
                break
            req.init_next_round_input(self.tree)
            chunked = {"has_chunked_req": self.chunked_req is not None, "truncation_align_size": None}
            result = admission.consider_request(PrefillAdder.add_one_req, adder, req, **chunked)
            if result != AddReqResult.CONTINUE:
                if result == AddReqResult.NO_TOKEN:
                    self.batch.batch_is_full = bool(adder.can_run_list or self.batch.reqs)
                if not adder.can_run_list or req is not adder.can_run_list[-1]:
                    self._reject(req)
                break
        if not adder.can_run_list:
            return False
        self.waiting = [req for req in self.waiting if req not in adder.can_run_list]
        if adder.new_chunked_req is not None:
            assert self.chunked_req is None
            self.chunked_req = adder.new_chunked_req
        self._extend(adder.can_run_list)
        return True

    def _extend(self, reqs: list[Req]) -> None:
        prefixes = [
            self.rows.req_to_token[req.kv.req_pool_idx, : req.prefix_len].long()
            if req.kv.holds_kv
            else self.tree.prefix_device_indices(req).long()
            for req in reqs
        ]
        self._before_rows(reqs)
        assert self.rows.alloc(reqs) is not None
        # Raises when admission has let in more than there is.
        slots = alloc_token_slots(self.tree, sum(req.extend_len for req in reqs))
        staged = []
        for req, prefix, mine in zip(reqs, prefixes, slots.split([req.extend_len for req in reqs]), strict=True):
            row = req.kv.req_pool_idx
            self.rows.write((row, slice(0, req.prefix_len)), prefix.to(torch.int32))
            self.rows.write((row, slice(req.prefix_len, req.extend_end)), mine.to(torch.int32))
            req.kv.kv_committed_len = req.kv.kv_allocated_len = req.extend_end
            req.is_retracted = False
            self._write(req, req.prefix_len, req.extend_end)
            self._compute_state(req, req.prefix_len, req.extend_end)
            # What a retracted request had answered is computed again behind what it keeps.
            if (job := job_of(req)) is not None and job.host is not None and not job.host.settled:
                staged.append((req, self.rows.req_to_token[row, : req.prefix_len].long()))
            if req.extend_batch_idx == 0 and not req.retracted_stain:
                req.cached_tokens_seen = req.prefix_len
            req.extend_batch_idx += 1
            job = job_of(req)
            if job is not None and job.host is None:
                if job.progress.reached is not None and job.progress.reached != req.prefix_len:
                    job.restart()
                if job.progress.reached is None:
                    job.report.fields["start"] = req.prefix_len
                    job.progress.done = job.asked.length - req.prefix_len < MIN_TOKENS or job.reading is not None
                job.progress.reached = req.extend_end
                if not job.progress.done and req.extend_end >= job.asked.end:
                    self._compress(req, job)
        attend(self, staged)
        for req, _ in staged:
            self._end_chunk(req)
        for req in reqs:
            # Published, and from now on resumed behind this chunk.
            if req is not self.chunked_req and self.random.random() < self.late_share:
                self.unpublished.append(req)
            else:
                checkpoint_kv_cache(req, self.tree)
            if req is not self.chunked_req:
                req.output_ids.append(50 + len(req.output_ids))
                self.batch.reqs.append(req)
        self._finish_those_at_their_end()

    def _end_chunk(self, req: Req) -> None:
        """As `Compressor.end_chunk` and `Compressor.finish`."""
        job = job_of(req)
        assert self.host is not None
        assert job is not None
        assert job.host is not None
        memory, length = self.host.memory, job.asked.length
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        slots = row[req.prefix_len : min(req.extend_end, length)].long()
        job.progress.reached = req.extend_end
        if slots.numel():
            if not memory.write_back(slots):
                job.host.unwritten = True
            elif req.extend_end < length:
                memory.release_chunk(slots)
        if req.extend_end >= length:
            keep = torch.tensor([[self.random.random() < 0.2 for _ in range(length)] for _ in range(PLANES)])
            if length < MIN_TOKENS:
                keep[:] = True
            most = PLANES * int(job.host.ratio * length - self.choice.recall)
            keep &= keep.flatten().cumsum(0).view_as(keep) <= most
            decided = (row[:length].long(), keep, int(keep.sum()))
            # Either raises when admission has let in too many.
            if memory.recall is None:
                job.host.own = memory.settle(*decided)
            else:
                job.host.own, job.area = memory.settle_with_area(*decided, self.choice.recall)
                keep = keep | memory.recall.places(~job.area.fixed, self.choice.recall)
            kept = self.arena.residency.table[:, job.host.own.private] >= 0
            assert torch.equal(kept, keep), "what is kept is not what was decided"
            row[:length] = job.host.own.private.to(row.dtype)
            job.progress.done = True

    def retire(self, slots: torch.Tensor, keep: torch.Tensor) -> None:
        """Evict; now and then the host learns of the end later."""
        event = Event() if self.random.random() < self.late_share else None
        eviction = self.arena.residency.evict(slots, keep)
        self.allocator.accounting.retire(eviction, event)
        if event is not None:
            self.evictions.append((event, eviction.numbers[: int(eviction.count)]))

    def _compress(self, req: Req, job: CompressionJob) -> None:
        start = job.report.fields["start"]
        slots = self.rows.req_to_token[req.kv.req_pool_idx, start : job.asked.length].long()
        keep = torch.tensor([[self.random.random() < 0.15 for _ in slots] for _ in range(PLANES)])
        self.retire(slots, keep)
        job.progress.done = job.progress.compressed = True

    def decode(self) -> None:
        """One token for every running request; who does not fit is sent back, the last chunk first."""

        def step(_: World, batch: Batch) -> None:
            while batch.reqs and not batch.check_decode_mem():
                if len(batch.reqs) == 1:
                    self.aborted_for_memory += 1
                self.retract(batch.reqs[-1])
            if not batch.reqs:
                return
            slots = alloc_token_slots(self.tree, len(batch.reqs))
            for req, slot in zip(batch.reqs, slots, strict=True):
                end = req.kv.kv_allocated_len
                self.rows.write((req.kv.req_pool_idx, slice(end, end + 1)), slot[None].to(torch.int32))
                req.kv.kv_committed_len = req.kv.kv_allocated_len = end + 1
                self._write(req, end, end + 1)
                self._compute_state(req, end, end + 1)
                req.output_ids.append(50 + len(req.output_ids))
            self._recall(batch.reqs)

        before = len(self.batch.reqs)
        admission.make_room(step, self, self.batch)
        self.new_token_ratio_tracker.decay_step()
        self._publish()
        self._finish_those_at_their_end()
        if len(self.batch.reqs) < before:
            self.batch.batch_is_full = False

    def _recall(self, reqs: list[Req]) -> None:
        """What the step needs comes back, layer by layer; nobody knows beforehand what that is."""
        jobs = [job for job in map(job_of, reqs) if job is not None]
        areas = [job.recalls for job in jobs if job.recalls is not None]
        if not areas or self.host is None or (recall := self.host.memory.recall) is None:
            return
        recall.step(areas)
        for plane in range(PLANES):
            numbers = [self.random.gauss(0, 1) for _ in range(len(areas) * HEAD_DIM)]
            recall.refresh(slice(plane, plane + 1), torch.tensor(numbers).view(len(areas), 1, HEAD_DIM), 1.0)

    def _publish(self) -> None:
        """The results of the last step are there."""
        for req in self.unpublished:
            checkpoint_kv_cache(req, self.tree)
        self.unpublished.clear()

    def _finish_those_at_their_end(self) -> None:
        for req in list(self.batch.reqs):
            if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                self.finish(req)

    def finish(self, req: Req) -> None:
        req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
        req.finished_len = len(req.output_ids)
        release_kv_cache(req, self.tree, checkpoint=True)
        self._leave(req)
        self.batch.batch_is_full = False
        self.served += 1

    def _leave(self, req: Req) -> None:
        self.batch.reqs.remove(req)
        if req in self.unpublished:
            self.unpublished.remove(req)

    def abort(self, req: Req) -> None:
        """The client is gone: in the queue, between two chunks, or while it runs."""
        if req in self.waiting:
            self.waiting.remove(req)
            return
        req.finished_reason = FINISH_ABORT("gone")
        if req is self.chunked_req:
            release_kv_cache(req, self.tree, checkpoint=False)
            self.chunked_req = None
        else:
            release_kv_cache(req, self.tree, checkpoint=True)
            self._leave(req)
            self.batch.batch_is_full = False

    def retract(self, req: Req) -> None:
        self._leave(req)
        release_req(
            req=req,
            remaing_req_count=len(self.batch.reqs),
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )
        self.batch.batch_is_full = False
        self._add_request_to_queue(req, is_retracted=True)

    def flush(self) -> None:
        """As SGLang does when nothing runs."""
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    def step(self) -> None:
        """Prefill first, as SGLang does; now and then a decode step between two chunks, as it can be told to."""
        decodes = self.batch.reqs and self.random.random() < 0.3
        if (decodes or not self.prefill()) and self.batch.reqs:
            self.decode()

    def catch_up(self) -> None:
        """The device has computed everything."""
        for event, _ in self.evictions:
            event.passed = True
        self.evictions.clear()

    def run_dry(self) -> None:
        """Serve everybody; fails when nobody has finished for long."""
        served, idle = self.served, 0
        while idle < 500:
            self.catch_up()
            if not self.owners() and not self.waiting:
                return
            self.step()
            served, idle = self.served, idle + 1 if served == self.served else 0
        raise AssertionError(f"{len(self.waiting)} wait, {len(self.batch.reqs)} run, chunk: {self.chunked_req}")

    def owners(self) -> list[Req]:
        return [*self.batch.reqs, *([self.chunked_req] if self.chunked_req is not None else [])]

    def _write(self, req: Req, begin: int, end: int) -> None:
        slots = self.rows.req_to_token[req.kv.req_pool_idx, begin:end].long()
        cells = self.arena.write_cells(slots)
        assert (cells > 0).all(), "a new token has no cell in some plane"
        written = marks(req, begin, end, PLANES)
        for plane in range(PLANES):
            keys = written[plane].view(-1, 1, 1).expand(-1, 1, HEAD_DIM)
            self.arena.write(cells[plane : plane + 1], keys, -keys)

    def check(self) -> None:
        """Everything that must hold between two steps."""
        check(self)
