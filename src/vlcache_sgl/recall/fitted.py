"""A sketch of keys in coordinates of the model: few bits where a key matters little to the model's queries.

Keys and queries of a trained head lie in few common directions.  A *basis* has coordinates `y = k E` of unit variance
such that `q . k` is the sum of `(q F)_i y_i`, the coordinates with the largest share of the logits' variance first.
The first ones are kept with 4 bits, the next with 2, the others are left out:

    q . k  is estimated by  sum over i of (q F)_i level(code_i)

The basis is a constant of the model: it is fitted once, to moments of tokens that are the same for everybody, and a
code depends on its own key alone.  Stored keys are rotated to their positions; so that the basis fits all of them, the
moments are averaged over offsets of the position, which needs no further forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlcache_sgl.api import Rotary

OFFSETS, REACH = 64, 4096
"""Offsets of the position over which moments are averaged, and the largest, in tokens."""
RIDGE = 1e-4
"""Added to the queries' moment, in parts of its mean diagonal: directions that no query had still count a little."""
TINY = 1e-12
"""A head that is never used has no moments."""
LEVELS_4 = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326)
LEVELS_2 = (0.4528, 1.5104)
"""Positive levels to which a Gaussian of unit variance is quantised with the least squared error (Max 1960)."""


class Moments(NamedTuple):
    """Of one layer's states of a text, as stored (post-RoPE)."""

    keys: torch.Tensor
    """`[K, D, D]` float32, mean of `k k^T`."""
    queries: torch.Tensor
    """`[K, D, D]` float32, mean of `q q^T` over the query heads of the KV head."""


class Basis(NamedTuple):
    """Coordinates of one layer, the most important first."""

    keys: torch.Tensor
    """`[K, D, m]` float32, E: `k @ keys` are a key's coordinates."""
    queries: torch.Tensor
    """`[K, D, m]` float32, F: `q @ queries` are their weights in a logit."""


def moments(keys: torch.Tensor, queries: torch.Tensor) -> Moments:
    """Of a text's keys `[n, K, D]` and queries `[m, H, D]`."""
    count, kv_heads, dim = keys.shape
    by_head = queries.float().view(len(queries), kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    k = keys.float().transpose(0, 1)
    return Moments(k.mT @ k / count, by_head.mT @ by_head / by_head.shape[1])


def spread(seen: Moments, rotary: Rotary, reach: int = REACH) -> Moments:
    """The moments of the same states at all positions.

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


def fit(seen: Moments, count: int | None = None) -> Basis:
    """The basis whose first coordinates hold most of the logits' variance.

    Args:
        seen: what it is fitted to.
        count: of coordinates; None: as many as `FittedSketch` keeps.
    """
    keys, queries = (part.double() for part in seen)
    size = queries.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=TINY)[:, None, None]
    eye = torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device)
    values, vectors = torch.linalg.eigh(queries + RIDGE * size * eye)
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    back = (vectors / values.sqrt()[:, None]) @ vectors.mT
    variance, turn = torch.linalg.eigh(root @ keys @ root)
    used = sum(coordinates(keys.shape[-1])) if count is None else count
    variance, turn = variance.flip(1)[:, :used], turn.flip(2)[..., :used]
    deviation = variance.clamp(min=TINY**2).sqrt()[:, None]
    return Basis((root @ turn / deviation).float(), (back @ turn * deviation).float())


def coordinates(head_dim: int) -> tuple[int, int]:
    """How many are kept with 4 bits and with 2: whole bytes, at most 3.9 % of keys and values in bfloat16."""
    return max(2, head_dim // 16 * 2), max(4, head_dim * 3 // 32 * 4)


class FittedSketch:
    """Codes of one layer's keys, and what a query is worth to them; used as `KeySketch` is.

    Args:
        basis: of the layer, where the codes are to be.

    Attributes:
        bytes: of one token's code per KV head: 10 for D = 64, 20 for D = 128.
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self._four, self._two = coordinates(basis.keys.shape[1])
        self.bytes = self._four // 2 + self._two // 4
        device = basis.keys.device
        self._levels = [_both(half, device) for half in (LEVELS_4, LEVELS_2)]
        self._edges = [(levels[1:] + levels[:-1]) / 2 for levels in self._levels]

    def encode(self, keys: torch.Tensor) -> torch.Tensor:
        """Codes of keys.

        Args:
            keys: `[n, K, D]`, as stored (post-RoPE).

        Returns:
            `[n, K, bytes]` uint8: first the 4-bit coordinates, two to a byte, then the 2-bit ones, four to a byte; the
            first in the low bits.
        """
        found = torch.einsum("nkd,kdm->nkm", keys.float(), self.basis.keys)
        parts = found.split([self._four, self._two], dim=-1)
        wide, narrow = (
            torch.bucketize(part.contiguous(), edges).to(torch.uint8)
            for part, edges in zip(parts, self._edges, strict=True)
        )
        return torch.cat([_packed(wide, 4), _packed(narrow, 2)], dim=-1)

    def scores(self, queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Estimated logits.

        Args:
            queries: `[H, D]`, post-RoPE; H is a multiple of K, neighbouring query heads share a KV head.
            codes: `[n, K, bytes]`.

        Returns:
            `[H, n]` float32, estimates of `q . k` without the scale of attention; higher = more attention.
        """
        wide, narrow = codes.split([self._four // 2, self._two // 4], dim=-1)
        near = torch.cat([self._levels[0][_unpacked(wide, 4)], self._levels[1][_unpacked(narrow, 2)]], dim=-1)
        weights = queries.float().view(codes.shape[1], -1, queries.shape[-1]) @ self.basis.queries
        return torch.einsum("kgm,nkm->kgn", weights, near).flatten(0, 1)


def _both(half: tuple[float, ...], device: torch.device) -> torch.Tensor:
    positive = torch.tensor(half, device=device)
    return torch.cat([-positive.flip(0), positive])


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers below `2 ** bits`, `8 / bits` to a byte."""
    places = torch.arange(0, 8, bits, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // bits)).to(torch.int64) << places).sum(-1).to(torch.uint8)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    places = torch.arange(0, 8, bits, device=packed.device)
    return ((packed[..., None].to(torch.int64) >> places) & (2**bits - 1)).flatten(-2)
