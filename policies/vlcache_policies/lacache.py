"""LaCache: every layer keeps another rung of old tokens, so that together they lose nothing for long.

Dachuan Shi et al., https://arxiv.org/abs/2507.14204
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlcache_sgl.api import LayerView, Needs, Prompt, RecipePlugin, Scorer, ScorerPlugin, hookimpl

PAPER = "2507.14204"


@dataclass(frozen=True)
class Ladder(Scorer):
    """The later a token would be cut from the growing ladder, the better.

    Old tokens are cut group by group, from the oldest on, each layer sparing other members of a group; at the end of
    the prompt the cursor starts over on what survived.  The order of the cuts does not depend on the cache size, so
    it is a score, and the budget decides how far the cutting goes: in the middle of a group where the reference
    code finishes it.  Kept tokens keep their position (the reference code counts positions inside the cache), and
    several rounds cut consecutive survivors (it stretches the groups).  Meant for equal layer budgets.
    """

    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    rung: int = 0
    """Neighbouring layers that keep the same token, the paper's span; 0 = half of them (the paper: 16 of 32)."""
    overlap: int = 0
    """Layers of a rung shared with the next one."""
    first: int = 4
    """Leading tokens that are never cut.  The paper has 128, for streams of a million tokens."""

    def __post_init__(self) -> None:
        if min(self.rung, self.overlap, self.first) < 0 or (self.rung and self.overlap >= self.rung):
            raise ValueError("rung, overlap and first must be at least 0, overlap less than rung")

    def check(self, model: Prompt) -> None:
        """Raises ValueError when `overlap` is not below the rung that the model gets."""
        if self.overlap >= self._rung(model):
            raise ValueError(f"overlap {self.overlap} must be less than the rung of {self._rung(model)} layers")

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        self.check(prompt)
        order = self.order(prompt.length, layer.index, prompt)[prompt.start :]
        return prompt.upload(order.to(torch.float32)).expand(prompt.num_kv_heads, -1)

    def order(self, length: int, layer: int, model: Prompt) -> torch.Tensor:
        """`[length]` int64: the group in which a token is cut; survivors have the highest numbers, by recency."""
        span = self._rung(model)
        group = 1 + max(0, math.ceil((model.num_layers - span) / (span - self.overlap)))
        spared = min(math.ceil(span / (span - self.overlap)), group)
        step = layer % (group - spared + 1)
        is_spared = torch.zeros(group, dtype=torch.bool)
        is_spared[step : step + spared] = True
        cut_at = torch.zeros(length, dtype=torch.int64)
        alive = torch.arange(min(self.first, length), length)
        clock = 0
        while alive.numel() >= group > spared:
            groups = alive.numel() // group
            members = alive[: groups * group].reshape(groups, group)
            cut_at[members[:, ~is_spared]] = torch.arange(clock, clock + groups)[:, None]
            clock += groups
            alive = torch.cat([members[:, is_spared].flatten(), alive[groups * group :]])
        cut_at[alive] = clock + torch.arange(alive.numel())
        cut_at[: self.first] = clock + length
        return cut_at

    def _rung(self, model: Prompt) -> int:
        return self.rung or max(1, model.num_layers // 2)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("lacache", Ladder, PAPER, "a ladder of old tokens, another rung in every layer")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "lacache",
        scorer="lacache",
        allocator="uniform",
        paper=PAPER,
        summary="a positional ladder through the layers",
    )
