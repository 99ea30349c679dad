"""Tables of docs/sharing.md, made from the committed results of benchmarks/sharing.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from host import ROOT

from vlcache_sgl.fidelity.report import markdown_table
from vlcache_sgl.fidelity.stats import interval, mean, wilson

PAGE = ROOT / "docs/sharing.md"
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


# -- tables -----------------------------------------------------------------------------------------------------------


def origin(result: Result) -> str:
    """Where the numbers come from."""
    host = result["host"]
    return (
        f"`{result['command']}`, model `{result['model']}`, {host['date'][:10]}, SGLang {host['packages']['sglang']}, "
        f"{host['cores']} CPU cores, float32."
    )


def _share(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def table(result: Result) -> str:
    """Every way to share."""
    lines = [
        [
            row["arm"],
            _share(row["first"], row["first_interval"]),
            _share(row["later"], row["later_interval"]),
            f"{row['ttft_ms']:.0f}",
            f"{row['ttft_ratio']:.2f}x",
            f"{row['ttft_gain']:.2f}x",
            f"{row['prefill_ms']:.0f}",
            f"{row['picture_kept']:.2f}" if row["arm"] != PRIVATE else f"{row['picture_kept']:.2f} while asked",
            f"{row['bytes_ratio']:.3f}",
            f"{row['sketch_ratio']:.3f}" if row["sketch_bytes"] else "",
            f"{row['recomputed']:.1f}" if "enforce" in row["arm"] else "",
            "" if row["missing"] is None else f"{row['missing']:.3f}",
        ]
        for row in result["summary"]
    ]
    head = ["arm", "question 1", "questions 2 to 8", "first token ms", "over a hit", "off over this"]
    head += ["prefill ms", "of the picture", "bytes", "sketch", "recomputed", "reading"]
    return markdown_table(head, lines)


def targets(result: Result) -> str:
    """Which targets each shared copy reaches."""
    lines = []
    for row in result["summary"]:
        if row["arm"] not in (FULL, PRIVATE):
            values = (f"{row['lost']:.3f}", f"{row['ttft_ratio']:.2f}", f"{row['ttft_gain']:.2f}")
            values = (*values, f"{row['picture_ratio']:.3f}", f"{row['bytes_ratio']:.3f}")
            met = reached(row).values()
            lines.append([row["arm"], *(f"{v}{'' if ok else ', **no**'}" for v, ok in zip(values, met, strict=True))])
    bounds = ("at most 0.02", "at most 1.5", "at least 2", "at most 0.25", "at most 0.25")
    return markdown_table(("arm", *(f"{n} ({b})" for n, b in zip(TARGETS, bounds, strict=True))), lines)


def latency(result: Result) -> str:
    """First tokens where prefill costs something."""
    lines = [
        [
            f"{row['side'] ** 2}",
            row["arm"],
            f"{row['ttft_first_ms']:.0f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['ttft_ratio']:.2f}x",
            f"{row['ttft_gain']:.2f}x",
            f"{row['bytes_ratio']:.3f}",
        ]
        for row in result["summary"]
    ]
    head = ("image tokens", "arm", "question 1, ms", "questions 2 to 8, ms", "over a hit", "off over this", "bytes")
    return markdown_table(head, lines, left=2)


JUDGED = ("copies", "threshold", "false alarms, of right answers", "misses, of wrong answers", "area under ROC")


def _judgement(title: str, threshold: float, items: Sequence[tuple[float, bool]]) -> list[str]:
    alarms, right, misses, wrong = rates(items, threshold)
    shown = [
        f"{count} of {total}: {_share(count / total, wilson(count, total))}" if total else "none"
        for count, total in ((alarms, right), (misses, wrong))
    ]
    return [title, f"{threshold:.2f}", *shown, f"{area(items):.3f}" if wrong and right else ""]


def guard(result: Result) -> str:
    """Thresholds, and what they would have done on other pictures."""
    lines = []
    for name, copies in WATCHED.items():
        chosen = choose(judged_copies(result, copies, CHOICE))
        lines.append(_judgement(f"{name}: all", chosen, judged_copies(result, copies, JUDGEMENT)))
        lines += [_judgement(copy, chosen, judged_copies(result, (copy,), JUDGEMENT)) for copy in copies]
    return markdown_table(JUDGED, lines)


def guard_rows(result: Result) -> str:
    """The same from other numbers of rows."""
    found: dict[str, Reading] = {f"last {rows}" if rows else "all": itemgetter(str(rows)) for rows in ROWS_READ}
    return _readings("rows", result, found)


def guard_decode(result: Result) -> str:
    """The same with a look at the first decode steps."""
    prefill = str(result["rows_read_by_server"])
    found: dict[str, Reading] = {
        "prefill": itemgetter(prefill),
        "decode": itemgetter(DECODE),
        "the larger": lambda readings: max(readings[prefill], readings[DECODE]),
        "their mean": lambda readings: (readings[prefill] + readings[DECODE]) / 2,
    }
    return _readings("reading", result, found)


def _readings(head: str, result: Result, found: Mapping[str, Reading]) -> str:
    """Readings beside each other, each with a threshold of its own."""
    lines = []
    for name, copies in WATCHED.items():
        for title, reading in found.items():
            chosen = choose(judged_copies(result, copies, CHOICE, reading))
            items = judged_copies(result, copies, JUDGEMENT, reading)
            if items:
                lines.append(_judgement(f"{name}: {title}", chosen, items))
    return markdown_table((head, *JUDGED[1:]), lines)


def guard_thresholds(result: Result) -> str:
    """What other thresholds would have done."""
    lines = []
    for name, copies in WATCHED.items():
        items = judged_copies(result, copies, JUDGEMENT)
        for threshold in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
            lines.append(_judgement(name, threshold, items)[:-1])
    return markdown_table(JUDGED[:-1], lines)


def served(result: Result) -> str:
    """The same thresholds on a server, all pictures."""
    lines = []
    for name, arms in SERVED.items():
        threshold = float(result["threshold"])
        items = judged(result, arms, range(CHOICE.start, JUDGEMENT.stop))
        lines.append(_judgement(f"{name}, all", threshold, items))
        for arm in arms:
            lines.append(_judgement(arm, threshold, judged(result, (arm,), range(CHOICE.start, JUDGEMENT.stop))))
    return markdown_table(JUDGED, lines)


def overhead(result: Result) -> str:
    """What observing costs."""
    lines = []
    for watched in ("tiered, observe", "tiered, profile, observe"):
        off, on = ([r for r in result["records"] if r["arm"] == arm] for arm in (UNGUARDED, watched))
        if not on:
            continue
        readings = [sum("missing" in q for q in r["questions"]) for r in on]
        reading = median(r["guard_ms"] / count for r, count in zip(on, readings, strict=True))
        sketch = median(r["selection_ms"] for r in on) - median(r["selection_ms"] for r in off)
        picture = median(r["prefill_ms"] for r in off)
        follow = [median(q["prefill_ms"] for r in rs for q in r["questions"][1:]) for rs in (off, on)]
        steps = median(r["guard_decode_ms"] / len(r["questions"]) for r in on)
        lines.append(
            [
                watched,
                f"{picture:.1f}",
                f"{sketch:.2f} ({sketch / picture:.1%})",
                f"{reading:.2f} ({reading / picture:.1%})",
                f"{follow[0]:.1f}",
                f"{follow[1]:.1f}",
                f"{reading / follow[0]:.1%}",
                f"{steps:.2f}" if steps else "",
            ]
        )
    head = ["copies", "prefill of the picture, ms", "sketch, ms", "one reading, ms"]
    head += ["prefill of a question, off, ms", "observe, ms", "reading of it", "first decode steps, ms"]
    return markdown_table(head, lines)


def sketch(result: Result) -> str:
    """Methods beside each other."""
    limit = 0.03 * result["tokens"] * 2 * 2 * 32
    lines = [
        [
            row["method"],
            f"{row['bytes_per_layer']}",
            f"{row['error']:.3f}",
            f"{row['bias']:+.3f}",
            " ".join(f"{error:.3f}" for error in row["error_by_layer"]),
            f"{row['auc']:.3f}",
        ]
        for row in result["summary"]
        if row["method"] != "true"
    ]
    head = (
        "sketch",
        "bytes per layer",
        "mean absolute error",
        "bias",
        "error by layer",
        "own question or another (area)",
    )
    text = f"The limit of 3 % is {4 * limit:.0f} bytes per layer in float32, {2 * limit:.0f} in bfloat16."
    return f"{markdown_table(head, lines)}\n\n{text}"


def rows_read(result: Result) -> str:
    """Which rows of a question tell its own copy from another's."""
    lines = [
        [
            f"last {row['rows']}" if row["rows"] else "all",
            row["method"],
            *(f"{row[key]:.3f}" for key in ("own_mean", "own_most", "other_mean", "other_least")),
        ]
        for row in result["rows"]
    ]
    head = ("rows", "mass", "own question: mean", "at most", "other questions: mean", "at least")
    return markdown_table(head, lines, left=2)


