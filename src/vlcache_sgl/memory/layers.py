"""Which cells a layer of a model uses, and how it divides them.

All cells of an arena are equally large.  The *counted* layers attend to all tokens; policies choose among theirs, and
a cell is one token of one of them (or of one KV head).  Layers with a *window* attend to the last tokens only.  They
keep those whole, in planes behind those of the counted layers, and divide cells their own way: heads of another number
and size, as many as fit a cell; where whole layers fit, several share it, because all keep the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """The layers of a model that attend to the last tokens only; they are alike."""

    layer_ids: Sequence[int]
    kv_heads: int
    """Of this rank."""
    head_dim: int
    tokens: int
    """How many tokens before its own a token sees."""
    heads_per_cell: int
    layers_per_cell: int

    @property
    def planes(self) -> int:
        """Planes of all these layers."""
        return -(-len(self.layer_ids) // self.layers_per_cell) * self.planes_per_layer

    @property
    def planes_per_layer(self) -> int:
        return self.kv_heads // self.heads_per_cell


@dataclass(frozen=True)
class LayerCells:
    """One layer's part of an arena."""

    place: int
    """Which layer of the arena it is, the counted ones first: of those its number."""
    planes: slice
    heads: int
    """KV heads in a cell."""
    head_dim: int
    part: int = 0
    """Which of the layers that share a cell."""
    window: int | None = None
    """How many tokens before its own a token sees; None: all."""

    @property
    def number(self) -> int:
        """Which of the counted layers it is: what policies, budgets and reports count by."""
        assert self.counted, "a layer with a window is not counted"
        return self.place

    @property
    def counted(self) -> bool:
        """Whether policies choose among this layer's tokens."""
        return self.window is None

    def view(self, cells: torch.Tensor) -> torch.Tensor:
        """`[n, 2, heads, head_dim]` of cells `[n, ..]`: this layer's part of each, without a copy."""
        size = 2 * self.heads * self.head_dim
        part = cells.flatten(1)[:, self.part * size : (self.part + 1) * size]
        both: torch.Tensor = part.unflatten(1, (2, self.heads, self.head_dim))
        return both


def lay_out(
    layer_ids: Sequence[int], groups: int, heads: int, head_dim: int, window: Window | None
) -> Mapping[int, LayerCells]:
    """The layers of a model by their numbers in it.

    Args:
        layer_ids: the counted layers, in order.
        groups: cells of a token in each of them.
        heads, head_dim: of such a cell.
        window: the others.
    """
    layers = {
        layer: LayerCells(number, slice(number * groups, (number + 1) * groups), heads, head_dim)
        for number, layer in enumerate(layer_ids)
    }
    if window is not None:
        first, width = len(layer_ids) * groups, window.planes_per_layer
        for number, layer in enumerate(window.layer_ids):
            bundle, part = divmod(number, window.layers_per_cell)
            planes = slice(first + bundle * width, first + (bundle + 1) * width)
            layers[layer] = LayerCells(
                len(layer_ids) + number, planes, window.heads_per_cell, window.head_dim, part, window=window.tokens
            )
    return layers
