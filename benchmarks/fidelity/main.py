"""What compression costs in right answers, on the bundled models: the experiments of docs/fidelity.md.

Each experiment but `recall` (`recall.py`) and `inspect` is one or more calls of `vlcache eval` with the same output
folder, so an interrupted run goes on where it stopped.  A finished experiment becomes
`benchmarks/results/fidelity-NAME.json`, and the page's tables and plots are made from these files alone:

    python benchmarks/run.py fidelity                      # everything that is missing, then the page
    python benchmarks/run.py fidelity requery --time-limit 8
    python benchmarks/run.py fidelity --page               # only the page
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console

from benchmarks.common.host import ROOT, host_block
from benchmarks.common.pages import with_blocks
from benchmarks.common.results import RESULTS, save
from benchmarks.fidelity import recall
from vlcache_sgl.cli import eval as evaluation
from vlcache_sgl.cli import inspect as inspection
from vlcache_sgl.client.server import BUNDLED_FLAGS, ServerProcess, interruptible
from vlcache_sgl.evaluation.report import by_index, markdown_table, percent, plot_budgets, plot_index
from vlcache_sgl.evaluation.run import FULL
from vlcache_sgl.evaluation.stats import interval, mean
from vlcache_sgl.inspection.layout import read_report
from vlcache_sgl.inspection.sheet import draw_sheet
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import describe

PAGE, FIGURES = ROOT / "docs/fidelity.md", ROOT / "docs/figures"
OUT = ROOT / "out/fidelity"
COMMAND = "python benchmarks/run.py fidelity"
RECALL, INSPECT = "recall", "inspect"
"""The experiments that are no calls of `vlcache eval`."""
GROUNDED, UNGROUNDED = "models/tinyvlm/grounded", "models/tinyvlm/ungrounded"
QUERY_AWARE = ("vlcache", "snapkv")
AGNOSTIC = ("keydiff", "expected_attention", "infinipot_v", "compactor", "knorm", "random")
BUDGETS = ("0.4", "0.2", "0.1")
SCORERS = {"accumulated": "h2o", "window": "snapkv", "post-vision": "vlcache", "random": "random"}
ALLOCATORS = {"uniform": "uniform", "pyramid": "pyramid", "density": "vlcache", "equal mass": "prefixkv"}
SENSITIVITY = {
    **{f"threshold {value}": f"vlcache:density,threshold={value}" for value in ("0.001", "0.1")},
    **{
        f"last {value} post-vision rows": f"vlcache:density,scorer.rows={value},allocator.rows={value}"
        for value in ("1", "4", "16")
    },
}
"""Policies of the table of sensitivity, by what the table calls them."""
INSPECTED = argparse.Namespace(image=None, question=None, policy=None, budget=None, max_tokens=inspection.MAX_TOKENS)
"""Arguments of `vlcache inspect`: its own image and question, the server's policy and budget."""
ALONE = "recent=0.1,floor=0.5"
"""Selection of every cell of the ablation: that of `vlcache:density`."""


POLICYS_COPY = ("--kv-share", "policy")
"""What experiments ask about: what a policy keeps for one question is worth to the next."""


class Experiment(NamedTuple):
    """Calls of `vlcache eval` that fill one folder."""

    model: str
    calls: tuple[tuple[str, ...], ...]


def composed(scorer: str, allocator: str) -> str:
    """A cell of the ablation, as a value of `kv_policy`."""
    return f"scorer={SCORERS[scorer]},allocator={ALLOCATORS[allocator]},{ALONE}"


def recipes() -> list[str]:
    """All built-in recipes."""
    own = (item for item in describe(registry()) if item.kind == "policy" and item.provider.split()[0] == "vlcache-sgl")
    return [item.name for item in own]


