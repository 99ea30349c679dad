"""Between forwards: which prompts may start, and what is sent to clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_sgl.sglang_hooks.admission import reopen
from vlcache_sgl.sglang_hooks.facades import Req, ScheduleBatch, Scheduler
from vlcache_sgl.sglang_hooks.jobs import job_of
from vlcache_sgl.sglang_hooks.model_start import ModelStart
from vlcache_sgl.sglang_hooks.second_reading import SecondReadings, clients_of


class Scheduling:
    """Tells SGLang's scheduler of memory that has come back and of second readings.

    Args:
        model: the served model, when it has started.
    """

    def __init__(self, model: ModelStart) -> None:
        self._model = model
        self._readings: SecondReadings | None = None

    def start(self, scheduler: Scheduler) -> None:
        """SGLang's scheduler has been built."""
        self._readings = SecondReadings(scheduler)

    def admit_prefills(self, original: Callable[..., Any], scheduler: Scheduler, running_batch: ScheduleBatch) -> Any:
        """Around the choice of prompts to start: some memory has come back, some prompts must wait for another."""
        reopen(scheduler, running_batch)
        if self._readings is None:
            return original(scheduler, running_batch)
        with self._readings.holding_back():
            return original(scheduler, running_batch)

    def send_answers(
        self, original: Callable[..., Any], streamer: Any, reqs: Sequence[Req], *args: Any, **options: Any
    ) -> Any:
        """Around sending what `reqs` have said: only to clients, with what is known at the end of an answer only."""
        answered = clients_of(reqs)
        for req in answered:
            job = job_of(req)
            if job is None:
                continue
            if self._model.served is not None:
                self._model.served.compressor.report_shared(job)
            if req.finished() and job.report.measured is not None:
                job.report.fields["attention"] = job.report.measured.report(len(req.output_ids))
            if req.finished() and job.area is not None:
                job.report.fields["recall"] = job.area.report()
        return original(streamer, answered, *args, **options)
