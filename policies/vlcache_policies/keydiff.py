"""KeyDiff: keys that point away from the crowd are the ones that attention can tell apart.

Junyoung Park et al., https://arxiv.org/abs/2504.15364
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, declared, hookimpl

PAPER = "2504.15364"


@dataclass(frozen=True)
class KeyDifference(Scorer):
    """Minus the cosine between a key and the mean direction of all owned keys of its head.

    The paper evicts block after block while the prompt is read; here the whole prompt is compared once.
    """

    needs: ClassVar[Needs] = Needs(keys=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        direction = torch.nn.functional.normalize(declared(layer.keys).float(), dim=-1)
        anchor = torch.nn.functional.normalize(direction.mean(1, keepdim=True), dim=-1)
        return -(direction * anchor).sum(-1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("keydiff", KeyDifference, PAPER, "keys unlike the mean key")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin("keydiff", scorer="keydiff", allocator="model", paper=PAPER, summary="distinctive keys")
