"""Everything a policy author imports.

A policy is a *scorer* (which tokens matter), an *allocator* (how many tokens each layer keeps) and a
*selection* (what is protected, whether KV heads share a set).  A plugin registers scorers, allocators and recipes
as named records; the user picks by name with ``--kv-policy``.
"""

from vlcache_sgl.api.hookspecs import hookimpl
from vlcache_sgl.api.needs import Needs, Rows
from vlcache_sgl.api.ops import keep_first, keep_last, minmax, pool, zscore
from vlcache_sgl.api.protocols import Allocator, BudgetSum, Scorer
from vlcache_sgl.api.records import AllocatorPlugin, RecipePlugin, ScorerPlugin, Selection
from vlcache_sgl.api.tensors import Budget, Grid, LayerView, Patches, Prompt, Rotary, Span, declared

__all__ = [
    "Allocator",
    "AllocatorPlugin",
    "Budget",
    "BudgetSum",
    "Grid",
    "LayerView",
    "Needs",
    "Patches",
    "Prompt",
    "RecipePlugin",
    "Rotary",
    "Rows",
    "Scorer",
    "ScorerPlugin",
    "Selection",
    "Span",
    "declared",
    "hookimpl",
    "keep_first",
    "keep_last",
    "minmax",
    "pool",
    "zscore",
]
