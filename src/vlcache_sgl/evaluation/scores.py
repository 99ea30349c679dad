"""How right an answer is: published metrics, each in [0, 1], 1 = right, the best over all accepted answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

ANLS_THRESHOLD = 0.5
"""Answers that are less similar than this count nothing (arXiv 1905.13648)."""
RELAXED_TOLERANCE = 0.05
"""Relative error that a number may have (ChartQA, arXiv 2203.10244)."""


def exact(answer: str, expected: str) -> float:
    """1 if both are the same but for letter case and white space.

    >>> exact(" A  b", "a B"), exact("a", "b")
    (1.0, 0.0)
    """
    return float(_plain(answer) == _plain(expected))


def anls(answer: str, expected: str) -> float:
    """Normalised Levenshtein similarity, 0 below ANLS_THRESHOLD: the measure of DocVQA.

    >>> anls("kitten", "kitten"), round(anls("kitten", "sitten"), 3), anls("kitten", "dog")
    (1.0, 0.833, 0.0)
    """
    ours, theirs = _plain(answer), _plain(expected)
    longest = max(len(ours), len(theirs))
    similarity = 1.0 - levenshtein(ours, theirs) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed(answer: str, expected: str) -> float:
    """Relaxed accuracy of ChartQA: numbers within RELAXED_TOLERANCE, everything else as `exact`.

    >>> relaxed("104", "100"), relaxed("106", "100"), relaxed("12 %", "0.12"), relaxed("Red", "red")
    (1.0, 0.0, 1.0, 1.0)
    """
    ours, theirs = _number(answer), _number(expected)
    if ours is None or theirs is None:
        return exact(answer, expected)
    return float(abs(ours - theirs) <= RELAXED_TOLERANCE * abs(theirs))


def begins(answer: str, expected: str) -> float:
    """1 if the answer begins with what is expected, for outputs that go on after it.

    >>> begins("7F3A and more", "7f3a"), begins("it is 7F3A", "7F3A")
    (1.0, 0.0)
    """
    return float(_plain(answer).startswith(_plain(expected)))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "begins": begins,
    "anls": anls,
    "relaxed": relaxed,
}


def score(metric: str, answer: str, expected: Sequence[str]) -> float:
    """The best score over the accepted answers.

    Raises:
        KeyError: for an unknown metric.
    """
    return max((METRICS[metric](answer, one) for one in expected), default=0.0)


def levenshtein(a: str, b: str) -> int:
    """Least number of inserted, deleted and replaced characters that turn `a` into `b`.

    >>> levenshtein("kitten", "sitting"), levenshtein("", "abc")
    (3, 3)
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def agreement(tokens: Sequence[str], reference: Sequence[str]) -> float:
    """Share of `reference` that `tokens` follows before the two first part.

    >>> agreement("abcx", "abcd"), agreement("", "")
    (0.75, 1.0)
    """
    same = next((i for i, (x, y) in enumerate(zip(tokens, reference, strict=False)) if x != y), None)
    if same is None:
        same = min(len(tokens), len(reference))
    return same / len(reference) if reference else float(not tokens)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(text: str) -> float | None:
    plain = text.strip().replace(",", "").lstrip("$€£")
    share = plain.endswith("%")
    try:
        value = float(plain.rstrip("% "))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if share else value
