"""The smallest budget that keeps one's own data within a stated loss of right answers.  Pure.

Budgets are tried from the largest down, and the first that is not shown to stay within the loss ends the search: in a
fixed order each test may use the whole 5 % of error, so trying many budgets does not make a lucky one likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlcache_sgl.evaluation.compare import differences
from vlcache_sgl.evaluation.run import Record
from vlcache_sgl.evaluation.stats import Groups, Z, bootstrap, mean, wilson

Kind = Literal["within", "lost", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """What one budget loses."""

    samples: int
    questions: int
    loss: float
    """Mean score of the full cache minus that of the budget, on the same questions."""
    interval: tuple[float, float]
    """95 %."""
    kind: Kind
    """Whether the interval lies below the allowed loss, above it, or on both sides."""


def judge(full: Sequence[Record], compressed: Sequence[Record], allowed: float) -> Verdict:
    """Whether a budget loses at most `allowed` of the score, in [0, 1].

    Raises:
        EvalError: when the two have no sample in common.
    """
    lost = {sample: [-gain for gain in gains] for sample, gains in differences(full, compressed).items()}
    low, high = loss_interval(lost)
    kind: Kind = "within" if high <= allowed else "lost" if low > allowed else "unclear"
    return Verdict(len(lost), sum(map(len, lost.values())), mean(lost), (low, high), kind)


def loss_interval(lost: Groups) -> tuple[float, float]:
    """95 % interval of a mean loss, samples with losses in [-1, 1].

    The wider of two on each side.  A bootstrap over samples knows how answers flip both ways, and nothing of flips that
    have not been seen; Wilson's, on the net loss, knows that no flip in n samples leaves room for about 4 / n.
    """
    low, high = bootstrap(lost)
    net, samples = mean(lost), len(lost)
    if net >= 0:
        below, above = wilson(net * samples, samples)
    else:
        above, below = (-bound for bound in wilson(-net * samples, samples))
        above = max(above, wilson(0, samples)[1])
    return min(low, below), max(high, above)


def least_samples(allowed: float) -> int:
    """How many samples it takes to show a loss of at most `allowed` when not one answer changes.

    >>> least_samples(0.02), least_samples(0.1)
    (189, 35)
    """
    return math.ceil(Z * Z * (1 - allowed) / allowed)


def least_loss(samples: int) -> float:
    """The smallest loss that so many samples can show.

    >>> round(least_loss(189), 4)
    0.0199
    """
    return wilson(0, samples)[1]
