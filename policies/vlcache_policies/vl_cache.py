"""VL-Cache: what the question looks at says which tokens matter.

Dezhan Tu, Danylo Vashchilenko, Yuzhe Lu, Panpan Xu, https://arxiv.org/abs/2410.23317

The paper also reads each layer's budget from its attention (`Density`).  On pretrained language models that starves the
few layers that find things, so the recipe takes budgets from the model (`vlcache_policies.model`), the strongest
attention to a token instead of the sum, and smooths along the sequence, because an answer lies in a run of tokens.
What each of these is worth is in benchmarks/LOG.md; ``vlcache:paper`` is the letter of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

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
    pool,
)

PAPER = "2410.23317"


@dataclass(frozen=True)
class PostVision(Scorer):
    """Attention that a token gets from the text after the last image (section 4.2, algorithm 1).

    Vision and text tokens compete; the modality only chooses the query rows.  Without text after the image the last
    32 rows are read.  With several images the rows are what follows the last one.
    """

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    rows: int = 0
    """At most this many query rows, the latest ones; 0 = all.  The paper's speed study uses 50."""
    votes: Literal["sum", "max"] = "sum"
    """``sum``: the paper's sum over rows, mean over query heads.  ``max``: the largest entry of any row and head."""
    smooth: int = 1
    """Average of so many neighbours along the sequence, odd; 1 = none."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth must be odd, got {self.smooth}")

    @property
    def needs(self) -> Needs:
        largest = self.votes == "max"
        return Needs(rows=Rows.post_vision(self.rows), column_sum=not largest, column_max=largest)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        received = declared(layer.column_max if self.votes == "max" else layer.column_sum)
        return pool(received, self.smooth, "avg")


@dataclass(frozen=True)
class Density(Allocator):
    """Layers whose post-vision attention is denser get more (equations 1 and 2, algorithm 1).

    The density of a layer is the share of attention entries that reach `threshold` times their row's maximum.
    Unlike the paper, what the bounds take from one layer is given to the others, so that the sum is the budget.
    """

    threshold: float = 0.01
    rows: int = 0
    """At most this many query rows, the latest ones; 0 = all."""
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


_AS_PUBLISHED = {"allocator": "vlcache", "votes": "sum", "smooth": 1, "sink": 0, "heads": "shared", "reduce": "mean"}


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    # The recent window is inside the budget, and a tenth of it: at small budgets a longer one displaces the image.
    # The floor leaves every layer something: what a layer is worth is measured on other prompts than this one.
    yield RecipePlugin(
        "vlcache",
        scorer="vlcache",
        allocator="model",
        params={"votes": "max", "smooth": 17, "unknown": "rank"},
        selection=Selection(sink=4, recent=0.1, heads="auto", reduce="max", floor=0.3),
        variants={
            "paper": {**_AS_PUBLISHED, "paper": True, "floor": 0.0},
            # With exact sums and a floor, what the flagship was before a pretrained model judged it.
            "density": {**_AS_PUBLISHED, "floor": 0.5},
        },
        paper=PAPER,
        summary="strongest attention of post-vision rows, smoothed; layer budgets from the model",
    )
