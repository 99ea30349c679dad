"""StreamingLLM: the first few tokens catch attention that has nowhere to go; keep them and the most recent ones.

Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis, https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, Selection, hookimpl

PAPER = "2309.17453"


@dataclass(frozen=True)
class Recency(Scorer):
    """Later is better; the sinks come from the selection.

    The paper re-assigns positions inside the shortened cache; here a kept token keeps its own, as within the trained
    length quality is close.
    """

    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        position = torch.arange(prompt.start, prompt.length, dtype=torch.float32, device=prompt.device)
        return position.expand(prompt.num_kv_heads, -1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("streaming", Recency, PAPER, "later tokens are better")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "streaming",
        scorer="streaming",
        allocator="model",
        selection=Selection(sink=4),
        paper=PAPER,
        summary="four sinks and the most recent tokens",
    )
