"""What the grounded model is trained for besides its answers, all read from the attention of the question's rows.

Post-vision rows are the tokens after the image up to the end of the prompt.  `B` images, `K` observed questions of
each, `keys` = prefix + image + question: one row of the batch is one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

THRESHOLD = 0.01
"""An entry counts as attended from this share of its row's maximum (VL-Cache, equation 1)."""
ENOUGH = 0.01
"""Density that is not trained down any further; without that, the first layer is ten times denser than the others and
takes most of a budget that is shared out by density."""
SOFTNESS = 0.5
"""Width, in logits, of the differentiable stand-in for that step."""
RANK_SHARE, RANK_LEAST = 0.03, 16
"""The record has to rank among the first RANK_SHARE of the prompt, or RANK_LEAST tokens in short prompts."""
MIN_KEPT = 12
"""Tokens that a simulated cache keeps in every layer; below it even the question is gone."""
RANK_MARGIN = 0.5
"""By how much, in logarithms: a record that just makes it in training fails on the next image."""


@dataclass(frozen=True)
class PostVision:
    """Attention of the post-vision rows of one layer."""

    logits: Tensor
    """`[B, heads, K, rows, keys]` float32, -inf where not causal."""
    weights: Tensor
    """Their softmax over keys."""

    @classmethod
    def of(cls, logits: Tensor) -> PostVision:
        return cls(logits, torch.softmax(logits, -1))

    @property
    def scores(self) -> Tensor:
        """VL-Cache's token scores, shared by the heads: `[B, K, keys]`, attention summed over rows, mean over heads."""
        return self.weights.sum(3).mean(1)


def grounding(attention: PostVision, rows: list[int], targets: Tensor) -> Tensor:
    """Cross entropy, in nats above its minimum, between "uniform over the targets" and the attention of `rows`.

    `targets` `[B, K, n]` are key positions; attention is averaged over heads and rows first, so heads may share it.
    """
    mean = attention.weights[:, :, :, rows].mean((1, 3))
    wanted = mean.gather(-1, targets)
    return -(wanted + 1e-4).log().mean() - math.log(targets.shape[-1])


def ranking(scores: Tensor, targets: Tensor) -> Tensor:
    """How far, in nats, the targets are from the first ranks of the scores `[B, K, keys]`; 0 when all are inside."""
    count = max(RANK_LEAST, round(RANK_SHARE * scores.shape[-1]))
    bar = scores.detach().topk(count, -1).values[..., -1:]
    return torch.relu((bar + 1e-6).log() + RANK_MARGIN - (scores.gather(-1, targets) + 1e-6).log()).mean()


def density(attention: PostVision) -> Tensor:
    """Share of causal entries within THRESHOLD of their row's maximum (VL-Cache, equation 2): a scalar in [0, 1]."""
    return (_above_threshold(attention) >= 0).float().sum() / torch.isfinite(attention.logits).sum()


def excess_density(attention: PostVision) -> Tensor:
    """How far, in nats, the density with a sigmoid for the step is above ENOUGH; 0 when below."""
    inside = torch.sigmoid(_above_threshold(attention) / SOFTNESS)
    soft = inside.sum() / torch.isfinite(attention.logits).sum()
    return torch.relu((soft / ENOUGH).log())


def _above_threshold(attention: PostVision) -> Tensor:
    return attention.logits - attention.logits.amax(-1, keepdim=True) - math.log(THRESHOLD)


@dataclass(frozen=True)
class CacheDraw:
    """One step's compressed caches: what decoding keeps of each prompt."""

    budgets: Tensor
    """`[B, K]` share of the prompt, averaged over layers."""
    protected: Tensor
    """`[B, K]` bool: the question's text is kept before anything else."""
    layer_factors: tuple[float, ...]
    """Per layer, its budget relative to the average."""

    def keep(self, layer: int, attention: PostVision, forced: Tensor | None) -> Tensor:
        """What layer `layer` keeps: bool `[B, K, keys]`, the first by post-vision score.

        `forced` `[B, K, n]` positions stay whatever their score: losing the answer itself would teach the model to copy
        codes into the question's tokens, which no large model does.
        """
        scores = attention.scores.detach().clone()
        rows, keys = attention.logits.shape[-2:]
        scores[..., keys - rows :] += self.protected[..., None] * float(rows)
        shares = (self.budgets * self.layer_factors[layer]).clamp(0.01, 1.0)
        counts = (shares * keys).round().clamp(min=MIN_KEPT, max=keys).long()
        ranks = scores.argsort(-1, descending=True).argsort(-1)
        kept = ranks < counts[..., None]
        return kept if forced is None else kept.scatter(-1, forced, True)


@dataclass
class CacheSimulator:
    """Draws compressed caches like those of serving: any budget, text protected or not, uniform or by density."""

    layers: int
    budgets: tuple[float, float] = (0.04, 0.3)
    densities: list[float] = field(default_factory=list)
    """Running average per layer.  A layer's budget depends on the density of later layers, which a single pass does not
    know yet; it moves slowly enough to take from the steps before."""

    def observe(self, densities: list[float]) -> None:
        if not self.densities:
            self.densities = densities
        self.densities = [0.95 * old + 0.05 * new for old, new in zip(self.densities, densities, strict=True)]

    def draw(self, images: int, questions: int) -> CacheDraw:
        low, high = (math.log(b) for b in self.budgets)
        budgets = torch.exp(low + (high - low) * torch.rand(images, questions))
        protected = torch.rand(images, questions) < 0.5
        factors = [1.0] * self.layers
        if self.densities and torch.rand(()) < 0.5:
            total = sum(self.densities)
            factors = [d / total * self.layers for d in self.densities]
        return CacheDraw(budgets, protected, tuple(factors))
