"""Which requests are compressed, and how: decided when a request is queued."""

from __future__ import annotations

from typing import Any

from vlcache_sgl.compression.job import CompressionJob, ReadingState
from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.counters import Counters
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.policy.choice import Choice, Choices
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.sglang_hooks.compat import is_health_poll
from vlcache_sgl.sglang_hooks.facades import Req, Scheduler
from vlcache_sgl.sglang_hooks.gate import NAMESPACE, read_request
from vlcache_sgl.sglang_hooks.jobs import give_job, job_of
from vlcache_sgl.sglang_hooks.media import vision_runs, vision_spans
from vlcache_sgl.sglang_hooks.model_start import ModelStart, ServedModel
from vlcache_sgl.sglang_hooks.status import Status

REPORT_KEY = "kv_compression"
"""In the response's `meta_info`: a list with one report."""
UNEVICTED = "|measured"
"""Ends the radix key of a request that only measures: it finds no compressed prefix, and leaves nothing behind."""


class Requests:
    """Gives requests their jobs and their namespaces in the radix tree.

    Args:
        config: the server's settings.
        choices: turns what requests ask for into policies.
        counters: where requests that are left alone are counted.
        model: the served model, when it has started.
        status: is told that something has happened.
    """

    def __init__(
        self,
        config: KVConfig,
        choices: Choices,
        counters: Counters,
        model: ModelStart,
        status: Status,
    ) -> None:
        self._config = config
        self._choices = choices
        self._counters = counters
        self._model = model
        self._status = status
        self._private = 0

    @property
    def _served(self) -> ServedModel:
        served = self._model.served
        assert served is not None, "requests are queued after the model has started"
        return served

    def admit(self, scheduler: Scheduler, req: Req, *_: Any, **__: Any) -> None:
        """Before a request is queued: decide whether and how it will be compressed."""
        if (known := job_of(req)) is not None:
            known.restart()  # it was retracted
            return
        if REPORT_KEY in (req.customized_info or {}):
            return  # the same: it is left alone
        if getattr(req, "to_finish", None) is not None:
            return
        try:
            params, choice = read_request(
                self._choices,
                req.sampling_params,
                extra_key=req.extra_key,
                length=len(req.origin_input_ids),
                stream=bool(req.stream),
            )
            if params.report == "attention":
                self._require_measurable(choice)
        except (ConfigError, PolicyError) as error:
            req.set_finish_with_abort(str(error))
            return
        self._status.note_change()
        host = self._served.host
        vision = vision_spans(req.multimodal_inputs)
        reason = None
        if choice.budget.keeps_all:
            reason = "budget"
        elif not vision and self._config.scope == "vision":
            # Where images lie in a prompt of vectors nobody says.
            reason = "scope" if req.input_embeds is None else "embeds"
        elif len(req.origin_input_ids) < self._config.min_tokens:
            reason = "short"
        if reason is not None:
            if not is_health_poll(req):
                self._counters.skipped(reason)
            _report(req, {"skipped": reason})
            if host is not None and (refused := host.fit(req, None)):
                req.set_finish_with_abort(refused)
            return
        positions, measured = params.report == "positions", params.report == "attention"
        asked = Asked(
            choice,
            vision,
            len(req.origin_input_ids),
            self._config.min_tokens,
            runs=vision_runs(req.multimodal_inputs, self._served.module),
            positions=positions,
            measures_attention=measured,
        )
        job = CompressionJob(asked, ReadingState() if choice.policy.reads_twice else None)
        if choice.share == "exact" and not measured and host is not None and host.admits(job):
            host.begin(req, job)
        if host is not None and (refused := host.fit(req, job)):
            req.set_finish_with_abort(refused)
            return
        _report(req, job.report.fields)
        give_job(req, job)
        self._name_prefix(req, job)

    def _name_prefix(self, req: Req, job: CompressionJob) -> None:
        """Give a request its namespace in the radix tree: compressed and full variants of a prefix never mix."""
        user_key, choice = req.extra_key or "", job.asked.choice
        if job.host is not None:
            req.extra_key = f"{user_key}{NAMESPACE}exact"
            return
        req.extra_key = f"{user_key}{NAMESPACE}{choice.fingerprint}"
        if job.asked.measures_attention:
            req.extra_key += UNEVICTED
            req.skip_radix_cache_insert = True
            return
        if choice.share in ("off", "exact"):  # exact: more than fits host memory
            self._private += 1
            req.extra_key += f"#private{self._private}"
            req.skip_radix_cache_insert = True

    def limit_hit(self, result: int, req: Req, *rest: Any) -> int:
        """After SGLang has said how much of a prompt may come from the prefix cache."""
        host = None if self._model.served is None else self._model.served.host
        return result if host is None else host.limit_hit(result, req, *rest)

    def _require_measurable(self, choice: Choice) -> None:
        """
        Raises:
            ConfigError: where `kv_report: attention` cannot be answered; the message is for the client.
        """
        if self._served.backend.provider.on_device:
            raise ConfigError("kv_report attention needs a server with --attention-backend torch_native")
        if self._served.ranks > 1:
            raise ConfigError(
                "kv_report attention needs a server without tensor parallelism: a rank sees its own heads"
            )
        if choice.policy.reads_twice:
            raise ConfigError(
                f"kv_report attention cannot be had with {choice.policy.spec}: its prompt is read elsewhere"
            )


def _report(req: Req, report: dict[str, Any]) -> None:
    """Let the response's `meta_info` carry `report`, which may still be filled in."""
    req.customized_info = {**(req.customized_info or {}), REPORT_KEY: [report]}
