"""From single answers to tables and plots; everything here is a pure function of the records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vlcache_sgl.evaluation.run import FULL, PRIVATE, Record, parse_condition
from vlcache_sgl.evaluation.scores import agreement
from vlcache_sgl.evaluation.stats import bootstrap, interval, mean

Row = dict[str, Any]
"""One line of the summary: a condition on a task."""


def paired(records: Sequence[Record], wanted: Sequence[str]) -> list[Record]:
    """For each task the samples that all of the conditions `wanted` have answered, under every condition that has
    answered them all: scores of different questions do not compare.

    A sample with one question is asked once for ``shared`` and ``private``, which are the same then: the answer stands
    for both, as a `twin` that no file holds.
    """
    kept: list[Record] = []
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        mine += _twins(mine)
        answered: dict[str, set[str]] = defaultdict(set)
        for record in mine:
            answered[record["condition"]].add(record["sample"])
        common = set.intersection(*([answered[name] for name in wanted if name in answered] or answered.values()))
        kept += [record for record in mine if record["sample"] in common and common <= answered[record["condition"]]]
    return kept


def _twins(records: Sequence[Record]) -> list[Record]:
    """Records of ``private`` conditions for samples with one question, where other samples have some."""
    private = {record["condition"] for record in records if record["condition"].endswith(PRIVATE)}
    return [
        {**record, "condition": record["condition"] + PRIVATE, "twin": True}
        for record in records
        if len(record["questions"]) == 1 and record["condition"] + PRIVATE in private
    ]


def summarise(records: Sequence[Record]) -> list[Row]:
    """Per task and condition: `questions`, `score` with its `interval`, `same` (share of answers that are the full
    cache's, None without one), `ratio` (kept share of prompts that were compressed), `cached` (share of prompt tokens
    that came from the prefix cache, None where the server did not say), `failed` policies; for long outputs `agreement`
    and `divergence`; where right answers were forced, what `_forced` says.
    """
    rows = []
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        full = {record["sample"]: record["questions"] for record in mine if record["condition"] == FULL}
        for condition in sorted({record["condition"] for record in mine}, key=_order):
            rows.append(_row(task, condition, [r for r in mine if r["condition"] == condition], full))
    return rows


def _order(condition: str) -> tuple[Any, ...]:
    """Full cache first, then by policy, the largest budget first."""
    parsed = parse_condition(condition)
    return (parsed.policy or "", parsed.sharing, -float(parsed.budget))


def _row(task: str, condition: str, records: Sequence[Record], full: Mapping[str, Sequence[Any]]) -> Row:
    asked = [question for record in records for question in record["questions"]]
    scores = {record["sample"]: [question["score"] for question in record["questions"]] for record in records}
    low, high = interval(scores)
    pairs = [
        (ours, theirs)
        for record in records
        for ours, theirs in zip(record["questions"], full.get(record["sample"], ()), strict=False)
    ]
    own = [question["ratio"] for question in asked if question["ratio"] < 1]
    row: Row = {
        "task": task,
        "condition": condition,
        "samples": len(records),
        "questions": len(asked),
        "score": round(mean(scores), 4),
        "interval": [round(low, 4), round(high, 4)],
        "same": round(fmean(ours["answer"] == theirs["answer"] for ours, theirs in pairs), 4) if pairs else None,
        "ratio": round(fmean(own), 4) if own else 1.0,
        "cached": _cached_share(asked),
        "failed": sum("failed" in question for question in asked),
    }
    row |= _forced(records)
    long = [(ours, theirs) for ours, theirs in pairs if "tokens" in ours and "tokens" in theirs]
    if long:
        row["agreement"] = round(fmean(agreement(ours["tokens"], theirs["tokens"]) for ours, theirs in long), 4)
        row["divergence"] = round(fmean(divergence(ours, theirs) for ours, theirs in long), 4)
    return row


def _forced(records: Sequence[Record]) -> Row:
    """`answer_logprob`, the mean log-probability of right answers in nats, `answer_interval` and `answers_forced`, how
    many they are; nothing where none was forced."""
    measured = {
        record["sample"]: [q["answer_logprob"] for q in record["questions"] if "answer_logprob" in q]
        for record in records
    }
    groups = {sample: found for sample, found in measured.items() if found}
    if not groups:
        return {}
    low, high = bootstrap(groups)
    return {
        "answer_logprob": round(mean(groups), 4),
        "answer_interval": [round(low, 4), round(high, 4)],
        "answers_forced": sum(map(len, groups.values())),
    }


def _cached_share(asked: Sequence[Mapping[str, Any]]) -> float | None:
    cached: list[int] = [question["cached_tokens"] for question in asked if question["cached_tokens"] is not None]
    if len(cached) < len(asked):
        return None
    total: int = sum(question["prompt_tokens"] for question in asked)
    return round(sum(cached) / max(1, total), 4)


def divergence(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Mean absolute difference of the log-probability of the output's tokens, in nats, while both outputs agree and at
    the token where the full cache's goes on differently is not counted: from there on they answer other contexts."""
    differences = []
    pairs = zip(ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"], strict=False)
    for mine, other, my_logprob, other_logprob in pairs:
        if mine != other:
            break
        differences.append(abs(my_logprob - other_logprob))
    return fmean(differences) if differences else 0.0


def by_index(records: Iterable[Record], condition: str, task: str) -> list[Row]:
    """Score by the number of the question about the same images: `index` from 1, `score`, `interval`, `questions`."""
    groups: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for record in records:
        if record["condition"] == condition and record["task"] == task:
            for number, question in enumerate(record["questions"], 1):
                groups[number][record["sample"]] = [question["score"]]
    rows = []
    for number, scores in sorted(groups.items()):
        low, high = interval(scores)
        rows.append(
            {
                "index": number,
                "questions": len(scores),
                "score": round(mean(scores), 4),
                "interval": [round(low, 4), round(high, 4)],
            }
        )
    return rows


# -- Markdown ---------------------------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    """
    >>> percent(0.123), percent(None)
    ('12 %', '')
    """
    return "" if share is None else f"{100 * share:.0f} %"


def cached_in_words(row: Row) -> str:
    """Cells of a row of the summary."""
    return "not reported" if row["cached"] is None else percent(row["cached"])


def logprob_in_words(row: Row) -> str:
    """Cells of a row of the summary; empty where nothing was forced."""
    if "answer_logprob" not in row:
        return ""
    low, high = row["answer_interval"]
    left_out = row["questions"] - row["answers_forced"]
    return f"{row['answer_logprob']:.2f} ({low:.2f} to {high:.2f})" + (f", {left_out} left out" if left_out else "")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def markdown(rows: Sequence[Row]) -> str:
    """The summary, one table per task."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        long = any("agreement" in row for row in mine)
        forced = any("answer_logprob" in row for row in mine)
        head = ["condition", "questions", "score", "95 % interval", "as full cache", "kept", "from prefix cache"]
        head += ["follows full cache", "divergence (nats)"] if long else []
        head += ["log-probability of the right answer (nats)"] if forced else []
        lines = []
        for row in mine:
            low, high = row["interval"]
            line = [f"`{row['condition']}`", str(row["questions"]), f"{row['score']:.3f}", f"{low:.2f} to {high:.2f}"]
            line += [percent(row["same"]), f"{row['ratio']:.3f}", cached_in_words(row)]
            line += [percent(row.get("agreement")), f"{row.get('divergence', 0):.3f}"] if long else []
            line += [logprob_in_words(row)] if forced else []
            lines.append(line)
        parts.append(f"### {task}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(parts) + "\n"


# -- plots ------------------------------------------------------------------------------------------------------------

COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1971c2", "#f08c00", "#495057")
"""Told apart by lightness too; further policies repeat them with another marker."""
MARKERS = "osD^vPX*"


def plot_budgets(rows: Sequence[Row], path: Path) -> None:
    """Score over budget, one panel per task, one line per policy with its interval, the full cache as a dashed line."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = _axes(len(tasks))
    policies = sorted({_line(row["condition"]) for row in rows if row["condition"] != FULL})
    for axis, task in zip(axes, tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for row in (row for row in mine if row["condition"] == FULL):
            axis.axhline(row["score"], color="black", linestyle="--", linewidth=1, label="full cache")
        for number, policy in enumerate(policies):
            points = [row for row in mine if row["condition"] != FULL and _line(row["condition"]) == policy]
            # Side by side: lines that meet at 0 or 1 would hide each other's intervals.
            _draw(axis, number, policy, [(_budget(row) * 1.012**number, row) for row in reversed(points)])
        axis.set(title=task, xlabel="budget (share of the prompt that is kept)", xscale="log", ylim=(-0.03, 1.03))
        budgets = sorted({_budget(row) for row in mine if row["condition"] != FULL})
        axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axis.minorticks_off()
    axes[0].set_ylabel("score")
    _save(figure, axes, path)


def plot_index(
    records: Sequence[Record], task: str, panels: Mapping[str, Sequence[str]], label: Callable[[str], str], path: Path
) -> None:
    """Score by question number; `panels` are titles and the conditions drawn there, `label` names a condition."""
    figure, axes = _axes(len(panels))
    names = sorted(
        {label(condition) for conditions in panels.values() for condition in conditions if condition != FULL}
    )
    for axis, (title, conditions) in zip(axes, panels.items(), strict=True):
        for condition in conditions:
            points = by_index(records, condition, task)
            if condition == FULL:
                shown = [row["index"] for row in points], [row["score"] for row in points]
                axis.plot(*shown, color="black", linestyle="--", linewidth=1, label="full cache")
            else:
                number = names.index(label(condition))
                _draw(axis, number, names[number], [(row["index"] + 0.05 * number, row) for row in points])
        axis.set(title=title, xlabel="question about the same image", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("score")
    _save(figure, axes, path)


def _line(condition: str) -> str:
    parsed = parse_condition(condition)
    return f"{parsed.policy}" + (", private" if parsed.sharing == "private" else "")


def _budget(row: Row) -> float:
    return float(parse_condition(row["condition"]).budget)


def _axes(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 4.4 * count, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _draw(axis: Any, number: int, label: str, points: Sequence[tuple[float, Row]]) -> None:
    if not points:
        return
    xs, rows = zip(*points, strict=True)
    spread = [
        [max(0.0, row["score"] - row["interval"][0]) for row in rows],
        [max(0.0, row["interval"][1] - row["score"]) for row in rows],
    ]
    axis.errorbar(
        xs,
        [row["score"] for row in rows],
        yerr=spread,
        label=label,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        linewidth=1.4,
        elinewidth=0.7,
        capsize=2,
    )


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)
