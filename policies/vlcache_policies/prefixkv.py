"""PrefixKV: choose layer budgets such that every layer retains the same share of its attention.

Ao Wang et al., https://arxiv.org/abs/2412.03409
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import (
    Allocator,
    AllocatorPlugin,
    Budget,
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    Rows,
    Selection,
    declared,
    hookimpl,
)

PAPER = "2412.03409"


@dataclass(frozen=True)
class EqualMass(Allocator):
    """The least tokens per layer that reach one common share of its accumulated attention.

    The share is the largest that the budget allows, found exactly (the reference code bisects on it and stops within
    five tokens).  The paper averages the budgets over samples and fixes them: profile with this one and pass the
    result to ``table``.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), column_sum=True)
    prefix_hit: ClassVar[str] = "only the request's own new rows count, only its own tokens hold mass"

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        mass = torch.stack([declared(layer.column_sum).mean(0) for layer in layers]).double()
        mass = mass.sort(dim=1, descending=True).values
        # On the CPU: a running sum on a GPU may differ in the last digit from rank to rank.
        share = (mass / mass.sum(1, keepdim=True).clamp(min=1e-30)).cpu()
        # Token i of a layer is needed as soon as the common share exceeds what the i tokens before it hold.
        needed_above = (share.cumsum(1) - share).clamp(min=0)
        needed_above[:, : budget.lo] = -1.0
        order = needed_above.flatten().sort(stable=True).indices[: budget.total]
        return torch.bincount(order // max(1, prompt.owned), minlength=budget.num_layers)


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("prefixkv", EqualMass, PAPER, "the same share of accumulated attention in every layer")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "prefixkv",
        scorer="h2o",
        allocator="prefixkv",
        selection=Selection(sink=1, recent=1),
        paper=PAPER,
        summary="accumulated attention, equal mass in every layer",
    )
