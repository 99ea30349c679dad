"""LagKV: a token is worth keeping if it stands out against the tokens that follow it.

Manlai Liang et al., https://arxiv.org/abs/2504.04704
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
    Scorer,
    ScorerPlugin,
    declared,
    hookimpl,
    keep_first,
    keep_last,
)

PAPER = "2504.04704"


@dataclass(frozen=True)
class LagRelative(Scorer):
    """Spread over channels of keys and values, each channel scaled by the range it has in the next partition.

    Tokens are ranked inside their partition of `lag` tokens; the last partition has no successor and stays, with what
    is left over behind it.  Prompts below two partitions are ranked by recency.  Where the budget cannot hold the
    last partition its latest tokens stay (the paper's budgets always hold it).
    """

    needs: ClassVar[Needs] = Needs(keys=True, values=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    first: int = 4
    """Leading tokens of the prompt that always stay."""
    lag: int = 128
    """Tokens of a partition."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.lag < 2:
            raise ValueError(f"first must be at least 0 and lag at least 2, got {self.first} and {self.lag}")

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        keys, values = declared(layer.keys).float(), declared(layer.values).float()
        first = max(0, self.first - prompt.start)
        partitions = (prompt.owned - first) // self.lag
        if partitions < 2:
            age = torch.arange(prompt.owned, dtype=torch.float32, device=keys.device) / max(1, prompt.owned)
            return keep_first(age.expand(keys.shape[0], -1), first)
        end = first + partitions * self.lag
        spread = (self._spread(keys[:, first:end]) + self._spread(values[:, first:end])) / 2
        ranks = spread.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) / self.lag
        scores = torch.zeros(keys.shape[:2], device=keys.device)
        scores[:, first : end - self.lag] = ranks.flatten(1)
        return keep_last(keep_first(scores, first), prompt.owned - end + self.lag)

    def _spread(self, states: torch.Tensor) -> torch.Tensor:
        """`[K, partitions - 1, lag]` from `[K, tokens, D]`."""
        parts = states.reshape(states.shape[0], -1, self.lag, states.shape[-1])
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        # A channel that is constant in the reference says nothing; the reference code divides by zero there.
        scaled = (parts[:, :-1] - low) / (high - low).clamp(min=1e-6)
        return scaled.std(-1).softmax(-1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("lagkv", LagRelative, PAPER, "keys and values that stand out against what follows")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin("lagkv", scorer="lagkv", allocator="model", paper=PAPER, summary="outliers of their partition")
