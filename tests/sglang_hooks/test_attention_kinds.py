"""Kinds of attention that are not served: told before weights are loaded, or by the name of the layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from described import describe
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.server_args import ServerArgs

from vlcache_sgl.config import ConfigError
from vlcache_sgl.sglang_hooks.attention_kinds import attention_layers, refuse_layers, resolved_model, unsupported_model
from vlcache_sgl.sglang_hooks.compat import _UNSUPPORTED_ARGUMENTS, unsupported_arguments, unsupported_configuration
from vlcache_sgl.sglang_hooks.flags import attach_config
from vlcache_sgl.sglang_hooks.kv_layers import kv_layers, window_layers, window_tokens

REFUSED = {
    "cohere2_vision": "sliding-window",
    "gemma3n": "sliding-window",
    "kimi_k25": "MLA",
    "kimi_k3": "MLA",
    "kimi_vl": "MLA",
    "llama4": "chunked attention",
    "minimax_m3": "sparse attention",
    "mllama": "cross-attention",
    "step3p7": "sliding-window",
}


@pytest.mark.parametrize(("name", "kind"), REFUSED.items(), ids=REFUSED.keys())
def test_a_family_is_refused_by_its_description(tmp_path: Path, name: str, kind: str) -> None:
    """As SGLang resolves it, with no weights there to load."""
    server_args = ServerArgs(model_path=str(describe(name, tmp_path)))
    with pytest.raises(ConfigError, match=kind) as refusal:
        attach_config(server_args, {"kv_policy": "vlcache"})
    assert "\n" not in str(refusal.value)
    model = resolved_model(server_args)
    assert model is not None
    assert kind in " ".join(unsupported_model(model))


@pytest.mark.parametrize("name", ["qwen3_5", "minicpmv4_6"])
def test_gated_delta_nets_are_served(tmp_path: Path, name: str) -> None:
    server_args = ServerArgs(model_path=str(describe(name, tmp_path)))
    # SGLang 0.5.23 does not list MiniCPM-V 4.6 among the models that read images, and serves it as one.
    attach_config(server_args, {"kv_policy": "vlcache"})
    model = resolved_model(server_args)
    assert model is not None
    assert list(unsupported_model(model)) == []
    layers = kv_layers(model)
    assert len(layers) == model.num_attention_layers // 4
    assert layers[0] == 3


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_windows_are_served(tmp_path: Path, name: str) -> None:
    """Layers of both kinds, every sixth of them counted; a token sees as many before it as SGLang says."""
    server_args = ServerArgs(model_path=str(describe(name, tmp_path)))
    attach_config(server_args, {"kv_policy": "vlcache", "kv_scope": "all"})
    model = resolved_model(server_args)
    assert model is not None
    assert list(unsupported_model(model)) == []
    both = sorted([*kv_layers(model), *window_layers(model)])
    assert both == list(range(model.num_attention_layers))
    assert kv_layers(model)[0] == 5
    assert window_tokens(model) == model.hf_text_config.sliding_window - 1


@pytest.mark.parametrize("name", ["llama4", "kimi_vl", "minimax_m3", "mllama", "nemotron", "step3p7"])
def test_what_is_stored_tells_vlcache_plan_the_same(tmp_path: Path, name: str) -> None:
    config = json.loads((describe(name, tmp_path) / "config.json").read_text())
    assert next(unsupported_configuration(config), None) is not None


PHI4 = """
from transformers import Phi3Config


class Phi4MMConfig(Phi3Config):
    model_type = "phi4mm"
