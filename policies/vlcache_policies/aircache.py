"""AirCache: a few elite words of the question know which image tokens matter, and how much each layer needs.

Kai Huang et al., https://arxiv.org/abs/2503.23956
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
    Scorer,
    ScorerPlugin,
    Selection,
    declared,
    hookimpl,
)

PAPER = "2503.23956"


def elite_attention(layer: LayerView, prompt: Prompt, elite: float) -> torch.Tensor:
    """`[m]` float32, mean over heads: for vision tokens the attention of the elite rows, for text that of the last row.

    The candidates are the text rows after the last image: the paper allows all text, but text before the image cannot
    see it.  A candidate is elite if the last row attends to it with at least `elite` times its strongest attention to
    a candidate; this softmax is over text.  The elite is then read with a softmax over vision tokens and elite tokens.
    """
    rows = declared(layer.row_positions) - prompt.start
    keys, queries = declared(layer.keys).float(), declared(layer.queries).float()
    grouped = queries.reshape(keys.shape[0], -1, *queries.shape[1:])
    logits = torch.einsum("kgrd,kmd->kgrm", grouped, keys).flatten(0, 1) / keys.shape[-1] ** 0.5
    vision = prompt.is_vision()
    is_row = torch.zeros_like(vision)
    is_row.index_fill_(0, rows, True)
    asking = _softmax(logits[:, -1], ~vision | is_row).mean(0)
    candidates = asking[rows]
    chosen = candidates >= elite * candidates.max()
    is_elite = torch.zeros_like(vision)
    is_elite[rows] = chosen
    earlier = torch.arange(prompt.owned, device=rows.device) <= rows[:, None]
    received = _softmax(logits, (vision | is_elite) & earlier).mean(0)
    seen = (received * chosen[:, None]).sum(0) / chosen.sum()
    return torch.where(vision, seen, asking)


def _softmax(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Over the allowed entries; a row without any is 0 everywhere."""
    masked = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return masked.softmax(-1) * allowed


def _of_vision(values: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Those of `values` `[m]` that belong to vision tokens; by ranges, because a GPU is waited for to apply a mask."""
    owned = values[: prompt.owned]
    return torch.cat([owned[max(0, begin - prompt.start) : max(0, end - prompt.start)] for begin, end in prompt.vision])


def _check(elite: float) -> None:
    if not 0 < elite <= 1:
        raise ValueError(f"elite must be in (0, 1], got {elite}")


@dataclass(frozen=True)
class EliteWindow(Scorer):
    """Attention that vision tokens get from the elite of the question, one set for all heads.

    Text is ranked among itself by the attention of the last row; the method protects it anyway.
    """

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(rows=Rows.post_vision(), queries=True, keys=True)

    elite: float = 0.9
    """Share of the strongest attention that makes a word elite, in (0, 1]."""

    def __post_init__(self) -> None:
        _check(self.elite)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        return elite_attention(layer, prompt, self.elite).expand(prompt.num_kv_heads, -1)


@dataclass(frozen=True)
class StrengthAndSkewness(Allocator):
    """Vision tokens per layer by the sum of the elite's attention on them and by how skewed it is.

    Both are scaled to a mean of 1 over layers and averaged.  Text keeps what it has in every layer, as far as the
    budget goes; a negative skewness counts as none.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.post_vision(), queries=True, keys=True)

    elite: float = 0.9

    def __post_init__(self) -> None:
        _check(self.elite)

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        images = prompt.owned_vision
        text = min(prompt.owned - images, budget.total // budget.num_layers)
        if images == 0:
            return budget.distribute(torch.ones(budget.num_layers))
        received = torch.stack(
            [_of_vision(elite_attention(layer, prompt, self.elite), prompt) for layer in layers]
        ).double()
        strength, skewness = received.sum(1), skew(received).clamp(min=0)
        weight = strength / strength.mean().clamp(min=1e-30) + skewness / skewness.mean().clamp(min=1e-30)
        rest = budget.total - text * budget.num_layers
        share = Budget(rest, budget.num_layers, min(max(0, budget.lo - text), images), budget.hi - text)
        return text + share.distribute(weight)


def skew(values: torch.Tensor) -> torch.Tensor:
    """`[L]` adjusted skewness of the rows of `[L, N]`; 0 where it is not defined (N < 3 or constant)."""
    count = values.shape[1]
    if count < 3:
        return torch.zeros_like(values[:, 0])
    scaled = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp(min=1e-30)
    return count / ((count - 1) * (count - 2)) * (scaled**3).sum(1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("aircache", EliteWindow, PAPER, "attention of the question's elite words on vision tokens")


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("aircache", StrengthAndSkewness, PAPER, "strength and skewness of the elite's attention")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "aircache",
        scorer="aircache",
        allocator="aircache",
        selection=Selection(protect="text"),
        paper=PAPER,
        summary="elite words choose vision tokens and layer budgets, all text stays",
    )
