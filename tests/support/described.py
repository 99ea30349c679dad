"""Families of which only the description is tried: configurations of their default sizes, which nobody loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
}
LATENT = {**SIZES, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
SPARSE = {**SIZES, "sparse_attention_config": {"sparse_attention_freq": [0, 1, 1, 1]}}
SLIDING = {**SIZES, "layer_types": ["sliding_attention", "full_attention"] * 2}
HYBRID = {"model_type": "qwen3_5_text", "full_attention_interval": 4}

DESCRIBED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cohere2_vision": ("cohere2_vision", "Cohere2VisionForConditionalGeneration", {}),
    "gemma3": ("gemma3", "Gemma3ForConditionalGeneration", {}),
    "gemma3n": ("gemma3n", "Gemma3nForConditionalGeneration", {}),
    "gemma4": ("gemma4", "Gemma4ForConditionalGeneration", {}),
    "kimi_k25": ("kimi_k25", "KimiK25ForConditionalGeneration", {}),
    "kimi_k3": ("kimi_k3", "KimiK3ForConditionalGeneration", {"text_config": LATENT}),
    "kimi_vl": ("kimi_vl", "KimiVLForConditionalGeneration", {}),
    "llama4": ("llama4", "Llama4ForConditionalGeneration", {}),
    "minicpmv4_6": ("minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration", {"text_config": HYBRID}),
    "minimax_m3": ("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", {"text_config": SPARSE}),
    "mllama": ("mllama", "MllamaForConditionalGeneration", {}),
    "nemotron": ("NemotronH_Nano_VL_V2", "NemotronH_Nano_VL_V2", {}),
    "qwen3_5": ("qwen3_5", "Qwen3_5ForConditionalGeneration", {"text_config": HYBRID}),
    "step3p7": ("step3p7", "Step3p7ForConditionalGeneration", {"text_config": SLIDING}),
}
"""Model type, architecture and what its configuration says beside the defaults."""


def describe(name: str, folder: Path) -> Path:
    """Write the configuration of a family to `folder`."""
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
    from transformers import CONFIG_MAPPING

    kind, architecture, more = DESCRIBED[name]
    family = _CONFIG_REGISTRY[kind] if kind in _CONFIG_REGISTRY else CONFIG_MAPPING[kind]
    values = json.loads(family(**more).to_json_string(use_diff=False))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**values, "architectures": [architecture]}, indent=1) + "\n")
    return folder
