"""`vlcache top`: a running server, live: where its cells are, what is kept, what is shared.

Reads `GET /server_info` once per interval; nothing has to be switched on in the server.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vlcache_sgl.client.server import RunningServer

URL = "http://127.0.0.1:30000"
INTERVAL_S = 2.0
_BAR = 60
"""Width of the arena's bar, in characters."""
_SPARKS = "▁▂▃▄▅▆▇█"
PARTS = (
    ("own", "yellow", "█"),
    ("tree, in use", "green", "▓"),
    ("tree, evictable", "cyan", "▒"),
    ("free", "white", "░"),
)
"""Parts of the arena, with their colours, and characters that tell them apart without."""
_SUMMED = (
    *("cells_total", "cells_used", "cells_free", "cells_tree", "cells_evictable", "cells_seen", "cells_kept"),
    *("requests_compressed", "policy_failures", "prefix_hits", "prefix_hit_tokens"),
    *("host_tokens_total", "host_tokens_used", "host_bytes_written", "host_bytes_read", "staged_tokens"),
    *("prefill_ms", "scoring_ms", "selection_ms", "physical_tokens_total", "virtual_slots_total", "virtual_slots_free"),
)
_BY_LAYER = ("seen_by_layer", "kept_by_layer", "vision_seen_by_layer", "vision_kept_by_layer")


