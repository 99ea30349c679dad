"""Try a policy without a server: made-up prompts, and everything that a policy may need, computed the plain way.

::

    prompt = synthetic_prompt(length=300, vision=[(10, 260)])
    policy = resolve("snapkv:window=16")
    plan = policy.decide(*synthetic_views(prompt, policy.needs), prompt, total=120)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.tensors import LayerView, Prompt, Span
from vlcache_sgl.prompt import select_rows


@dataclass(frozen=True)
class PlainRotary:
    """Rotary embedding on half-split channels; with `sections`, M-RoPE."""

    theta: float = 10000.0
    sections: tuple[int, ...] = ()
    """Frequencies per position row; empty = one row of positions for all."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """See `vlcache_sgl.api.Rotary`."""
        half = x.shape[-1] // 2
        frequency = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        if positions.dim() == 2:
            sections = torch.tensor(self.sections or (half,) + (0,) * (positions.shape[0] - 1), device=x.device)
            row = torch.repeat_interleave(torch.arange(len(sections), device=x.device), sections)
            angle = positions[row].T * frequency
        else:
            angle = positions[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        if inverse:
            sin = -sin
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@dataclass(frozen=True)
class Layer:
    """Post-RoPE states of a whole prompt in one layer; behind them those of its second reading, if there is one."""

    queries: torch.Tensor
    """`[H, n + repeated, D]`."""
    keys: torch.Tensor
    """`[K, n + repeated, D]`."""
    values: torch.Tensor
    """`[K, n + repeated, D]`."""


def synthetic_prompt(
    length: int = 300,
    vision: Iterable[tuple[int, int]] = ((10, 260),),
    start: int = 0,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    repeated: int = 0,
) -> Prompt:
    """A prompt with text positions and a plain rotary embedding."""
    return Prompt(
        length=length,
        start=start,
        vision=tuple(Span(*span) for span in vision),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        repeated=repeated,
        rotary=PlainRotary(),
        positions=torch.arange(start, length),
    )


def synthetic_layers(prompt: Prompt, seed: int = 0) -> list[Layer]:
    """Random states, the same for every `start`; attention gets sharper with every layer, as in real models."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(heads, prompt.length + prompt.repeated, prompt.head_dim, generator=generator)

    return [
        Layer(draw(prompt.num_heads) * (1 + index), draw(prompt.num_kv_heads), draw(prompt.num_kv_heads))
        for index in range(prompt.num_layers)
    ]


def synthetic_views(
    prompt: Prompt, needs: tuple[Needs, Needs], seed: int = 0
) -> tuple[list[LayerView], list[LayerView]]:
    """Views of random layers for the scorer and for the allocator."""
    layers = synthetic_layers(prompt, seed)
    return view_layers(layers, prompt, needs[0]), view_layers(layers, prompt, needs[1])


def view_layers(layers: Sequence[Layer], prompt: Prompt, needs: Needs) -> list[LayerView]:
    """What a policy with these needs gets to see; see `LayerView` for the definitions."""
    return [_view(index, layer, prompt, needs) for index, layer in enumerate(layers)]


def _view(index: int, layer: Layer, prompt: Prompt, needs: Needs) -> LayerView:
    owned = slice(prompt.start, prompt.length)
    view = LayerView(index)
    view.keys = layer.keys[:, owned] if needs.keys else None
    view.values = layer.values[:, owned] if needs.values else None
    if needs.rows.kind == "none":
        return view
    rows = torch.arange(*select_rows(needs.rows, prompt))
    view.row_positions = rows
    queries = layer.queries[:, rows]
    view.queries = queries if needs.queries else None
    if not needs.reads_attention:
        return view
    probabilities, visible = attention(queries, layer.keys, rows)
    groups = (layer.keys.shape[0], -1)
    per_group = probabilities.reshape(*groups, *probabilities.shape[1:])
    mine = per_group[..., owned]
    view.column_sum = mine.sum(2).mean(1) if needs.column_sum else None
    view.column_square_sum = mine.square().sum(2).mean(1) if needs.column_square_sum else None
    view.column_max = mine.amax((1, 2)) if needs.column_max else None
    view.probabilities = probabilities[..., owned] if needs.probabilities else None
    if needs.entropy:
        view.entropy = -torch.special.xlogy(per_group, per_group).sum(-1).mean((1, 2))
    if needs.density is not None:
        dense = (probabilities >= needs.density * probabilities.amax(-1, keepdim=True)) & visible
        share = dense.sum((1, 2)) / visible.sum()
        view.density = share.reshape(groups).mean(1)
    return view


def attention(queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax `[H, R, n]` in the dtype of the inputs, and which entries are visible, `[R, n]` bool.

    Args:
        queries: `[H, R, D]`, those of `rows`.
        keys: `[K, n, D]`, all keys of the prompt (and of its second reading).
        rows: `[R]` int64, positions.
    """
    heads, dim = queries.shape[0], queries.shape[-1]
    repeated = keys.repeat_interleave(heads // keys.shape[0], dim=0)
    logits = queries @ repeated.transpose(1, 2) / math.sqrt(dim)
    visible = torch.arange(keys.shape[1], device=keys.device) <= rows[:, None]
    return logits.masked_fill(~visible, -torch.inf).softmax(-1), visible
