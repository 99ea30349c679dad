"""Expected Attention: future queries are Gaussian with the prompt's moments, so their attention has a closed form.

Alessio Devoto, Maximilian Jeblick, Simon Jégou, https://arxiv.org/abs/2510.00636
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
    Rotary,
    Rows,
    Scorer,
    ScorerPlugin,
    declared,
    hookimpl,
    keep_first,
)

PAPER = "2510.00636"


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected attention weight times the length of the value.

    With mean and covariance of the un-rotated queries, turned by the average rotation of the next `future` positions,
    the expectation of ``exp(q k / sqrt(D))`` is ``exp(mean k / sqrt(D) + k cov k / 2D)``.  With M-RoPE the next
    positions are text positions.  The moments come from the latest `rows` rows: the paper takes the whole prompt,
    which would hold all queries of all layers in memory until the prompt ends.
    """

    query_aware: ClassVar[bool] = False
    prefix_hit: ClassVar[str] = "only the request's own new rows enter the moments"

    rows: int = 512
    """Rows whose moments are taken, the latest ones; 0 = all."""
    first: int = 4
    """Leading tokens of the prompt that stay and enter neither moments nor softmax."""
    future: int = 512
    """Next positions to average the rotation over."""
    covariance: bool = True
    values: bool = True
    """Multiply by the length of the value."""

    def __post_init__(self) -> None:
        if self.rows < 0 or self.first < 0 or self.future < 1:
            raise ValueError("rows and first must be at least 0, future at least 1")

    @property
    def needs(self) -> Needs:
        rows = Rows.last(self.rows) if self.rows else Rows.all()
        return Needs(rows=rows, queries=True, keys=True, values=self.values, rotary=True)

    def score(self, layer: LayerView, prompt: Prompt) -> torch.Tensor:
        first = max(0, self.first - prompt.start)
        keys = declared(layer.keys).float()[:, first:]
        if keys.shape[1] == 0:
            return keep_first(torch.zeros(keys.shape[0], prompt.owned, device=keys.device), first)
        mean, covariance = self._moments(layer, prompt)
        heads, dim = keys.shape[0], keys.shape[-1]
        logits = torch.einsum("kmd,kgd->kgm", keys, mean.reshape(heads, -1, dim)) / dim**0.5
        if self.covariance:
            grouped = covariance.reshape(heads, -1, dim, dim)
            logits = logits + torch.einsum("kmi,kgij,kmj->kgm", keys, grouped, keys) / (2 * dim)
        scores = logits.softmax(-1).mean(1)
        if self.values:
            scores = scores * declared(layer.values).float()[:, first:].norm(dim=-1)
        return keep_first(torch.nn.functional.pad(scores, (first, 0)), first)

    def _moments(self, layer: LayerView, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[H, D]` and covariance `[H, D, D]` of the queries at the average future position."""
        rotary, positions = prompt.rotary, declared(prompt.positions)
        if rotary is None:
            raise LookupError("this model's rotary embedding is not known")
        rows = declared(layer.row_positions)
        queries = rotary.rotate(declared(layer.queries).float(), positions[..., rows - prompt.start], inverse=True)
        # Without rows after the leading ones all rows count.
        counted = (rows >= self.first) | (rows[-1:] < self.first)
        weight = (counted / counted.sum())[:, None]
        mean = (queries * weight).sum(1, keepdim=True)
        centred = (queries - mean) * counted[:, None]
        covariance = centred.transpose(1, 2) @ centred / counted.sum()
        turn = _mean_rotation(rotary, positions, self.future, queries.shape[-1])
        return mean[:, 0] @ turn, turn.T @ covariance @ turn


@functools.lru_cache(maxsize=4)  # the layers of a request share it: they are shown the same tensor of positions
def _mean_rotation(rotary: Rotary, positions: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """`[D, D]`: a row vector times it is its mean over the `count` positions behind the last of `positions`."""
    future = positions.max() + torch.arange(1, count + 1, device=positions.device)  # never read: that would wait
    unit = torch.eye(dim, device=positions.device)[:, None].expand(-1, count, -1)
    return rotary.rotate(unit, future).mean(1)


@hookimpl
def vlcache_scorers() -> Iterator[ScorerPlugin]:
    yield ScorerPlugin("expected_attention", ExpectedAttention, PAPER, "what Gaussian future queries would look at")


@hookimpl
def vlcache_recipes() -> Iterator[RecipePlugin]:
    yield RecipePlugin(
        "expected_attention",
        scorer="expected_attention",
        allocator="model",
        paper=PAPER,
        summary="expected attention of future queries times value length",
    )