def experiments() -> dict[str, Experiment]:
    """By name, in the order of the page."""
    ablation = [composed(scorer, allocator) for scorer in SCORERS for allocator in ALLOCATORS]
    few = ("vlcache", "snapkv", "h2o", "keydiff")
    requery = ("--task", "requery", "--samples", "20", "--budget", *BUDGETS)
    return {
        "requery": Experiment(
            GROUNDED,
            (
                (*requery, "--policy", *QUERY_AWARE, *AGNOSTIC),
                (*requery, "--policy", *QUERY_AWARE, "keydiff", "--sharing", "private"),
            ),
        ),
        "recipes": Experiment(
            GROUNDED,
            (("--task", "single", "--samples", "20", "--policy", *recipes(), "--budget", "0.4", "0.2", "0.1", "0.05"),),
        ),
        "ablation": Experiment(
            GROUNDED,
            (
                ("--task", "single", "--samples", "20", "--policy", *ablation, "--budget", "0.1", "0.05"),
                ("--task", "single", "--samples", "20", "--policy", *SENSITIVITY.values(), "--budget", "0.1", "0.05"),
            ),
        ),
        "long": Experiment(
            GROUNDED,
            (("--task", "long", "--samples", "20", "--budget", *BUDGETS, "--policy", *few),),
        ),
        "adversarial": Experiment(
            UNGROUNDED,
            (
                ("--task", "single", "--samples", "20", "--budget", *BUDGETS, "--policy", *few),
                (*requery, "--policy", "vlcache", "keydiff"),
            ),
        ),
    }


def names() -> list[str]:
    """All experiments."""
    return [*experiments(), RECALL, INSPECT]


def result_path(name: str) -> Path:
    """Where a finished experiment is committed."""
    return RESULTS / f"fidelity-{name}.json"


def run(name: str, experiment: Experiment, time_limit: float | None, console: Console) -> bool:
    """Ask what is missing; whether everything has been asked."""
    folder = OUT / name
    started, deadline = host_block(), None if time_limit is None else time.monotonic() + 60 * time_limit
    flags = [*BUNDLED_FLAGS, *evaluation.FLAGS, *POLICYS_COPY]
    console.rule(name)
    with ServerProcess(experiment.model, flags, title=name, console=console) as server:
        for call in experiment.calls:
            argv = [*call, "--base-url", server.url, "--output", str(folder)]
            if deadline is not None:
                argv += ["--time-limit", str(max(0.01, (deadline - time.monotonic()) / 60))]
            code = evaluation.main(argv)
            if code:
                console.print(f"{name}: not finished, exit code {code}", style="red" if code != 3 else "")
                return False
    result = json.loads((folder / evaluation.RESULT).read_text())
    command = f"{COMMAND} {name}"
    calls = [" ".join(("vlcache eval", *call)) for call in experiment.calls]
    head = {"task": "fidelity", "command": command, "calls": calls, "server_flags": flags, "host": started}
    written(name, {**head, **result}, console)
    return True


def run_recall(console: Console) -> None:
    """Both models, a few minutes; begins anew when it was interrupted."""
    flags, started = [*BUNDLED_FLAGS, *evaluation.FLAGS], host_block()
    console.rule(RECALL)
    records = [record for model in (GROUNDED, UNGROUNDED) for record in recall.measure(model, flags, console)]
    head = {"task": "fidelity", "command": f"{COMMAND} {RECALL}", "server_flags": flags}
    settings = {"budget": recall.BUDGET, "policies": {name: recall.policy(name) for name in recall.SCORES}}
    result = {**head, "host": started, **settings, "summary": recall.summarise(records), "records": records}
    written(RECALL, result, console)


def run_inspect(console: Console) -> None:
    """One image, as `vlcache inspect` sees it."""
    flags, started = [*BUNDLED_FLAGS, *evaluation.FLAGS], host_block()
    images, question = inspection.images_of(INSPECTED)
    with ServerProcess(GROUNDED, flags, title=INSPECT, console=console) as server:
        seen = inspection.inspect(server, images, question, INSPECTED)
    head = {"task": "fidelity", "command": f"{COMMAND} {INSPECT}", "server_flags": flags}
    written(INSPECT, {**head, "host": started, "inspection": seen}, console)


