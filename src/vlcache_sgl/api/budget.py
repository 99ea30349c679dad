"""Exact integer budgets: water filling between bounds, largest remainder.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def water_fill(weights: torch.Tensor, *, total: int, lo: int, hi: int) -> torch.Tensor:
    """Integers ``clip(scale * weights, lo, hi)`` whose sum is exactly `total`.

    Args:
        weights: `[L]`, any float dtype, finite and >= 0; all zero counts as all equal.  Layers of weight zero beside
            others get `lo`, and what the others cannot take is spread over them evenly.
        total: tokens summed over layers; moved into ``[L * lo, L * hi]`` if outside.
        lo, hi: bounds of every entry, ``0 <= lo <= hi``.

    Returns:
        `[L]` int64 on the CPU.  Fractions are rounded by largest remainder, ties to the lower layer.

    Raises:
        ValueError: for NaN, infinite or negative weights, or ``lo > hi``.
    """
    # A few dozen numbers: plain Python is faster than a tensor operation each, and one copy is the only wait.
    values = weights.detach().to("cpu", torch.float64).tolist()
    if any(not math.isfinite(value) or value < 0 for value in values):
        raise ValueError(f"layer weights must be finite and not negative, got {values}")
    if not 0 <= lo <= hi:
        raise ValueError(f"bounds must satisfy 0 <= lo <= hi, got lo={lo}, hi={hi}")
    total = min(max(total, len(values) * lo), len(values) * hi)
    real = _clip_to_sum(values, total, lo, hi)
    return torch.tensor(_largest_remainder(real, total, hi), dtype=torch.int64)


def _clip_to_sum(weights: Sequence[float], total: int, lo: int, hi: int) -> list[float]:
    """``clip(scale * weight, lo, hi)`` with the one scale whose sum is `total`.

    The sum is piecewise linear in the scale; its kinks are where a layer leaves `lo` or reaches `hi`.  The segment
    that contains `total` is found by bisection over the sorted kinks, the scale inside it by interpolation.
    """
    largest = max(weights, default=0.0)
    # A weight below 1e-9 of the largest is zero: it could not get a token before the largest had a billion.
    share = [weight / largest if weight > 1e-9 * largest else 0.0 for weight in weights] if largest > 0 else []
    if not any(share):
        share = [1.0] * len(weights)

    def at(scale: float) -> list[float]:
        return [min(max(scale * weight, lo), hi) for weight in share]

    kinks = sorted({0.0, *(bound / weight for weight in share if weight > 0 for bound in (lo, hi))})
    below, above = 0, len(kinks) - 1
    while above - below > 1:
        middle = (below + above) // 2
        if math.fsum(at(kinks[middle])) <= total:
            below = middle
        else:
            above = middle
    left, right = at(kinks[below]), at(kinks[above])
    gap = math.fsum(right) - math.fsum(left)
    part = min(max((total - math.fsum(left)) / gap, 0.0), 1.0) if gap > 0 else 1.0
    real = [a + part * (b - a) for a, b in zip(left, right, strict=True)]
    # Everything that has weight is at `hi`: the rest goes to the layers without weight, in equal parts.
    idle = [layer for layer, weight in enumerate(share) if weight == 0]
    rest = total - math.fsum(real)
    for layer in idle:
        real[layer] = min(max(real[layer] + rest / len(idle), lo), hi)
    return real


def _largest_remainder(real: Sequence[float], total: int, hi: int) -> list[int]:
    """Round `real` to integers of the given sum, none above `hi`."""
    # A value a rounding error below a whole number is that number.
    tokens = [math.floor(value + 1e-9) for value in real]
    missing = total - sum(tokens)
    by_remainder = sorted(range(len(real)), key=lambda layer: (tokens[layer] - real[layer], layer))
    for layer in [layer for layer in by_remainder if tokens[layer] < hi][: max(0, missing)]:
        tokens[layer] += 1
    assert sum(tokens) == total, (real, tokens, total)
    return tokens
