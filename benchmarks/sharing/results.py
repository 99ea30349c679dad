"""What the experiments of `main.py` compare, and what is counted of their records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from vlcache_sgl.evaluation.stats import interval, mean

Record = Mapping[str, Any]
Result = Mapping[str, Any]

FULL, PRIVATE, UNGUARDED = "full cache", "off", "tiered, alone"
TARGETS = {
    "right answers lost": 0.02,
    "first token, over a hit": 1.5,
    "first token, off over this": 2.0,
    "bytes, picture and sketch": 0.25,
    "bytes, texts too": 0.25,
}
"""What a shared copy was to reach: at most, except for the third: at least."""
CHOICE, JUDGEMENT = range(61_000, 62_000), range(62_000, 63_000)
"""Seeds of the pictures a threshold is chosen on, and of those it is judged on."""
SCORERS = ("keydiff", "infinipot_v", "knorm", "lagkv", "random")
"""Scores with which a server makes copies: they need keys and values only."""
OBSERVERS = {
    "leverage": "rotation",
    "compactor": "rotation, queries",
    "expected_attention": "rotation, queries",
}
"""Scores of plugins that need more than that of the picture's own prefill, and what it is."""
ASKERS = ("describe", "asked")
"""Scores from questions that somebody made up."""
BOUND = "oracle"
"""The score from the very questions that are then asked."""
ROWS_READ = (1, 4, 8, 0)
"""Last rows of a question that a reading is made of; 0 = all."""
BUDGET = 0.2
BUDGETS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
LAYERS = {"all alike": False, "by profile": True}
"""Whether a copy's layers divide its budget by a profile."""
FRONTIER = (SCORERS[0], "leverage", "expected_attention", "asked", BOUND)
"""Copies of the experiment `copies`: all scorers at `BUDGET`, these at all budgets."""
DECODE = "decode"
"""Name of the reading from the first decode steps; others are named by their number of rows."""
Reading = Callable[[Mapping[str, float]], float]
"""What of a question's readings is compared with a threshold."""


def copy_name(scorer: str, budget: float, profile: bool) -> str:
    """A copy of the experiment `copies`."""
    return f"tiered, {scorer} {budget}{', profile' if profile else ''}"


WATCHED = {
    name: (f"policy{what}", *(copy_name(SCORERS[0], budget, bool(what)) for budget in BUDGETS))
    for name, what in (("no profile", ""), ("profile", ", profile"))
}
"""Copies whose guards weigh the layers alike; they differ in how much they lack."""
SERVED = {
    "no profile": ("policy, observe", "tiered, observe"),
    "profile": ("policy, profile, observe", "tiered, profile, observe"),
}
"""The same on a server: arms of the experiment `guard`."""


def dump(result: Result) -> str:
    """JSON with the innermost objects and lists on one line each."""
    text = json.dumps(result, indent=1)
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


# -- counting ---------------------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per arm and size of picture, ratios to the full cache and to nothing shared."""
    rows: list[dict[str, Any]] = []
    for side in dict.fromkeys(record["side"] for record in records):
        for arm in dict.fromkeys(record["arm"] for record in records):
            mine = [record for record in records if (record["arm"], record["side"]) == (arm, side)]
            rows.append({"arm": arm, "side": side, **_row(mine)})
    for row in rows:
        full, private = (
            next((other for other in rows if (other["arm"], other["side"]) == (arm, row["side"])), None)
            for arm in (FULL, PRIVATE)
        )
        if full is not None:
            row["ttft_ratio"] = round(row["ttft_ms"] / full["ttft_ms"], 3)
            row["bytes_ratio"] = round((row["bytes"] + row["sketch_bytes"]) / full["bytes"], 4)
            row["lost"] = round(full["later"] - row["later"], 4)
        if private is not None:
            row["ttft_gain"] = round(private["ttft_ms"] / row["ttft_ms"], 3)
    return rows