def main(argv: Sequence[str] | None = None) -> int:
    """Show until interrupted; returns the exit code."""
    arguments = _parser().parse_args(argv)
    server, console = RunningServer(arguments.base_url), Console()
    try:
        before, now = None, read(server)
        if arguments.once:
            console.print(view(server.url, now, None))
            return 0
        first, screen = view(server.url, now, before), console.is_terminal
        with Live(first, console=console, screen=screen, auto_refresh=False) as live:
            while True:
                time.sleep(arguments.interval)
                before, now = now, read(server)
                live.update(view(server.url, now, before), refresh=True)
    except (httpx.HTTPError, ValueError) as error:
        console.print(f"vlcache top: {server.url}: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 0


def read(server: RunningServer) -> dict[str, Any]:
    """The server's totals, of all its schedulers together, and when they were read (`at`, in seconds).

    Raises:
        httpx.HTTPError: when it does not answer.
        ValueError: when it runs without a policy.
    """
    info = server.server_info()
    states = [state["kv_policy"] for state in info["internal_states"] if state.get("kv_policy")]
    if not states:
        raise ValueError("the server runs without --kv-policy")
    total = combined(states)
    total["model"] = info.get("served_model_name") or info.get("model_path", "")
    total["schedulers"] = len(states)
    total["throughput"] = sum(state.get("last_gen_throughput") or 0.0 for state in info["internal_states"])
    total["at"] = time.monotonic()
    return total


def combined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals over the schedulers of a data-parallel server; settings are those of the first."""
    skipped: Counter[str] = Counter()
    for state in states:
        skipped.update(state["requests_skipped"])
    layers = {
        name: [sum(layer) for layer in zip(*(state[name] for state in states if state[name]), strict=True)]
        for name in _BY_LAYER
    }
    summed = {name: sum(state[name] for state in states) for name in _SUMMED}
    return {**states[0], **summed, **layers, "requests_skipped": dict(skipped)}


def arena(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Cells in the order of PARTS."""
    in_use = state["cells_tree"] - state["cells_evictable"]
    return state["cells_used"] - state["cells_tree"], in_use, state["cells_evictable"], state["cells_free"]


def bar(cells: Sequence[int], width: int = _BAR) -> list[int]:
    """Characters for each part: together `width`, at least one for what is not empty.

    >>> bar((1, 0, 500, 499), 20)
    [1, 0, 10, 9]
    """
    total = max(1, sum(cells))
    shares = [cell / total * width for cell in cells]
    chars = [max(1, int(share)) if cell else 0 for cell, share in zip(cells, shares, strict=True)]
    while sum(chars) != width and any(cells):
        more = sum(chars) < width
        gaps = [share - have if more else have - share for share, have in zip(shares, chars, strict=True)]
        places = [i for i, have in enumerate(chars) if cells[i] and (more or have > 1)]
        chars[max(places, key=lambda i: gaps[i])] += 1 if more else -1
    return chars


def spark(shares: Sequence[float]) -> str:
    """One block per layer, as high as the share that is kept, the largest full.

    >>> spark([0.1, 0.2, 0.4])
    '▂▄█'
    """
    most = max(shares, default=0.0) or 1.0
    return "".join(_SPARKS[max(0, min(7, round(share / most * 8) - 1))] for share in shares)


def view(url: str, now: Mapping[str, Any], before: Mapping[str, Any] | None) -> Panel:
    """Everything on one screen; rates are those since `before`."""
    seconds = now["at"] - before["at"] if before else 0.0

    def rate(name: str) -> str:
        return f"{(now[name] - before[name]) / seconds:.1f}/s" if before and seconds else ""

    table = Table.grid(padding=(0, 3))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    seen, kept = now["cells_seen"], now["cells_kept"]
    vision_seen, vision_kept = sum(now["vision_seen_by_layer"]), sum(now["vision_kept_by_layer"])
    table.add_row("prompts compressed", str(now["requests_compressed"]), rate("requests_compressed"), "")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(now["requests_skipped"].items()))
    table.add_row("left alone", str(sum(now["requests_skipped"].values())), "", reasons)
    failures = Text(str(now["policy_failures"]), style="bold red" if now["policy_failures"] else "")
    table.add_row("policy failures", failures, rate("policy_failures"), "")
    table.add_row("compressed prefixes hit", str(now["prefix_hits"]), rate("prefix_hits"), "")
    table.add_row("  tokens from them", str(now["prefix_hit_tokens"]), rate("prefix_hit_tokens"), "")
    if now["host_tokens_total"]:
        used, total, size = now["host_tokens_used"], now["host_tokens_total"], now["host_bytes_per_token"]
        held = f"{decimal(used * size)} of {decimal(total * size)}, written {decimal(now['host_bytes_written'])}"
        table.add_row("tokens in host memory", str(used), percent(used, total), held)
        table.add_row("  staged for prefills", str(now["staged_tokens"]), rate("staged_tokens"), "")
    table.add_row(
        "kept",
        percent(kept, seen),
        "",
        f"vision {percent(vision_kept, vision_seen)}, text {percent(kept - vision_kept, seen - vision_seen)}",
    )
    if now["seen_by_layer"]:
        shares = [k / max(1, s) for k, s in zip(now["kept_by_layer"], now["seen_by_layer"], strict=True)]
        table.add_row("  by layer", "", "", f"{spark(shares)}  {min(shares):.1%} to {max(shares):.1%}")
    scoring, selection, prefill = (now[f"{name}_ms"] for name in ("scoring", "selection", "prefill"))
    cost = f"scoring {percent(scoring, prefill)}, selection {percent(selection, prefill)}"
    table.add_row("cost, of the prefill", percent(scoring + selection, prefill), "", cost)
    table.add_row("decode", f"{now['throughput']:.0f} tok/s", "", "as SGLang has it")
    title = f"{now['model']}  {now['policy']}, budget {now['budget']}"
    if now["schedulers"] > 1:
        title += f"  {now['schedulers']} schedulers"
    return Panel(Group(_arena(now), Text(), table), title=Text(title), subtitle=url, title_align="left", expand=False)


def _arena(now: Mapping[str, Any]) -> Group:
    cells = arena(now)
    line, legend = Text("arena  "), Text("       ")
    for (name, colour, block), chars, count in zip(PARTS, bar(cells), cells, strict=True):
        line.append(block * chars, style=colour)
        legend.append(f"{block} ", style=colour)
        legend.append(f"{name} {percent(count, now['cells_total'])}   ")
    used, size = now["cells_used"] * now["bytes_per_cell"], now["cells_total"] * now["bytes_per_cell"]
    line.append(f"  {decimal(used)} of {decimal(size)}")
    tokens = now["cells_used"] // max(1, now["cells_per_token"])
    slots = now["virtual_slots_total"] - now["virtual_slots_free"]
    legend.append(f"\n       {slots} tokens held in the room of {tokens}")
    return Group(line, legend)


def percent(part: float, whole: float) -> str:
    """
    >>> percent(1, 8), percent(0, 0)
    ('12.5%', '-')
    """
    return f"{part / whole:.1%}" if whole else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlcache top", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--base-url", metavar="URL", default=URL, help=f"the server; default: {URL}")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help=f"seconds; default: {INTERVAL_S:g}")
    parser.add_argument("--once", action="store_true", help="print once and end")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
