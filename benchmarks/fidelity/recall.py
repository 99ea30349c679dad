"""Of a full cache's attention while it answers, how much falls on what each score would have kept?

One question per image, asked with `kv_report: attention`, so answers are those of the full cache.  Part of
`fidelity.py`, which writes the result down and puts table and figure into docs/fidelity.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track

from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import ServerProcess
from vlcache_sgl.evaluation.data import TASKS
from vlcache_sgl.evaluation.report import COLOURS, markdown_table
from vlcache_sgl.evaluation.scores import score

BUDGET = "0.1"
IMAGES = 20
AT_ONCE = 4
SCORES = {
    "post-vision": "vlcache",
    "window": "snapkv",
    "last row": "tova",
    "accumulated": "h2o",
    "keys alike": "keydiff",
    "recent": "streaming",
    "random": "random",
}
"""Under equal layer budgets, so that every score keeps as many tokens of every layer."""
FIGURES = {"cache_hit_rate": "cache hit rate", "attention_mass": "attention mass"}


def policy(name: str) -> str:
    """Value of `kv_policy` for an entry of SCORES."""
    return f"scorer={SCORES[name]},allocator=uniform,recent=0.1"


def measure(model: str, flags: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """One record per image and score: `model`, `sample`, `scores`, `right`, `kept_tokens_per_layer`, and the report
    of `kv_report: attention`."""
    samples = [TASKS["single"](number) for number in range(IMAGES)]
    work = [(sample, name) for sample in samples for name in SCORES]
    with ServerProcess(model, flags, title=f"recall {Path(model).name}", console=console) as server:
        client = Client(server.openai_url)

        def one(pair: Any) -> dict[str, Any]:
            sample, name = pair
            (question,) = sample.questions
            answer = client.ask(
                question.text,
                *sample.open_images(),
                max_tokens=question.max_tokens,
                custom_params={"kv_policy": policy(name), "kv_budget": BUDGET, "kv_report": "attention"},
                return_meta_info=True,
            )
            return {
                "model": model,
                "sample": sample.id,
                "scores": name,
                "right": score(question.metric, answer.text, question.answers),
                "kept_tokens_per_layer": answer.report["kept_tokens_per_layer"],
                **answer.report["attention"],
            }

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(track(pool.map(one, work), "asking", len(work), console=console))


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model and score, means over images: `cache_hit_rate` and `attention_mass` per layer, and `steps`."""
    rows = []
    for model, name in dict.fromkeys((record["model"], record["scores"]) for record in records):
        mine = [record for record in records if (record["model"], record["scores"]) == (model, name)]
        row = {"model": model, "scores": name, "samples": len(mine), "right": fmean(r["right"] for r in mine)}
        row["steps"] = fmean(record["steps"] for record in mine)
        for figure in FIGURES:
            row[figure] = [round(fmean(column), 4) for column in zip(*(r[figure] for r in mine), strict=True)]
        rows.append(row)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Both figures of both models, per layer."""
    layers = len(result["summary"][0]["cache_hit_rate"])
    lines = []
    for figure, title in FIGURES.items():
        for row in result["summary"]:
            cells = [f"{value:.2f}" for value in (*row[figure], fmean(row[figure]))]
            lines.append([title, f"`{Path(row['model']).name}`", row["scores"], *cells])
    return markdown_table(
        ("share", "model", "scores", *(f"layer {number}" for number in range(layers)), "mean"), lines, left=3
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A panel per model and figure, a group of bars per layer."""
    from matplotlib.figure import Figure

    rows = result["summary"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(len(FIGURES), len(models), sharex=True, sharey=True, squeeze=False)
    for line, (key, title) in zip(panels, FIGURES.items(), strict=True):
        for axis, model in zip(line, models, strict=True):
            mine = [row for row in rows if row["model"] == model]
            width = 0.85 / len(mine)
            for number, row in enumerate(mine):
                places = [layer + (number - (len(mine) - 1) / 2) * width for layer in range(len(row[key]))]
                axis.bar(places, row[key], width, label=row["scores"], color=COLOURS[number % len(COLOURS)])
            axis.axhline(float(BUDGET), color="black", linestyle=":", linewidth=1, label=f"budget {BUDGET}")
            axis.set(title=f"{title}, {Path(model).name}", ylim=(0, 1))
            axis.set_xticks(range(len(mine[0][key])))
            axis.grid(axis="y", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[-1]:
        axis.set_xlabel("layer")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False, title="scores")
    figure.savefig(path, dpi=140)