def _row(records: Sequence[Record]) -> dict[str, Any]:
    first = {str(r["seed"]): [float(q["right"]) for q in r["questions"][:1]] for r in records}
    later = {str(r["seed"]): [float(q["right"]) for q in r["questions"][1:8]] for r in records}
    times = [q["ttft_ms"] for r in records for q in r["questions"][1:8]]
    readings = [q["missing"] for r in records for q in r["questions"] if "missing" in q]
    return {
        "pictures": len(records),
        "first": round(mean(first), 4),
        "first_interval": [round(x, 4) for x in interval(first)],
        "later": round(mean(later), 4),
        "later_interval": [round(x, 4) for x in interval(later)],
        "ttft_first_ms": round(fmean(r["questions"][0]["ttft_ms"] for r in records), 1),
        "ttft_ms": round(fmean(times), 1),
        "ttft_median_ms": round(median(times), 1),
        "prefill_ms": round(fmean(q["prefill_ms"] for r in records for q in r["questions"][1:8]), 1),
        "bytes": round(fmean(r["cells_tree"] * r["bytes_per_cell"] for r in records)),
        "picture_kept": round(fmean(r["picture_kept"] for r in records), 4),
        "sketch_ratio": round(fmean(map(_sketch_share, records)), 4),
        "picture_ratio": round(fmean(r["picture_kept"] + _sketch_share(r) for r in records), 4),
        "sketch_bytes": round(fmean(r["sketch_bytes"] for r in records)),
        "recomputed": round(fmean(r["expansions"] for r in records), 3),
        "whole": round(fmean(r["pictures_whole"] for r in records), 3),
        "missing": round(fmean(readings), 4) if readings else None,
    }


def _sketch_share(record: Record) -> float:
    """Bytes of sketches, of those that the picture has uncompressed."""
    whole = record["side"] ** 2 * record["cells_per_token"] * record["bytes_per_cell"]
    return float(record["sketch_bytes"] / whole)


def reached(row: Mapping[str, Any]) -> dict[str, bool]:
    """Which targets an arm reaches."""
    values = (
        row["lost"] <= 0.02,
        row["ttft_ratio"] <= 1.5,
        row["ttft_gain"] >= 2.0,
        row["picture_ratio"] <= 0.25,
        row["bytes_ratio"] <= 0.25,
    )
    return dict(zip(TARGETS, values, strict=True))


def judged(result: Result, arms: Sequence[str], seeds: range) -> list[tuple[float, bool]]:
    """Readings, and whether the answer was another one than the full cache's."""
    full = {r["seed"]: [q["answer"] for q in r["questions"]] for r in result["records"] if r["arm"] == FULL}
    return [
        (question["missing"], question["answer"] != answer)
        for record in result["records"]
        if record["arm"] in arms and record["seed"] in seeds
        for question, answer in zip(record["questions"], full[record["seed"]], strict=True)
        if "missing" in question
    ]


def rates(items: Sequence[tuple[float, bool]], threshold: float) -> tuple[int, int, int, int]:
    """False alarms, right answers, misses, wrong answers."""
    right = [reading for reading, wrong in items if not wrong]
    wrong = [reading for reading, wrong in items if wrong]
    return sum(r > threshold for r in right), len(right), sum(r <= threshold for r in wrong), len(wrong)


def choose(items: Sequence[tuple[float, bool]]) -> float:
    """The threshold with the least sum of both rates, to two digits; of equal ones the middle."""
    best: list[float] = []
    least = float("inf")
    for step in range(1, 100):
        alarms, right, misses, wrong = rates(items, step / 100)
        total = alarms / max(1, right) + misses / max(1, wrong)
        if total < least - 1e-9:
            least, best = total, []
        if total < least + 1e-9:
            best.append(step / 100)
    return best[len(best) // 2]


def area(items: Sequence[tuple[float, bool]]) -> float:
    """Chance that a wrong answer's reading is above a right one's."""
    right = [reading for reading, wrong in items if not wrong]
    wrong = [reading for reading, wrong in items if wrong]
    if not right or not wrong:
        return float("nan")
    return sum((w > r) + (w == r) / 2 for w in wrong for r in right) / (len(right) * len(wrong))


def summarise_copies(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Right answers to questions 2 to 8 from each copy."""
    rows = []
    for name in dict.fromkeys(record["copy"] for record in records):
        mine = [record for record in records if record["copy"] == name]
        later = {str(r["seed"]): [float(x) for x in r["right"][1:]] for r in mine}
        row = {"copy": name, "pictures": len(mine), "kept": round(fmean(r["kept"] for r in mine), 4)}
        row["extra_rows"] = round(fmean(r["extra_rows"] for r in mine), 1)
        rows.append({**row, "later": round(mean(later), 4), "interval": [round(x, 4) for x in interval(later)]})
    return rows


def judged_copies(
    result: Result, copies: Sequence[str], seeds: range, reading: Reading | None = None
) -> list[tuple[float, bool]]:
    """Readings (of as many rows as the server reads), and whether an answer was wrong that the full cache gives."""
    reading = reading or itemgetter(str(result["rows_read_by_server"]))
    full = {r["seed"]: r["right"] for r in result["records"] if r["copy"] == FULL}
    return [
        (reading({name: values[number] for name, values in record["readings"].items()}), not right)
        for record in result["records"]
        if record["copy"] in copies and record["seed"] in seeds
        for number, (right, known) in enumerate(zip(record["right"], full[record["seed"]], strict=True))
        if known
    ]
