"""A sketch of evicted keys: enough to estimate how much attention a later question would have paid to them.

Keys of one KV head lie close to a subspace of few dimensions.  A sketch keeps the mean key, an orthonormal basis of
that subspace (nearly the leading eigenvectors of the keys' covariance) and each key's coordinates in it, in 4 bits.
Clusters of keys (count, mean, spread) were tried first: attention that looks for one token is lost in a cluster's mean,
and a Gaussian spread overestimates it (`benchmarks/LOG.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHARE = 0.03
"""Most bytes of a sketch, as a share of the keys and values of all tokens that it stands for."""
MOST_DIMS = 32
ITERATIONS = 2
"""Of the search for a sketch's dimensions.  With two it leaves 6.3 % of the bundled model's variance outside ten of 32
dimensions; the eigenvectors leave 6.0 %."""
_LEVELS = 7
"""Coordinates are whole numbers in [-7, 7]."""


@dataclass(frozen=True)
class KeySketch:
    """Evicted keys of one layer, `K` KV heads with `e` keys each, in `r` dimensions."""

    mean: torch.Tensor
    """`[K, D]`."""
    basis: torch.Tensor
    """`[K, r, D]`, orthonormal rows, times the size of one level of each coordinate."""
    codes: torch.Tensor
    """`[K, e, r / 2]` uint8, two coordinates each, offset by 8."""

    @classmethod
    def of(cls, keys: torch.Tensor, tokens: int) -> KeySketch | None:
        """Sketch `keys` `[K, e, D]`, the evicted ones of `tokens` tokens; None when there is nothing worth it.

        The rank is the largest even one with which the sketch stays within `SHARE` of what `tokens` tokens hold.
        """
        heads, evicted, dim = keys.shape
        if not heads or not evicted:
            return None
        size = keys.element_size()
        room = SHARE * tokens * 2 * dim * size - dim * size
        rank = min(MOST_DIMS, dim, evicted, int(room // (evicted / 2 + dim * size))) // 2 * 2
        if rank < 2:
            return None
        full = keys.float()
        mean = full.mean(1, keepdim=True)
        centred = full - mean
        basis = leading_directions(centred.transpose(1, 2) @ centred, rank)
        coordinates = centred @ basis.transpose(1, 2)
        step = (coordinates.abs().amax(1, keepdim=True) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        levels = ((coordinates / step).round().clamp(-_LEVELS, _LEVELS) + 8).to(torch.uint8)
        return cls(
            mean=mean[:, 0].to(keys.dtype),
            basis=(basis * step.transpose(1, 2)).to(keys.dtype),
            codes=levels[..., 0::2] | (levels[..., 1::2] << 4),
        )

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return sum(part.numel() * part.element_size() for part in (self.mean, self.basis, self.codes))

    def log_mass(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """Estimated logarithm of the sum of exponentials over the evicted keys.

        Args:
            queries: `[R, H, D]`, `H` a multiple of `K`; rotated as the keys were.
            scale: factor of the logits.

        Returns:
            `[R, H]` float32.
        """
        rows, num_heads, dim = queries.shape
        heads = self.mean.shape[0]
        q = queries.float().view(rows, heads, num_heads // heads, dim).permute(1, 2, 0, 3).flatten(1, 2) * scale
        low, high = self.codes & 15, self.codes >> 4
        levels = torch.stack([low, high], -1).flatten(-2).float() - 8  # [K, e, r]
        logits = (q @ self.basis.float().transpose(1, 2)) @ levels.transpose(1, 2)
        found = logits.logsumexp(-1) + (q @ self.mean.float()[:, :, None])[..., 0]
        return found.view(heads, num_heads // heads, rows).permute(2, 0, 1).reshape(rows, num_heads)


def leading_directions(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal rows `[K, rank, D]` that hold nearly as much of `gram` `[K, D, D]` as its leading eigenvectors.

    Subspace iteration from a fixed start: an eigendecomposition takes several times as long for a few percent more, and
    on a GPU the host waits for it.
    """
    start = torch.randn(gram.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(gram)
    found = gram @ start
    for _ in range(ITERATIONS):
        found = gram @ torch.linalg.qr(found)[0]
    basis: torch.Tensor = torch.linalg.qr(found)[0].transpose(1, 2)
    return basis


def missing_share(kept: torch.Tensor, evicted: torch.Tensor) -> torch.Tensor:
    """Share of the attention that would have gone to evicted keys, in [0, 1], from two log masses of any shape."""
    return torch.sigmoid(evicted - kept)


def sketch_limit(tokens: int, heads: int, dim: int, element_bytes: int) -> int:
    """Most bytes that sketches of one layer may take for a prefix of `tokens` tokens."""
    return math.floor(SHARE * tokens * heads * 2 * dim * element_bytes)
