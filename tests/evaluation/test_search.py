"""The smallest budget within a loss: what is shown, and what is too little to show anything."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

from vlcache_sgl.evaluation import search
from vlcache_sgl.evaluation.search import judge, least_loss, least_samples, loss_interval


def records(condition: str, *scores: float) -> list[dict[str, Any]]:
    """One question per sample."""
    return [
        {"sample": str(i), "task": "t", "condition": condition, "questions": [{"score": score, "answer": f"{score}"}]}
        for i, score in enumerate(scores)
    ]


def test_examples() -> None:
    assert doctest.testmod(search).failed == 0


@pytest.mark.parametrize(
    ("lost", "count", "allowed", "kind"),
    [
        (0, 300, 0.02, "within"),
        (0, 100, 0.02, "unclear"),  # nothing was lost, and three losses in a hundred may be chance not to see
        (2, 300, 0.02, "unclear"),
        (10, 300, 0.1, "within"),
        (60, 300, 0.1, "lost"),
        (1, 1, 0.02, "lost"),
    ],
)
def test_verdicts(lost: int, count: int, allowed: float, kind: str) -> None:
    full = records("full", *([1.0] * count))
    verdict = judge(full, records("p@0.1", *([0.0] * lost), *([1.0] * (count - lost))), allowed)
    assert verdict.kind == kind
    assert verdict.loss == pytest.approx(lost / count)
    assert (verdict.samples, verdict.questions) == (count, count)


def test_the_loss_is_against_the_full_cache_on_the_same_questions() -> None:
    """Half of the questions are wrong under both: they are not lost, and a wrong one that turns right is a gain."""
    full = records("full", *([1.0, 0.0] * 100))
    assert judge(full, records("p@0.1", *([1.0, 0.0] * 100)), 0.02).loss == 0.0
    assert judge(full, records("p@0.1", *([0.0, 1.0] * 100)), 0.02).loss == 0.0
    flipped = judge(full, records("p@0.1", *([0.0, 1.0] * 100)), 0.02)
    assert flipped.interval[1] > 0.1  # answers that flip both ways hide a loss
    assert flipped.kind == "unclear"


def test_samples_with_several_questions_count_once() -> None:
    one, many = ({str(i): [0.0] * questions for i in range(50)} for questions in (1, 20))
    assert loss_interval(one) == loss_interval(many)


def test_what_can_be_shown() -> None:
    for allowed in (0.01, 0.02, 0.05, 0.2):
        needed = least_samples(allowed)
        assert least_loss(needed) <= allowed < least_loss(needed - 1)


def test_the_interval_covers() -> None:
    """Of losses that are truly 3 points, between samples that flip both ways, nearly all lie below the upper bound."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        draws = rng.choice([1.0, -1.0, 0.0], size=120, p=[0.05, 0.02, 0.93])
        low, high = loss_interval({str(i): [draw] for i, draw in enumerate(draws)})
        covered += low <= 0.03 <= high
    assert covered >= 185
