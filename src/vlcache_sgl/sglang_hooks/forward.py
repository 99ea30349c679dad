"""Around the model's forwards: which chunks they compute, and what is compressed at their end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.counters import Counters
from vlcache_sgl.recall.areas import RecallArea
from vlcache_sgl.sglang_hooks.facades import ForwardBatch, ModelRunner, Req, ScheduleBatch
from vlcache_sgl.sglang_hooks.host_sharing import prefix_positions
from vlcache_sgl.sglang_hooks.jobs import job_of
from vlcache_sgl.sglang_hooks.model_start import ModelStart
from vlcache_sgl.sglang_hooks.status import Status

JOBS_ATTRIBUTE = "vlcache_jobs"
"""On SGLang's ForwardBatch: one entry per request, None where nothing is to be scored."""
AREAS_ATTRIBUTE = "vlcache_areas"
"""On SGLang's ForwardBatch: requests that decode and get evicted tokens back, by the row that their token has in it."""
ROWS_ATTRIBUTE = "vlcache_rows"
"""On SGLang's ForwardBatch: the requests' rows of `req_to_token`, a list."""


class Forwards:
    """Hands the jobs of a batch to attention and, when their prompts are complete, to the compressor.

    Args:
        model: the served model, when it has started.
        counters: where the time of forwards is counted.
        status: is told that something has happened.
    """

    def __init__(self, model: ModelStart, counters: Counters, status: Status) -> None:
        self._model = model
        self._counters = counters
        self._status = status

    def begin(self, forward_batch: ForwardBatch, cls: Any, batch: ScheduleBatch, *_: Any, **__: Any) -> None:
        """After a ForwardBatch is built: tell the compressor which chunks it will compute."""
        served = self._model.served
        if served is None:
            return
        rows = getattr(batch, "req_pool_indices_cpu", None)
        if rows is not None:
            setattr(forward_batch, ROWS_ATTRIBUTE, rows.tolist())
        if not batch.forward_mode.is_extend():
            watched = [job if job is not None and job.reads_decode else None for job in map(job_of, batch.reqs)]
            if any(watched):
                setattr(forward_batch, JOBS_ATTRIBUTE, watched)
            setattr(forward_batch, AREAS_ATTRIBUTE, _areas(enumerate(batch.reqs)))
            return
        decoding = {id(req) for req in (batch.decoding_reqs or ())}
        jobs: list[CompressionJob | None] = []
        rows_of_decoding: list[tuple[int, Req]] = []
        first = 0
        for req, begin, count in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            job = job_of(req) if id(req) not in decoding else None
            if job is not None:
                served.compressor.begin_chunk(job, int(begin), int(begin) + int(count))
                if job.progress.scoring is not None:
                    if job.host is not None and job.progress.chunk.begin == job.progress.shared > 0:
                        device = forward_batch.positions.device
                        job.progress.scoring.add_positions(prefix_positions(req, job.progress.shared, device))
                    job.progress.scoring.add_positions(_positions(forward_batch, first, int(count)))
            if id(req) in decoding:
                rows_of_decoding.append((first, req))
            first += int(count)
            jobs.append(job if job is not None and _attends(job) else None)
        if any(jobs):
            setattr(forward_batch, JOBS_ATTRIBUTE, jobs)
        setattr(forward_batch, AREAS_ATTRIBUTE, _areas(rows_of_decoding))

    def run(
        self, original: Callable[..., Any], runner: ModelRunner, forward_batch: ForwardBatch, *args: Any, **kw: Any
    ) -> Any:
        """Around the model's forward: at its end, compress the prompts that are complete."""
        served = self._model.served
        if served is None:
            return original(runner, forward_batch, *args, **kw)
        self._status.note_change()
        jobs = getattr(forward_batch, JOBS_ATTRIBUTE, None)
        scored = jobs is not None and any(job is not None and job.progress.scoring is not None for job in jobs)
        started = time.perf_counter()
        # Handed over here, because SGLang's runners may give attention a copy of the batch without our attributes.
        rows: list[int] | None = getattr(forward_batch, ROWS_ATTRIBUTE, None)
        served.backend.jobs, served.backend.rows = jobs, rows
        served.backend.areas = getattr(forward_batch, AREAS_ATTRIBUTE, [])
        table = runner.req_to_token_pool.req_to_token
        computing = (
            []
            if jobs is None or not forward_batch.forward_mode.is_extend()
            else [
                (job, table[forward_batch.req_pool_indices[number] if rows is None else rows[number]])
                for number, job in enumerate(jobs)
                if job is not None
            ]
        )
        compressor = served.compressor
        staged = [
            (job, row[: job.progress.chunk.begin])
            for job, row in computing
            if job.host is not None and not job.host.settled and job.progress.chunk.begin
        ]
        compressor.stage([prefix for _, prefix in staged])
        try:
            result = original(runner, forward_batch, *args, **kw)
        finally:
            served.backend.jobs = served.backend.rows = None
            served.backend.areas = []
            compressor.end_staging()
        if jobs is None or forward_batch.forward_mode.is_decode():
            return result
        for job, row in computing:
            compressor.end_chunk(job, row)
        complete = [(job, row) for job, row in computing if (job.progress.reached or 0) >= job.asked.end]
        for job, row in complete:
            compressor.finish(job, row)
        elapsed = (time.perf_counter() - started) * 1e3
        if scored:
            self._counters.prefill_ms += elapsed
        if staged:
            self._counters.staged_forwards += 1
            self._counters.staged_ms += elapsed
        for job, prefix in staged:
            job.report.staged.add(prefix.numel(), elapsed)
            job.report.fields["staged"] = job.report.staged.as_dict()
        if any(job is not None and job.asked.repeated for job in jobs):
            self._counters.second_reading_ms += elapsed
        for job, row in complete:
            if job.asked.positions:
                compressor.report_positions(job, row)
        return result

    def fits_graph(self, result: bool, _: Any, forward_batch: ForwardBatch) -> bool:
        """After SGLang has said whether a recorded decode graph serves a batch: are our buffers large enough?"""
        return bool(result) and (self._model.served is None or self._model.served.backend.fits_graph(forward_batch))


def _areas(decoding: Iterable[tuple[int, Req]]) -> list[tuple[int, RecallArea]]:
    """The areas of requests that decode, with the rows of their tokens."""
    jobs = ((row, job_of(req)) for row, req in decoding)
    return [(row, job.recalls) for row, job in jobs if job is not None and job.recalls is not None]


def _attends(job: CompressionJob) -> bool:
    """Whether anything is to be done for a job in or after a prefill forward."""
    progress = job.progress
    return job.host is not None or job.asked.positions or progress.shared > 0 or not progress.done


def _positions(forward_batch: ForwardBatch, first: int, count: int) -> torch.Tensor:
    """Rotary positions of `count` tokens of the batch, `[count]` or `[3, count]`."""
    mrope = forward_batch.mrope_positions
    positions: torch.Tensor = forward_batch.positions if mrope is None else mrope
    return positions[..., first : first + count]
