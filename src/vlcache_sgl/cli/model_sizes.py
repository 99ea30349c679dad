"""What a model stores, by its description, for `vlcache plan`: bytes of a token, of a state, and of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlcache_sgl.capacity import (
    WINDOW_FAMILIES,
    KVShape,
    StateShape,
    WindowShape,
    kv_layer_count,
    window_layer_count,
)

HUB_TIMEOUT_S = 5.0


class PlanError(ValueError):
    """Nothing can be planned; the message is one line for the user."""


def read_model(name: str) -> dict[str, Any]:
    """The Hugging Face configuration at a file, in a folder, or of a model of that name.

    Raises:
        PlanError: when there is none, or when the server would refuse it.
    """
    from transformers import AutoConfig

    from vlcache_sgl.sglang_hooks.compat import unsupported_configuration

    config = _stored_config(name)
    if problem := next(unsupported_configuration(config), None):
        raise PlanError(problem)
    try:
        # Configurations leave out what is the family's default.
        config["text_config"] = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config().to_dict()
    except Exception:  # a family that this version of transformers does not know: what is written has to do
        config.setdefault("text_config", _text_part(config))
    return config


def _stored_config(name: str) -> dict[str, Any]:
    """As it is written; a hub is asked only for a name that this machine does not know, and when it answers.

    Raises:
        PlanError: when there is none.
    """
    from transformers import PretrainedConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise PlanError(f"no config.json in {name}")
    try:
        return dict(PretrainedConfig.get_config_dict(name, local_files_only=True)[0])
    except Exception as error:  # whatever a parser says, or: not on this machine
        if path.exists():
            raise PlanError(f"cannot read a model configuration from {name}: {_first_line(error)}") from error
    other_way = "the path of the model's config.json is enough"
    if problem := _hub_problem():
        raise PlanError(f"{name} is not on this machine and {problem}; {other_way}")
    try:
        return dict(PretrainedConfig.get_config_dict(name)[0])
    except Exception as error:  # whatever the hub or the network says
        raise PlanError(f"cannot read the configuration of {name}: {_first_line(error)}; {other_way}") from error


def _hub_problem() -> str | None:
    """Why the hub cannot be asked; its own client tries again and again before it says so."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask for it"
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = next((config[key] for key in ("llm_config", "language_config") if key in config), config)
    return part


def shape_of(model: dict[str, Any], dtype: str, tp: int, head_cells: bool, kv_cache_dtype: str = "auto") -> KVShape:
    """What the model stores per token on one of `tp` ranks.

    Raises:
        PlanError: when the configuration does not say, or the heads cannot be divided.
    """
    text = model["text_config"]
    layers, heads = kv_layer_count(text), text.get("num_attention_heads")
    if not layers or not heads:
        raise PlanError("the configuration names no num_hidden_layers and num_attention_heads: not a language model")
    kv_heads, head_dim = _full_heads(text)
    if not head_dim:
        raise PlanError("the configuration names neither head_dim nor hidden_size")
    mine = _on_rank(heads, kv_heads, tp)
    window = None
    if sliding := window_layer_count(text):
        own = text.get("num_key_value_heads") or heads
        tokens = int(text["sliding_window"]) + WINDOW_FAMILIES[text["model_type"]]
        window = WindowShape(sliding, _on_rank(heads, own, tp), text.get("head_dim") or head_dim, tokens)
    stored = {"auto": _element_bytes(dtype), "bf16": 2, "bfloat16": 2}.get(kv_cache_dtype, 1)
    return KVShape(layers, mine, head_dim, stored, groups=mine if head_cells else 1, window=window)


def _full_heads(text: dict[str, Any]) -> tuple[int, int]:
    """KV heads and head size of the layers that attend to all tokens.

    Where layers differ, the configuration's own numbers are those of layers with a window.
    """
    heads = text["num_attention_heads"]
    own: dict[str, Any] = next(iter((text.get("per_layer_config") or {}).values()), {})
    kv_heads = own.get("num_key_value_heads") or text.get("num_key_value_heads") or heads
    return kv_heads, own.get("head_dim") or text.get("head_dim") or text.get("hidden_size", 0) // heads


def _on_rank(heads: int, kv_heads: int, tp: int) -> int:
    """KV heads of one of `tp` ranks.

    Raises:
        PlanError: they cannot be divided.
    """
    if tp < 1 or heads % tp or (kv_heads % tp and tp % kv_heads):
        raise PlanError(f"{heads} attention heads and {kv_heads} KV heads cannot be divided over --tp {tp}")
    return max(1, kv_heads // tp)


def state_shape_of(model: dict[str, Any], dtype: str, tp: int) -> StateShape | None:
    """What the other layers keep on one of `tp` ranks; None: there are no Gated Delta Networks."""
    text = model["text_config"]
    heads = text.get("linear_num_value_heads")
    if not heads:
        return None
    return StateShape(
        layers=int(text["num_hidden_layers"]) - kv_layer_count(text),
        key_heads=max(1, text["linear_num_key_heads"] // tp),
        value_heads=heads // tp,
        key_dim=text["linear_key_head_dim"],
        value_dim=text["linear_value_head_dim"],
        convolution=text["linear_conv_kernel_dim"],
        element_bytes=_element_bytes(dtype),
    )


def _element_bytes(dtype: str) -> int:
    # SGLang's `auto` serves float32 models in float16.
    return 4 if dtype == "float32" else 2


def weight_bytes(name: str, dtype: str) -> int:
    """Bytes of the model's weights: of the files in its folder, otherwise counted without allocating them.

    Raises:
        PlanError: when they cannot be counted.
    """
    files = list(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if files:
        return sum(file.stat().st_size for file in files)
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(name, local_files_only=True)
            model = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # any family has its own way to fail
        raise PlanError(f"cannot count the weights of {name}; give them with --weights, as 16GB") from error
    return _element_bytes(dtype) * int(sum(parameter.numel() for parameter in model.parameters()))
