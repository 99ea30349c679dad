"""LOOK-M: in a multimodal prompt text comes first; image tokens compete for what is left.

Zhongwei Wan et al., https://arxiv.org/abs/2406.18139
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

PAPER = "2406.18139"


@dataclass(frozen=True)
class TextPrior(Scorer):
    """Accumulated attention, text raised by the largest value that text has.

    The paper merges evicted tokens into kept ones; nothing is merged here, because averaging keys of different M-RoPE
    positions destroys them.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), column_sum=True)
    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    prefix_hit: ClassVar[str] = "only the request's own new rows count"

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        received = declared(layer.column_sum)
        on_text = received.masked_fill(prompt.is_vision(), 0.0)
        raised = received + on_text.amax(-1, keepdim=True) if prompt.owned else received
        return torch.where(prompt.is_vision(), received, raised)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("lookm", TextPrior, PAPER, "accumulated attention with a bonus for text")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "lookm",
        scorer="lookm",
        allocator="model",
        selection=Selection(recent=0.5),
        paper=PAPER,
        summary="heavy hitters with text first, half recent tokens; without the merging",
    )
