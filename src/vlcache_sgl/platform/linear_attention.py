"""Plain torch in place of the Triton kernels that SGLang has for linear-attention layers.

Called where SGLang called a kernel, hence with its arguments.  Replaced when the loaded model has such layers, in the
modules that call: they imported the kernels by name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
from torch.nn import functional

from vlcache_sgl.platform import delta_rule

_SILU = ("silu", "swish", True)


class TorchGDNKernel(LinearAttnKernelBase):
    """`delta_rule` over SGLang's pool of states, `[slots, heads, value_dim, key_dim]`, which changes in place."""

    supports_packed_decode = False

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """One token per request: `[1, requests, heads, value_dim]`."""
        g, beta = delta_rule.gates(A_log, a, b, dt_bias)
        slots = cache_indices.long()
        outputs, states = delta_rule.step(q[0], k[0], v[0], g[0], beta[0], ssm_states[slots])
        ssm_states[slots] = states.to(ssm_states.dtype)
        return outputs[None].to(v.dtype)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """Several tokens per request: outputs `[1, tokens, heads, value_dim]`, and the states before each chunk."""
        bounds, slots = query_start_loc.tolist(), cache_indices.tolist()
        outputs, before = torch.zeros_like(v), []
        for slot, first, last in zip(slots, bounds, bounds[1:], strict=False):
            if first == last:
                continue
            part = slice(first, last)
            out, state, states = delta_rule.run_sequence(
                q[0, part], k[0, part], v[0, part], g[0, part], beta[0, part], ssm_states[slot]
            )
            outputs[0, part] = out.to(v.dtype)
            ssm_states[slot] = state.to(ssm_states.dtype)
            before.append(states)
        return outputs, None, torch.cat(before)[None] if before else ssm_states[None, :0]


def convolve_prompts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    activation: str | bool | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """``causal_conv1d_fn``: `x` `[channels, tokens]` of requests one after the other; the pool of states follows."""
    outputs = torch.zeros_like(x)
    bounds = query_start_loc.tolist()
    known = has_initial_state.tolist()
    for number, slot in enumerate(cache_indices.tolist()):
        part = slice(bounds[number], bounds[number + 1])
        if part.start == part.stop:
            continue
        state = conv_states[slot] if known[number] else torch.zeros_like(conv_states[slot])
        out, after = delta_rule.convolve(x[None, :, part], weight, bias, state[None], silu=activation in _SILU)
        outputs[:, part] = out[0]
        conv_states[slot] = after[0]
    return outputs


def convolve_step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """``causal_conv1d_update``: `x` `[requests, channels]`, one token each."""
    slots = conv_state_indices.long()
    out, after = delta_rule.convolve(x[..., None], weight, bias, conv_state[slots], silu=activation in _SILU)
    conv_state[slots] = after
    return out[..., 0]


def track_states(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    track_mask: torch.Tensor,
    track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """``track_mamba_states_if_needed``: copy the states of masked requests to other slots, `[slots, ...]`."""
    chosen = track_mask[:batch_size].nonzero().flatten()
    source, target = cache_indices[chosen].long(), track_indices[chosen].long()
    for states in (conv_states, ssm_states):
        states[target] = states[source]


def track_states_of_all_layers(
    conv_states: torch.Tensor, ssm_states: torch.Tensor, *arguments: Any, **options: Any
) -> None:
    """``track_mamba_states_all_layers``: the same of states `[layers, slots, ...]`."""
    track_states(conv_states.transpose(0, 1), ssm_states.transpose(0, 1), *arguments, **options)


def split_projections(
    qkvz: torch.Tensor, ba: torch.Tensor, key_heads: int, heads: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fused_qkvzba_split_reshape_cat_contiguous``: q, k and v together, z `[tokens, heads, value_dim]`, b and a."""
    width = 2 * key_heads * key_dim + heads * value_dim
    z = qkvz[:, width:].reshape(-1, heads, value_dim)
    return qkvz[:, :width].contiguous(), z, ba[:, :heads].contiguous(), ba[:, heads:].contiguous()


def gate_output(x: torch.Tensor, gate: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """``fused_sigmoid_mul``: ``x * sigmoid(gate)``, both of as many numbers."""
    gated = x * gate.reshape(x.shape).sigmoid()
    return x.copy_(gated) if inplace else gated


def add_gated(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor, output: torch.Tensor
) -> None:
    """``fused_gate_sigmoid_mul_add``: `output`, `[tokens, hidden]`, grows by the shared expert's times its gate."""
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid()
    output.copy_(output.float() + gate.unsqueeze(-1) * shared_output.float())


def norm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
) -> torch.Tensor:
    """``rms_norm_gated``: the RMS norm of rows, then the gate, as Gated Delta Networks do it."""
    if group_size not in (None, x.shape[-1]) or not norm_before_gate or not is_rms_norm or bias is not None:
        raise NotImplementedError("only the norm of Gated Delta Networks is there for CPUs")
    rows, gate = x.float(), z.reshape(x.shape).float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (rows * (functional.silu(gate) if activation in _SILU else gate.sigmoid())).to(x.dtype)


_BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
_TRACKING = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_NORM = "sglang.kernels.ops.attention.fla.layernorm_gated"
REPLACED: dict[tuple[str, str], Any] = {
    (_BACKEND, "TritonGDNKernel"): TorchGDNKernel,
    (_BACKEND, "causal_conv1d_fn"): convolve_prompts,
    (_BACKEND, "causal_conv1d_update"): convolve_step,
    (_BACKEND, "fused_gdn_gating"): delta_rule.gates,
    (_TRACKING, "track_mamba_states_if_needed"): track_states,
    (_TRACKING, "track_mamba_states_all_layers"): track_states_of_all_layers,
    (_NORM, "rms_norm_gated"): norm_gated,
}
"""Module and name of what Gated Delta Networks call, and what takes its place."""
REPLACED_IN_MODELS: dict[str, Callable[..., Any]] = {
    "fused_qkvzba_split_reshape_cat_contiguous": split_projections,
    "fused_sigmoid_mul": gate_output,
    "fused_gate_sigmoid_mul_add": add_gated,
}
"""The same in the modules of the model's own classes."""


def replace_kernels(model: torch.nn.Module) -> None:
    """Let `model` compute its linear-attention layers in plain torch, if it has any."""
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

    parts = list(model.modules())
    if not any(isinstance(part, RadixLinearAttention) for part in parts):
        return
    for (module, name), replacement in REPLACED.items():
        _replace(importlib.import_module(module), name, replacement)
    for module_of_part in {sys.modules[type(part).__module__] for part in parts}:
        for name, replacement in REPLACED_IN_MODELS.items():
            if name in vars(module_of_part):
                _replace(module_of_part, name, replacement)


def _replace(module: Any, name: str, replacement: Any) -> None:
    if not hasattr(module, name):
        raise RuntimeError(f"SGLang has no {module.__name__}.{name}: linear attention on a CPU needs another version")
    setattr(module, name, replacement)
