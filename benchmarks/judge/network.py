"""A Llama checkpoint in float32 on the CPU, with what the judge needs of a forward: states out, a masked past in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from vlcache_sgl.api.testing import PlainRotary


class States(NamedTuple):
    """What attention sees of `n` consecutive tokens, rotated to their positions."""

    queries: torch.Tensor
    """`[L, H, n, D]` float32."""
    keys: torch.Tensor
    """`[L, K, n, D]` float32."""
    values: torch.Tensor
    """`[L, K, n, D]` float32."""

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def first(self, count: int) -> States:
        """Those of the first `count` tokens."""
        return States(*(part[:, :, :count].contiguous() for part in self))


class Past(NamedTuple):
    """Earlier tokens, of which every condition sees other cells."""

    states: States
    keep: torch.Tensor
    """`[L, C, K, n]` bool."""


class Recalled(NamedTuple):
    """What comes back for each row."""

    seen: torch.Tensor
    """`[K or 1, C, t, n]` bool, beside the kept tokens."""
    rest: torch.Tensor | None = None
    """`[K, C, g, t, 1]`, the logarithm of what all other tokens add to the softmax's sum; None: nothing."""
    value: torch.Tensor | None = None
    """`[K, C, 1, 1, D]`, their value."""


class Recall(Protocol):
    """Which evicted tokens come back for which row."""

    def __call__(self, layer: int, rows: torch.Tensor) -> Recalled:
        """
        Args:
            layer: index.
            rows: `[K, C, g, t, D]`, queries times the scale of attention.
        """


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, by the letters of `vlcache_sgl.api.tensors`."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Block:
    """Weights of one layer; matrices that read the same input are one."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """`[(H + 2 K) D, hidden]`."""
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Network:
    """The weights and their forward."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = model.config
        self.shape = Shape(
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.rotary = PlainRotary(theta=config.rope_parameters["rope_theta"])
        self._eps: float = config.rms_norm_eps
        weights = model.state_dict()
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        self._head = weights["lm_head.weight"]
        self._blocks = [_block(weights, f"model.layers.{index}.") for index in range(self.shape.layers)]

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return len(self._embedding)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], past: States | None = None) -> tuple[torch.Tensor, States]:
        """Hidden states `[n, hidden]` behind the last layer, and the states of `tokens`, which follow `past`."""
        begin = 0 if past is None else past.length
        turn = self._turn(begin, len(tokens))
        x = embedding(torch.tensor(tokens), self._embedding)
        causal = None if past is None else torch.ones(len(tokens), begin + len(tokens), dtype=torch.bool).tril(begin)
        found = []
        for index, block in enumerate(self._blocks):
            q, k, v = (part.transpose(0, 1) for part in self._project(block, x, turn))
            found.append((q, k, v))
            if past is not None:
                k = torch.cat([past.keys[index], k], 1)
                v = torch.cat([past.values[index], v], 1)
            mixed = scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=causal, is_causal=past is None, enable_gqa=True
            )[0]
            x = self._finish(block, x, mixed.transpose(0, 1).flatten(1))
        return self._normed(x, self._norm), States(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    @torch.inference_mode()
    def follow(self, tokens: Sequence[int], past: Past, recall: Recall | None = None) -> torch.Tensor:
        """Hidden states `[C, t, hidden]` of `tokens`, which follow `past`, once per condition.

        A row attends to what its condition kept of `past`, to what `recall` brings back for it, and to the tokens up to
        its own.
        """
        layers, heads, kv_heads, dim = (self.shape.layers, self.shape.heads, self.shape.kv_heads, self.shape.head_dim)
        conditions, count, length = past.keep.shape[1], len(tokens), past.states.length
        group = heads // kv_heads
        turn = tuple(part.repeat(conditions, 1, 1) for part in self._turn(length, count))
        x = embedding(torch.tensor(tokens), self._embedding).repeat(conditions, 1)
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        for index in range(layers):
            block = self._blocks[index]
            q, k, v = self._project(block, x, turn)
            rows = q.mul_(dim**-0.5).view(conditions, count, kv_heads, group, dim).permute(2, 0, 3, 1, 4)
            rows = rows.reshape(kv_heads, -1, dim)  # [K, C g t, D]
            own_k, own_v = (part.view(conditions, count, kv_heads, dim).permute(2, 0, 1, 3) for part in (k, v))
            old = torch.bmm(rows, past.states.keys[index].transpose(1, 2)).view(kv_heads, conditions, -1, length)
            seen = past.keep[index].transpose(0, 1)[:, :, None]  # [K, C, 1, n]
            by_token = rows.view(kv_heads, conditions, group, count, dim)
            back = Recalled(seen) if recall is None else recall(index, by_token)
            seen = seen | back.seen
            split = old.view(kv_heads, conditions, group, count, length)
            split.masked_fill_(~seen[:, :, None], -torch.inf)
            new = rows.view(kv_heads, conditions, -1, dim) @ own_k.transpose(2, 3)
            new.view(kv_heads, conditions, group, count, count).masked_fill_(future, -torch.inf)
            # A token sees itself at least, so the greatest logit is finite.
            most = torch.maximum(old.amax(-1, keepdim=True), new.amax(-1, keepdim=True))
            old, new = old.sub_(most).exp_(), new.sub_(most).exp_()
            mass = old.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
            others = None if back.rest is None else (back.rest.flatten(2, 3) - most).exp()
            if others is not None:
                mass = mass + others
            mixed = torch.bmm(old.view(kv_heads, -1, length), past.states.values[index]).view(*old.shape[:3], dim)
            mixed = mixed + new @ own_v
            if others is not None and back.value is not None:
                mixed = mixed + others * back.value[:, :, 0]
            mixed = mixed / mass
            mixed = mixed.view(kv_heads, conditions, group, count, dim).permute(1, 3, 0, 2, 4)
            x = self._finish(block, x, mixed.reshape(conditions * count, -1))
        return self._normed(x, self._norm).view(conditions, count, -1)

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., vocabulary]` of the token that follows, from `[..., hidden]`."""
        return linear(hidden, self._head).log_softmax(-1)

    def _project(
        self, block: Block, x: torch.Tensor, turn: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[r, H, D]`, keys and values `[r, K, D]` of the rows `x`, rotated."""
        shape = self.shape
        both = linear(self._normed(x, block.attention_norm), block.qkv).view(x.shape[0], -1, shape.head_dim)
        q, k, v = both.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        return _rotated(q, turn), _rotated(k, turn), v

    def _finish(self, block: Block, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output from the rows `x` and the heads' outputs `[r, H D]`."""
        x = x + linear(mixed, block.output)
        gate, up = linear(self._normed(x, block.mlp_norm), block.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate).mul_(up), block.down)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self._eps)

    def _turn(self, begin: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[count, 1, D / 2]` of the positions from `begin` on."""
        half = self.shape.head_dim // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(self.rotary.theta) / half))
        angle = torch.arange(begin, begin + count)[:, None, None] * frequency
        return angle.cos().float(), angle.sin().float()


def _rotated(x: torch.Tensor, turn: tuple[torch.Tensor, ...]) -> torch.Tensor:
    cos, sin = turn
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _block(weights: dict[str, torch.Tensor], name: str) -> Block:
    def joined(*parts: str) -> torch.Tensor:
        return torch.cat([weights[f"{name}{part}.weight"] for part in parts])

    return Block(
        attention_norm=joined("input_layernorm"),
        qkv=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=joined("self_attn.o_proj"),
        mlp_norm=joined("post_attention_layernorm"),
        gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
        down=joined("mlp.down_proj"),
    )
