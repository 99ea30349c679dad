"""Random: the baseline that every score has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, Selection, hookimpl


@dataclass(frozen=True)
class Random(Scorer):
    """Uniform noise, the same for every prompt of a length: a layer draws its own, the heads share it."""

    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    seed: int = 0

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        # Drawn on the CPU for the whole prompt: neither the device nor a prefix hit changes a token's number.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index)
        noise = torch.rand(prompt.length, generator=generator)[prompt.start :]
        return prompt.upload(noise).expand(prompt.num_kv_heads, -1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("random", Random, summary="uniform noise from a seed")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    # The 10 % recent window is the one that the VL-Cache paper gives all methods it compares.
    yield RecipePlugin(
        "random",
        scorer="random",
        allocator="model",
        selection=Selection(recent=0.1),
        summary="random tokens and a 10 % recent window",
    )
