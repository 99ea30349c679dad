"""CAKE: layers that look at many tokens and keep changing their mind deserve more; so do tokens attended unsteadily.

Ziran Qin et al., https://arxiv.org/abs/2503.12491
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
    declared,
    hookimpl,
    keep_last,
    pool,
)

PAPER = "2503.12491"


def moments(layer: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over the window's rows, `[K, m - window]` each.

    With grouped queries the variance is over the rows of all query heads of the group, so differences between
    the heads count too; the paper's models with one head per group get the paper's variance.
    """
    total, squares, rows = declared(layer.column_sum), declared(layer.column_square_sum), layer.num_rows
    prefix = slice(0, total.shape[-1] - rows)
    mean = total[:, prefix] / rows
    variance = (squares[:, prefix] - rows * mean**2).clamp(min=0) / max(1, rows - 1)
    return mean, variance


@dataclass(frozen=True)
class MeanAndVariance(Scorer):
    """Mean plus `gamma` times variance of the attention from the last `window` rows, smoothed; the window stays."""

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    window: int = 32
    gamma: float = 200.0
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.gamma < 0:
            raise ValueError(f"window must be at least 1 and gamma at least 0, got {self.window} and {self.gamma}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.last(self.window), column_sum=True, column_square_sum=True)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        mean, variance = moments(layer)
        smooth = pool(mean + self.gamma * variance, self.kernel)
        return keep_last(torch.nn.functional.pad(smooth, (0, layer.num_rows)), layer.num_rows)


@dataclass(frozen=True)
class Preference(Allocator):
    """Layers in proportion to ``entropy^(1/tau1) * variance^(1/tau2)`` of the window's attention.

    The entropy is that of whole rows (the paper leaves the window's own columns out), and what a full layer cannot
    take goes to the others in proportion (the paper: in equal parts).  The paper decides layer by layer while the
    prompt is read, so that the peak is bounded as well; here all layers are known when it is decided.
    """

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError("window must be at least 1, tau1 and tau2 positive")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.last(self.window), column_sum=True, column_square_sum=True, entropy=True)

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        entropy = torch.stack([declared(layer.entropy).mean() for layer in layers]).double()
        variance = torch.stack([moments(layer)[1].sum() for layer in layers]).double()
        return budget.distribute(entropy ** (1 / self.tau1) * variance ** (1 / self.tau2))


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("cake", MeanAndVariance, PAPER, "mean plus variance of the window's attention")


@hookimpl
def vlcache_allocators() -> Iterator[AllocatorPlugin]:
    yield AllocatorPlugin("cake", Preference, PAPER, "entropy times variance of the window's attention")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "cake", scorer="cake", allocator="cake", paper=PAPER, summary="dispersion and shift of attention, twice"
    )
