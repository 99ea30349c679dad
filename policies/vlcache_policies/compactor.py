"""Compactor: outliers of the key matrix, by leverage score, and what nearby tokens attend to when they may look ahead.

Vivek Chari, Benjamin Van Durme, https://arxiv.org/abs/2507.08143
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

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
    keep_first,
    keep_last,
    pool,
    zscore,
)

PAPER = "2507.08143"

RIDGE = 1e-2
"""Added to the diagonal of the Gram matrix, as in kvpress: sketched keys need not have full rank."""


def leverage_scores(keys: torch.Tensor, sketch: int, seed: int) -> torch.Tensor:
    """`[K, m]` float32 in [0, 1]: how much of a direction of key space hangs on the token alone.

    Args:
        keys: `[K, m, D]` without rotation.
        sketch: columns of the Gaussian sketch; from D on there is nothing to save and none is made.
        seed: of the sketch, drawn on the CPU.
    """
    dim = keys.shape[-1]
    centred = (keys - keys.mean(1, keepdim=True)).double()
    if sketch < dim:
        centred = centred @ _sketch_on(keys.device, dim, sketch, seed)
    gram = centred.transpose(1, 2) @ centred
    ridge = RIDGE * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    # The ridge makes it succeed; `cholesky` would wait for a GPU to find that out.
    factor = torch.linalg.cholesky_ex(gram + ridge).L
    solved = torch.cholesky_solve(centred.transpose(1, 2), factor).transpose(1, 2)
    scores: torch.Tensor = (centred * solved).sum(-1)
    return scores.clamp(min=0).float()


def gaussian_sketch(dim: int, sketch: int, seed: int) -> torch.Tensor:
    """`[dim, sketch]` float32 with variance ``1 / sketch``; one for all heads, so that ranks draw the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, sketch, generator=generator).div(sketch**0.5)


@functools.lru_cache(maxsize=4)  # copied to a GPU once
def _sketch_on(device: torch.device, dim: int, sketch: int, seed: int) -> torch.Tensor:
    """`gaussian_sketch` in float64."""
    return gaussian_sketch(dim, sketch, seed).to(device, torch.float64)


def look_ahead(queries: torch.Tensor, keys: torch.Tensor, chunk: int, scale: float) -> torch.Tensor:
    """`[K, m]` attention without the causal mask inside chunks of `chunk` tokens: column sums, mean over the group.

    kvpress also gives padding in the last chunk a weight; that is not copied.

    Args:
        queries: `[H, m, D]`.
        keys: `[K, m, D]`.
        chunk: tokens.
        scale: factor of the logits.
    """
    heads, tokens, dim = keys.shape
    pad = -tokens % chunk
    q = torch.nn.functional.pad(queries, (0, 0, 0, pad)).reshape(heads, -1, (tokens + pad) // chunk, chunk, dim)
    k = torch.nn.functional.pad(keys, (0, 0, 0, pad)).reshape(heads, 1, (tokens + pad) // chunk, chunk, dim)
    exists = (torch.arange(tokens + pad, device=keys.device) < tokens).reshape(-1, 1, chunk)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~exists, torch.finfo(q.dtype).min)
    weights = logits.softmax(-1) * exists.transpose(-1, -2)
    columns: torch.Tensor = weights.sum(-2).mean(1).flatten(1)
    return columns[:, :tokens]


@dataclass(frozen=True)
class Leverage(Scorer):
    """Approximate leverage scores of the un-rotated keys, z-normalised over the layer."""

    needs: ClassVar[Needs] = Needs(keys=True, rotary=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    sketch: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sketch < 1:
            raise ValueError(f"sketch must be at least 1, got {self.sketch}")

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        return zscore(leverage_scores(unrotated(layer, prompt), self.sketch, self.seed))


@dataclass(frozen=True)
class Compactor(Scorer):
    """Leverage plus look-ahead attention times value length, both z-normalised over the layer; the ends stay.

    All rows are needed at once: their queries are held until the prompt ends.
    """

    needs: ClassVar[Needs] = Needs(rows=Rows.all(), queries=True, keys=True, values=True, rotary=True)
    query_aware: ClassVar[bool] = False
    comparable: ClassVar[bool] = True
    prefix_hit: ClassVar[str] = "only the request's own new rows and keys are compared"

    blending: float = 0.35
    """Weight of the leverage part."""
    sketch: int = 48
    chunk: int = 256
    """Tokens that look at each other."""
    first: int = 8
    """Leading tokens of the prompt that stay and enter no statistics."""
    last: int = 4
    """Latest tokens that stay and enter no statistics."""
    scaled: bool = False
    """Divide the logits of the look-ahead attention by sqrt(D), as the model's own attention does.  The authors' code
    does not, which lets each row point at fewer tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sketch, self.chunk) < 1 or min(self.first, self.last, self.blending) < 0:
            raise ValueError("sketch and chunk must be at least 1; first, last and blending at least 0")

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        first = min(max(0, self.first - prompt.start), prompt.owned)
        last = min(self.last, prompt.owned - first)
        middle = slice(first, prompt.owned - last)
        keys, values = declared(layer.keys).float(), declared(layer.values).float()
        scores = torch.zeros(keys.shape[:2], device=keys.device)
        if middle.start < middle.stop:
            leverage = leverage_scores(unrotated(layer, prompt)[:, middle], self.sketch, self.seed)
            scale = prompt.head_dim**-0.5 if self.scaled else 1.0
            attention = look_ahead(declared(layer.queries).float()[:, middle], keys[:, middle], self.chunk, scale)
            weighted = pool(attention * values[:, middle].norm(dim=-1), 3)
            scores[:, middle] = self.blending * zscore(leverage) + zscore(weighted)
        return keep_last(keep_first(scores, first), last)


def unrotated(layer: LayerView, prompt: Prompt) -> torch.Tensor:
    """`[K, m, D]` float32, keys before their rotation."""
    if prompt.rotary is None:
        raise LookupError("this model's rotary embedding is not known")
    return prompt.rotary.rotate(declared(layer.keys).float(), declared(prompt.positions), inverse=True)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("compactor", Compactor, PAPER, "leverage scores and look-ahead attention")
    yield ScorerPlugin("leverage", Leverage, PAPER, "leverage scores of the keys alone")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "compactor",
        scorer="compactor",
        allocator="model",
        paper=PAPER,
        summary="leverage scores blended with look-ahead attention times value length",
    )