"""


@pytest.mark.parametrize("trusted", [True, False], ids=["remote code", "as stored"])
def test_a_window_that_sglang_ignores_refuses_nobody(tmp_path: Path, trusted: bool) -> None:
    """Phi-4-mm names a window of 262144, and SGLang's class has none."""
    config = {
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi4mm.Phi4MMConfig"},
        "sliding_window": 262144,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_phi4mm.py").write_text(PHI4)
    server_args = ServerArgs(model_path=str(tmp_path), trust_remote_code=trusted)
    attach_config(server_args, {"kv_policy": "vlcache"})
    model = resolved_model(server_args)
    assert (model is not None) == trusted
    assert list(unsupported_configuration(config)) == []


def test_flags_that_cannot_be_combined_are_flags_of_sglang() -> None:
    fields = set(ServerArgs.__struct_fields__)
    assert {name for name, _, _ in _UNSUPPORTED_ARGUMENTS} <= fields
    # Refusing what nobody has set would refuse everybody.
    assert list(unsupported_arguments(ServerArgs(model_path="m"))) == []


# -- layers -----------------------------------------------------------------------------------------------------------

HEADS, WIDTHS, CONTEXT = (4, 2), (32, 32), 4096


class Owner(torch.nn.Module):
    """A decoder layer, as far as it matters here."""

    def __init__(self, number: int, **attention: Any) -> None:
        super().__init__()
        shape = {"num_heads": 4, "head_dim": 32, "scaling": 1.0, "num_kv_heads": 2, "layer_id": number}
        self.attn = RadixAttention(**{**shape, **attention})


def model_of(*layers: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    return model


def refuse(model: torch.nn.Module, kept: range = range(2)) -> None:
    refuse_layers(model, kept=kept, heads=HEADS, widths=WIDTHS, context=CONTEXT)


def with_temperature(owner: Owner) -> None:
    owner.attn.xai_temperature_len = 1024


def with_sinks(owner: Owner) -> None:
    owner.sinks = torch.nn.Parameter(torch.zeros(4))


CHANGED: dict[str, tuple[dict[str, Any], Callable[[Owner], None] | None, str]] = {
    "cross-attention": ({"is_cross_attention": True}, None, "cross-attention"),
    "window": ({"sliding_window_size": 63}, None, "window of 63 tokens"),
    "chunks": ({"use_irope": True}, None, "chunked attention"),
    "bidirectional": ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, None, "decoder_bidirectional"),
    "encoder": ({"attn_type": AttentionType.ENCODER_ONLY}, None, "encoder_only"),
    "cap": ({"logit_cap": 30.0}, None, "logit cap of 30.0"),
    "temperature": ({}, with_temperature, "1024 tokens"),
    "positions": ({"pos_encoding_mode": "ALIBI"}, None, "ALIBI"),
    "sinks": ({}, with_sinks, "attention sinks"),
    "other heads": ({"num_kv_heads": 4}, None, "4 query and 4 KV heads, not 4 and 2"),
    "wider heads": ({"head_dim": 64}, None, "width 64 and 64, not 32 and 32"),
    "narrow values": ({"v_head_dim": 16}, None, "width 32 and 16"),
    "shared keys": ({"number": 0}, None, "keys that are those of layers.0.attn"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_layer_is_refused_by_its_name(name: str) -> None:
    attention, change, words = CHANGED[name]
    odd = Owner(**{"number": 1, **attention})
    if change is not None:
        change(odd)
    with pytest.raises(ConfigError, match=r"layer layers\.1\.attn of this model: it has .*" + words):
        refuse(model_of(Owner(0), odd))


def test_plain_layers_are_served_and_others_are_sglangs() -> None:
    refuse(model_of(Owner(0), Owner(1)))
    refuse(model_of(Owner(0), Owner(1, sliding_window_size=CONTEXT)))  # no prompt outgrows it
    # A layer whose keys are not in the arena may be of any kind.
    refuse(model_of(Owner(0), Owner(1, sliding_window_size=63)), kept=range(1))


def test_a_layer_that_is_not_found_is_not_served_by_chance() -> None:
    with pytest.raises(ConfigError, match="layer 1 has no attention"):
        refuse(model_of(Owner(0)))


def test_layers_in_a_dict_are_found() -> None:
    """SGLang's models over transformers keep theirs so."""
    model = torch.nn.Module()
    layers = {n: Owner(n).attn for n in range(2)}
    model.attention_instances = layers  # type: ignore[assignment]
    assert [name for name, _, _ in attention_layers(model)] == ["attention_instances[0]", "attention_instances[1]"]
    refuse(model)
    layers[1].logit_cap = 5.0
    with pytest.raises(ConfigError, match=r"attention_instances\[1\]"):
        refuse(model)
