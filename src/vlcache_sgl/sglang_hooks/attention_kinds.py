"""Which kinds of attention are served: asked of SGLang's description of a model, and of each attention layer.

The description is known before weights are loaded, the layers are what a server runs.  A kind that is not understood
would be answered wrongly or end the first request, so it ends the start: one line that says what is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from vlcache_sgl.config import ConfigError
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.sglang_hooks.facades import AttentionLayer, ModelConfig, ServerArgs

# -- before weights are loaded ----------------------------------------------------------------------------------------

_IGNORE_WINDOWS = frozenset({"qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"})
"""Families whose configurations may name sliding layers, and whose classes in SGLang have none."""


def _has_latent_attention(model: ModelConfig) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return bool(model.attention_arch == AttentionArch.MLA)


def _has_sparse_attention(model: ModelConfig) -> bool:
    from sglang.srt.configs.model_config import is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse
    from sglang.srt.layers.attention.qsa.config import is_qwen_qsa

    return any(kind(model.hf_config) for kind in (is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse, is_qwen_qsa))


def _has_untried_states(model: ModelConfig) -> bool:
    """Layers without a KV cache that are no Gated DeltaNets: their states are SGLang's too, but nobody has looked."""
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mambaish_config

    return mambaish_config(model) is not None and hybrid_gdn_config(model) is None


def _has_no_attention(model: ModelConfig) -> bool:
    from vlcache_sgl.sglang_hooks.kv_layers import kv_layers

    return not kv_layers(model)


def _has_sliding_layers(model: ModelConfig) -> bool:
    from vlcache_sgl.sglang_hooks.kv_layers import has_windows

    text = model.hf_text_config
    if has_windows(model):
        return False
    named = any("sliding" in str(kind) for kind in getattr(text, "layer_types", None) or ())
    return bool(model.is_hybrid_swa) or (named and getattr(text, "model_type", None) not in _IGNORE_WINDOWS)


_UNSERVED_MODELS: tuple[tuple[Callable[[ModelConfig], Any], str], ...] = (
    (_has_latent_attention, "multi-head latent attention (MLA): a cell holds keys and values of heads"),
    (_has_sparse_attention, "sparse attention: its index has keys of its own, which are in no cell"),
    (lambda model: model.is_encoder_decoder, "cross-attention: those layers read tokens of an encoder"),
    (lambda model: model.attention_chunk_size, "chunked attention: those layers already drop tokens"),
    (_has_untried_states, "state-space layers, or linear attention that is not Gated DeltaNet: nobody has tried them"),
    (_has_no_attention, "models without layers of attention: there is no KV cache to compress"),
    (_has_sliding_layers, "sliding-window attention: those layers already drop tokens"),
    (lambda model: model.has_attention_sinks, "attention sinks: weights that are no token's take part in the softmax"),
    (lambda model: model.has_asymmetric_kv, "keys and values of different width: they have no common cell"),
)
"""Kinds of models that are not served, and why."""


def resolved_model(server_args: ServerArgs) -> ModelConfig | None:
    """SGLang's description of the model that `server_args` name; None where it has none, and will say why itself.

    Not the one that SGLang remembers: flags that are not resolved yet may change what it describes.
    """
    from sglang.srt.configs.model_config import ModelConfig as Resolved

    try:
        return Resolved.from_server_args(server_args)  # type: ignore[no-any-return]
    except Exception:  # no such model, no such architecture: SGLang's own message is the better one
        return None


def unsupported_model(model: ModelConfig) -> Iterator[str]:
    """One line per kind of attention in a model that cannot be served."""
    for has_it, what in _UNSERVED_MODELS:
        if has_it(model):
            yield f"--kv-policy does not support {what}"


