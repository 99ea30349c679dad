"""Global: one ranking over the tokens of all layers, or of all their heads; each keeps as many as it wins places.

The budget rule of KVzip (https://arxiv.org/abs/2505.23416) and of KVCompose (https://arxiv.org/abs/2509.05165),
without their second pass over the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, LayerView, Needs, Prompt, declared, hookimpl


@dataclass(frozen=True)
class Global(Allocator):
    """Ranks scores across layers, so the scorer must be ``comparable``; ties go to the lower layer, then head.

    Equal counts for all heads of a layer, as in KVCompose, unless `per_head`.  KVCompose also gives layer 0 the best
    curve of all layers; use ``floor`` instead.
    """

    needs: ClassVar[Needs] = Needs()
    compares_layers: ClassVar[bool] = True

    composite: bool = False
    """KVCompose: the i-th best of every head together compete as one token; for ``heads=split``."""
    per_head: bool = False
    """KVzip: every KV head of every layer competes for itself; for ``heads=split``."""

    def __post_init__(self) -> None:
        if self.composite and self.per_head:
            raise ValueError("composite and per_head exclude each other")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        scores = torch.stack([declared(layer.scores) for layer in layers])
        if self.per_head:
            curves = scores.sort(dim=-1, descending=True).values
        elif self.composite:
            curves = scores.sort(dim=-1, descending=True).values.mean(1, keepdim=True)
        else:
            curves = scores.mean(1, keepdim=True).sort(dim=-1, descending=True).values
        curves[..., : budget.lo] = torch.inf
        sets = curves.shape[:2].numel()
        winners = curves.flatten().sort(descending=True, stable=True).indices[: budget.total * curves.shape[1]]
        counts = torch.bincount(winners // max(1, prompt.owned), minlength=sets).view(curves.shape[:2])
        return counts if self.per_head else counts[:, 0]


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("global", Global, "2505.23416, 2509.05165", "one ranking over the tokens of all layers")
