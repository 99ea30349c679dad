"""Two conditions on the same questions: is one worse, by how much, and on which questions?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vlcache_sgl.evaluation.run import EvalError, Record
from vlcache_sgl.evaluation.stats import bootstrap

HALF = 0.5
"""A question has flipped when its score crosses this."""


@dataclass(frozen=True)
class Flip:
    """A question that one condition gets right and the other wrong."""

    sample: str
    index: int
    """Number of the question about the sample's images, from 1."""
    before: str
    after: str
    lost: bool
    """Right before, wrong after."""


@dataclass(frozen=True)
class Comparison:
    """B against A on the questions that both have answered."""

    questions: int
    samples: int
    score_a: float
    score_b: float
    difference: float
    """Mean of B's score minus A's."""
    interval: tuple[float, float]
    """95 %, by a paired bootstrap over samples."""
    same_answers: float
    """Share of questions with the same answer text."""
    flips: tuple[Flip, ...]

    @property
    def verdict(self) -> str:
        """In words."""
        low, high = self.interval
        if low == high == 0:
            return "no question scores differently"
        if low <= 0 <= high:
            return "no difference beyond chance"
        return "B is worse" if high < 0 else "B is better"


def select(result: Mapping[str, Any], condition: str) -> list[Record]:
    """The records of one condition.

    Raises:
        EvalError: when there are none, with the names that there are.
    """
    found = [record for record in result["records"] if record["condition"] == condition]
    if not found:
        names = dict.fromkeys(record["condition"] for record in result["records"])
        raise EvalError(f"no condition {condition!r}; choose one of: {', '.join(names)}")
    return found


def compare(ours: Sequence[Record], theirs: Sequence[Record]) -> Comparison:
    """How B differs from A on their common samples.

    Raises:
        EvalError: when they have none, or asked other questions.
    """
    pairs = _pairs(ours, theirs)
    flips = [
        Flip(sample, index, a["answer"], b["answer"], lost=a["score"] >= HALF)
        for sample, index, a, b in pairs
        if (a["score"] >= HALF) != (b["score"] >= HALF)
    ]
    return Comparison(
        questions=len(pairs),
        samples=len({sample for sample, *_ in pairs}),
        score_a=fmean(a["score"] for _, _, a, _ in pairs),
        score_b=fmean(b["score"] for _, _, _, b in pairs),
        difference=fmean(b["score"] - a["score"] for _, _, a, b in pairs),
        interval=bootstrap(differences(ours, theirs)),
        same_answers=fmean(a["answer"] == b["answer"] for _, _, a, b in pairs),
        flips=tuple(sorted(flips, key=lambda flip: not flip.lost)),
    )


def differences(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, list[float]]:
    """B's score minus A's, by sample; raises as `compare`."""
    found: dict[str, list[float]] = {}
    for sample, _, a, b in _pairs(ours, theirs):
        found.setdefault(sample, []).append(b["score"] - a["score"])
    return found


Pair = tuple[str, int, Mapping[str, Any], Mapping[str, Any]]
"""Sample, number of the question from 1, A's answer, B's."""


def _pairs(ours: Sequence[Record], theirs: Sequence[Record]) -> list[Pair]:
    by_sample = {record["sample"]: record["questions"] for record in theirs}
    pairs: list[Pair] = []
    for record in ours:
        other = by_sample.get(record["sample"])
        if other is None:
            continue
        if len(other) != len(record["questions"]):
            raise EvalError(f"{record['sample']}: {len(record['questions'])} questions in A, {len(other)} in B")
        both = enumerate(zip(record["questions"], other, strict=True), 1)
        pairs += [(record["sample"], number, a, b) for number, (a, b) in both]
    if not pairs:
        raise EvalError("A and B have no sample in common")
    return pairs
