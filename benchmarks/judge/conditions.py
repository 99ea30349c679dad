"""What is asked of every case: a medium, a policy and a budget, and whose question it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import describe

from .decisions import Medium

Turn = Literal["first", "later"]
"""The question that the text was compressed for, or another one that finds what was kept for the first."""
FULL = "full"
"""Stands for a policy: nothing is evicted."""
MEDIA: tuple[Medium, ...] = ("text", "image")
TURNS: tuple[Turn, ...] = ("first", "later")
BUDGETS = (0.7, 0.5, 0.3, 0.2, 0.1)
VARIANTS = (
    "vlcache:heads=split",
    "vlcache:allocator=global",
    "vlcache:allocator=global,heads=split",
    "vlcache:paper",
    "kvzip:heads=split",
    "snapkv:window=8",
    *(f"{name}:allocator=uniform" for name in ("snapkv", "keydiff", "h2o", "expected_attention", "streaming")),
)
"""Judged beside the recipes: the flagship with sets per KV head and without the weights, the letter of its paper,
and some methods with equal layers, as they were published."""
CONTENDERS = (
    "vlcache",
    "vlcache:heads=split",
    "vlcache:allocator=global",
    "vlcache:paper",
    "kvzip:heads=split",
    "chunkkv",
    "snapkv:window=8",
    "keydiff",
    "keydiff:allocator=uniform",
)
"""Judged on every case; the others on the first seeds only."""
SHARED = ("vlcache", "vlcache:heads=split", "kvzip:heads=split", "snapkv", "keydiff")
"""Policies whose copies are asked a later question: a question costs five times the rows of an answer."""


@dataclass(frozen=True)
class Condition:
    """One way to keep a text for one question."""

    medium: Medium
    turn: Turn
    policy: str
    """As for `--kv-policy`, or FULL."""
    budget: float

    @property
    def name(self) -> str:
        """Unique: ``text first snapkv@0.5``."""
        return f"{self.medium} {self.turn} {self.policy}@{self.budget:g}"


def parse_condition(name: str) -> Condition:
    """The condition of that name.

    >>> parse_condition("image later scorer=snapkv,allocator=uniform@0.1").policy
    'scorer=snapkv,allocator=uniform'
    """
    medium, turn, rest = name.split(" ", 2)
    policy, _, budget = rest.rpartition("@")
    assert medium in MEDIA
    assert turn in TURNS
    return Condition(medium, turn, policy, float(budget))


def recipes() -> list[str]:
    """All built-in recipes."""
    own = (item for item in describe(registry()) if item.kind == "policy" and item.provider.split()[0] == "vlcache-sgl")
    return [item.name for item in own]


def conditions(
    policies: Sequence[str], budgets: Sequence[float], media: Sequence[Medium], shared: Sequence[str]
) -> list[Condition]:
    """Every policy at every budget; copies of those in `shared` are asked a later question too."""
    turns: dict[Turn, Sequence[str]] = {"first": policies, "later": [policy for policy in policies if policy in shared]}
    found = []
    for medium in media:
        for turn, names in turns.items():
            found.append(Condition(medium, turn, FULL, 1.0))
            found += [Condition(medium, turn, policy, budget) for policy in names for budget in budgets]
    return found
