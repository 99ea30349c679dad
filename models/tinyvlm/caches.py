"""What decoding keeps of a prompt, for the tables: small references in plain torch, independent of the plugin.

Budgets are shares of the prompt, averaged over layers.  One index set per layer serves all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlcache_sgl.api.budget import water_fill

from .probe import Prompt

Scorer = Callable[[Prompt, int, torch.Generator], Tensor]
"""(prompt, layer, random numbers) -> `[tokens]` float32, higher = keep."""
SINK = 4
PAPER_FLOOR = 0.01
"""Least share of the prompt that a layer gets in VL-Cache."""

SCORERS: dict[str, Scorer] = {
    "post-vision": lambda prompt, layer, _: prompt.layers[layer].post_vision,
    "accumulated": lambda prompt, layer, _: prompt.layers[layer].accumulated,
    "last token": lambda prompt, layer, _: prompt.layers[layer].last,
    "sliding window": lambda prompt, *_: torch.arange(prompt.tokens).float(),
    "random": lambda prompt, _, generator: torch.rand(prompt.tokens, generator=generator),
}


@dataclass(frozen=True)
class CachePolicy:
    """A row of the tables."""

    name: str
    scorer: str
    allocator: Literal["uniform", "density", "paper"] = "uniform"
    """``density``: proportional to the layers' density, at least `floor`, exact total.  ``paper``: as published,
    clipped to [0.01, 1] and not normalised again."""
    floor: float = 0.0
    """Least share of the average budget that a layer gets."""
    protect_text: bool = False
    sink: int = 0

    def keep(self, prompt: Prompt, budget: float, generator: torch.Generator) -> Tensor:
        """`[layers, tokens]` bool."""
        counts = self._counts(prompt, budget)
        kept = torch.zeros(len(prompt.layers), prompt.tokens, dtype=torch.bool)
        for layer, count in enumerate(counts):
            scores = SCORERS[self.scorer](prompt, layer, generator).clone()
            if self.protect_text:
                text = torch.ones(prompt.tokens, dtype=torch.bool)
                text[prompt.image] = False
                scores[text] += scores.max() + 1
            if self.sink:
                scores[: self.sink] += scores.max() + 1
            kept[layer, scores.topk(count).indices] = True
        return kept

    def _counts(self, prompt: Prompt, budget: float) -> list[int]:
        """Tokens per layer."""
        layers, tokens = len(prompt.layers), prompt.tokens
        density = torch.tensor([layer.density for layer in prompt.layers])
        if self.allocator == "paper":
            shares = (density / density.sum() * budget * layers).clamp(PAPER_FLOOR, 1.0)
            return [max(1, round(float(share) * tokens)) for share in shares]
        average = budget * tokens
        weights = density if self.allocator == "density" else torch.ones(layers)
        least = max(1, round(self.floor * average))
        filled = water_fill(weights, total=max(layers, round(average * layers)), lo=least, hi=tokens)
        return [int(count) for count in filled]


POLICIES: tuple[CachePolicy, ...] = tuple(
    policy
    for protect in (False, True)
    for policy in (
        CachePolicy("post-vision, uniform", "post-vision", protect_text=protect),
        CachePolicy("post-vision, density, floor 0.5", "post-vision", "density", 0.5, protect),
        CachePolicy("post-vision, density, floor 0.25", "post-vision", "density", 0.25, protect),
        CachePolicy("VL-Cache (density as published)", "post-vision", "paper", protect_text=protect),
        CachePolicy("H2O (all rows)", "accumulated", protect_text=protect),
        CachePolicy("StreamingLLM", "sliding window", protect_text=protect, sink=SINK),
        CachePolicy("random", "random", protect_text=protect),
    )
)


def record_only(prompt: Prompt, cells: tuple[int, ...]) -> Tensor:
    """All text and the image tokens that answer the question: what a perfect scorer would keep; `[layers, tokens]`."""
    kept = torch.ones(prompt.tokens, dtype=torch.bool)
    kept[prompt.image] = False
    kept[[prompt.image.start + cell for cell in cells]] = True
    return kept.repeat(len(prompt.layers), 1)


def text_only(prompt: Prompt) -> Tensor:
    """No image token at all: how much of the answer was copied into the question; `[layers, tokens]`."""
    return record_only(prompt, ())


@dataclass(frozen=True)
class HitRate:
    """How well a scorer foresees the first decoded token, per layer (VL-Cache, definition 3.1)."""

    tokens: list[float]
    """Share of the k most attended prompt tokens that are among the k kept."""
    mass: list[float]
    """Share of the attention on the prompt that falls on kept tokens."""


def hit_rate(prompt: Prompt, scorer: str, budget: float, generator: torch.Generator) -> HitRate:
    """Compare the k best-scored tokens with the k that the first decoded token attends to; k = budget x prompt."""
    k = max(1, round(budget * prompt.tokens))
    tokens, mass = [], []
    for layer, row in enumerate(prompt.first_row):
        kept = SCORERS[scorer](prompt, layer, generator).topk(k).indices
        wanted = row.topk(k).indices
        tokens.append(float(torch.isin(kept, wanted).float().mean()))
        mass.append(float(row[kept].sum() / row.sum()))
    return HitRate(tokens, mass)
