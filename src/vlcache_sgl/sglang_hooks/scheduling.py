"""Between forwards: which prompts may start, which requests start over, and what is sent to clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_sgl.compression.sharing.images import SharedImages
from vlcache_sgl.config import KVConfig
from vlcache_sgl.counters import Counters
from vlcache_sgl.sglang_hooks.admission import reopen
from vlcache_sgl.sglang_hooks.expansion import Expansions
from vlcache_sgl.sglang_hooks.facades import Req, ScheduleBatch, Scheduler
from vlcache_sgl.sglang_hooks.jobs import job_of
from vlcache_sgl.sglang_hooks.model_start import ModelStart
from vlcache_sgl.sglang_hooks.second_reading import SecondReadings, clients_of


class Scheduling:
    """Asks expansions and second readings what SGLang's scheduler must do.  Does nothing until `start`.

    Args:
        config: the server's settings.
        images: what is shared.
        counters: where expansions are counted.
        model: the served model, when it has started.
    """

    def __init__(self, config: KVConfig, images: SharedImages, counters: Counters, model: ModelStart) -> None:
        self._config = config
        self._images = images
        self._counters = counters
        self._model = model
        self._expansions: Expansions | None = None
        self._readings: SecondReadings | None = None

    def start(self, scheduler: Scheduler) -> None:
        """SGLang's scheduler has been built."""
        config = self._config
        enforce = config.guard == "enforce"
        self._expansions = Expansions(scheduler, self._images, config.guard_threshold, enforce, self._counters)
        self._readings = SecondReadings(scheduler)
        scheduler.tree_cache.copy_listener = self._expansions.published
        scheduler.tree_cache.reset_listener = self._images.clear

    def before_next_batch(self, _: Any, *, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None) -> None:
        """Before SGLang chooses its next batch: send questions back that their picture's copy cannot answer."""
        if self._expansions is not None:
            self._expansions.before_next_batch(running_batch, last_batch)

    def before_prefill_result(self, _: Any, batch: ScheduleBatch, *__: Any) -> None:
        """Before SGLang publishes the first tokens of a prefill batch; under overlap scheduling that has been done."""
        if self._expansions is not None:
            self._expansions.judge(batch)

    def withholds(self, result: bool, req: Req, *_: Any) -> bool:
        """After SGLang has said whether what a stream has to say must wait: so must an answer that is not judged."""
        return bool(result) or (self._expansions is not None and self._expansions.withholds(req))

    def admit_prefills(self, original: Callable[..., Any], scheduler: Scheduler, running_batch: ScheduleBatch) -> Any:
        """Around the choice of prompts to start: some memory has come back, some prompts must wait for another."""
        reopen(scheduler, running_batch)
        if self._expansions is None or self._readings is None:
            return original(scheduler, running_batch)
        with self._expansions.holding_back(), self._readings.holding_back():
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
            if not req.finished():
                continue
            if job.report.recall is not None:
                job.report.fields["recall"] = job.report.recall.report(len(req.output_ids))
            if self._expansions is not None:
                self._expansions.note_decode(job)
        return original(streamer, answered, *args, **options)
