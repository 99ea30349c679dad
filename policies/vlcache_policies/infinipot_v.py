"""InfiniPot-V: without a question in sight, image tokens with long values are the ones to keep.

Minsoo Kim et al., https://arxiv.org/abs/2506.15745
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, Selection, declared, hookimpl

PAPER = "2506.15745"


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """Length of the value; every text token ranks above every vision token.

    This is the method's value-norm half.  The other half drops what repeats between the frames of a video stream
    and needs the frame grid, which a prompt of still images does not have.
    """

    needs: ClassVar[Needs] = Needs(values=True)
    query_aware: ClassVar[bool] = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        length: torch.Tensor = declared(layer.values).float().norm(dim=-1)
        if prompt.owned == 0:
            return length
        return torch.where(prompt.is_vision(), length, length + length.amax(-1, keepdim=True))


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("infinipot_v", ValueNorm, PAPER, "text first, then vision tokens with long values")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "infinipot_v",
        scorer="infinipot_v",
        allocator="model",
        selection=Selection(protect="text"),
        paper=PAPER,
        summary="vision tokens with long values, all text; without the temporal half",
    )
