"""Every place of SGLang that --kv-policy replaces, and what for.  A test resolves all of them."""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlcache_sgl.sglang_hooks import background_calibration
from vlcache_sgl.sglang_hooks.compat import ATTENTION_BACKENDS
from vlcache_sgl.sglang_hooks.gate import Gate, count_placeholders, refuse_misplaced, serve_generate
from vlcache_sgl.sglang_hooks.media import name_by_arrangement
from vlcache_sgl.sglang_hooks.patching import PatchPoint
from vlcache_sgl.sglang_hooks.session import REPORT_KEY

if TYPE_CHECKING:
    from vlcache_sgl.sglang_hooks.session import Session

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_ENTRYPOINTS = "sglang.srt.entrypoints"
_PROCESSORS = "sglang.srt.multimodal.processors"
_REGISTRY = "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS"

UNREADABLE_MEDIA = (OSError, EOFError, struct.error, Image.DecompressionBombError)
"""What opening a client's picture may raise besides SGLang's own list: no such file, cut off, absurdly large."""


def is_request_level(result: bool, _: Any, key: str) -> bool:
    """After SGLang has said whether a `meta_info` entry belongs to the request or to its tokens."""
    return result or key == REPORT_KEY


def writes_through_pool(_: bool, __: Any) -> bool:
    """After SGLang has said whether a model may write its keys itself: it would do so by slot, not by cell."""
    return False


