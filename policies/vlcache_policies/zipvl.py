"""ZipVL: keep as many tokens per layer as it takes to hold a fixed share of the attention, and no more.

Yefei He et al., https://arxiv.org/abs/2410.08584
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
    BudgetSum,
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    Rows,
    declared,
    hookimpl,
)

PAPER = "2410.08584"


@dataclass(frozen=True)
class MassTarget(Allocator):
    """A quality target instead of a memory target: the sum is what it takes, and the budget is only its upper bound.

    Scores are divided by the number of rows that see a token, as in the paper.  The paper estimates them from a few
    probe rows during a sparse prefill; here all rows count, and the prefill is dense.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), column_sum=True)
    prefix_hit: ClassVar[str] = "only the request's own new rows count, only its own tokens hold mass"

    budget_sum: ClassVar[BudgetSum] = "at_most"

    tau: float = 0.975
    """Share of the (normalised) attention to hold, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        mass = torch.stack([declared(layer.column_sum).mean(0) for layer in layers]).double()
        mass = mass / torch.arange(prompt.owned, 0, -1, device=mass.device)
        # On the CPU: a running sum on a GPU may differ in the last digit from rank to rank.
        mass = mass.sort(dim=1, descending=True).values.cpu()
        short_of_it = mass.cumsum(1) < self.tau * mass.sum(1, keepdim=True)
        tokens = (short_of_it.sum(1) + 1).clamp(min=budget.lo, max=budget.hi)
        return tokens if int(tokens.sum()) <= budget.total else budget.distribute(tokens)


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin(
        "zipvl", MassTarget, PAPER, "as many tokens as hold a share of the attention, at most the budget"
    )


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "zipvl",
        scorer="h2o",
        allocator="zipvl",
        params={"mean": True},
        paper=PAPER,
        summary="attention per visible row, 97.5 % of it in every layer; without the sparse prefill",
    )
