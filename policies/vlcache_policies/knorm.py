"""KNorm: keys of small norm collect attention, so the norm alone says what to keep.

Alessio Devoto, Yu Zhao, Simone Scardapane, Pasquale Minervini, https://arxiv.org/abs/2406.11430
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, declared, hookimpl

PAPER = "2406.11430"


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Minus the length of the key.

    The paper leaves the first two layers whole; here budgets are the allocator's (``table`` can do it).
    """

    needs: ClassVar[Needs] = Needs(keys=True)
    query_aware: ClassVar[bool] = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        length: torch.Tensor = declared(layer.keys).float().norm(dim=-1)
        return -length


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("knorm", KeyNorm, PAPER, "short keys matter")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin("knorm", scorer="knorm", allocator="model", paper=PAPER, summary="tokens with short keys")
