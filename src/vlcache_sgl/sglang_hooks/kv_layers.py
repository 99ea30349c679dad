"""Which layers of a model have a KV cache: in a hybrid the others keep a state per request, of constant size.

Planes, budgets, policies and reports count these layers only, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.configs.hybrid_arch import mambaish_config

from vlcache_sgl.sglang_hooks.facades import ModelConfig


def kv_layers(model: ModelConfig) -> Sequence[int]:
    """Their numbers in the model, ascending."""
    hybrid = mambaish_config(model)
    if hybrid is None:
        return range(model.num_attention_layers)
    layers: list[int] = hybrid.full_attention_layer_ids
    return layers
