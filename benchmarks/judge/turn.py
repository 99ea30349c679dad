"""Directions of a model in which signs say most: what a sketch's keys and queries are turned by before the rotation.

The error of a sign sketch grows with the length of the key times that of the query.  Neither need be what the model
made it: `q . k` is also `(q F) . (k E)` for matrices with `E F^T = 1`.  The *balanced* turn gives keys and queries the
same second moment, diagonal, which makes the mean product of the lengths the least possible.  Directions in which keys
are long and queries short, such as the mean key, shrink then; none is lost.

A turn is a constant of the model: it is fitted once, to states of tokens that are the same for everybody, and a code
depends on its own key alone.  Servers do not turn: `TurnedSketch` is studied here.  Stored keys are rotated to their
positions; for a turn that fits other positions, moments are averaged over offsets, which needs no further forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlcache_sgl.api import Rotary
from vlcache_sgl.recall.sketch import KeySketch

OFFSETS = 64
"""Of the position, over which moments are averaged."""
REACH = 1024
"""The largest offset, in tokens.  Larger ones serve longer prompts better and shorter ones worse."""
RIDGE = 1e-2
"""Added to the queries' moment, in parts of its mean diagonal: directions that no query had still count a little."""
TINY = 1e-12
"""A head that is never used has no moments."""
FLOOR = 1e-6
"""Least variance of a direction, in parts of the largest."""


class Moments(NamedTuple):
    """Of one layer's states of a text, as stored (post-RoPE)."""

    keys: torch.Tensor
    """`[K, D, D]` float32, mean of `k k^T`."""
    queries: torch.Tensor
    """`[K, D, D]` float32, mean of `q q^T` over the query heads of the KV head."""


class Basis(NamedTuple):
    """Coordinates of one layer in which keys have unit variance, those with most of the logits' variance first."""

    keys: torch.Tensor
    """`[K, D, m]` float32, E: `k @ keys` are a key's coordinates."""
    queries: torch.Tensor
    """`[K, D, m]` float32, F: `q @ queries` are their weights in a logit."""
    variance: torch.Tensor
    """`[K, m]` float32, of the weights: each coordinate's part of the logits' variance."""


class Turn(NamedTuple):
    """Of one layer; `keys @ queries^T` is the identity."""

    keys: torch.Tensor
    """`[K, D, D]` float32; a key turned is `k @ keys`."""
    queries: torch.Tensor
    """`[K, D, D]` float32; a query turned is `q @ queries`."""


def moments(keys: torch.Tensor, queries: torch.Tensor) -> Moments:
    """Of a text's keys `[n, K, D]` and queries `[m, H, D]`."""
    count, kv_heads, dim = keys.shape
    by_head = queries.float().view(len(queries), kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    k = keys.float().transpose(0, 1)
    return Moments(k.mT @ k / count, by_head.mT @ by_head / by_head.shape[1])


def spread(seen: Moments, rotary: Rotary, reach: int = REACH) -> Moments:
    """The moments of the same states at other positions, too.

    Args:
        seen: of states at the positions of the text.
        rotary: the model's.
        reach: the largest offset, in tokens.
    """
    dim = seen.keys.shape[-1]
    offsets = torch.linspace(0, reach, OFFSETS, device=seen.keys.device).round().to(torch.int64)
    unit = torch.eye(dim, device=seen.keys.device)[:, None].expand(dim, OFFSETS, dim)
    turns = rotary.rotate(unit, offsets).permute(1, 2, 0)  # [offsets, D, D]

    def averaged(moment: torch.Tensor) -> torch.Tensor:
        return torch.stack([(turns @ one @ turns.mT).mean(0) for one in moment])

    return Moments(averaged(seen.keys), averaged(seen.queries))


def basis(seen: Moments, ridge: float = RIDGE) -> Basis:
    """Principal coordinates of the logits.

    Args:
        seen: what it is fitted to.
        ridge: see RIDGE.
    """
    keys, queries = (part.double() for part in seen)
    size = queries.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=TINY)[:, None, None]
    eye = torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device)
    values, vectors = torch.linalg.eigh(queries + ridge * size * eye)
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    back = (vectors / values.sqrt()[:, None]) @ vectors.mT
    variance, turned = torch.linalg.eigh(root @ keys @ root)
    variance, turned = variance.flip(1), turned.flip(2)
    variance = torch.maximum(variance, FLOOR * variance[:, :1]).clamp(min=TINY**2)
    deviation = variance.sqrt()[:, None]
    return Basis((root @ turned / deviation).float(), (back @ turned * deviation).float(), variance.float())


def balanced(seen: Moments) -> Turn:
    """The turn after which keys and queries have the same second moment."""
    keys, queries, variance = basis(seen)
    part = variance.pow(0.25)[:, None]
    return Turn(keys * part, queries / part)


class TurnedSketch(KeySketch):
    """A sketch of turned keys, for turned queries.

    Args:
        turn: of one layer, `[K, D, D]` each.
    """

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn.keys.shape[-1], turn.keys.device)
        self._keys, self._queries = (part @ self.rotation for part in turn)