def _client_errors(known: tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    return (*known, *UNREADABLE_MEDIA)


MEDIA_POINTS = (
    *(
        PatchPoint(
            f"{_PROCESSORS}.{module}:CLIENT_MEDIA_EXCEPTIONS",
            "replace",
            _client_errors,
            "answering unreadable pictures with a 400 instead of a 500",
        )
        for module in ("base_processor", "llava")
    ),
    PatchPoint(
        f"{_PROCESSORS}.base_processor:BaseMultimodalProcessor._process_and_collect_mm_items",
        "around",
        count_placeholders,
        "answering placeholders without an image with a 400",
    ),
)
"""How the process that reads requests reads images."""

_IGNORED = "a 400 for what endpoints would ignore"
HTTP_POINTS = (
    PatchPoint(f"{_ENTRYPOINTS}.http_server:serve_generate_request", "around", serve_generate, _IGNORED),
    PatchPoint(
        f"{_ENTRYPOINTS}.http_server:_wait_and_warmup",
        "after",
        background_calibration.start,
        "measuring what layers and heads of a model need on its first start",
    ),
    *(
        PatchPoint(f"{_ENTRYPOINTS}.{target}", "around", refuse_misplaced, _IGNORED)
        for target in (
            "openai.serving_base:OpenAIServingBase.handle_request",
            "openai.serving_responses:OpenAIServingResponses.create_responses",
            "anthropic.serving:AnthropicServing.handle_messages",
        )
    ),
)
"""What it does as an HTTP server; not in `sgl.Engine`."""


def gate_points(gate: Gate) -> list[PatchPoint]:
    """Where requests pass on their way to the scheduler."""
    return [
        PatchPoint(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
            "after",
            gate.check,
            "refusing what cannot be served before a stream begins",
        )
    ]


def runtime_points(session: Session) -> list[PatchPoint]:
    """The patch points of a scheduler process that compresses."""
    from vlcache_sgl.sglang_hooks import admission

    def backend(name: str, _: Any) -> Any:
        return partial(session.build_backend, name)

    return [
        PatchPoint(
            f"{_CONFIGURATOR}._resolve_memory_pool_config", "after", session.size_pools, "virtual slots beyond memory"
        ),
        PatchPoint(f"{_CONFIGURATOR}._build_mha_kv_pool", "around", session.build_pool, "one arena for all layers"),
        PatchPoint(
            f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", "around", session.build_allocator, "returning cells"
        ),
        PatchPoint(
            "sglang.srt.model_executor.model_runner:ModelRunner.effective_logical_max_total_num_tokens",
            "replace",
            session.physical_capacity,
            "refusing prompts that can never fit",
        ),
        *(
            PatchPoint(f"{_REGISTRY}[{name}]", "replace", partial(backend, name), "attention over cells")
            for name in ATTENTION_BACKENDS
        ),
        PatchPoint(
            "sglang.srt.mem_cache.registry:create_unified_radix_cache",
            "around",
            session.build_tree,
            "publishing prompts after compression only",
        ),
        PatchPoint(
            f"{_SCHEDULER}._add_request_to_queue",
            "before",
            session.admit_request,
            "choosing each request's policy and prefix namespace",
        ),
        PatchPoint(
            "sglang.srt.managers.schedule_batch:MultimodalInputs.from_processor_output",
            "after",
            name_by_arrangement,
            "telling images of the same patches in another arrangement apart",
        ),
        PatchPoint(
            f"{_SCHEDULER}.get_new_batch_prefill",
            "around",
            session.admit_prefills,
            "admitting prompts into memory that compression gave back",
        ),
        PatchPoint(
            f"{_SCHEDULER}.get_next_batch_to_run",
            "before",
            session.before_next_batch,
            "starting questions over that miss too much of a shared picture",
        ),
        PatchPoint(
            f"{_COMPONENTS}.batch_result_processor:SchedulerBatchResultProcessor.process_batch_result_prefill",
            "before",
            session.before_prefill_result,
            "not answering questions that miss too much of a shared picture",
        ),
        PatchPoint(
            "sglang.srt.managers.schedule_batch:Req.check_match_stop_str_prefix",
            "after",
            session.withholds,
            "sending nothing of a stream that may have to start over",
        ),
        PatchPoint(
            f"{_SCHEDULER}.update_running_batch",
            "around",
            admission.make_room,
            "retracting a prompt between its chunks before the last running request is aborted",
        ),
        PatchPoint(
            "sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority",
            "after",
            admission.spare_waiting_prefixes,
            "using shared prefixes before a prefill pushes them out",
        ),
        PatchPoint(
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
            "after",
            session.begin_forward,
            "knowing which rows to score",
        ),
        PatchPoint(
            "sglang.srt.model_executor.model_runner:ModelRunner.forward",
            "around",
            session.run_forward,
            "compressing at the end of the prefill",
        ),
        PatchPoint(
            "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.can_run_graph",
            "after",
            session.fits_graph,
            "decoding without a graph where its buffers are too small",
        ),
        PatchPoint(
            "sglang.srt.models.utils:enable_fused_set_kv_buffer",
            "after",
            writes_through_pool,
            "keeping models from writing keys by slot, past our pool",
        ),
        PatchPoint(
            f"{_COMPONENTS}.pool_stats_observer:SchedulerPoolStatsObserver._get_token_info",
            "after",
            session.show_physical_tokens,
            "logs and metrics that count memory, not slots",
        ),
        PatchPoint(
            f"{_COMPONENTS}.load_inquirer:SchedulerLoadInquirer.get_loads",
            "after",
            session.show_physical_load,
            "a load report that counts memory, not slots",
        ),
        PatchPoint(
            f"{_COMPONENTS}.internal_state:SchedulerInternalStateController.get_internal_state",
            "after",
            session.add_state,
            "showing the state in /server_info",
        ),
        PatchPoint(
            f"{_COMPONENTS}.internal_state:SchedulerInternalStateController.set_internal_state",
            "around",
            session.set_internal_state,
            "weights of the model that were measured while it serves",
        ),
        PatchPoint(
            "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector.log_stats",
            "after",
            session.publish_metrics,
            "our figures in /metrics",
        ),
        PatchPoint(
            f"{_COMPONENTS}.metrics_reporter:SchedulerMetricsReporter._maybe_log_idle_metrics",
            "after",
            session.publish_when_idle,
            "up-to-date figures in /metrics when nothing runs",
        ),
        PatchPoint(
            f"{_COMPONENTS}.output_streamer:SchedulerOutputStreamer.is_request_level_customized_info_key",
            "after",
            is_request_level,
            "reporting per request what was done",
        ),
        PatchPoint(
            f"{_COMPONENTS}.output_streamer:SchedulerOutputStreamer.stream_output",
            "around",
            session.send_answers,
            "reporting what is known at the end of an answer, and nothing to nobody",
        ),
    ]
