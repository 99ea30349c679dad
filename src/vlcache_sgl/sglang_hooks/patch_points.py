"""Every place of SGLang that --kv-policy replaces in a scheduler, and what for.  A test resolves all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from vlcache_sgl.sglang_hooks import admission, image_states
from vlcache_sgl.sglang_hooks.compat import ATTENTION_BACKENDS
from vlcache_sgl.sglang_hooks.media import name_by_arrangement
from vlcache_sgl.sglang_hooks.patching import PatchPoint
from vlcache_sgl.sglang_hooks.requests import REPORT_KEY
from vlcache_sgl.sglang_hooks.session import Session

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_STATES = "sglang.srt.mem_cache.unified_cache.components.mamba:MambaComponent"
_REGISTRY = "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS"


def is_request_level(result: bool, _: Any, key: str) -> bool:
    """After SGLang has said whether a `meta_info` entry belongs to the request or to its tokens."""
    return result or key == REPORT_KEY


def writes_through_pool(_: bool, __: Any) -> bool:
    """After SGLang has said whether a model may write its keys itself: it would do so by slot, not by cell."""
    return False


def runtime_points(session: Session) -> list[PatchPoint]:
    """The patch points of a scheduler process that compresses."""

    def backend(name: str, _: Any) -> Any:
        return partial(session.model.build_backend, name)

    return [
        PatchPoint(
            f"{_CONFIGURATOR}._resolve_memory_pool_config", "after", session.pools.size, "virtual slots beyond memory"
        ),
        PatchPoint(
            f"{_CONFIGURATOR}._build_mha_kv_pool", "around", session.pools.build_pool, "one arena for all layers"
        ),
        PatchPoint(
            f"{_CONFIGURATOR}._build_hybrid_linear_kv_pool",
            "around",
            session.pools.build_hybrid_pool,
            "one arena for the layers of attention of a hybrid",
        ),
        PatchPoint(
            f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator",
            "around",
            session.pools.build_allocator,
            "returning cells",
        ),
        PatchPoint(
            "sglang.srt.model_executor.model_runner:ModelRunner.effective_logical_max_total_num_tokens",
            "replace",
            session.pools.physical_capacity,
            "refusing prompts that can never fit",
        ),
        *(
            PatchPoint(f"{_REGISTRY}[{name}]", "replace", partial(backend, name), "attention over cells")
            for name in ATTENTION_BACKENDS
        ),
        PatchPoint(
            "sglang.srt.mem_cache.registry:create_unified_radix_cache",
            "around",
            session.pools.build_tree,
            "publishing prompts after compression only",
        ),
        PatchPoint(
            f"{_SCHEDULER}._add_request_to_queue",
            "before",
            session.requests.admit,
            "choosing each request's policy and prefix namespace",
        ),
        PatchPoint(
            "sglang.srt.managers.schedule_batch:Req._compute_max_prefix_len",
            "after",
            session.requests.limit_hit,
            "computing all query rows, whatever the prefix cache has",
        ),
        *(
            PatchPoint(
                f"sglang.srt.managers.schedule_policy:PrefillAdder.{method}",
                "around",
                admission.consider_request,
                "charging a prompt in host memory a chunk and what it keeps, and cutting one of a hybrid at its image",
            )
            for method in ("add_one_req", "add_chunked_req")
        ),
        PatchPoint(
            "sglang.srt.managers.schedule_batch:ScheduleBatch._mamba_radix_cache_v2_req_prepare_for_extend",
            "before",
            image_states.choose_branching_point,
            "keeping the states of a hybrid behind its images",
        ),
        PatchPoint(
            f"{_STATES}.prepare_for_caching_req",
            "around",
            image_states.prepare_state,
            "publishing states only with the tokens that they have seen",
        ),
        PatchPoint(
            f"{_STATES}.cleanup_after_caching_req",
            "around",
            image_states.clean_up_state,
            "publishing states of images without touching those of requests",
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
            session.scheduling.admit_prefills,
            "admitting prompts into memory that compression gave back",
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
            session.forwards.begin,
            "knowing which rows to score",
        ),
        PatchPoint(
            "sglang.srt.model_executor.model_runner:ModelRunner.forward",
            "around",
            session.forwards.run,
            "compressing at the end of the prefill",
        ),
        PatchPoint(
            "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.can_run_graph",
            "after",
            session.forwards.fits_graph,
            "decoding without a graph where its buffers are too small",
        ),
        PatchPoint(
            "sglang.srt.models.utils:enable_fused_set_kv_buffer",
            "after",
            writes_through_pool,
            "keeping models from writing keys by slot, past our pool",
        ),
        *(
            PatchPoint(
                f"{_COMPONENTS}.pool_stats_observer:SchedulerPoolStatsObserver.{method}",
                "after",
                session.pools.show_physical_tokens,
                "logs and metrics that count memory, not slots",
            )
            for method in ("_get_token_info", "_get_mamba_token_info")
        ),
        PatchPoint(
            f"{_COMPONENTS}.load_inquirer:SchedulerLoadInquirer.get_loads",
            "after",
            session.pools.show_physical_load,
            "a load report that counts memory, not slots",
        ),
        PatchPoint(
            f"{_COMPONENTS}.internal_state:SchedulerInternalStateController.get_internal_state",
            "after",
            session.status.add_state,
            "showing the state in /server_info",
        ),
        PatchPoint(
            f"{_COMPONENTS}.internal_state:SchedulerInternalStateController.set_internal_state",
            "around",
            session.weights.set_internal_state,
            "weights of the model that were measured while it serves",
        ),
        PatchPoint(
            "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector.log_stats",
            "after",
            session.status.publish_metrics,
            "our figures in /metrics",
        ),
        PatchPoint(
            f"{_COMPONENTS}.metrics_reporter:SchedulerMetricsReporter._maybe_log_idle_metrics",
            "after",
            session.status.publish_when_idle,
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
            session.scheduling.send_answers,
            "reporting what is known at the end of an answer, and nothing to nobody",
        ),
    ]