def scorers(result: Result) -> str:
    """Scores for copies, without and with a profile, and what each takes beyond keys and values."""
    rows = {row["copy"]: row for row in result["summary"]}
    full = _share(rows[FULL]["later"], rows[FULL]["interval"])
    lines = [[FULL, "", full, full]]
    for scorer in (*SCORERS, *OBSERVERS, *ASKERS, BOUND):
        both = [rows[copy_name(scorer, BUDGET, profile)] for profile in (False, True)]
        takes = OBSERVERS.get(scorer, "")
        if scorer in ASKERS:
            takes = f"a forward of {both[0]['extra_rows']:.0f} rows"
        if scorer == BOUND:
            takes = "the questions to come: a bound"
        lines.append([f"`{scorer}`", takes, *(_share(row["later"], row["interval"]) for row in both)])
    return markdown_table(("scorer", "needs", "all layers alike", "layers by profile"), lines, left=2)


def frontier(result: Result) -> str:
    """Budgets, without and with a profile."""
    rows = {row["copy"]: row for row in result["summary"]}
    lines = []
    for name, profile in LAYERS.items():
        for scorer in FRONTIER:
            mine = (rows[copy_name(scorer, budget, profile)] for budget in BUDGETS)
            lines.append([name, f"`{scorer}`", *(_share(row["later"], row["interval"]) for row in mine)])
    return markdown_table(("layers", "scorer", *(f"{budget:g}" for budget in BUDGETS)), lines, left=2)


