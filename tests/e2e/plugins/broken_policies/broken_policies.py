"""Policies that break their contract, each in its own way; a distribution like any third party's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlcache_sgl.api import AllocatorPlugin, Budget, LayerView, Needs, Prompt, ScorerPlugin, hookimpl


@dataclass(frozen=True)
class Raises:
    needs = Needs()
    query_aware = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        raise RuntimeError("broken on purpose")


@dataclass(frozen=True)
class Exits:
    needs = Needs()
    query_aware = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        raise SystemExit("broken on purpose")


@dataclass(frozen=True)
class SaysNaN:
    needs = Needs()
    query_aware = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        scores = torch.ones(prompt.num_kv_heads, prompt.owned)
        scores[:, prompt.owned // 2] = torch.nan
        return scores


@dataclass(frozen=True)
class SaysTooFew:
    needs = Needs()
    query_aware = False

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        return torch.ones(prompt.num_kv_heads, prompt.owned - 1)


@dataclass(frozen=True)
class KeepsTooMuch:
    needs = Needs()

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        return torch.full((budget.num_layers,), budget.total // budget.num_layers + 1, dtype=torch.int64)


@dataclass(frozen=True)
class KeepsTooLittle:
    needs = Needs()

    def allocate(self, layers: Sequence[LayerView], prompt: Prompt, budget: Budget) -> torch.Tensor:
        return torch.full((budget.num_layers,), budget.total // budget.num_layers // 2, dtype=torch.int64)


@hookimpl
def vlcache_scorers() -> Iterable[ScorerPlugin]:
    yield ScorerPlugin("exits", Exits)
    yield ScorerPlugin("raises", Raises)
    yield ScorerPlugin("nan", SaysNaN)
    yield ScorerPlugin("too_few", SaysTooFew)


@hookimpl
def vlcache_allocators() -> Iterable[AllocatorPlugin]:
    yield AllocatorPlugin("too_much", KeepsTooMuch)
    yield AllocatorPlugin("too_little", KeepsTooLittle)
