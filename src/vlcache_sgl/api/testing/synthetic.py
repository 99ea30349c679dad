"""Made-up prompts, and everything that a policy may need computed the plain way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlcache_sgl.api.needs import Needs
from vlcache_sgl.api.prompt import select_rows
from vlcache_sgl.api.tensors import Grid, LayerView, Prompt, Span


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
    """A prompt with text positions and a plain rotary embedding; every span of `vision` is an image.

    The tokens of an image lie on one grid, as close to a square as their number permits.
    """
    spans = tuple(Span(*span) for span in vision)
    return Prompt(
        length=length,
        start=start,
        vision=spans,
        grids=tuple((_grid(len(span)),) for span in spans),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        repeated=repeated,
        rotary=PlainRotary(),
        positions=torch.arange(start, length),
    )


def _grid(tokens: int) -> Grid:
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return Grid(rows, tokens // rows)


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


def view_layers(layers: Sequence[Layer], prompt: Prompt, needs: Needs, chunk: int = 0) -> list[LayerView]:
    """What a policy with these needs gets to see; see `LayerView` for the definitions.

    Args:
        chunk: tokens that are prefilled at a time, so that statistics are summed up in several steps; 0 = all.
    """
    return [_view(index, layer, prompt, needs, chunk) for index, layer in enumerate(layers)]


def _view(index: int, layer: Layer, prompt: Prompt, needs: Needs, chunk: int) -> LayerView:
    owned = slice(prompt.start, prompt.length)
    view = LayerView(index)
    view.keys = layer.keys[:, owned] if needs.keys else None
    view.values = layer.values[:, owned] if needs.values else None
    if needs.rows.kind == "none" or not (needs.reads_attention or needs.queries):
        return view
    rows = torch.arange(*select_rows(needs.rows, prompt))
    view.row_positions = rows
    view.queries = layer.queries[:, rows] if needs.queries else None
    if not needs.reads_attention:
        return view
    ends = range(prompt.start + chunk, prompt.length, chunk) if chunk else ()
    parts = torch.tensor_split(rows, torch.searchsorted(rows, torch.tensor(ends, dtype=rows.dtype)))
    found = [_statistics(layer, part, owned, needs) for part in parts if part.numel()]
    if needs.column_sum:
        view.column_sum = torch.stack([part.column_sum for part in found]).sum(0)
    if needs.column_square_sum:
        view.column_square_sum = torch.stack([part.column_square_sum for part in found]).sum(0)
    if needs.column_max:
        view.column_max = torch.stack([part.column_max for part in found]).amax(0)
    if needs.probabilities:
        view.probabilities = torch.cat([part.probabilities for part in found], dim=1)
    if needs.entropy:
        view.entropy = torch.stack([part.entropy_sum for part in found]).sum(0) / rows.numel()
    if needs.density is not None:
        dense, visible = (torch.stack([getattr(part, name) for part in found]).sum(0) for name in ("dense", "visible"))
        view.density = dense / visible
    return view


class _Votes(NamedTuple):
    """What the rows of one chunk say; see `LayerView`."""

    column_sum: torch.Tensor
    column_square_sum: torch.Tensor
    column_max: torch.Tensor
    probabilities: torch.Tensor
    entropy_sum: torch.Tensor
    """`[K]`, summed over rows, the mean over query heads."""
    dense: torch.Tensor
    """`[K]`, entries at least p times their row maximum, the mean over query heads."""
    visible: torch.Tensor
    """Entries that the rows see."""


def _statistics(layer: Layer, rows: torch.Tensor, owned: slice, needs: Needs) -> _Votes:
    probabilities, visible = attention(layer.queries[:, rows], layer.keys, rows)
    per_group = probabilities.reshape(layer.keys.shape[0], -1, *probabilities.shape[1:])
    mine = per_group[..., owned]
    dense = (per_group >= (needs.density or 0.0) * per_group.amax(-1, keepdim=True)) & visible
    return _Votes(
        column_sum=mine.sum(2).mean(1),
        column_square_sum=mine.square().sum(2).mean(1),
        column_max=mine.amax((1, 2)),
        probabilities=probabilities[..., owned],
        entropy_sum=-torch.special.xlogy(per_group, per_group).sum((-2, -1)).mean(1),
        dense=dense.sum((-2, -1)).to(probabilities.dtype).mean(1),
        visible=visible.sum(),
    )


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
