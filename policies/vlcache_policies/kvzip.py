"""KVzip: what a model needs to repeat its prompt is what it needs to answer any question about it.

Jang-Hyun Kim et al., https://arxiv.org/abs/2505.23416
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

PAPER = "2505.23416"


@dataclass(frozen=True)
class Reconstruction(Scorer):
    """The most attention that a token gets from any row and query head while the prompt is read a second time.

    The paper reads long prompts again in chunks of 2048 tokens, each against its own part; here the second reading sees
    the whole prompt.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.repeat(), column_max=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        return declared(layer.column_max)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("kvzip", Reconstruction, PAPER, "largest attention while the prompt is read a second time")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    # Four sinks always stay, as in the authors' code.
    yield RecipePlugin(
        "kvzip",
        scorer="kvzip",
        allocator="global",
        selection=Selection(sink=4, heads="auto", reduce="max"),
        paper=PAPER,
        summary="reconstruction scores in one ranking over all layers and KV heads",
    )
