"""Tables of docs/sharing.md, made from the committed results of `main.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import median

from benchmarks.common.host import ROOT
from benchmarks.common.pages import with_blocks
from benchmarks.sharing.results import (
    ASKERS,
    BOUND,
    BUDGET,
    BUDGETS,
    CHOICE,
    DECODE,
    FRONTIER,
    FULL,
    JUDGEMENT,
    LAYERS,
    OBSERVERS,
    PRIVATE,
    ROWS_READ,
    SCORERS,
    SERVED,
    TARGETS,
    UNGUARDED,
    WATCHED,
    Reading,
    Result,
    area,
    choose,
    copy_name,
    judged,
    judged_copies,
    rates,
    reached,
)
from vlcache_sgl.evaluation.report import markdown_table
from vlcache_sgl.evaluation.stats import interval, mean, wilson

PAGE = ROOT / "docs/sharing.md"


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
            values = [f"{row['lost']:.3f}", f"{row['ttft_ratio']:.2f}", f"{row['ttft_gain']:.2f}"]
            values += [f"{row['picture_ratio']:.3f}", f"{row['bytes_ratio']:.3f}"]
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
    blocks = {
        name: f"{make(results[source])}\n\n{origin(results[source])}" if source in results else "Not measured yet."
        for name, (source, make) in BLOCKS.items()
    }
    return with_blocks(page, blocks)
