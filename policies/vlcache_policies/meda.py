"""MEDA: the more undecided a layer's attention, the larger its share.

Zhongwei Wan et al., https://arxiv.org/abs/2502.17599
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
    Rows,
    Selection,
    declared,
    hookimpl,
)

PAPER = "2502.17599"


@dataclass(frozen=True)
class Entropy(Allocator):
    """Layers in proportion to the softmax of the mean entropy (in nats) of their attention rows.

    The paper clips the shares to [0.01, 1] and leaves the sum where it falls; here the sum is the budget.  Its
    cross-modal variant of the entropy needs two blocks of the attention matrix and is left out.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), entropy=True)
    prefix_hit: ClassVar[str] = "only the request's own new rows count"

    temperature: float = 1.0
    """Above 1 flattens the shares; the paper has 1."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        entropy = torch.stack([declared(layer.entropy).mean() for layer in layers]).double()
        return budget.distribute((entropy / self.temperature).softmax(0))


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("meda", Entropy, PAPER, "softmax of the layers' attention entropies")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "meda",
        scorer="lookm",
        allocator="meda",
        selection=Selection(recent=0.5),
        paper=PAPER,
        summary="LOOK-M scores, entropy budgets, half recent tokens; without the merging",
    )
