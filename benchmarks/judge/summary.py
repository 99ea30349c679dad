"""From verdicts to the committed result: shares with intervals, per task and over all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlcache_sgl.evaluation.stats import bootstrap, interval, mean

from .cases import CaseId
from .conditions import FULL, Condition
from .verdicts import Verdict

ALL = "all"
"""Stands for a task: all of them together."""
Row = dict[str, Any]
"""A condition on a task: `task`, `condition`, `count`, `score` with `interval`, `log_probability` with
`log_interval` (nats, of the whole answer), `kept`; `full_score`, that of the full cache on the same cases, because not
every policy is judged on all of them; and `answers`, one digit per case, 1 = right."""


def summarise(found: Mapping[CaseId, Mapping[str, Verdict | None]], conditions: Sequence[Condition]) -> list[Row]:
    """One row per task and condition that was judged at all."""
    cases = sorted(found)
    tasks = {f"{case.task}:{case.tokens}": 0 for case in cases}
    rows = []
    for task in (ALL, *tasks):
        mine = [case for case in cases if task in (ALL, f"{case.task}:{case.tokens}")]
        for condition in conditions:
            given = {case.name: found[case].get(condition.name) for case in mine}
            verdicts = {name: verdict for name, verdict in given.items() if verdict is not None}
            if verdicts:
                full = Condition(condition.medium, condition.turn, FULL, 1.0).name
                whole = {case.name: found[case][full] for case in mine if case.name in verdicts}
                rows.append(_row(task, condition, verdicts, whole))
    return rows


def _row(task: str, condition: Condition, verdicts: Mapping[str, Verdict], whole: Mapping[str, Verdict | None]) -> Row:
    right = {name: [float(verdict.right)] for name, verdict in verdicts.items()}
    gained = {name: [verdict.log_probability] for name, verdict in verdicts.items()}
    return {
        "task": task,
        "condition": condition.name,
        "count": len(verdicts),
        "score": round(mean(right), 4),
        "full_score": round(sum(verdict is not None and verdict.right for verdict in whole.values()) / len(whole), 4),
        "interval": [round(end, 4) for end in interval(right)],
        "log_probability": round(mean(gained), 3),
        "log_interval": [round(end, 3) for end in bootstrap(gained)],
        "kept": round(sum(verdict.kept for verdict in verdicts.values()) / len(verdicts), 4),
        "answers": "".join(str(int(verdict.right)) for verdict in verdicts.values()),
    }
