"""What we read of SGLang's objects, and set on them: one protocol per class, all attributes by name.

mypy knows nothing of SGLang; with these it refuses an attribute that is not listed here, and a test finds every listed
one in the installed SGLang.  Attributes that are our own objects in the place of SGLang's are `Any`: their classes use
these protocols themselves.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Protocol

import torch

# -- requests ---------------------------------------------------------------------------------------------------------


class SamplingParams(Protocol):
    """How a request wants its answer."""

    max_new_tokens: int
    min_new_tokens: int
    custom_params: Any
    beam_width: int | None


class Modality(Protocol):
    """Image, video or audio."""

    name: str


class MediaItem(Protocol):
    """One image, video or audio of a prompt."""

    offsets: Any
    """Pairs of first and last token; None or empty where SGLang keeps them elsewhere."""
    modality: Modality
    model_specific_data: dict[str, Any]

    def is_audio(self) -> bool: ...

    def has_cuda_ipc_proxy(self) -> bool: ...


class MultimodalInputs(Protocol):
    """All media of a prompt."""

    mm_items: list[Any]
    """`MediaItem`; None for one whose features were released."""
    mrope_positions: torch.Tensor | None
    """`[3, n]`."""
    mrope_position_delta: Any
    mrope_position_delta_repeated_cache: Any
    padded_input_ids: Any
    token_modalities: Any
    vision_position_ids: Any


class RequestKV(Protocol):
    """What a request holds of the KV cache."""

    req_pool_idx: Any
    """Its row of `req_to_token`; None: it has none."""
    cache_protected_len: int
    """Leading tokens whose slots belong to the prefix tree."""
    mamba_last_track_seqlen: int | None
    """Of a hybrid, with states kept in the middle of prompts: how many tokens the newest of them has seen."""

    @property
    def holds_kv(self) -> bool: ...


class Req(Protocol):
    """A request in a scheduler."""

    prefix_len: int
    extend_end: int
    """Where the chunk that is computed, or was computed last, ends."""
    full_untruncated_fill_ids: Any
    """Prompt and answer so far, an array."""
    mamba_branching_seqlen: int | None
    """Of a hybrid: behind how many tokens a state is to be kept."""
    origin_input_ids: Any
    """The prompt's token numbers, an array."""
    output_ids: array[int]
    extra_key: Any
    """The request's namespace in the radix tree, text or None."""
    cache_salt: str | None
    kv: RequestKV
    lock: Any
    """On what it relies of the prefix tree; None: on nothing."""
    multimodal_inputs: Any
    """`MultimodalInputs` or None."""
    sampling_params: SamplingParams
    customized_info: dict[str, Any] | None
    to_finish: Any
    skip_radix_cache_insert: bool
    num_matched_prefix_tokens: int
    stream: Any
    return_logprob: bool
    logprob_start_len: int
    input_embeds: Any
    positional_embed_overrides: Any
    lora_id: Any
    eos_token_ids: Any
    vocab_size: Any
    priority: Any
    http_worker_ipc: Any
    tokenizer: Any
    time_stats: Any
    arrival_processed_tokens: Any

    def finished(self) -> bool: ...

    def owned_kv_len(self) -> int: ...

    def set_finish_with_abort(self, error_msg: str) -> None: ...


class TokenizedRequest(Protocol):
    """A request on its way to a scheduler."""

    sampling_params: SamplingParams
    input_ids: Any
    stream: bool
    extra_key: str | None


# -- scheduling -------------------------------------------------------------------------------------------------------


class ReqToTokenPool(Protocol):
    """Slots of requests."""

    req_to_token: torch.Tensor
    """`[rows, context]` int32."""


class ForwardMode(Protocol):
    """What a forward computes."""

    def is_extend(self) -> bool: ...

    def is_decode(self) -> bool: ...

    def is_idle(self) -> bool: ...


class ScheduleBatch(Protocol):
    """Requests that are computed together."""

    reqs: list[Any]
    """`Req`."""
    batch_is_full: bool
    forward_mode: ForwardMode
    decoding_reqs: Any
    prefix_lens: list[int]
    extend_lens: list[int]
    req_pool_indices_cpu: Any

    def check_decode_mem(self) -> bool: ...


class NewTokenRatioTracker(Protocol):
    """How much of their limits answers are expected to take."""

    current: float

    def estimate_new_token_ratio_after_retract(self, reqs: Any) -> float: ...


