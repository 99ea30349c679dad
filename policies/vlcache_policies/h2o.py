"""H2O: tokens that have collected the most attention so far are the heavy hitters; keep them and a recent window.

Zhenyu Zhang et al., https://arxiv.org/abs/2306.14048
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
    Rows,
    Scorer,
    ScorerPlugin,
    Selection,
    declared,
    hookimpl,
)

PAPER = "2306.14048"


@dataclass(frozen=True)
class HeavyHitters(Scorer):
    """Attention summed over all query rows.

    Early tokens are seen by more rows, and in a multimodal prompt the rows of the image outvote the question: both
    are the method's.  The paper goes on adding rows while it decodes; here the prompt decides once.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), column_sum=True)
    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    prefix_hit: ClassVar[str] = "only the request's own new rows count"

    mean: bool = False
    """Divide by the number of rows that could see the token, which takes the advantage of early tokens away."""

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        received = declared(layer.column_sum)
        if not self.mean:
            return received
        return received / torch.arange(prompt.owned, 0, -1, device=received.device)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("h2o", HeavyHitters, PAPER, "attention accumulated over all rows")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "h2o",
        scorer="h2o",
        allocator="model",
        selection=Selection(recent=0.5),
        variants={"mean": {"mean": True}},
        paper=PAPER,
        summary="half heavy hitters, half recent tokens",
    )
