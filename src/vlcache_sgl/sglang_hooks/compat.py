"""What of SGLang and of models we cannot serve, and what SGLang says of them.

Other things that depend on SGLang's version: what is read (`facades.py`, found by a test), what is replaced
(`patch_points.py`, `request_points.py` and `startup.py`, found before a server starts) and what is subclassed
(`allocator.py`, `arena.py`, `backend.py`, `prefill_budget.py`, `prefix_tree.py`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlcache_sgl.capacity import WINDOW_FAMILIES, kv_layer_count
from vlcache_sgl.config import ConfigError
from vlcache_sgl.sglang_hooks.facades import Req, ServerArgs
from vlcache_sgl.sglang_hooks.patching import Patches, PatchPoint

TESTED_SGLANG = "0.5.23"

ATTENTION_BACKENDS = ("torch_native", "triton", "flashinfer")
"""Values of --attention-backend whose place our backend takes, with the kernels of that name."""

FLASHINFER_HEAD_DIMS = (64, 128, 256)
"""Head dimensions that FlashInfer's kernels are built for."""

KV_CACHE_DTYPES = (None, "auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
"""Values of --kv-cache-dtype that cells can hold."""

_UNSUPPORTED_ARGUMENTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("speculative_algorithm", bool, "draft tokens are rolled back, evicted tokens cannot be"),
    ("disaggregation_mode", lambda mode: mode not in (None, "null"), "KV transfer sends whole token slots"),
    ("enable_hierarchical_cache", bool, "host copies hold whole token slots"),
    ("enable_lmcache", bool, "external stores hold whole token slots"),
    ("enable_flexkv", bool, "external stores hold whole token slots"),
    ("enable_hisparse", bool, "it replaces the same KV pool"),
    ("enable_unified_memory", bool, "it replaces the same KV pool"),
    ("enable_page_major_kv_layout", bool, "it lays out the same KV pool"),
    ("enable_unified_cache_external_linker", bool, "external stores hold whole token slots"),
    ("kv_canary", lambda mode: mode not in (None, "none"), "it checks KV by slot, and slots are not memory here"),
    ("enable_kv_cache_sharding", bool, "residency is per rank"),
    ("pp_size", lambda size: (size or 1) > 1, "budgets need the statistics of all layers on one rank"),
    ("dcp_size", lambda size: (size or 1) > 1, "a token's keys would be on another rank than its queries"),
    ("attn_cp_size", lambda size: (size or 1) > 1, "a prompt's rows would be on several ranks"),
    ("enable_prefill_cp", bool, "a prompt's rows would be on several ranks"),
    ("page_size", lambda size: size not in (None, 1), "evicted tokens are single tokens, not pages"),
    ("kv_cache_dtype", lambda dtype: dtype not in KV_CACHE_DTYPES, "cells have a scale per layer, not per block"),
    ("enable_pdmux", bool, "prefill and decode would use one index at once"),
    ("enable_two_batch_overlap", bool, "a batch would be split under the index"),
    ("cuda_graph_backend_prefill", lambda kind: kind not in (None, "disabled"), "prefills are watched layer by layer"),
    ("cuda_graph_config", lambda config: _records_prefills(config), "prefills are watched layer by layer"),
    ("prefill_attention_backend", bool, "one backend must serve prefill and decode"),
    ("decode_attention_backend", bool, "one backend must serve prefill and decode"),
    ("radix_cache_backend", bool, "the prefix tree must be SGLang's own"),
    ("enable_streaming_session", bool, "sessions keep rows outside the prefix tree"),
    ("enable_session_radix_cache", bool, "sessions keep rows outside the prefix tree"),
    ("enable_dp_attention", bool, "ranks of one group would serve different requests"),
    ("attn_dp_size", lambda size: (size or 1) > 1, "ranks of one group would serve different requests"),
    ("dllm_algorithm", bool, "diffusion models rewrite their KV cache"),
    ("is_embedding", bool, "there is no decode to compress for"),
    ("prefill_only_disable_kv_cache", bool, "there is no KV cache"),
    ("encoder_only", bool, "an encoder has no KV cache; the server that it encodes for takes the flag"),
    ("enable_mis", bool, "items of one prompt must not see each other, and all see what is kept"),
    ("enable_deterministic_inference", bool, "how attention is cut follows from what else runs"),
    ("enable_memory_saver", bool, "it would take back memory that holds who owns which cell"),
    ("enable_nvidia_megakernel", bool, "its attention reads the KV cache by slot"),
    ("enable_amd_monokernel", bool, "its attention reads the KV cache by slot"),
)