class SchedulePolicy(Protocol):
    """The order of the queue."""

    tree_cache: Any
    """`CompressedPrefixTree`."""
    policy: Any
    enable_priority_scheduling: bool


class MetricsCollector(Protocol):
    """SGLang's own figures."""

    labels: dict[str, Any]


class MetricsReporter(Protocol):
    """Who publishes them."""

    metrics_collector: MetricsCollector
    current_scheduler_metrics_enabled: bool


class TpWorker(Protocol):
    """One rank's model."""

    model_runner: ModelRunner


class Scheduler(Protocol):
    """The loop that everything runs in."""

    waiting_queue: list[Any]
    """`Req`."""
    chunked_req: Any
    """The `Req` that is between two of its chunks, or None."""
    token_to_kv_pool_allocator: Any
    """`VirtualSlotAllocator`."""
    tree_cache: Any
    """`CompressedPrefixTree`."""
    req_to_token_pool: ReqToTokenPool
    new_token_ratio_tracker: NewTokenRatioTracker
    metrics_reporter: MetricsReporter
    tp_worker: TpWorker
    tokenizer: Any
    max_req_input_len: int
    disaggregation_mode: Any
    processed_tokens_counter: Any

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None: ...

    def init_req_max_new_tokens(self, req: Req) -> None: ...


class PoolStatsObserver(Protocol):
    """Counts what is used of the pool."""

    token_to_kv_pool_allocator: Any
    """`VirtualSlotAllocator`."""


class MemoryLoad(Protocol):
    """How full a scheduler's memory is."""

    token_capacity: int


class Load(Protocol):
    """How busy a scheduler is."""

    memory: MemoryLoad | None
    max_total_num_tokens: int


class StateRequest(Protocol):
    """Settings that change while the scheduler runs."""

    server_args: Mapping[str, Any]


class StateOutput(Protocol):
    """What ``/server_info`` shows of a scheduler."""

    internal_state: dict[str, Any]


# -- forwards ---------------------------------------------------------------------------------------------------------


class ForwardBatch(Protocol):
    """One forward's tensors."""

    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    positions: torch.Tensor
    mrope_positions: torch.Tensor | None
    extend_prefix_lens: torch.Tensor
    extend_prefix_lens_cpu: list[int]
    extend_seq_lens_cpu: list[int]


class GraphForwardBatch(Protocol):
    """What a recorded decode graph reads: a forward's tensors, padded to the size of the graph."""

    batch_size: int
    num_padding: int
    """Rows that are no request; while a graph is recorded it is not there, and all rows are."""
    req_pool_indices: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor


class AttentionLayer(Protocol):
    """One layer's attention."""

    layer_id: int
    tp_q_head_num: int
    tp_k_head_num: int
    tp_v_head_num: int
    head_dim: int
    v_head_dim: int
    scaling: float
    k_scale: Any
    v_scale: Any
    """Tensors or numbers by which the model's 8-bit keys and values are to be multiplied; None: by 1."""
    k_scale_float: float | None
    v_scale_float: float | None
    """The same where they are tensors."""
    is_cross_attention: bool
    sliding_window_size: int | None
    """How many tokens before its own a token sees; negative or None: all."""
    use_irope: bool
    """Chunked, in a model that has an attention chunk size."""
    attn_type: Any
    logit_cap: float
    xai_temperature_len: int | None
    pos_encoding_mode: str


# -- the model and its pools ------------------------------------------------------------------------------------------


class ServerArgs(Protocol):
    """All settings of a server."""

    disable_hybrid_swa_memory: bool
    model_path: str
    api_key: str | None
    admin_api_key: str | None
    tokenizer_worker_num: Any
    tp_size: Any
    chunked_prefill_size: int | None
    triton_attention_num_kv_splits: Any
    attention_backend: str | None
    radix_eviction_policy: str
    disable_radix_cache: bool
    disable_prefill_cuda_graph: bool
    dtype: Any
    device: Any

    def url(self) -> str: ...