def guesses(result: Result) -> str:
    """Whom made-up questions help: those about a label that was guessed, or the others too."""
    lines = [
        [
            name,
            f"{budget:g}",
            *(
                _share(mean(rights), interval(rights))
                for known in (True, False)
                for scorer in ("asked", SCORERS[0])
                for rights in [_rights(result, copy_name(scorer, budget, profile), known)]
            ),
        ]
        for name, profile in LAYERS.items()
        for budget in BUDGETS
    ]
    head = ("layers", "share budget", "guessed: `asked`", "`keydiff`", "others: `asked`", "`keydiff`")
    return markdown_table(head, lines, left=2)


def _rights(result: Result, copy: str, known: bool) -> dict[str, list[float]]:
    """By picture, answers to those of questions 2 to 8 that somebody guessed or that nobody did."""
    guessed = {r["seed"]: r["guessed"] for r in result["records"] if r["copy"] == FULL}
    found = {
        str(record["seed"]): [
            float(right)
            for right, was in zip(record["right"][1:], guessed[record["seed"]][1:], strict=True)
            if was == known
        ]
        for record in result["records"]
        if record["copy"] == copy
    }
    return {seed: rights for seed, rights in found.items() if rights}


BLOCKS = {
    "table": ("table", table),
    "targets": ("table", targets),
    "latency": ("latency", latency),
    "guard": ("copies", guard),
    "guard-rows": ("copies", guard_rows),
    "guard-decode": ("copies", guard_decode),
    "late": ("late", guard_decode),
    "just-in-time": ("just-in-time", table),
    "guard-thresholds": ("copies", guard_thresholds),
    "served": ("guard", served),
    "overhead": ("guard", overhead),
    "overhead-latency": ("latency", overhead),
    "sketch": ("sketch", sketch),
    "rows": ("sketch", rows_read),
    "scorers": ("copies", scorers),
    "frontier": ("copies", frontier),
    "guesses": ("copies", guesses),
}
"""Experiment and maker of each generated part of the page, by the name of its markers."""


def rendered(page: str, results: Mapping[str, Result]) -> str:
    """`page` with the blocks between its markers made anew; those whose experiment is missing say so."""
    for name, (source, make) in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE.name} lacks the markers of {name}")
        block = "Not measured yet."
        if source in results:
            block = f"{make(results[source])}\n\n{origin(results[source])}"
        page = f"{before}{begin}{block}{end}{after}"
    return page


# -- figures ----------------------------------------------------------------------------------------------------------
