"""ChunkKV: keep or drop whole runs of neighbours, because meaning does not sit in single tokens.

Xiang Liu et al., https://arxiv.org/abs/2502.00299

It is a selection rule over another method's scores, so it is a recipe: SnapKV's scores and ``span=20``.  The last run
that does not fit is cut (the reference code drops it and misses the budget), and layers choose for themselves (the
paper lets neighbouring layers share a choice to save time).
"""

from __future__ import annotations

from collections.abc import Iterator

from vlcache_sgl.api import RecipePlugin, Selection, hookimpl


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "chunkkv",
        scorer="snapkv",
        allocator="model",
        selection=Selection(span=20),
        paper="2502.00299",
        summary="SnapKV scores, whole runs of 20 tokens",
    )
