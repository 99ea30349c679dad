"""What `main.py` and `soak.py` came to: targets, tables, plots, and the results in docs/capacity.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.capacity.loads import LOADS
from benchmarks.common.host import ROOT
from benchmarks.common.pages import with_block
from benchmarks.common.results import RESULTS
from benchmarks.speed.main import MODEL_NAME

PAGE = ROOT / "docs/capacity.md"
MARKERS = "capacity"
STOCK = "stock"
"""The server that the others are compared with."""
EXACT = "ours 0.1, exact"
"""The server that shares prefixes from host memory, of the size that it chooses: twice the pool."""
EXACT_ALL = "ours 0.1, exact, host memory for all"
"""The same with host memory for all images of the working set."""


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row its ratios to stock."""
    stock = next((row for row in rows if row["server"] == STOCK), None)
    if stock is None:
        return
    for row in rows:
        for key in ("running_peak", "running_mean_while_others_wait", "tokens_per_s", "ttft_mean_ms", "latency_p95_ms"):
            row[f"{key}_ratio"] = round(row[key] / stock[key], 3) if stock[key] else None


def check_targets(load: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was to be reached, and whether it was."""
    found = {row["server"]: row for row in rows}
    stock, tenth, exact, exact_all = (found.get(name) for name in (STOCK, "ours 0.1", EXACT, EXACT_ALL))
    if stock is None:
        return {}
    checks: dict[str, tuple[float, str, float]] = {}
    for name, row, times in (("ours 0.1", tenth, 6), (EXACT, exact, 8)):
        if load == "in-flight" and row is not None and row["requests"] >= times * stock["running_peak"]:
            checks[f"running requests, {name} / stock"] = (row["running_peak_ratio"], "at least", times)
    if load == "working-set":
        checks["hit rate, stock"] = (stock["hit_rate"], "at most", 0.4)
        for name, row, rate, times in (("ours 0.1", tenth, 0.9, 3), (EXACT_ALL, exact_all, 0.95, 5)):
            if row is not None:
                checks[f"hit rate, {name}"] = (row["hit_rate"], "at least", rate)
                checks[f"mean first token, stock / {name}"] = (1 / row["ttft_mean_ms_ratio"], "at least", times)
        if exact_all is not None:
            checks[f"right answers, {EXACT_ALL}, less stock's"] = (exact_all["right"] - stock["right"], "at least", 0)
    return {
        name: {
            "target": f"{direction} {bound:g}",
            "value": round(value, 3),
            "reached": value >= bound if direction == "at least" else value <= bound,
        }
        for name, (value, direction, bound) in checks.items()
    }


def table_of(result: dict[str, Any]) -> Table:
    """One row per server."""
    table = Table(title=f"{title_of(result)}: {result['about']}", title_justify="left")
    table.add_column("server", no_wrap=True)
    for name in ("running: most", "mean", "tokens/s", "hit rate", "TTFT mean, p95 ms", "latency p50, p95 ms", "right"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["server"],
            str(row["running_peak"]),
            f"{row['running_mean_while_others_wait']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['hit_rate']:.3f}",
            f"{row['ttft_mean_ms']:.0f}, {row['ttft_p95_ms']:.0f}",
            f"{row['latency_p50_ms']:.0f}, {row['latency_p95_ms']:.0f}",
            f"{row['right']}/{row['judged']}",
        )
    return table


def title_of(result: dict[str, Any]) -> str:
    """Load, model, and ranks where there are several."""
    ranks = result.get("tensor_parallel", 1)
    return f"{result['load']}, {result['model']}" + (f", tensor parallel {ranks}" if ranks > 1 else "")


def plot(result: dict[str, Any], path: Path) -> None:
    """Requests that decode together over the run, and the figures beside each other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *right) = pyplot.subplots(1, 4, figsize=(14, 3.6), width_ratios=(2.2, 1, 1, 1), layout="constrained")
    rows = result["rows"]
    names = [row["server"] for row in rows]
    colours = [f"C{number}" for number in range(len(names))]
    for row, colour in zip(rows, colours, strict=True):
        running = sorted((running for running, _ in row["decode_steps"]), reverse=True)
        share = [(i + 1) / len(running) for i in range(len(running))]
        # Stock over ours 1.0, which it often equals.
        style, order = ("--", 3) if row["server"] == STOCK else ("-", 2)
        left.step(share, running, style, label=row["server"], color=colour, where="pre", zorder=order)
    left.set(
        xlabel="decode steps, most crowded first", ylabel="requests decoding together", ylim=(0, None), xlim=(0, 1)
    )
    left.legend()
    middle = (
        ("most together", "running_peak", 1.0)
        if result["load"] == "in-flight"
        else ("prefix hit rate", "hit_rate", 1.0)
    )
    panels = (("tokens / s", "tokens_per_s", 1.0), middle, ("first token, mean s", "ttft_mean_ms", 1e-3))
    for axis, (title, key, scale) in zip(right, panels, strict=True):
        bars = axis.bar(names, [row[key] * scale for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.3g")
        axis.set(title=title)
        axis.tick_params(axis="x", rotation=30)
        axis.margins(y=0.15)
    figure.suptitle(f"{title_of(result)}: {result['about']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def result_paths() -> list[Path]:
    """The committed results, the loads in the order of `LOADS`."""
    found = RESULTS.glob("*-capacity-*.json")
    names = [load.name for load in LOADS]
    return sorted(
        found,
        key=lambda path: (MODEL_NAME in path.name, "-tp2-" in path.name, [n in path.name for n in names].index(True)),
    )


def soak_paths() -> list[Path]:
    """The committed results of `soak.py`."""
    return sorted(RESULTS.glob("*-soak-*.json"))


def block(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The Markdown between the markers, from (path of the plot, result)."""
    parts = []
    for plot_path, result in results:
        host = result["host"]
        parts += [
            f"### {title_of(result)}",
            "",
            f"{result['about'].capitalize()}.",
            "",
            "| server | decode together: most, mean while others wait | tokens/s | prefix hit rate "
            "| first token ms: mean, p95 | latency ms: p50, p95 | right |",
            "|---" * 7 + "|",
        ]
        for row in result["rows"]:
            first = f"{row['ttft_mean_ms']:.0f}, {row['ttft_p95_ms']:.0f}"
            latency = f"{row['latency_p50_ms']:.0f}, {row['latency_p95_ms']:.0f}"
            parts.append(
                f"| {row['server']} | {row['running_peak']}, {row['running_mean_while_others_wait']:.1f} "
                f"| {row['tokens_per_s']:.1f} | {row['hit_rate']:.3f} | {first} | {latency} "
                f"| {row['right']} of {row['judged']} |"
            )
        parts.append("")
        for name, check in result["targets"].items():
            reached = "reached" if check["reached"] else "**not reached**"
            parts.append(f"* {name}: {check['value']:.2f}; wanted {check['target']}: {reached}")
        parts += [
            "",
            f"`{result['command']}`; SGLang {host['packages']['sglang']}, {host['cores']} CPU cores, float32.",
            "",
            f"![{result['load']}]({plot_path})",
            "",
        ]
    return "\n".join(parts).rstrip()


def soak_line(result: dict[str, Any]) -> str:
    """What one run of `soak.py` came to."""
    state, memory = result["kv_policy_at_end"], [memory for _, memory, *_ in result["samples"]]
    third = len(memory) // 3
    early, late = max(memory[:third]) / 1e9, max(memory[-third:]) / 1e9
    verdict = f"**Failed**: {'; '.join(result['problems'])}." if result["problems"] else "Nothing lost, nothing wrong."
    return (
        f"{result['minutes']:g} minutes, {result['clients']} clients, {result['requests']} requests: "
        f"{result['outcomes']['in full, as stock']} answers at budget 1.0 were compared with stock SGLang's and are "
        f"the same, {result['outcomes']['compressed, as alone']} at the server's budget with those of the same "
        f"questions asked alone. {result['retracted']} requests were retracted, {state['prefix_hits']} compressed "
        f"prefixes hit; host memory of {state['host_tokens_total']} tokens was written "
        f"{state['host_bytes_written'] / state['host_bytes_per_token'] / state['host_tokens_total']:.0f} times over. "
        f"After the last flush {state['cells_used']} of {state['cells_total']} cells and "
        f"{state['host_tokens_used']} of {state['host_tokens_total']} tokens of host memory were used. "
        f"Resident memory: at most {early:.2f} GB in the first third of the time, {late:.2f} GB in the last. {verdict}"
    )


def soak_block(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown about soaks."""
    parts = []
    for result in results:
        host = result["host"]
        source = f"`{result['command']}`; SGLang {host['packages']['sglang']}, {host['cores']} CPU cores, float32."
        parts += [f"### soak, {result['model']}", "", soak_line(result), "", source, ""]
    return "\n".join(parts).rstrip()


def rendered(page: str) -> str:
    """The page with the tables of the committed results."""
    results = [
        (f"../{path.with_suffix('.png').relative_to(ROOT)}", json.loads(path.read_text())) for path in result_paths()
    ]
    soaks = [json.loads(path.read_text()) for path in soak_paths()]
    text = "\n\n".join(part for part in (block(results), soak_block(soaks)) if part)
    return with_block(page, MARKERS, text)
