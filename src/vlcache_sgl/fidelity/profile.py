"""Which layers do later questions read?  A search for the smallest share of each layer that answers them.

Pure: what a setting is worth is asked of a function, so that the search can be tested without a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Shares = tuple[float, ...]
"""Per layer the share of a picture's tokens that it keeps, in [0, 1]."""

LEAST = 0.1
"""Share that layers are lowered to before any is emptied: most of the saving for the least of the risk."""
LEVELS = (0.5, 0.25)
"""Shares that are tried, one after the other, for a layer which cannot be lowered to LEAST."""
GROUPS = 8
"""A model with more layers is tried in this many groups of neighbours first."""


def mean_share(shares: Sequence[float]) -> float:
    """Share of the picture's cells over all layers."""
    return sum(shares) / len(shares)


def blocks(layers: int, groups: int) -> list[tuple[int, ...]]:
    """`layers` numbers in at most `groups` runs of neighbours, as equal as possible.

    >>> blocks(5, 2), blocks(2, 8)
    ([(0, 1), (2, 3, 4)], [(0,), (1,)])
    """
    groups = min(groups, layers)
    bounds = [layers * i // groups for i in range(groups + 1)]
    return [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]


def most_trials(layers: int, groups: int = GROUPS) -> int:
    """How many settings `search` can ask for at most.

    Every group is emptied alone; lowering and emptying each halve a group that is needed down to single layers; and
    every layer may take all levels.
    """
    groups = min(groups, layers)
    return groups + 2 * (2 * layers - groups) + layers * len(LEVELS)


class ExhaustedError(Exception):
    """`measure` takes no further trials."""


@dataclass
class Found:
    """What a search has come to, kept current while it runs."""

    shares: Shares
    """The smallest setting that reaches the score."""
    alone: dict[int, float] = field(default_factory=dict)
    """Per layer the score without it (without its group) and with everything else whole; higher = dispensable."""
    finished: bool = False
    """False when trials ran out first: a smaller setting may exist."""


def search(layers: int, measure: Callable[[Shares], float], least: float, groups: int = GROUPS) -> Found:
    """Lower groups of layers to LEAST, or parts of groups, or single layers to one of LEVELS, as far as the score stays
    at `least` or above; then empty what can be emptied without any further loss.

    Args:
        measure: score of a setting, higher = better; raises ExhaustedError to end the search.  No setting is asked for
            twice.
        least: what a setting must reach.
    """
    known: dict[Shares, float] = {}

    def score(shares: Shares) -> float:
        if shares not in known:
            known[shares] = measure(shares)
        return known[shares]

    found = Found((1.0,) * layers)
    try:
        _search(found, score, least, blocks(layers, groups))
    except ExhaustedError:
        return found
    found.finished = True
    return found


def _search(found: Found, score: Callable[[Shares], float], least: float, groups: list[tuple[int, ...]]) -> None:
    whole = found.shares
    for group in groups:
        alone = score(_with(whole, group, 0.0))
        found.alone.update(dict.fromkeys(group, alone))
    # What costs least alone goes first; of equals the upper layers, which fewer layers could make use of.
    order = sorted(groups, key=lambda group: (found.alone[group[0]], group[0]), reverse=True)
    _lower(found, score, least, order, LEAST)
    falling = [layer for group in order for layer in reversed(group) if found.shares[layer] == 1.0]
    # Level by level, so that the first layer does not use up what may be lost.
    for level in LEVELS:
        falling = [layer for layer in falling if _accept(found, score, least, (layer,), level)]
    # A layer's last tokens save little, and no question can read it without them: only where nothing is lost by it.
    nearly = [tuple(layer for layer in group if found.shares[layer] == LEAST) for group in order]
    if any(nearly):
        _lower(found, score, score(found.shares), [group for group in nearly if group], 0.0)


def _lower(
    found: Found, score: Callable[[Shares], float], least: float, groups: Sequence[tuple[int, ...]], share: float
) -> None:
    """Lower as many of these layers as the score allows: whole groups first, then halves of those that failed."""
    pending = list(groups)
    while pending:
        failed = [group for group in pending if not _accept(found, score, least, group, share)]
        pending = [half for group in failed if len(group) > 1 for half in _halves(group)]


def _accept(found: Found, score: Callable[[Shares], float], least: float, group: Sequence[int], share: float) -> bool:
    """Whether these layers can be lowered to `share`; if so they are."""
    lowered = _with(found.shares, group, share)
    # Never everything: a picture that nobody keeps cannot be asked about.
    if not any(lowered) or score(lowered) < least:
        return False
    found.shares = lowered
    return True


def _with(shares: Shares, group: Sequence[int], share: float) -> Shares:
    return tuple(share if layer in group else old for layer, old in enumerate(shares))


def _halves(group: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The upper half first."""
    middle = len(group) // 2
    return [group[middle:], group[:middle]]
