"""PyramidKV: lower layers spread their attention and get much, upper layers focus and get little.

Zefan Cai et al., https://arxiv.org/abs/2406.02069
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import (
    Allocator,
    AllocatorPlugin,
    Budget,
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    hookimpl,
)

PAPER = "2406.02069"


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Layer budgets fall on a straight line; the top layer gets the average divided by `beta`.

    The observation window is inside the budget (the reference code adds it on top), short prompts are treated like
    long ones, and rounding keeps the exact sum.
    """

    needs: ClassVar[Needs] = Needs()

    beta: float = 20.0
    """How many times less than the average the top layer gets; 1 is uniform."""

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        average = budget.total / budget.num_layers
        top = average / self.beta
        bottom = 2 * average - top
        if bottom > budget.hi:  # the bottom layer keeps everything, the line gets flatter
            bottom = budget.hi
            top = 2 * average - bottom
        return budget.distribute(torch.linspace(bottom, top, budget.num_layers, dtype=torch.float64))


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("pyramid", Pyramid, PAPER, "budgets fall linearly from the bottom layer to the top")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "pyramidkv",
        scorer="snapkv",
        allocator="pyramid",
        paper=PAPER,
        summary="SnapKV scores, linearly falling layer budgets",
    )
