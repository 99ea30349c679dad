"""What a plugin may offer.  pluggy collects from all plugins; the user then selects one record by its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vlcache_sgl.api.records import AllocatorPlugin, RecipePlugin, ScorerPlugin

PROJECT = "vlcache_sgl"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def vlcache_scorers() -> Iterable[ScorerPlugin]:  # type: ignore[empty-body]
    """Scorers this plugin provides.

    A whole plugin, in a module that an entry point of group ``vlcache_sgl`` names::

        from dataclasses import dataclass
        from vlcache_sgl.api import Needs, ScorerPlugin, hookimpl

        @dataclass(frozen=True)
        class KeyNorm:
            needs = Needs(keys=True)
            query_aware = False

            def score(self, layer, prompt):
                return -layer.keys.float().norm(dim=-1)

        @hookimpl
        def vlcache_scorers():
            yield ScorerPlugin("my_knorm", KeyNorm, paper="2406.11430", summary="small keys matter")
    """


@hookspec
def vlcache_allocators() -> Iterable[AllocatorPlugin]:  # type: ignore[empty-body]
    """Allocators this plugin provides.

    For instance one that looks at nothing but the number of layers::

        from dataclasses import dataclass
        import torch
        from vlcache_sgl.api import AllocatorPlugin, hookimpl

        @dataclass(frozen=True)
        class FirstHalf:
            def allocate(self, layers, prompt, budget):
                weight = torch.ones(budget.num_layers)
                weight[: budget.num_layers // 2] = 2
                return budget.distribute(weight)

        @hookimpl
        def vlcache_allocators():
            yield AllocatorPlugin("first_half", FirstHalf, summary="lower layers keep twice as much")
    """


@hookspec
def vlcache_recipes() -> Iterable[RecipePlugin]:  # type: ignore[empty-body]
    """Named combinations this plugin provides.

    For instance one of the two classes above::

        from vlcache_sgl.api import RecipePlugin, Selection, hookimpl

        @hookimpl
        def vlcache_recipes():
            yield RecipePlugin("mine", scorer="my_knorm", allocator="first_half", selection=Selection(sink=4))
    """
