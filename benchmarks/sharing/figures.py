"""Figures of docs/sharing.md, made from the committed results of `main.py`; tables: `page.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.host import ROOT
from benchmarks.sharing.results import (
    BOUND,
    BUDGETS,
    CHOICE,
    FULL,
    JUDGEMENT,
    LAYERS,
    PRIVATE,
    SCORERS,
    WATCHED,
    Result,
    area,
    choose,
    copy_name,
    judged_copies,
    rates,
)
from vlcache_sgl.evaluation.report import COLOURS, MARKERS

FIGURES = ROOT / "docs/figures"
STYLES = {SCORERS[0]: "-", "asked": "--", BOUND: ":"}
"""Lines of scores over bytes."""


def draw_plots(results: Mapping[str, Result], folder: Path = FIGURES) -> None:
    """The page's figures."""
    folder.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    if "table" in results:
        figures["table"] = draw_table(results["table"])
    if "sketch" in results:
        figures["sketch"] = draw_sketch(results["sketch"])
    if "copies" in results:
        figures["guard"] = draw_guard(results["copies"])
        figures["frontier"] = draw_frontier(results["copies"], results.get("table"))
    for name, figure in figures.items():
        figure.savefig(folder / f"sharing-{name}.png", dpi=140)


def _axes(columns: int, width: float = 4.6, height: float = 4.2, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_table(result: Result) -> Any:
    """Right answers, first tokens and bytes of every arm."""
    figure, axes = _axes(3, 4.4, 3.8, sharey=True)
    rows = result["summary"][::-1]
    names = [row["arm"] for row in rows]
    colours = [
        COLOURS[7] if row["arm"] in (FULL, PRIVATE) else COLOURS[0 if "enforce" in row["arm"] else 5] for row in rows
    ]
    full = result["summary"][0]
    panels = (
        ("questions 2 to 8: right", [row["later"] for row in rows], full["later"] - 0.02, "%.2f"),
        ("first token of questions 2 to 8, ms", [row["ttft_ms"] for row in rows], 1.5 * full["ttft_ms"], "%.0f"),
        (
            "bytes of the picture, of the full cache's",
            [row["picture_ratio"] if row["bytes"] else 0.0 for row in rows],
            0.25,
            "%.2f",
        ),
    )
    for axis, (title, values, target, form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, fmt=form, padding=2, fontsize=8)
        axis.axvline(target, color="black", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
    axes[0].annotate("dashed: target", (0.02, -0.13), xycoords="axes fraction", fontsize=8)
    return figure


def draw_guard(result: Result) -> Any:
    """ROC on the pictures of judgement, and the readings behind it."""
    figure, axes = _axes(3)
    for number, (name, copies) in enumerate(WATCHED.items()):
        chosen = choose(judged_copies(result, copies, CHOICE))
        items = judged_copies(result, copies, JUDGEMENT)
        points = [(1.0, 1.0)]
        for threshold in sorted({reading for reading, _ in items}):
            alarms, right, misses, wrong = rates(items, threshold)
            points.append((alarms / right, 1 - misses / wrong))
        colour = COLOURS[number]
        axes[0].step(*zip(*points, strict=True), color=colour, where="pre", label=f"{name}: area {area(items):.3f}")
        alarms, right, misses, wrong = rates(items, chosen)
        axes[0].plot(alarms / right, 1 - misses / wrong, "o", color=colour, label=f"{name}, threshold {chosen:.2f}")
        axis = axes[1 + number]
        edges = [step / 40 for step in range(41)]
        parts = [[reading for reading, wrong in items if wrong is which] for which in (False, True)]
        labels = ("right", "wrong")
        axis.hist(parts, edges, stacked=True, color=[COLOURS[3], COLOURS[4]], label=labels)
        axis.axvline(chosen, color="black", linestyle="--", linewidth=1, label=f"threshold {chosen:.2f}")
        axis.set(title=f"readings, {name}", xlabel="estimated missing share of attention", ylabel="questions")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set(title="held-out pictures", xlabel="false alarms, of right answers", ylabel="noticed, of wrong answers")
    axes[0].set(xlim=(-0.02, 1), ylim=(0, 1.02))
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def draw_sketch(result: Result) -> Any:
    """Estimated over true missing share, a point per question and layer."""
    rows = {row["method"]: row for row in result["summary"]}
    shown = [name for name in rows if name != "true"]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, name in zip(grid.flat, shown, strict=True):
        axis.plot((0, 1), (0, 1), color="black", linewidth=0.8)
        for layer in range(len(rows[name]["error_by_layer"])):
            xs = [record["shares"]["true"][layer] for record in result["records"]]
            ys = [record["shares"][name][layer] for record in result["records"]]
            axis.plot(xs, ys, MARKERS[layer], color=COLOURS[layer], markersize=4, alpha=0.7, label=f"layer {layer}")
        axis.set_title(f"{name}: error {rows[name]['error']:.3f}", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("true missing share of attention", fontsize=10)
    figure.supylabel("estimated", fontsize=10)
    return figure


def draw_frontier(result: Result, table: Result | None) -> Any:
    """Right answers over bytes: lines over share budgets, and what enforcing makes of them."""
    figure, (axis,) = _axes(1, 9.5, 4.8)
    rows = {row["copy"]: row for row in result["summary"]}
    axis.axhline(rows[FULL]["later"], color="black", linestyle="--", linewidth=1, label=FULL)
    for number, (name, profile) in enumerate(LAYERS.items()):
        look = {"marker": MARKERS[number], "color": COLOURS[number], "capsize": 2}
        for scorer, style in STYLES.items():
            mine = [rows[copy_name(scorer, budget, profile)] for budget in BUDGETS]
            xs, ys = [row["kept"] for row in mine], [row["later"] for row in mine]
            spread = [[y - row["interval"][0] for y, row in zip(ys, mine, strict=True)]]
            spread.append([row["interval"][1] - y for y, row in zip(ys, mine, strict=True)])
            axis.errorbar(xs, ys, yerr=spread, linestyle=style, label=f"{scorer}, layers {name}", **look)
    policy = rows["policy"]
    axis.plot(policy["kept"], policy["later"], MARKERS[2], color=COLOURS[7], label="what the first question needs")
    for number, row in enumerate(row for row in (table["summary"] if table else ()) if "enforce" in row["arm"]):
        label = f"{row['arm']}: {row['recomputed']:.1f} recomputed"
        axis.plot(row["picture_ratio"], row["later"], MARKERS[3 + number], color=COLOURS[2 + number], label=label)
    axis.axvline(0.25, color="grey", linestyle=":", linewidth=1, label="target")
    axis.set(xlabel="of the picture's bytes, after 8 questions", ylabel="questions 2 to 8: right", ylim=(-0.03, 1.05))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
