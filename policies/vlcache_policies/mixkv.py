"""MixKV: importance alone keeps the same thing many times; redundant heads need diversity as well.

Xuyang Liu et al., https://arxiv.org/abs/2510.20707
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlcache_sgl.api import (
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
    minmax,
    pool,
)

PAPER = "2510.20707"


@dataclass(frozen=True)
class Mixed(Scorer):
    """Attention of the window, length of the value, and distance of the key from the mean key, on one scale.

    ``mix=head``: ``r * diversity + (1 - r) * (attention + value)`` with the head's redundancy r, the mean cosine
    between two different keys, taken from the prompt itself.  ``mix=mean``: the plain mean of the three.
    """

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    window: int = 32
    kernel: int = 5
    mix: Literal["head", "mean"] = "head"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.last(self.window), column_sum=True, keys=True, values=True)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        before = prompt.owned - layer.num_rows
        received = declared(layer.column_sum) / layer.num_rows
        if before == 0:
            return keep_last(received, layer.num_rows)
        attention = pool(received[:, :before], self.kernel)
        level = attention.mean(-1, keepdim=True)
        direction = torch.nn.functional.normalize(declared(layer.keys).float(), dim=-1)
        centre = direction.mean(1, keepdim=True)
        diversity = _at_level(-(direction[:, :before] * centre).sum(-1), level)
        length = _at_level(declared(layer.values).float()[:, :before].norm(dim=-1), level)
        if self.mix == "mean":
            mixed = (attention + length + diversity) / 3
        else:
            tokens = direction.shape[1]
            redundancy = ((tokens * centre.square().sum(-1) - 1) / max(1, tokens - 1)).clamp(0, 1)
            mixed = redundancy * diversity + (1 - redundancy) * (attention + length)
        return keep_last(torch.nn.functional.pad(mixed, (0, layer.num_rows)), layer.num_rows)


def _at_level(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`values` scaled per head to a least value of 0 and the mean `level`."""
    scaled = minmax(values)
    return scaled * level / scaled.mean(-1, keepdim=True).clamp(min=1e-8)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("mixkv", Mixed, PAPER, "window attention, value length and key diversity, mixed per head")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "mixkv",
        scorer="mixkv",
        allocator="model",
        variants={"mean": {"mix": "mean"}},
        paper=PAPER,
        summary="importance and diversity, weighted by the redundancy of the head",
    )
