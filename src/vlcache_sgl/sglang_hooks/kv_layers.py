"""Which layers of a model have a KV cache, and which of them attend to all tokens.

Budgets, policies and reports count the latter only, in their order.  Of a hybrid the others keep a state per request,
of constant size; layers with a window attend to the last tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.configs.hybrid_arch import mambaish_config

from vlcache_sgl.capacity import WINDOW_FAMILIES
from vlcache_sgl.sglang_hooks.facades import ModelConfig


def kv_layers(model: ModelConfig) -> Sequence[int]:
    """Layers that attend to all tokens and have keys of their own: their numbers in the model, ascending."""
    hybrid = mambaish_config(model)
    if hybrid is not None:
        layers: list[int] = hybrid.full_attention_layer_ids
        return layers
    return _of_kind(model, "full_attention") if has_windows(model) else range(model.num_attention_layers)


def has_windows(model: ModelConfig) -> bool:
    """Whether some layers attend to the last tokens only, in a way that is served."""
    text = model.hf_text_config
    return getattr(text, "model_type", None) in WINDOW_FAMILIES and "sliding_attention" in (text.layer_types or ())


def window_layers(model: ModelConfig) -> Sequence[int]:
    """Layers that attend to the last tokens only and have keys of their own."""
    return _of_kind(model, "sliding_attention") if has_windows(model) else ()


def window_tokens(model: ModelConfig) -> int:
    """How many tokens before its own a token sees in these layers."""
    text = model.hf_text_config
    return int(text.sliding_window) + WINDOW_FAMILIES[text.model_type]


def _of_kind(model: ModelConfig, kind: str) -> list[int]:
    text = model.hf_text_config
    with_keys = int(text.num_hidden_layers) - int(getattr(text, "num_kv_shared_layers", 0) or 0)
    return [number for number, found in enumerate(text.layer_types[:with_keys]) if found == kind]
