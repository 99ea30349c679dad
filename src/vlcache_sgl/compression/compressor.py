"""From a finished prefill to a smaller cache: stats -> scores -> budgets -> plan -> evict.

Runs at the end of the forward that computes a prompt's last chunk, so that the first decode step already attends to
the compressed cache and the prefix tree only ever sees compressed slots.

On a GPU that is on the stream of the forward: the table changes there, behind the last kernel that reads the evicted
cells and before the first of the next step.  The scheduler works on another stream and may hand the cells out again
once an event, recorded here behind the eviction, has passed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import torch

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.capacity import longest_answer
from vlcache_sgl.compression.exact import HostMemory, OutOfMemory
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.compression.measured import Measured
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.batches import ExtendRequest, Memory
from vlcache_sgl.memory.residency import EVICTED
from vlcache_sgl.policy.plan import EvictionPlan
from vlcache_sgl.scoring.batch import BatchScoring
from vlcache_sgl.scoring.scoring import KeysValues, Scoring, divide_prefix
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.streams import passed_event, to_host

logger = logging.getLogger(__name__)


class Compressor:
    """Compresses prompts of one model on one rank.

    Args:
        model: what the policy is told of the model; `length`, `start`, `vision` and `grids` are filled in per request.
        heads: puts the ranks' KV heads together.
        counters: where figures are kept.
        accounting: who holds the cells of the arena.
    """

    def __init__(self, model: Prompt, heads: HeadGather, counters: Counters, accounting: CellAccounting) -> None:
        self._model = model
        self._heads = heads
        self.counters = counters
        self.accounting = accounting
        self._arena = accounting.arena
        self.host: HostMemory | None = None
        """Where prefixes that are shared without loss are; None: without host memory."""
        self._uncounted: list[tuple[Any | None, torch.Tensor]] = []

    # -- during the prefill -----------------------------------------------------------------------------------------

    def begin_chunk(self, job: CompressionJob, begin: int, end: int) -> None:
        """A chunk ``[begin, end)`` of the job's prompt is about to be computed."""
        if job.progress.reached is not None and begin != job.progress.reached:
            job.restart()
        if job.progress.reached is None:
            job.progress.shared = begin
            # Who was retracted while it decoded finds what it has published itself.
            if job.report.before is None and job.asked.vision and begin > job.asked.vision[0].begin:
                self._count_hit(job)
        job.progress.reached = end
        job.progress.chunk = Span(begin, end)
        if job.progress.done:
            return
        if job.progress.scoring is None:
            if job.reading is not None and job.reading.report:
                self.take_over(job, job.reading.report)
                return
            start = job.first_evictable()
            if job.asked.length - start < job.asked.min_tokens:
                self.skip(job, "short")
                return
            if job.reading is not None:
                self.skip(job, "second_reading")
                return
            prompt = replace(
                job.asked.choice.of_model(self._model),
                length=job.asked.length,
                start=start,
                vision=job.asked.vision,
                grids=job.asked.grids,
                repeated=job.asked.repeated,
            )
            try:
                job.progress.scoring = Scoring(prompt, job.asked.choice.policy.needs, first=job.first_kept)
            except Exception as error:
                self.fail(job, error)

    def _count_hit(self, job: CompressionJob) -> None:
        """A prompt has found an image in the prefix cache."""
        if not job.report.counted_hit:
            self.counters.prefix_hit(job.progress.shared)
            job.report.counted_hit = True

    def take_over(self, job: CompressionJob, report: dict[str, Any]) -> None:
        """Another request has read this one's prompt twice, and compressed it or not: that is what was done."""
        job.progress.done = True
        job.report.fields.update(report)
        if "skipped" in report:
            self._count_skipped(job, report["skipped"])

    def skip(self, job: CompressionJob, reason: str) -> None:
        """Leave the rest of a request alone; one that comes back from a retraction keeps the report of its prefill."""
        job.progress.done = True
        if job.report.before is not None:
            job.report.fields.update(job.report.before)
            return
        job.report.fields.update(policy=job.asked.choice.policy.spec, skipped=reason)
        if job.progress.shared:
            job.report.fields.update(
                budget=str(job.asked.choice.budget), prompt_tokens=job.asked.length, shared_tokens=job.progress.shared
            )
        self._count_skipped(job, reason)

    def _count_skipped(self, job: CompressionJob, reason: str) -> None:
        if not job.report.counted:
            self.counters.skipped(reason)
            job.report.counted = True

    def fail(self, job: CompressionJob, error: Exception) -> None:
        """A policy does not keep its contract: the request keeps its full cache."""
        job.progress.done = True
        job.progress.scoring = None
        job.report.fields.update(policy=job.asked.choice.policy.spec, failed=f"{type(error).__name__}: {error}")
        self.counters.policy_failures += 1
        logger.error(
            "policy %s failed, the request keeps its full cache: %s: %s",
            job.asked.choice.policy.spec,
            type(error).__name__,
            error,
        )

    def observe(
        self,
        job: CompressionJob,
        layer: int,
        begin: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        prefix: torch.Tensor | None,
        valid: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Add the statistics of the chunk's query rows in one layer.

        Args:
            begin: position of the chunk's first token.
            queries, keys: `[t, H, D]` and `[t, K, D]` of the chunk.
            prefix: `[P, 2, K, D]`, the layer's kept keys and values of all positions before `begin`.
            valid: `[K]`, leading entries of `prefix` that exist per KV head; None = all `P`.
        """
        scoring = job.progress.scoring
        if scoring is None or scoring.failure is not None:
            return
        started = time.perf_counter()
        try:
            earlier = begin - scoring.prompt.start  # owned tokens of earlier chunks: nothing of them is evicted yet
            shared, shared_valid, own = divide_prefix(prefix, valid, max(0, earlier))
            if earlier < 0:
                # The chunk begins in front of the first image.  Keys that only enter the normaliser have no order.
                front, keys = keys[:-earlier], keys[-earlier:]
                shared = front if shared is None else torch.cat([front, shared])
                shared_valid = None if shared_valid is None else shared_valid - earlier
            owned = keys if own is None else torch.cat([own, keys])
            owned = owned[: scoring.end - scoring.prompt.start]  # a retracted request recomputes generated tokens too
            scoring.observe(layer, begin, queries, owned, shared, shared_valid, scale)
        except Exception as error:
            _give_up([scoring], error)
        self.counters.scoring_ms += (time.perf_counter() - started) * 1e3

    def plan_batch(
        self, memory: Memory, requests: Sequence[ExtendRequest], scorings: Sequence[Scoring | None]
    ) -> BatchScoring | None:
        """Prepare `observe_batch` for one forward; see `BatchScoring` for the arguments."""
        try:
            return BatchScoring(memory, requests, scorings)
        except Exception as error:
            _give_up(scorings, error)
            return None

    def observe_batch(
        self, batch: BatchScoring, planes: slice, queries: torch.Tensor, scale: float, lse: torch.Tensor | None
    ) -> None:
        """Add the statistics of the query rows of a batch in one layer; see `BatchScoring.observe`."""
        started = time.perf_counter()
        try:
            batch.observe(planes, queries, scale, lse)
        except Exception as error:
            _give_up(batch.scorings, error)
        self.counters.scoring_ms += (time.perf_counter() - started) * 1e3

    # -- at its end -------------------------------------------------------------------------------------------------

    def finish(self, job: CompressionJob, row: torch.Tensor) -> None:
        """Compress a prompt whose last token has been computed.

        Args:
            row: `[context]`, the request's row of `req_to_token`.
        """
        if job.progress.shared and job.report.before is None and job.host is None:
            job.report.shared_kept = self._kept_of(row[: job.progress.shared])
        scoring = job.progress.scoring
        if job.progress.done or scoring is None:
            self._keep_whole(job, row)
            return
        started = time.perf_counter()
        prompt = scoring.prompt
        front = prompt.start - job.first_kept
        slots = row[prompt.start : prompt.length].to(torch.int64)
        try:
            plan = self._decide(job, scoring, slots)
        except Exception as error:
            self.fail(job, error)
            self._keep_whole(job, row)
            return
        if job.asked.measures_attention:
            job.report.measured = job.report.measured or Measured(
                plan.keep, prompt
            )  # a retracted request decides twice, and alike
            self._count_skipped(job, "measured")
        else:
            self._evict(job, prompt, row, plan)
            job.progress.compressed = True
        per_layer = [front + tokens for tokens in plan.tokens_per_layer]
        job.report.fields.update(
            policy=job.asked.choice.policy.spec,
            budget=str(job.asked.choice.budget),
            prompt_tokens=prompt.length,
            shared_tokens=job.progress.shared,
            front_tokens=front,
            kept_tokens_per_layer=per_layer,
            ratio=round(sum(per_layer) / ((front + prompt.owned) * len(per_layer)), 4),
        )
        if plan.differs_by_head:
            job.report.fields["kept_tokens_per_head"] = plan.counts.tolist()
        if job.asked.repeated:
            job.report.fields["second_reading"] = {"tokens": job.asked.repeated}
            self.counters.second_readings += 1
        job.progress.scoring = None
        job.progress.done = True
        self.counters.selection_ms += (time.perf_counter() - started) * 1e3

    def _decide(self, job: CompressionJob, scoring: Scoring, slots: torch.Tensor) -> EvictionPlan:
        prompt = scoring.final_prompt()
        keys_values = self._keys_values(slots, None if job.host is None else self.host)
        policy = job.asked.choice.policy
        try:
            if scoring.failure is not None:
                raise scoring.failure
            scorer_views, allocator_views = scoring.views(keys_values)
        except Exception:
            self._heads.refuse(prompt, policy.needs[1], scoring.count_rows(policy.needs[1]))
            raise
        total = job.asked.choice.budget.target(prompt.owned, prompt.length, prompt.num_layers)
        return self._heads.decide(policy, scorer_views, allocator_views, prompt, total)

    def _keys_values(self, slots: torch.Tensor, memory: HostMemory | None) -> KeysValues:
        """How to read the owned tokens' keys and values of a layer: `[owned, 2, kv_heads, head_dim]`.

        Of a request that shares without loss, what is not in the arena is read from host memory.
        """
        arena = self._arena
        numbers = torch.arange(slots.numel(), device=slots.device)

        def keys_values(layer: int) -> torch.Tensor:
            where = arena.layer(arena.layer_ids[layer])
            planes = where.planes
            cells = arena.residency.cells_of(planes, slots)
            both = arena.raw[cells.clamp(min=0).to(torch.int64)]
            if memory is not None:
                away = torch.where(cells == EVICTED, numbers, EVICTED)
                memory.host.copy(planes, slots, both, away, (away >= 0).sum())
            return arena.join(where, both, arena.wide_dtype)

        return keys_values

    # -- prefixes that are shared without loss ------------------------------------------------------------------------

    def stage(self, prefixes: Sequence[torch.Tensor]) -> None:
        """Before a prefill forward: bring shared prefixes, slots `[tokens]` each, within reach of attention."""
        if self.host is not None and prefixes:
            started = time.perf_counter()
            self.host.stage(prefixes)
            self.counters.host_ms += (time.perf_counter() - started) * 1e3

    def end_staging(self) -> None:
        """After a forward."""
        if self.host is not None:
            self.host.staging.end()

    def end_chunk(self, job: CompressionJob, row: torch.Tensor) -> None:
        """A chunk has been computed: copy it to host memory, and free its cells unless it is the prompt's last.

        Args:
            row: `[context]`, the request's row of `req_to_token`.
        """
        if job.host is None or job.host.settled:
            return
        assert self.host is not None
        started = time.perf_counter()
        slots = row[job.progress.chunk.begin : min(job.progress.chunk.end, job.asked.length)].to(torch.int64)
        if slots.numel():
            if not self.host.write_back(slots):
                job.host.unwritten = True
            elif job.progress.chunk.end < job.asked.end:
                self.host.release_chunk(slots)
        self.counters.host_ms += (time.perf_counter() - started) * 1e3

    def _keep_whole(self, job: CompressionJob, row: torch.Tensor) -> None:
        """The end of a prompt that is left alone: where it lies in host memory, bring all of it back.

        A prompt whose policy has failed was admitted for what the policy was to keep: it may not fit.
        """
        if job.host is None or job.host.settled:
            return
        keep = torch.ones((self._arena.counted_planes, job.asked.length), dtype=torch.bool, device=row.device)
        job.host.ratio = 1.0
        # All of it is there already: nothing is left that a step could recall.
        self._take_own(job, row, *self._with_window(keep, keep.numel(), job), recall=0)

    def _take_own(self, job: CompressionJob, row: torch.Tensor, keep: torch.Tensor, kept: int, *, recall: int) -> None:
        """Let the row of a request name slots of its own for what it keeps: `[planes, length]` bool, `kept` in all; and
        for the `recall` tokens that decode steps may bring back in each plane."""
        assert self.host is not None
        assert job.host is not None
        try:
            slots = row[: job.asked.length].to(torch.int64)
            if recall and self.host.recall is not None:
                job.host.own, job.area = self.host.settle_with_area(slots, keep, kept, recall)
            else:
                job.host.own = self.host.settle(slots, keep, kept)
        except OutOfMemory as error:
            logger.error("a prompt of %d tokens is lost: %s", job.asked.length, error)
            job.host.abort(*self._why_lost(job, error))
            return
        row[: job.asked.length] = job.host.own.private.to(row.dtype)

    def _why_lost(self, job: CompressionJob, error: OutOfMemory) -> tuple[str, HTTPStatus]:
        """What the client of a prompt is told that does not fit when its prefill has ended."""
        if "failed" not in job.report.fields:
            return f"the KV cache is full: {error}", HTTPStatus.INTERNAL_SERVER_ERROR
        held = self.accounting.physical_tokens
        why = (
            f"the policy {job.report.fields['policy']} failed ({job.report.fields['failed']}), and the prompt of "
            f"{job.asked.length} tokens does not fit the KV cache without it: it holds {held} uncompressed"
        )
        if longest_answer(job.asked.length, 1, held):
            return f"{why}, and others use it now", HTTPStatus.SERVICE_UNAVAILABLE
        return why, HTTPStatus.BAD_REQUEST

    def _evict(self, job: CompressionJob, prompt: Prompt, row: torch.Tensor, plan: EvictionPlan) -> None:
        arena = self._arena
        slots = row[prompt.start : prompt.length].to(torch.int64)
        keep = self._heads.own_groups(plan.keep, arena.groups)
        keep = keep.expand(-1, arena.groups, -1).reshape(arena.counted_planes, -1)
        vision_kept = to_host((keep & prompt.is_vision()).sum(-1).view(prompt.num_layers, -1).sum(-1))
        # From the plan, not from the device: the host need not wait to know them.
        counts = self._heads.own_groups(plan.counts, arena.groups).expand(-1, arena.groups)
        if job.host is not None:
            everything = torch.cat([keep.new_ones(keep.shape[0], prompt.start), keep], dim=1)
            kept = prompt.start * arena.counted_planes + int(counts.sum())
            self._take_own(job, row, *self._with_window(everything, kept, job), recall=job.asked.choice.recall)
            done = passed_event(slots.device)
        else:
            done = self.accounting.evict(slots, self._with_window(keep, 0, job)[0])
        if job.report.counted:  # it was retracted: what was done before is what counts
            return
        job.report.counted = True
        front = prompt.start - job.first_kept
        by_layer = [front * arena.groups + int(tokens) for tokens in counts.sum(-1).tolist()]
        seen = (front + slots.numel()) * arena.groups
        self.counters.compressed(by_layer, seen, prompt.owned_vision * arena.groups)
        self._uncounted.append((done, vision_kept))
        self.settle_counts()

    def _with_window(self, keep: torch.Tensor, kept: int, job: CompressionJob) -> tuple[torch.Tensor, int]:
        """What all planes keep of the last tokens of a prompt.

        Layers with a window give back what no later token sees; all of it stays where other requests may find the
        prompt, because theirs may go on from any point of it.

        Args:
            keep: `[counted planes, tokens]` bool, `kept` in all.

        Returns:
            `[planes, tokens]` bool, and how many are kept in all.
        """
        window = self._arena.window
        if window is None:
            return keep, kept
        tokens = keep.shape[1]
        seen = tokens if job.publishes_cells else min(tokens, window.tokens)
        last = torch.arange(tokens, device=keep.device) >= tokens - seen
        return torch.cat([keep, last.expand(window.planes, -1)]), kept + window.planes * seen

    def _kept_of(self, slots: torch.Tensor) -> tuple[torch.Tensor, Any | None]:
        """Share of `slots` that each layer has; see `Report.shared_kept`.  Nobody waits for it here."""
        arena = self._arena
        resident = arena.residency.table[: arena.counted_planes, slots.to(torch.int64)] != EVICTED
        shares = to_host(resident.view(-1, arena.groups * slots.numel()).float().mean(1))
        return shares, passed_event(slots.device)

    def report_shared(self, job: CompressionJob) -> None:
        """Add to the job's report what each layer has of the prefix that it was served."""
        if job.report.shared_kept is None:
            return
        shares, copied = job.report.shared_kept
        if copied is not None:
            copied.synchronize()
        job.report.fields["shared_kept_per_layer"] = [round(share, 4) for share in shares.tolist()]
        job.report.shared_kept = None

    @property
    def all_counted(self) -> bool:
        """Whether `vision_kept_by_layer` counts all prompts that `kept_by_layer` counts."""
        return not self._uncounted

    def settle_counts(self, *, wait: bool = False) -> None:
        """Count what the device has counted meanwhile (`wait`: wait for all of it)."""
        while self._uncounted:
            done, vision_kept = self._uncounted[0]
            if done is not None and not done.query():
                if not wait:
                    return
                done.synchronize()
            self._uncounted.pop(0)
            self.counters.vision_kept(vision_kept.tolist())

    def report_positions(self, job: CompressionJob, row: torch.Tensor) -> None:
        """Add to the job's report what each layer has of the prompt now, the shared prefix included.

        Waits for the device: only for requests that ask for it.

        Args:
            row: `[context]`, the request's row of `req_to_token`.
        """
        arena = self._arena
        cells = arena.residency.table[: arena.counted_planes, row[: job.asked.length].to(torch.int64)]
        resident = (cells != EVICTED).view(-1, arena.groups, job.asked.length).any(1)
        job.report.fields["kept_positions"] = [layer.nonzero().flatten().tolist() for layer in resident.cpu()]
        job.report.fields["vision"] = [run.as_dict() for run in job.asked.runs]


def _give_up(scorings: Iterable[Scoring | None], error: Exception) -> None:
    """Count no more for these prompts.  They fail in `finish`, where all tensor-parallel ranks meet."""
    for scoring in scorings:
        if scoring is not None:
            scoring.failure = error
