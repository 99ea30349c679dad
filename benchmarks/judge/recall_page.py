"""Tables and figure of docs/recall.md, made from committed results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_sgl.evaluation.report import markdown_table

from ..common.host import ROOT
from ..common.pages import with_blocks
from ..common.results import RESULTS

PAGE = ROOT / "docs/recall.md"
FIGURE = ROOT / "docs/figures/recall.png"
ANSWERS, SKETCHES, LOYALTY, INSTRUMENTS = (
    RESULTS / f"judge-{name}.json" for name in ("recalls", "sketches", "loyalty", "instruments")
)
NOTHING = "Not measured yet."

RANKED = {
    "signs": "signs",
    "random": "turned signs",
    "text": "signs turned by a text",
    "keys": "the keys",
    "mass": "sum of shares",
    "peak": "largest share",
    "logit": "largest logit",
}
"""What is written for a sketch and for what tokens are ranked by."""

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def origin(result: Result) -> str:
    """Where the numbers come from."""
    host = result["host"]
    return f"`{result['command']}`, seeds {result['seeds']}, {host['date'][:10]}, {host['cores']} CPU cores, float32."


def answers_table(result: Result, medium: str | None = None) -> str:
    """What is kept down, tokens that come back across."""
    rows = [row for row in result["summary"] if medium in (None, row["medium"])]
    tokens = list(dict.fromkeys(row["rule"]["tokens"] for row in rows))
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        rule = [str(value) for name, value in row["rule"].items() if name != "tokens"]
        key = (row["medium"], row["policy"], f"{row['budget']:g}", *rule)
        full = f"{row['full_score']:.2f}, {row['full_log_probability']:.2f}"
        rank = f"{RANKED[row['rule']['rank']]} by {RANKED[row['rule']['sketch']]}"
        begin = [f"`{row['policy']}`", f"{row['budget']:g}", rank, full]
        lines.setdefault(key, begin).append(_cell(row))
    if medium is None:  # for the terminal: all that tells arms apart
        return "\n".join(f"{' '.join(key)}: {'  '.join(line[3:])}" for key, line in lines.items())
    if not lines:
        return NOTHING
    return markdown_table(("policy", "budget", "ranked by", "full cache", *map(str, tokens)), list(lines.values()))


def _cell(row: Row) -> str:
    """Bold where the target is met: 0.95 of the full cache's right answers, log-probability within 0.1 nats."""
    text = f"{row['score']:.2f}, {row['log_probability']:.2f}"
    near = row["log_probability"] >= row["full_log_probability"] - 0.1
    return f"**{text}**" if near and row["score"] >= 0.95 * row["full_score"] else text


def sketches_table(result: Result, policy: str, budget: float) -> str:
    """Sketches down, tokens that come back across."""
    rows = [row for row in result["summary"] if (row["policy"], row["budget"]) == (policy, budget)]
    counts = list(dict.fromkeys(row["tokens"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        line = lines.setdefault(row["sketch"], [row["sketch"], f"{row['bytes']:g}"])
        line.append(f"{row['found']:.2f}, {row['mass']:.2f}")
    return markdown_table(("sketch", "bytes", *map(str, counts)), list(lines.values()))


def loyalty_table(result: Result) -> str:
    """What is kept down, tokens that come back across."""
    rows = result["summary"]
    counts = list(dict.fromkeys(row["tokens"] for row in rows))
    lines: dict[tuple[str, float], list[str]] = {}
    for row in rows:
        line = lines.setdefault((row["policy"], row["budget"]), [f"`{row['policy']}`", f"{row['budget']:g}"])
        line.append(f"{row['agreement']:.3f}, {row['first']:.0f}")
    return markdown_table(("policy", "budget", *map(str, counts)), list(lines.values()))


def hits_table(result: Result) -> str:
    """What is kept down, sizes of the area across."""
    rows = result["hits"]
    sizes = list(rows[0]["rates"])
    lines = [
        [
            f"`{row['policy']}`",
            f"{row['budget']:g}",
            str(row["tokens"]),
            *(f"{row['rates'][size]:.2f}" for size in sizes),
        ]
        for row in rows
    ]
    return markdown_table(("policy", "budget", "tokens", *(f"{size}x" for size in sizes)), lines)


def instruments_table(result: Result) -> str:
    """Models and kept sets down, tokens that come back across."""
    rows = result["summary"]
    counts = list(dict.fromkeys(row["tokens"] for row in rows))
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (row["model"], row["policy"], row["sketch"])
        line = lines.setdefault(key, [f"`{row['model']}`", row["policy"], row["sketch"], str(row["count"])])
        line.append(f"{row['same']:.2f}")
    return markdown_table(("model", "kept by", "ranked by", "questions", *map(str, counts)), list(lines.values()))


Maker = Callable[[Result], str]
BLOCKS: Mapping[str, tuple[Path, Maker]] = {
    "recall-sketches-keydiff": (SKETCHES, lambda result: sketches_table(result, "keydiff", 0.1)),
    "recall-sketches-vlcache": (SKETCHES, lambda result: sketches_table(result, "vlcache", 0.1)),
    "recall-image": (ANSWERS, lambda result: answers_table(result, "image")),
    "recall-text": (ANSWERS, lambda result: answers_table(result, "text")),
    "recall-loyalty": (LOYALTY, loyalty_table),
    "recall-hits": (LOYALTY, hits_table),
    "recall-instruments": (INSTRUMENTS, instruments_table),
}
"""File and maker of each generated part of the page, by the name of its markers."""


def _block(path: Path, make: Maker) -> str:
    if not path.exists():
        return NOTHING
    result = json.loads(path.read_text())
    return f"{make(result)}\n\n{origin(result)}"


def rendered(page: str) -> str:
    """`page` with its generated parts made anew."""
    return with_blocks(page, {name: _block(*maker) for name, maker in BLOCKS.items()})


def _rule(row: Row) -> dict[str, Any]:
    """How tokens are ranked, however many come back."""
    return {name: value for name, value in row["rule"].items() if name != "tokens"}


def draw(result: Result, path: Path) -> None:
    """Right answers as images over the tokens that come back, a panel per budget."""
    from matplotlib.figure import Figure

    rows = [row for row in result["summary"] if row["medium"] == "image"]
    rows = [row for row in rows if _rule(row) == _rule(rows[0])]
    budgets: Sequence[float] = sorted({row["budget"] for row in rows}, reverse=True)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axis, budget in zip(axes, budgets, strict=True):
        mine = [row for row in rows if row["budget"] == budget]
        axis.axhline(mine[0]["full_score"], color="black", linestyle=":", linewidth=1.5, label="full cache")
        for policy in dict.fromkeys(row["policy"] for row in mine):
            points = {row["rule"]["tokens"]: row["score"] for row in mine if row["policy"] == policy}
            axis.plot(range(len(points)), list(points.values()), marker="o", markersize=4, label=policy)
            axis.set_xticks(range(len(points)), list(map(str, points)))
        axis.set(
            title=f"budget {budget:g}", xlabel="evicted tokens that come back per layer and step", ylim=(-0.03, 1.03)
        )
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def write() -> None:
    """The page's parts and the figure."""
    PAGE.write_text(rendered(PAGE.read_text()))
    if ANSWERS.exists():
        draw(json.loads(ANSWERS.read_text()), FIGURE)
