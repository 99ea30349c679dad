"""Global: one ranking over the tokens of all layers, or of all their heads; each keeps as many as it wins places.

The budget rule of KVzip (https://arxiv.org/abs/2505.23416) and of KVCompose (https://arxiv.org/abs/2509.05165),
without their second pass over the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, LayerView, Needs, Prompt, declared, hookimpl


@dataclass(frozen=True)
class Global(Allocator):
    """Ranks scores across layers, so the scorer must be ``comparable``; ties go to the lower layer, then head.

    KVCompose also gives layer 0 the best curve of all layers; use ``floor`` instead.
    """

    needs: ClassVar[Needs] = Needs()
    compares_layers: ClassVar[bool] = True

    among: Literal["heads", "layers", "composite"] = "heads"
    """What competes where KV heads keep sets of their own (``heads=split``).  ``heads``: each for itself (KVzip).
    ``layers``: the mean of a token over heads, equal counts for the heads of a layer.  ``composite``: the same with
    the i-th best of every head taken together (KVCompose)."""

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        curves = torch.stack([declared(layer.scores) for layer in layers])
        if self.among == "layers":
            curves = curves.mean(1, keepdim=True)
        curves = curves.sort(dim=-1, descending=True).values
        if self.among == "composite":
            curves = curves.mean(1, keepdim=True)
        curves[..., : budget.lo] = torch.inf
        sets = curves.shape[:2].numel()
        winners = curves.flatten().sort(descending=True, stable=True).indices[: budget.total * curves.shape[1]]
        owner = winners // max(1, prompt.owned)
        # Not `bincount`, for which the host waits to learn the largest.
        counts = owner.new_zeros(sets).index_add_(0, owner, torch.ones_like(owner)).view(curves.shape[:2])
        return counts if counts.shape[1] > 1 else counts[:, 0]


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("global", Global, "2505.23416, 2509.05165", "one ranking over the tokens of all layers")
