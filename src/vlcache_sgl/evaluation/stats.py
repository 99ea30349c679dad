"""Intervals of 95 %: how much of a difference could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Z = 1.96
RESAMPLES = 4000
SEED = 20_241_023
"""The same results give the same intervals."""

Groups = Mapping[str, Sequence[float]]
"""Scores by sample: questions about one image are not independent, so images are drawn, not questions."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """Interval of a share of which `right` of `count` were seen.

    >>> [round(x, 3) for x in wilson(19, 20)]
    [0.764, 0.991]
    """
    share, room = right / count, Z * Z / count
    spread = math.sqrt(room * (share * (1 - share) + room / 4))
    low, high = ((share + room / 2 + sign * spread) / (1 + room) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def mean(groups: Groups) -> float:
    """Mean over all questions, in the unit of the scores."""
    return float(np.mean(np.concatenate([np.asarray(scores, dtype=float) for scores in groups.values()])))


def interval(groups: Groups) -> tuple[float, float]:
    """Interval of `mean` for scores in [0, 1].

    Wilson's where samples have one question that is right or wrong, a bootstrap over samples otherwise.  Where all
    samples score alike a bootstrap sees no spread: Wilson's over the number of samples then, which is on the safe side.
    """
    values = np.concatenate([np.asarray(scores, dtype=float) for scores in groups.values()])
    by_sample = np.array([np.mean(scores) for scores in groups.values()])
    one_each = len(values) == len(groups) and bool(np.isin(values, (0.0, 1.0)).all())
    if one_each or bool((by_sample == by_sample[0]).all()):
        return wilson(float(values.mean()) * len(groups), len(groups))
    return bootstrap(groups)


def bootstrap(groups: Groups) -> tuple[float, float]:
    """Percentile interval of `mean`, samples drawn with replacement."""
    sums = np.array([sum(scores) for scores in groups.values()])
    counts = np.array([len(scores) for scores in groups.values()])
    drawn = np.random.default_rng(SEED).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