# -- the loaded model -------------------------------------------------------------------------------------------------


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, AttentionLayer, torch.nn.Module]]:
    """Name, layer and owner of every attention layer that reads a KV cache.

    Models of transformers keep theirs in a dict beside the modules, so attributes are looked at, too.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        for name, value in (*owner.named_children(), *vars(owner).items()):
            if isinstance(value, RadixAttention):
                yield f"{prefix}{name}", value, owner
            elif isinstance(value, dict) and name != "_modules":
                for key, part in value.items():
                    if isinstance(part, RadixAttention):
                        yield f"{prefix}{name}[{key}]", part, owner


def _has_sinks(owner: torch.nn.Module) -> bool:
    """Whether the owner of an attention layer has weights to hand it as sinks."""
    tensors = {**dict(owner.named_parameters(recurse=False)), **dict(owner.named_buffers(recurse=False)), **vars(owner)}
    return any("sink" in name and isinstance(value, torch.Tensor) for name, value in tensors.items())


def refuse_layers(
    model: torch.nn.Module,
    *,
    kept: Collection[int],
    heads: tuple[int, int],
    widths: tuple[int, int],
    context: int,
    window: Window | None = None,
) -> None:
    """Look at every attention layer whose keys are in the arena.

    Args:
        model: SGLang's, loaded.
        kept: numbers of the layers that the arena has planes for, those with a window left out.
        heads: query heads and KV heads of this rank.
        widths: of a head's key and value, in elements.
        context: tokens of the longest prompt with its answer.
        window: layers that attend to the last tokens only.

    Raises:
        ConfigError: one line with the name of a layer that would be served wrongly, and why.
    """
    found: dict[int, str] = {}
    sliding = () if window is None else window.layer_ids
    for name, layer, owner in attention_layers(model):
        if layer.layer_id in sliding:
            assert window is not None
            own_heads, own_widths = (layer.tp_q_head_num, window.kv_heads), (window.head_dim, window.head_dim)
            problem = _problem(layer, own_heads, own_widths, context, window.tokens)
        elif layer.layer_id in kept:
            problem = _problem(layer, heads, widths, context)
        else:
            continue
        if problem is None and _has_sinks(owner):
            problem = "attention sinks"
        if problem is None and layer.layer_id in found and not getattr(owner, "is_kv_shared_layer", False):
            problem = f"keys that are those of {found[layer.layer_id]}"
        if problem is not None:
            raise ConfigError(f"--kv-policy does not support layer {name} of this model: it has {problem}")
        found[layer.layer_id] = name
    if missing := sorted({*kept, *sliding} - found.keys()):
        raise ConfigError(f"--kv-policy does not support this model: layer {missing[0]} has no attention that is known")


def _problem(
    layer: AttentionLayer, heads: tuple[int, int], widths: tuple[int, int], context: int, known: int | None = None
) -> str | None:
    """What attention over cells would leave out of a layer, whose window is `known`; None: nothing."""
    from sglang.srt.layers.radix_attention import AttentionType

    window, kind = layer.sliding_window_size, layer.attn_type
    # SGLang counts a window without the token itself; one that no prompt outgrows hides nothing.
    slides = window is not None and 0 <= window < context - 1 and window != known
    own_heads, own_widths = (layer.tp_q_head_num, layer.tp_k_head_num), (layer.head_dim, layer.v_head_dim)
    scales = layer.xai_temperature_len
    reasons = {
        "cross-attention": layer.is_cross_attention,
        f"a sliding window of {window} tokens": slides,
        "chunked attention": layer.use_irope,
        f"attention of kind {getattr(kind, 'value', kind)}": kind != AttentionType.DECODER,
        f"a logit cap of {layer.logit_cap}": bool(layer.logit_cap),
        f"a temperature that grows after {scales} tokens": scales is not None and scales > 0,
        f"position encoding {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
        f"{own_heads[0]} query and {own_heads[1]} KV heads, not {heads[0]} and {heads[1]}": own_heads != heads,
        f"{layer.tp_v_head_num} heads of values": layer.tp_v_head_num != layer.tp_k_head_num,
        f"heads of width {own_widths[0]} and {own_widths[1]}, not {widths[0]} and {widths[1]}": own_widths != widths,
    }
    return next((reason for reason, present in reasons.items() if present), None)