def unsupported_arguments(server_args: ServerArgs) -> Iterator[str]:
    """One line per flag of SGLang that cannot be combined with --kv-policy: the flag and the reason."""
    for name, is_set, reason in _UNSUPPORTED_ARGUMENTS:
        value = getattr(server_args, name, None)
        if is_set(value):
            flag = "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
            yield f"--kv-policy cannot be combined with {flag}: {reason}"
    from sglang.srt.environ import envs

    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get():
        yield "--kv-policy cannot be combined with SGLANG_ENABLE_METADATA_GLUE_GRAPH: lists change outside of graphs"
    backend = getattr(server_args, "attention_backend", None)
    supported = ATTENTION_BACKENDS if _has_cuda(server_args) else ATTENTION_BACKENDS[:1]
    if backend is not None and backend not in supported:
        yield (
            f"--kv-policy cannot be combined with --attention-backend {backend}: supported here: {', '.join(supported)}"
        )


def _records_prefills(config: Any) -> bool:
    """Whether a --cuda-graph-config asks for graphs of prefills."""
    return isinstance(config, dict) and config.get("prefill", {}).get("backend") not in (None, "disabled")


def _has_cuda(server_args: ServerArgs) -> bool:
    # Counted through NVML: `torch.cuda.is_available` may initialise CUDA, which forked children cannot use then.
    return getattr(server_args, "device", None) in (None, "cuda") and torch.cuda.device_count() > 0


def choose_defaults(server_args: ServerArgs, model: dict[str, Any]) -> None:
    """Set flags of SGLang that were not given and whose default is not for us.

    Done before SGLang resolves them.  The attention backend is chosen on a CUDA device only: a CPU has one.

    Args:
        model: its configuration, see `model_config_dict`.
    """
    explicit = getattr(server_args, "_radix_eviction_policy_explicitly_set", False)
    if server_args.radix_eviction_policy == "lru" and not explicit:
        # Segmented: what was used once goes before what is shared, however long ago that was.
        server_args.radix_eviction_policy = "slru"
    if _text_config(model).get("model_type") in WINDOW_FAMILIES:
        if _has_cuda(server_args):
            if server_args.attention_backend not in (None, "triton"):
                given = server_args.attention_backend
                raise ConfigError(f"--kv-policy serves sliding-window attention with triton, not {given}, on a GPU")
            server_args.attention_backend = "triton"
        # All layers in one pool, which is the arena: it gives back what has left a window.
        server_args.disable_hybrid_swa_memory = True
        own_attention = Patches((OWN_ATTENTION,))
        own_attention.install()
        own_attention.verify()
    if not _has_cuda(server_args):
        return
    if server_args.attention_backend is None:
        server_args.attention_backend = _best_attention(str(server_args.dtype), model)
    # What a policy watches during a prefill is Python between the layers, which no graph records.
    server_args.disable_prefill_cuda_graph = True


def _accepted_attention(original: Callable[[Any], Any], config: Any) -> Any:
    """Around SGLang's look at the attention backends of a model with windows: it asks which of its own kernels know
    them, and ours take their place."""
    return ("triton", "triton") if config.disable_hybrid_swa_memory else original(config)


OWN_ATTENTION = PatchPoint(
    "sglang.srt.arg_groups.model_hook:attention_backends_of", "around", _accepted_attention, "plain torch for Gemma 4"
)


