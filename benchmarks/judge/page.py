"""The judge's part of docs/fidelity.md and its figure, made from the committed result alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlcache_sgl.evaluation.report import markdown_table

from ..common.host import ROOT
from ..common.pages import with_blocks
from ..common.results import RESULTS
from .conditions import FULL, MEDIA, Condition, parse_condition
from .summary import ALL, Row

PAGE = ROOT / "docs/fidelity.md"
FIGURE = ROOT / "docs/figures/judge.png"
RESULT = RESULTS / "judge.json"
DEFAULT = "vlcache"
"""The recipe that the documentation tells users to begin with."""
BEST = 4
"""Policies of the figure beside the default and chance."""
CHANCE = "random"
TITLES = {"text": "Text", "image": "The same text as images"}


def committed() -> dict[str, Any] | None:
    """The result, if there is one."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else None


def rendered(page: str, result: Mapping[str, Any] | None) -> str:
    """`page` with the judge's blocks made anew."""
    blocks = {
        name: "Not measured yet." if result is None else f"{make(result)}\n\n{origin(result)}"
        for name, make in BLOCKS.items()
    }
    return with_blocks(page, blocks)


def origin(result: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    host = result["host"]
    seeds = result["seeds"]
    return (
        f"`{result['command']}`, model `{result['model']}`, seeds {seeds}, {host['date'][:10]}, "
        f"{host['cores']} CPU cores, float32."
    )


Rows = Mapping[Condition, Row]


def rows_of(result: Mapping[str, Any], task: str) -> Rows:
    """The summary of a task, by condition."""
    return {parse_condition(row["condition"]): row for row in result["summary"] if row["task"] == task}


def ranked(rows: Rows, medium: str, turn: str) -> list[str]:
    """Policies, the one that loses fewest right answers over all budgets first; equal ones by log-probability."""
    found: dict[str, list[tuple[float, float]]] = {}
    for condition, row in rows.items():
        if (condition.medium, condition.turn) == (medium, turn) and condition.policy != FULL:
            found.setdefault(condition.policy, []).append((row["score"] - row["full_score"], row["log_probability"]))
    return sorted(found, key=lambda policy: [-sum(column) for column in zip(*found[policy], strict=True)])


def budgets_of(rows: Rows) -> list[float]:
    """The largest first."""
    return sorted({condition.budget for condition in rows if condition.policy != FULL}, reverse=True)


def policies_table(medium: str, turn: str) -> Any:
    """Maker of the table of one medium and turn: policies down, budgets across."""

    def make(result: Mapping[str, Any]) -> str:
        rows = rows_of(result, ALL)
        budgets = budgets_of(rows)
        full = rows[Condition(medium, turn, FULL, 1.0)]  # type: ignore[arg-type]
        lines = [["full cache", str(full["count"]), f"{full['score']:.2f}", *[_cell(full)] * len(budgets)]]
        for policy in ranked(rows, medium, turn):
            found = [rows.get(Condition(medium, turn, policy, budget)) for budget in budgets]  # type: ignore[arg-type]
            same = next(row for row in found if row is not None)
            lines.append([f"`{policy}`", str(same["count"]), f"{same['full_score']:.2f}", *map(_cell, found)])
        return markdown_table(("policy", "questions", "full there", *(f"{budget:g}" for budget in budgets)), lines)

    return make


def tasks_table(result: Mapping[str, Any]) -> str:
    """The default by task, beside the full cache."""
    tasks = list(dict.fromkeys(row["task"] for row in result["summary"] if row["task"] != ALL))
    budgets = budgets_of(rows_of(result, ALL))
    lines = []
    for task in tasks:
        rows = rows_of(result, task)
        full = rows[Condition("image", "first", FULL, 1.0)]
        mine = (rows.get(Condition("image", "first", DEFAULT, budget)) for budget in budgets)
        lines.append([f"`{task}`", str(full["count"]), _cell(full), *map(_cell, mine)])
    return markdown_table(("task", "questions", "full cache", *(f"{budget:g}" for budget in budgets)), lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row["interval"]
    share = "" if abs(row["kept"] - parse_condition(row["condition"]).budget) < 0.01 else f", kept {row['kept']:.2f}"
    return f"{row['score']:.2f} ({low:.2f} to {high:.2f}), {row['log_probability']:.1f}{share}"


def figure_line(result: Mapping[str, Any]) -> str:
    """The figure, where the page shows it."""
    count = sum(row["count"] for row in result["summary"] if row["condition"] == f"image first {FULL}@1") // 2
    return f"![Right answers over budget, {count} questions](figures/{FIGURE.name})"


BLOCKS = {
    "judge-figure": figure_line,
    "judge-image": policies_table("image", "first"),
    "judge-text": policies_table("text", "first"),
    "judge-later": policies_table("image", "later"),
    "judge-tasks": tasks_table,
}
"""Maker of each generated part of the page, by the name of its markers."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Right answers over budget: the full cache, the default in colour, the best others, chance."""
    from matplotlib.figure import Figure

    rows = rows_of(result, ALL)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(MEDIA), sharey=True)
    others = _shown(rows)
    for axis, medium in zip(axes, MEDIA, strict=True):
        full = rows[Condition(medium, "first", FULL, 1.0)]
        axis.axhline(full["score"], color="black", linestyle=":", linewidth=1.5, label="full cache")
        for policy, style in others.items():
            _line(axis, {b: rows.get(Condition(medium, "first", policy, b)) for b in budgets_of(rows)}, policy, style)
        axis.set(title=TITLES[medium], xlabel="budget: share of the cells that are kept", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=(len(handles) + 1) // 2, frameon=False, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def _shown(rows: Rows) -> dict[str, dict[str, Any]]:
    """Lines of the figure, by policy: the default, the best others as images, chance.

    The others were asked every question: beside the full cache's line those asked fewer would lie too low or too high.
    """
    most = rows[Condition("image", "first", FULL, 1.0)]["count"]
    whole = {condition.policy for condition, row in rows.items() if row["count"] == most}
    best = [policy for policy in ranked(rows, "image", "first") if policy in whole - {DEFAULT, CHANCE}][:BEST]
    colours = ("#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c")
    styles: dict[str, dict[str, Any]] = {DEFAULT: {"color": "#0b7285", "linewidth": 3, "marker": "o", "zorder": 3}}
    styles |= {p: {"color": c, "linewidth": 1.5, "marker": "s"} for p, c in zip(best, colours, strict=False)}
    return {**styles, CHANCE: {"color": "#868e96", "linewidth": 1.2, "marker": "x"}}


def _line(axis: Any, points: Mapping[float, Row | None], label: str, style: Mapping[str, Any]) -> None:
    found = {budget: row for budget, row in points.items() if row is not None}
    if not found:
        return
    axis.plot(list(found), [row["score"] for row in found.values()], label=label, markersize=5, **style)
    low, high = zip(*(row["interval"] for row in found.values()), strict=True)
    axis.vlines(list(found), low, high, color=style["color"], alpha=0.3, linewidth=2)


def write(result: Mapping[str, Any]) -> None:
    """The page's blocks and the figure."""
    PAGE.write_text(rendered(PAGE.read_text(), result))
    draw(result, FIGURE)
