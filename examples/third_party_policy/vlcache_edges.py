"""Edges: keep vision tokens whose value differs from that of their left neighbour.

In a picture that is read row by row, flat regions repeat the same value and edges do not.  An idea to show how a
policy is packaged, not a published method.
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


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("edges", Edges, summary="values that differ from their neighbour's")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "edges",
        scorer="edges",
        allocator="uniform",
        selection=Selection(protect="text"),
        summary="text, and vision tokens at edges",
    )