def written(name: str, result: Mapping[str, Any], console: Console) -> None:
    """Write the result of an experiment, one record per line."""
    console.print(f"written: {save(result_path(name), result, evaluation.dump(dict(result)))}")


# -- the page ---------------------------------------------------------------------------------------------------------


def page_blocks(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The generated parts of the page, by the names of their markers; those whose experiment is missing say so."""
    makers = {
        "requery": ("requery", requery_table),
        "requery-index": ("requery", index_table),
        "recipes": ("recipes", recipes_table),
        "ablation": ("ablation", ablation_table),
        "sensitivity": ("ablation", sensitivity_table),
        "long": ("long", long_table),
        "adversarial": ("adversarial", adversarial_table),
        "recall": (RECALL, recall.table),
    }
    return {
        name: make(results[source]) + "\n\n" + origin(results[source]) if source in results else "Not measured yet."
        for name, (source, make) in makers.items()
    }


def origin(result: Mapping[str, Any]) -> str:
    """Where the numbers come from."""
    host = result["host"]
    models = [result["model"]] if "model" in result else dict.fromkeys(row["model"] for row in result["summary"])
    where = (
        f"`{result['command']}`, model {' and '.join(f'`{model}`' for model in models)}, {host['date'][:10]}, "
        f"SGLang {host['packages']['sglang']}, {host['cores']} CPU cores, float32."
    )
    failed = [row["failed"] for row in result["summary"] if "failed" in row]
    return f"{where} Policies that failed: {sum(failed)}." if failed else where


def rows_of(result: Mapping[str, Any], task: str) -> dict[str, Mapping[str, Any]]:
    """The summary of a task, by condition as it is called today."""
    return {_today(row["condition"]): row for row in result["summary"] if row["task"] == task}


def _today(condition: str) -> str:
    """Committed results have parameters of `vlcache` that are those of `vlcache:density` by now."""
    return re.sub(r"^vlcache:(?=threshold=|scorer\.rows=)", "vlcache:density,", condition)


def cell(row: Mapping[str, Any] | None) -> str:
    """A score with its interval."""
    if row is None:
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(row["score"], *row["interval"])


def without_first(records: Sequence[Mapping[str, Any]], condition: str) -> Mapping[str, Any] | None:
    """The questions after the first one about each image."""
    mine = {r["sample"]: [q["score"] for q in r["questions"][1:]] for r in records if r["condition"] == condition}
    if not mine:
        return None
    low, high = interval(mine)
    return {"score": mean(mine), "interval": [low, high]}


def requery_table(result: Mapping[str, Any]) -> str:
    """First question, later questions on the shared prefix, later questions compressed for themselves."""
    records = result["records"]

    def first(condition: str) -> Mapping[str, Any]:
        return by_index(records, condition, "requery")[0]

    lines = [["full cache", "", "1", cell(first(FULL)), cell(without_first(records, FULL)), ""]]
    for kind, policies in (("yes", QUERY_AWARE), ("no", AGNOSTIC)):
        for policy in policies:
            for budget in BUDGETS:
                name = f"{policy}@{budget}"
                private = cell(without_first(records, f"{name} private"))
                shared = cell(without_first(records, name))
                lines.append([f"`{policy}`", kind, budget, cell(first(name)), shared, private])
    head = ("policy", "query-aware", "budget", "question 1", "questions 2 to 8, shared", "questions 2 to 8, private")
    return markdown_table(head, lines, left=2)


def index_table(result: Mapping[str, Any]) -> str:
    """Score by question number for a few policies."""
    lines = []
    chosen = [FULL, *(f"{policy}@{budget}" for policy in ("vlcache", "snapkv", "keydiff") for budget in BUDGETS)]
    for condition in chosen:
        scores = [f"{row['score']:.2f}" for row in by_index(result["records"], condition, "requery")]
        lines.append([f"`{condition}`", *scores])
    return markdown_table(("shared prefix", *map(str, range(1, 9))), lines)


def recipes_table(result: Mapping[str, Any]) -> str:
    """Recipes by budget, best at 0.1 first."""
    rows = rows_of(result, "single")
    budgets = ("0.4", "0.2", "0.1", "0.05")
    policies = {name.rpartition("@")[0] for name in rows if name != FULL}
    names = sorted(policies, key=lambda name: (*(-rows[f"{name}@{b}"]["score"] for b in ("0.1", "0.05", "0.2")), name))
    lines = [["full cache", *[cell(rows[FULL])] * len(budgets)]]
    lines += [[f"`{name}`", *(cell(rows.get(f"{name}@{budget}")) for budget in budgets)] for name in names]
    return markdown_table(("policy", *budgets), lines)


def ablation_table(result: Mapping[str, Any]) -> str:
    """Scores down, budgets across, at both budgets."""
    rows = rows_of(result, "single")
    parts = []
    for budget in ("0.1", "0.05"):
        lines = [
            [scorer, *(cell(rows.get(f"{composed(scorer, allocator)}@{budget}")) for allocator in ALLOCATORS)]
            for scorer in SCORERS
        ]
        parts.append(markdown_table((f"budget {budget}: scores", *ALLOCATORS), lines))
    return "\n\n".join([f"Full cache: {cell(rows[FULL])}.", *parts])


def sensitivity_table(result: Mapping[str, Any]) -> str:
    """`vlcache:density` with other thresholds and numbers of rows."""
    rows = rows_of(result, "single")
    cases = {"the recipe: threshold 0.01, all rows": composed("post-vision", "density"), **SENSITIVITY}
    lines = [
        [case, *(cell(rows.get(f"{policy}@{budget}")) for budget in ("0.1", "0.05"))] for case, policy in cases.items()
    ]
    return markdown_table(("`vlcache:density`", "0.1", "0.05"), lines)


def long_table(result: Mapping[str, Any]) -> str:
    """How far outputs follow those of the full cache."""
    lines = [
        [f"`{name}`", cell(row), percent(row["agreement"]), f"{row['divergence']:.3f}"]
        for name, row in rows_of(result, "long").items()
    ]
    return markdown_table(("condition", "answer right", "follows the full cache", "divergence (nats)"), lines)


def adversarial_table(result: Mapping[str, Any]) -> str:
    """First questions, then later ones on a shared prefix."""
    single = rows_of(result, "single")
    lines = []
    for name, row in single.items():
        later = without_first([r for r in result["records"] if r["task"] == "requery"], name)
        lines.append([f"`{name}`", cell(row), cell(later)])
    return markdown_table(("condition", "one question", "questions 2 to 8, shared"), lines)


def draw_plots(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The page's figures."""
    FIGURES.mkdir(exist_ok=True)
    if "requery" in results:
        names = (*QUERY_AWARE, *AGNOSTIC[:3])
        panels = {f"budget {budget}": [FULL, *(f"{name}@{budget}" for name in names)] for budget in reversed(BUDGETS)}
        path = FIGURES / "fidelity-requery.png"
        plot_index(results["requery"]["records"], "requery", panels, lambda name: name.partition("@")[0], path)
    if "recipes" in results:
        shown = ("vlcache", "snapkv", "pyramidkv", "h2o", "keydiff", "streaming", "random", "zipvl")
        rows = [r for r in results["recipes"]["summary"] if r["condition"].partition("@")[0] in (FULL, *shown)]
        plot_budgets(rows, FIGURES / "fidelity-recipes.png")
    if {"recipes", "requery"} <= set(results):
        draw_front(results["recipes"], results["requery"], FIGURES / "fidelity.png")
    if RECALL in results:
        recall.draw(results[RECALL], FIGURES / "fidelity-recall.png")
    if INSPECT in results:
        path = FIGURES / "inspect.png"
        images, _ = inspection.images_of(INSPECTED)
        draw_sheet(read_report(images=images, **results[INSPECT]["inspection"]), path)
        # Half the size, and nobody sees it.
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


FRONT = {"vlcache": "#0b7285", "snapkv": "#e8590c", "h2o": "#2b8a3e", "keydiff": "#5f3dc4", "random": "#868e96"}
"""Policies of the README's figure: post-vision rows, the last rows, all rows, keys alone, chance."""
FRONT_BUDGETS = ("0.05", "0.1", "0.2", "0.4")


def draw_front(recipes: Mapping[str, Any], requery: Mapping[str, Any], path: Path) -> None:
    """Right answers over budget, for the question that compresses and for those that share its copy."""
    from matplotlib.figure import Figure

    single, records = rows_of(recipes, "single"), requery["records"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    first, later = figure.subplots(1, 2, sharey=True)
    first.set_title("The question that compresses the image", fontsize=12)
    later.set_title("Questions 2 to 8 about the same image", fontsize=12)
    for axis, full in ((first, single[FULL]), (later, without_first(records, FULL))):
        assert full is not None
        axis.axhline(full["score"], color="black", linestyle=":", linewidth=1.5, label="full cache")
        axis.set(xscale="log", xlim=(0.043, 0.46), ylim=(-0.04, 1.06), xlabel="budget: share of the prompt kept")
        axis.set_xticks([float(budget) for budget in FRONT_BUDGETS], ["5 %", "10 %", "20 %", "40 %"])
        axis.minorticks_off()
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    for number, policy in enumerate(FRONT):
        _front_line(first, number, policy, {b: single.get(f"{policy}@{b}") for b in FRONT_BUDGETS}, label=policy)
        _front_line(later, number, policy, {b: without_first(records, f"{policy}@{b}") for b in FRONT_BUDGETS})
    private = {b: without_first(records, f"vlcache@{b} private") for b in FRONT_BUDGETS}
    _front_line(later, 0, "vlcache", private, linestyle="--", markerfacecolor="white")
    later.text(0.0455, 1.015, "each question compressing for itself (vlcache)", color=FRONT["vlcache"])
    later.text(0.0455, 0.36, "all sharing what the first question kept", color="#495057")
    first.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    first.set_ylabel("right answers")
    handles, _ = first.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    figure.savefig(path, dpi=150)


def _front_line(
    axis: Any, number: int, policy: str, rows: Mapping[str, Mapping[str, Any] | None], **style: Any
) -> None:
    """One policy over budget with its intervals, beside the others: what is equal would be hidden otherwise."""
    points = [(float(budget) * 1.022 ** (number - 2), row) for budget, row in rows.items() if row is not None]
    if not points:
        return
    budgets, found = zip(*points, strict=True)
    scores = [row["score"] for row in found]
    low, high = zip(*(row["interval"] for row in found), strict=True)
    colour = FRONT[policy]
    axis.vlines(budgets, low, high, color=colour, alpha=0.4, linewidth=2)
    look = {"color": colour, "marker": "o", "markersize": 5.5, "linewidth": 2, "zorder": 3 - 0.1 * number}
    axis.plot(budgets, scores, **{**look, **style})


def committed() -> dict[str, dict[str, Any]]:
    """The results that there are, by name."""
    return {name: json.loads(result_path(name).read_text()) for name in names() if result_path(name).exists()}


def rendered(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """`page` with the blocks between its markers made anew."""
    return with_blocks(page, page_blocks(results))


def write_page() -> None:
    """Tables between the page's markers and the figures beside it, from the committed results."""
    results = committed()
    PAGE.write_text(rendered(PAGE.read_text(), results))
    draw_plots(results)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run what is missing, then write the page; 3 when something is not finished."""
    os.chdir(ROOT)  # the model's path is part of the results
    chosen = arguments.names or names()
    unfinished = []
    if not arguments.page:
        with interruptible():
            for name in chosen:
                if result_path(name).exists() and not arguments.names:
                    continue
                if name == RECALL:
                    run_recall(console)
                elif name == INSPECT:
                    run_inspect(console)
                elif not run(name, experiments()[name], arguments.time_limit, console):
                    unfinished.append(name)
    write_page()
    return 3 if unfinished else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names())}; default: what is missing")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="of each experiment; run again to go on")
    parser.add_argument("--page", action="store_true", help="ask nothing, write tables and plots again")