def _best_attention(dtype: str, model: dict[str, Any]) -> str:
    """`flashinfer` where it is installed and serves the model's heads, `triton` otherwise."""
    text = _text_config(model)
    heads = text.get("num_attention_heads")
    dim = text.get("head_dim") or (text["hidden_size"] // heads if heads and text.get("hidden_size") else None)
    if importlib.util.find_spec("flashinfer") is None or dtype in ("float", "float32"):
        return "triton"
    return "flashinfer" if dim in (None, *FLASHINFER_HEAD_DIMS) else "triton"


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a Hugging Face configuration."""
    return next((config[key] for key in ("text_config", "llm_config", "language_config") if key in config), config)


def unsupported_configuration(config: dict[str, Any]) -> Iterator[str]:
    """One line per property of a Hugging Face model configuration that we cannot serve.

    What can be told without SGLang, whose description of a model says more: see `attention_kinds`.
    """
    text = _text_config(config)
    if text.get("kv_lora_rank"):
        yield "--kv-policy does not support multi-head latent attention (MLA): a cell holds keys and values of heads"
    kinds = set(text.get("layer_types") or ())
    # A window alone says nothing: most families write one into their configuration and use none.
    unserved = ("chunked",) if text.get("model_type") in WINDOW_FAMILIES else ("chunked", "sliding")
    if any(word in kind for kind in kinds for word in unserved) or text.get("attention_chunk_size"):
        yield "--kv-policy does not support sliding-window attention: those layers already drop tokens"
    elif kinds and not kv_layer_count(text):
        yield "--kv-policy needs layers of attention, and this model has none: there is no KV cache to compress"
    if text.get("cross_attention_layers"):
        yield "--kv-policy does not support cross-attention: those layers read tokens of an encoder"
    if text.get("sparse_attention_config") or text.get("index_topk"):
        yield "--kv-policy does not support sparse attention: its index has keys of its own, which are in no cell"
    if any(text.get(name) for name in ("mamba_d_state", "mamba_num_heads", "linear_attn_config")):
        yield "--kv-policy does not support state-space layers, or linear attention that is not Gated DeltaNet"


def model_config_dict(server_args: ServerArgs) -> dict[str, Any]:
    """The model's Hugging Face configuration as stored; empty when it cannot be read without loading the model."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(server_args.model_path)
    except Exception:  # SGLang's own message about a missing model is the better one
        return {}
    return dict(config)


def kv_shape(config: dict[str, Any]) -> tuple[int, int] | None:
    """Layers with a KV cache, and KV heads, of a Hugging Face model configuration; None when it does not say."""
    text = _text_config(config)
    layers, heads = kv_layer_count(text), text.get("num_attention_heads")
    return (layers, int(text.get("num_key_value_heads") or heads)) if layers and heads else None


def reads_no_images(config: dict[str, Any]) -> bool:
    """Whether SGLang serves a model of this Hugging Face configuration as one of text alone; False when unknown.

    Where it cannot describe the model yet: its list of architectures lacks some that read images.
    """
    from sglang.srt.configs.model_config import is_multimodal_model

    architectures = config.get("architectures")
    return bool(architectures) and not is_multimodal_model(architectures)


def is_health_poll(req: Req) -> bool:
    """Whether a request is `GET /health_generate`'s own."""
    from sglang.srt.managers.utils import is_health_check_generate_req

    return bool(is_health_check_generate_req(req))


def slot_writers(model: Any) -> list[str]:
    """Modules of the served model that would write keys by slot, past our pool: imported before our patch."""
    from sglang.srt.models import utils

    modules = {sys.modules.get(type(part).__module__) for part in model.modules()}
    asked = utils.enable_fused_set_kv_buffer
    return sorted(
        str(module.__name__)
        for module in modules
        if module is not None and vars(module).get("enable_fused_set_kv_buffer", asked) is not asked
    )


def attention_tp() -> tuple[Any, int, int]:
    """Group, rank and size over which attention heads are divided."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    size = int(parallel.attn_tp_size)
    if size == 1:
        return None, 0, 1
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    return get_attn_tp_group(), int(parallel.attn_tp_rank), size
