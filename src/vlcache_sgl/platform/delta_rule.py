"""The gated delta rule and the causal convolution of linear-attention layers, in plain torch.

Gated Delta Networks ([2412.06464](https://arxiv.org/abs/2412.06464)): a layer has no KV cache but one state per
request, `S` `[heads, value_dim, key_dim]`.  A token with key `k`, value `v`, log decay `g` and strength `b` does

    S <- exp(g) S;   S <- S + b (v - S k) k^T;   o = S q

Keys and queries have length 1 here, queries are scaled.  No SGLang: what it calls is in `linear_attention.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

CHUNK = 64
"""Tokens that are computed at once; between chunks the state is materialised, which is where SGLang may keep it."""
EPS = 1e-6


def gates(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay and strength of tokens, `[1, tokens, heads]` float32 each, from `a` and `b` `[tokens, heads]`."""
    decay = -a_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def unit_rows(heads: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[tokens, key_heads, key_dim]` as the rule wants them, `[heads, tokens, key_dim]` float32.

    A key head serves `heads / key_heads` value heads that follow each other.
    """
    shared = heads // k.shape[1]

    def rows(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
        return x.repeat_interleave(shared, dim=1).transpose(0, 1)

    return rows(q) * q.shape[-1] ** -0.5, rows(k)


def run_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of one request that are new, a chunk at a time.

    Within a chunk the rule is a triangular system: what a token writes depends on what those before it wrote.

    Args:
        q, k: `[tokens, key_heads, key_dim]`.
        v: `[tokens, heads, value_dim]`.
        g, beta: `[tokens, heads]`, log decay and strength.
        state: `[heads, value_dim, key_dim]` before the first token.

    Returns:
        Outputs `[tokens, heads, value_dim]`; the state behind the last token; states before each chunk,
        `[chunks, heads, value_dim, key_dim]`; float32.
    """
    queries, keys = unit_rows(v.shape[1], q, k)
    values, decay, strength = v.float().transpose(0, 1), g.float().T, beta.float().T[..., None]
    state = state.float()
    outputs, before = [], []
    for first in range(0, v.shape[0], CHUNK):
        part = slice(first, first + CHUNK)
        q_c, k_c, v_c, b_c = queries[:, part], keys[:, part], values[:, part], strength[:, part]
        total = decay[:, part].cumsum(-1)  # log decay from the start of the chunk to each token
        between = (total[:, :, None] - total[:, None, :]).tril().exp().tril()
        since = total[..., None].exp()
        system = (b_c * (k_c @ k_c.mT) * between).tril(-1)
        written = torch.linalg.solve_triangular(
            system, b_c * (v_c - since * (k_c @ state.mT)), upper=False, unitriangular=True
        )
        outputs.append(since * (q_c @ state.mT) + ((q_c @ k_c.mT) * between) @ written)
        before.append(state)
        left = (total[:, -1:] - total).exp()[..., None]
        state = state * total[:, -1].exp()[:, None, None] + written.mT @ (left * k_c)
    return torch.cat(outputs, dim=1).transpose(0, 1), state, torch.stack(before)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each of several requests.

    Args:
        q, k: `[requests, key_heads, key_dim]`.
        v: `[requests, heads, value_dim]`.
        g, beta: `[requests, heads]`.
        state: `[requests, heads, value_dim, key_dim]`.

    Returns:
        Outputs `[requests, heads, value_dim]` and the new states, float32.
    """
    queries, keys = (x.transpose(0, 1)[..., None] for x in unit_rows(v.shape[1], q, k))  # [requests, heads, key_dim, 1]
    state = state.float() * g.float().exp()[..., None, None]
    written = beta.float()[..., None, None] * (v.float()[..., None] - state @ keys)
    state = state + written @ keys.mT
    return (state @ queries)[..., 0], state


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor, *, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal convolution of each channel for itself.

    Args:
        x: `[requests, channels, tokens]`.
        weight: `[channels, width]`, the last entry for the token itself.
        bias: `[channels]`.
        state: `[requests, channels, width - 1]`, inputs before the first token.
        silu: whether the output goes through SiLU.

    Returns:
        Outputs, of `x`'s shape and type, and the new state.
    """
    inputs = torch.cat([state.to(x.dtype), x], dim=-1)
    outputs = functional.conv1d(inputs, weight[:, None].to(x.dtype), bias, groups=x.shape[1])
    return functional.silu(outputs) if silu else outputs, inputs[..., -state.shape[-1] :].to(state.dtype)
