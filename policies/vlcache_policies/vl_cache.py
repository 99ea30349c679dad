"""VL-Cache: what the question looks at says which tokens matter and how many each layer needs.

Dezhan Tu, Danylo Vashchilenko, Yuzhe Lu, Panpan Xu, https://arxiv.org/abs/2410.23317
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
    BudgetSum,
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    Rows,
    Scorer,
    ScorerPlugin,
    Selection,
    declared,
    hookimpl,
)

PAPER = "2410.23317"


@dataclass(frozen=True)
class PostVision(Scorer):
    """Attention that a token gets from the text after the last image (section 4.2, algorithm 1).

    Vision and text tokens compete; the modality only chooses the voters.  Without text after the image the last
    32 rows vote.  With several images the voters are what follows the last one.
    """

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    rows: int = 0
    """At most this many voters, the latest ones; 0 = all.  The paper's speed study uses 50."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.post_vision(self.rows), column_sum=True)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        return declared(layer.column_sum)


@dataclass(frozen=True)
class Density(Allocator):
    """Layers whose post-vision attention is denser get more (equations 1 and 2, algorithm 1).

    The density of a layer is the share of attention entries that reach `threshold` times their row's maximum.
    Unlike the paper, what the bounds take from one layer is given to the others, so that the sum is the budget.
    """

    threshold: float = 0.01
    rows: int = 0
    """At most this many voters, the latest ones; 0 = all."""
    paper: bool = False
    """To the letter: shares clipped to [0.01, 1] and not renormalised, so the sum may miss the budget."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.post_vision(self.rows), density=self.threshold)

    @property
    def budget_sum(self) -> BudgetSum:
        """The clip from below may take more than the budget, the one from above gives nothing back."""
        return "free" if self.paper else "exact"

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        density = torch.stack([declared(layer.density).mean() for layer in layers]).double()
        if not self.paper:
            return budget.distribute(density)
        share = density / density.sum().clamp(min=1e-30) * budget.ratio * budget.num_layers
        return (share.clamp(0.01, 1.0) * budget.hi).round().long()


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("vlcache", PostVision, PAPER, "attention received from the text after the last image")


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("vlcache", Density, PAPER, "layers in proportion to the density of post-vision attention")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    # The 10 % recent window is inside the budget (section 5 of the paper leaves it open).  The floor is ours: one
    # dense layer must not starve the others.
    yield RecipePlugin(
        "vlcache",
        scorer="vlcache",
        allocator="vlcache",
        selection=Selection(recent=0.1, protect="none", floor=0.5),
        variants={"paper": {"paper": True, "floor": 0.0}},
        paper=PAPER,
        summary="post-vision scores, density-proportional layer budgets",
    )