class ModelConfig(Protocol):
    """The shape of a model."""

    num_attention_heads: int
    num_attention_layers: int
    head_dim: int
    v_head_dim: int
    swa_head_dim: int
    context_len: int
    hf_config: Any
    hf_text_config: Any
    attention_arch: Any
    attention_chunk_size: int | None
    is_encoder_decoder: bool
    is_multimodal: bool
    is_hybrid_swa: bool
    has_attention_sinks: bool

    @property
    def has_asymmetric_kv(self) -> bool: ...

    def get_total_num_kv_heads(self) -> int: ...

    def get_num_kv_heads(self, tensor_parallel_size: int, dcp_size: int) -> int: ...

    def get_swa_num_kv_heads(self, tensor_parallel_size: int) -> int: ...


class ModelRunner(Protocol):
    """A model, its pools and its attention backend."""

    model: torch.nn.Module
    model_config: ModelConfig
    server_args: ServerArgs
    token_to_kv_pool: Any
    """`KVArena`."""
    token_to_kv_pool_allocator: Any
    """`VirtualSlotAllocator`."""
    req_to_token_pool: ReqToTokenPool
    attn_backend: Any
    device: Any
    dtype: torch.dtype


class LayerInfo(Protocol):
    """Layers of this rank."""

    start_layer: int
    end_layer: int


class Configurator(Protocol):
    """Sizes and builds the pools of a model."""

    use_mla_backend: bool
    is_hybrid_swa: bool
    device: str
    kv_cache_dtype: torch.dtype
    layer_info: LayerInfo
    model_config: ModelConfig
    server_args: ServerArgs


class PoolConfig(Protocol):
    """Sizes of the pools."""

    max_total_num_tokens: int


class Tokenizers(Protocol):
    """The process that reads requests."""

    model_config: ModelConfig


_SCHEDULE_BATCH = "sglang.srt.managers.schedule_batch"
_IO = "sglang.srt.managers.io_struct"
_COMPONENTS = "sglang.srt.managers.scheduler_components"

CLASSES: Mapping[type, str] = {
    SamplingParams: "sglang.srt.sampling.sampling_params:SamplingParams",
    Modality: f"{_SCHEDULE_BATCH}:Modality",
    MediaItem: f"{_SCHEDULE_BATCH}:MultimodalDataItem",
    MultimodalInputs: f"{_SCHEDULE_BATCH}:MultimodalInputs",
    RequestKV: f"{_SCHEDULE_BATCH}:ReqKvInfo",
    Req: f"{_SCHEDULE_BATCH}:Req",
    TokenizedRequest: f"{_IO}:TokenizedGenerateReqInput",
    ReqToTokenPool: "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
    ForwardMode: "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    ScheduleBatch: f"{_SCHEDULE_BATCH}:ScheduleBatch",
    NewTokenRatioTracker: f"{_COMPONENTS}.new_token_ratio_tracker:NewTokenRatioTracker",
    SchedulePolicy: "sglang.srt.managers.schedule_policy:SchedulePolicy",
    MetricsCollector: "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector",
    MetricsReporter: f"{_COMPONENTS}.metrics_reporter:SchedulerMetricsReporter",
    TpWorker: "sglang.srt.managers.tp_worker:TpModelWorker",
    Scheduler: "sglang.srt.managers.scheduler:Scheduler",
    PoolStatsObserver: f"{_COMPONENTS}.pool_stats_observer:SchedulerPoolStatsObserver",
    MemoryLoad: "sglang.srt.managers.load_snapshot:MemoryMetrics",
    Load: "sglang.srt.managers.load_snapshot:LoadSnapshot",
    StateRequest: f"{_IO}:SetInternalStateReq",
    StateOutput: f"{_IO}:GetInternalStateReqOutput",
    ForwardBatch: "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    GraphForwardBatch: "sglang.srt.model_executor.runner.decode_cuda_graph_runner:build_replay_fb_view",
    AttentionLayer: "sglang.srt.layers.radix_attention:RadixAttention",
    ServerArgs: "sglang.srt.server_args:ServerArgs",
    ModelConfig: "sglang.srt.configs.model_config:ModelConfig",
    ModelRunner: "sglang.srt.model_executor.model_runner:ModelRunner",
    LayerInfo: "sglang.srt.model_executor.model_runner_components.layer_setup:ModelLayerInfo",
    Configurator: "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator",
    PoolConfig: "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
    Tokenizers: "sglang.srt.managers.tokenizer_manager:TokenizerManager",
}
"""The class of SGLang that each protocol is a part of, or the function that makes its object."""
