"""Uniform: every layer keeps the same number of tokens.  The baseline of every layer-adaptive method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import Allocator, AllocatorPlugin, Budget, LayerView, Needs, Prompt, hookimpl


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same for all; what does not divide goes to the lower layers."""

    needs: ClassVar[Needs] = Needs()

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        return budget.distribute(torch.ones(budget.num_layers))


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("uniform", Uniform, summary="the same number of tokens in every layer")
