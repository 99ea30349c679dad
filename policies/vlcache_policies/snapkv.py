"""SnapKV: the last tokens of a prompt already look where the answer will look.

Yuhong Li et al., https://arxiv.org/abs/2404.14469
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
    pool,
)

PAPER = "2404.14469"


@dataclass(frozen=True)
class ObservationWindow(Scorer):
    """Mean attention from the last `window` rows, smoothed along the sequence; the window itself always stays.

    The paper keeps one set per query head on repeated keys; a serving cache has KV heads only, so the query heads of
    a group are averaged, before the pooling (with ``pool=max`` the order matters: it is that of the KV-head mode of
    KVCache-Factory).
    """

    query_aware: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def needs(self) -> Needs:
        return Needs(rows=Rows.last(self.window), column_sum=True)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        received = declared(layer.column_sum) / layer.num_rows
        # Columns of the window are not pooled with the rest: half of them are masked.
        seen_by_all = received[:, : prompt.owned - layer.num_rows]
        smooth = torch.zeros_like(received)
        smooth[:, : seen_by_all.shape[1]] = pool(seen_by_all, self.kernel, self.pool)
        return keep_last(smooth, layer.num_rows)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("snapkv", ObservationWindow, PAPER, "pooled attention from the last rows")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "snapkv",
        scorer="snapkv",
        allocator="model",
        # Max pooling with kernel 7 is what AdaKV, HeadKV and SparseMM made of it.
        variants={"max": {"pool": "max", "kernel": 7}},
        paper=PAPER,
        summary="pooled attention from the last 32 rows",
    )
