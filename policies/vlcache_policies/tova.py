"""TOVA: a transformer is a multi-state RNN; drop the states that the last token looks at least.

Matanel Oren, Michael Hassid, Nir Yarden, Yossi Adi, Roy Schwartz, https://arxiv.org/abs/2401.06104
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
    declared,
    hookimpl,
    keep_last,
)

PAPER = "2401.06104"


@dataclass(frozen=True)
class LastRow(Scorer):
    """Attention of the last row, averaged over all heads of the layer.

    The paper evicts greedily at every decoded token; here the prompt decides once, and the last token itself stays.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.last(1), column_sum=True)
    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        received = declared(layer.column_sum)
        return keep_last(received.mean(0, keepdim=True), 1).expand_as(received)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("tova", LastRow, PAPER, "attention of the last row, mean over heads")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin("tova", scorer="tova", allocator="model", paper=PAPER, summary="what the last row looks at")
