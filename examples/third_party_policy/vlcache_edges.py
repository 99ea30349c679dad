"""Edges: keep vision tokens whose value differs from that of their left neighbour.  Center: keep those near the middle.

In an image that is read row by row, flat regions repeat the same value and edges do not.  Two ideas to show how
policies are packaged, and what they may know, not published methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import (
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    Scorer,
    ScorerPlugin,
    Selection,
    declared,
    hookimpl,
)


@dataclass(frozen=True)
class Edges(Scorer):
    """Distance of a value to the value before it, in multiples of the mean distance."""

    needs: ClassVar[Needs] = Needs(values=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    power: float = 1.0
    """Above 1 large steps count more; the order of tokens stays the same, that of layers does not."""

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        values = declared(layer.values).float()
        step = values.diff(dim=1, prepend=values[:, :1]).norm(dim=-1)
        return (step / step.mean(-1, keepdim=True).clamp(min=1e-12)) ** self.power


@dataclass(frozen=True)
class Center(Scorer):
    """Minus the distance from the middle of the image, in heights and widths; text before all of it.  Needs nothing."""

    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        at = prompt.patches()
        down, across = (at.row + 0.5) / at.rows - 0.5, (at.column + 0.5) / at.columns - 0.5
        score = torch.where(at.row < 0, 1.0, -torch.hypot(down, across))
        return score.expand(prompt.num_kv_heads, -1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("edges", Edges, summary="values that differ from their neighbour's")
    yield ScorerPlugin("center", Center, summary="the middle of the image")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "edges",
        scorer="edges",
        allocator="uniform",
        selection=Selection(protect="text"),
        summary="text, and vision tokens at edges",
    )
    yield RecipePlugin("center", scorer="center", allocator="uniform", summary="text, and the middle of the image")
