"""How many users fit: stock SGLang and ours in equally many bytes, under four loads, one server after another.

The pool holds about eight uncompressed requests of one 32 x 32 image (1024 image tokens).  What SGLang gives its KV
cache in bytes is what ours gets for cells, residency table and slots together.  The loads are in `capacity_loads.py`,
tables and plots in `report.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.capacity.loads import LOADS, SIDE, Ask, Load, Outcome, Sender, about
from benchmarks.capacity.report import (
    EXACT,
    EXACT_ALL,
    PAGE,
    STOCK,
    add_ratios,
    check_targets,
    plot,
    rendered,
    result_paths,
    table_of,
)
from benchmarks.common.host import ROOT, command_line, device_name, host_block
from benchmarks.common.results import folder, save
from benchmarks.models.make_model import make_model
from benchmarks.speed.main import MODEL_NAME
from vlcache_sgl.client.server import ServerProcess, interruptible

MODELS: dict[str, Callable[[], Path]] = {
    "tinyvlm": lambda: ROOT / "models/tinyvlm/grounded",
    MODEL_NAME: lambda: make_model(ROOT / "out/bench-model"),
}
"""The bundled model, which answers; and one of random weights, whose prefill is dear beside reading an image."""
REQUEST_TOKENS = SIDE * SIDE + 48 + 32
"""Of one uncompressed request: image, template and question, answer."""
POOL_REQUESTS = 8
FLAGS = (
    *("--dtype", "float32", "--max-total-tokens", str(POOL_REQUESTS * REQUEST_TOKENS)),
    *("--chunked-prefill-size", "2048", "--max-running-requests", "128"),
    *("--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle", "--decode-log-interval", "1"),
)
ENVIRONMENT = {
    # glibc would keep each request's pixels (10 MB) in fragments of its heap: gigabytes over this run, stock or not.
    "MALLOC_MMAP_THRESHOLD_": "4194304",
}
TWO_RANKS = ("--tp", "2")
ONE_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


class Contender(NamedTuple):
    """A server in the comparison."""

    name: str
    flags: tuple[str, ...]


def compressing(budget: str, share: str) -> tuple[str, ...]:
    """Flags of ours."""
    return ("--kv-policy", "vlcache", "--kv-budget", budget, "--kv-share", share)


CONTENDERS = (
    Contender(STOCK, ()),
    *(Contender(f"ours {budget}", compressing(budget, "policy")) for budget in ("1.0", "0.2", "0.1")),
    Contender(EXACT, compressing("0.1", "exact")),
)
HOST_FOR_ALL = {"tinyvlm": "140MB", MODEL_NAME: "560MB"}
"""`--kv-host-memory` for 45,000 tokens: the 40 images of the working set with their questions; 4.7 pools."""


NAMES = [*(contender.name for contender in CONTENDERS), EXACT_ALL]


def contenders(model: str) -> tuple[Contender, ...]:
    """All servers for one model."""
    return (*CONTENDERS, Contender(EXACT_ALL, (*compressing("0.1", "exact"), "--kv-host-memory", HOST_FOR_ALL[model])))


_STEP = re.compile(r"Decode batch, #running-req: (\d+), #token: (\d+), token usage: ([\d.]+).*#queue-req: (\d+)")


def decode_steps(log: str) -> Iterator[tuple[int, int]]:
    """Requests that decoded together, and requests that waited, in each decode step of the scheduler's log."""
    for found in _STEP.finditer(log):
        yield int(found[1]), int(found[4])


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def measure(server: ServerProcess, load: Load, prepared: Any, with_policies: bool) -> dict[str, Any]:
    """Run one load on one server."""
    assert server.log_path is not None
    server.flush_cache()

    async def run() -> tuple[list[Outcome], float, int]:
        sender = Sender(server.openai_url, with_policies)
        try:
            if load.warm_up is not None:
                await load.warm_up(sender, prepared)
            seen = server.log_path.stat().st_size  # type: ignore[union-attr]
            sender.started = time.perf_counter()
            outcomes = await load.run(sender, prepared)
            return outcomes, time.perf_counter() - sender.started, seen
        finally:
            await sender.close()

    outcomes, seconds, seen = asyncio.run(run())
    with server.log_path.open(errors="replace") as log:
        log.seek(seen)
        new = log.read()
    state = server.kv_policy()
    books = None
    if state:
        server.flush_cache()
        after = server.kv_policy()
        books = {"cells_used_after_flush": after["cells_used"], "problems": after["integrity"]}
    steps = list(decode_steps(new))
    return {
        **figures(outcomes, steps, seconds),
        "load_average_5_min": round(os.getloadavg()[1], 2),
        "retracted": sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", new)),
        "kv_policy_at_end": {key: value for key, value in state.items() if not isinstance(value, list)},
        "books": books,
        "decode_steps": [list(step) for step in steps],
        "outcomes": [{key: value for key, value in asdict(o).items() if key != "text"} for o in outcomes],
    }


def figures(outcomes: Sequence[Outcome], steps: Sequence[tuple[int, int]], seconds: float) -> dict[str, Any]:
    """What is said of one load on one server; `steps` as `decode_steps` yields them, `seconds` of the whole load."""
    crowded = [running for running, waiting in steps if waiting] or [running for running, _ in steps]
    judged = [outcome.right for outcome in outcomes if outcome.right is not None]
    return {
        "requests": len(outcomes),
        "seconds": round(seconds, 2),
        "running_peak": max((running for running, _ in steps), default=0),
        "running_mean_while_others_wait": round(statistics.mean(crowded), 2) if crowded else 0,
        "tokens_per_s": round(sum(outcome.completion_tokens for outcome in outcomes) / seconds, 2),
        "hit_rate": round(sum(o.cached_tokens for o in outcomes) / sum(o.prompt_tokens for o in outcomes), 4),
        "ttft_mean_ms": round(statistics.mean(o.ttft_ms for o in outcomes), 1),
        "ttft_p95_ms": percentile([o.ttft_ms for o in outcomes], 0.95),
        "latency_p50_ms": percentile([o.latency_ms for o in outcomes], 0.5),
        "latency_p95_ms": percentile([o.latency_ms for o in outcomes], 0.95),
        "right": sum(judged),
        "judged": len(judged),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py capacity`."""
    parser.add_argument("--quick", action="store_true", help="few requests: does it run?")
    names = [load.name for load in LOADS]
    parser.add_argument("--loads", nargs="+", choices=names, default=names, metavar="LOAD", help=", ".join(names))
    parser.add_argument(
        "--requests", type=int, metavar="N", help="of each load (chats in multi-turn), not its own count"
    )
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="tensor parallel ranks, one core each if 2")
    parser.add_argument("--model", choices=MODELS, default="tinyvlm", help=", ".join(MODELS) + "; default tinyvlm")
    parser.add_argument("--only", nargs="+", metavar="SERVER", help=f"some of: {', '.join(map(repr, NAMES))}")
    parser.add_argument("--flags", default="", help="further flags for all servers, as one text")
    parser.add_argument("--page", action="store_true", help="only draw the results again and rewrite docs/capacity.md")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/, out/ for anything but a whole run")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and write a JSON file and a plot per load; the exit code says whether it could be measured."""
    if arguments.page:
        for path in result_paths():
            result = json.loads(path.read_text())
            plot(result, path.with_suffix(".png"))
        PAGE.write_text(rendered(PAGE.read_text()))
        return 0
    loads = [load for load in LOADS if load.name in arguments.loads]
    chosen = [c for c in contenders(arguments.model) if not arguments.only or c.name in arguments.only]
    flags = [*FLAGS, *(TWO_RANKS if arguments.tp == 2 else ()), *arguments.flags.split()]
    counts = {load.name: arguments.requests or (load.quick_count if arguments.quick else load.count) for load in loads}
    environment = ENVIRONMENT | (ONE_CORE_EACH if arguments.tp == 2 else {})
    host = host_block()
    model = MODELS[arguments.model]()
    with console.status("drawing images"):
        prepared = {load.name: load.prepare(counts[load.name]) for load in loads}
    rows: dict[str, list[dict[str, Any]]] = {load.name: [] for load in loads}
    with interruptible():
        for contender in chosen:
            with ServerProcess(
                model, [*flags, *contender.flags], title=contender.name, env=environment, console=console
            ) as server:
                # The first request of a process pays for lazy imports and first allocations.
                asyncio.run(_one(server, about(900)))
                for load in loads:
                    with console.status(f"{contender.name}: {load.name}"):
                        ours = contender.name != STOCK
                        row = measure(server, load, prepared[load.name], ours)
                    rows[load.name].append({"server": contender.name, **row})
                    console.print(f"{contender.name}: {load.name}: {row['seconds']:.0f} s")
    whole = not (arguments.quick or arguments.only or arguments.flags)
    for load in loads:
        add_ratios(rows[load.name])
        result = {
            "task": "capacity",
            "load": load.name,
            "about": load.about.format(counts[load.name]),
            "command": command_line(),
            "host": host,
            "model": arguments.model,
            "tensor_parallel": arguments.tp,
            "server_flags": flags,
            "environment": environment,
            "servers": {c.name: list(c.flags) for c in chosen},
            "load_average_at_end": round(os.getloadavg()[0], 2),
            "targets": check_targets(load.name, rows[load.name]),
            "rows": rows[load.name],
        }
        write(result, folder(arguments.output, whole), console)
    if whole and arguments.output is None:
        PAGE.write_text(rendered(PAGE.read_text()))
    wrong = [line for load in loads for row in rows[load.name] for line in unbalanced(row)]
    for line in wrong:
        console.print(line, style="red", markup=False)
    return 1 if wrong else 0


def unbalanced(row: dict[str, Any]) -> list[str]:
    """What a server's books said was wrong after a load and a flush; nothing of a server without books."""
    books = row["books"]
    if books is None:
        return []
    left = books["cells_used_after_flush"]
    found = [f"{left} cells are used after a flush"] if left else []
    return [f"{row['server']}: {line}" for line in (*found, *books["problems"])]


async def _one(server: ServerProcess, ask: Ask) -> None:
    sender = Sender(server.openai_url, False)
    await sender(ask)
    await sender.close()


def write(result: dict[str, Any], place: Path, console: Console) -> None:
    """Table on the console, JSON and PNG in the folder `place`."""
    model = result["model"] + ("-tp2" if result["tensor_parallel"] == 2 else "")
    stem = f"{device_name()}-{model}-capacity-{result['load']}-sglang{result['host']['packages']['sglang']}"
    path = place / f"{stem}.json"
    text = json.dumps(result, indent=1)
    # Long lists of numbers on one line each.
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    written = save(path, result, text)
    plot(result, path.with_suffix(".png"))
    console.print(table_of(result))
    for name, check in result["targets"].items():
        console.print(f"{name}: {check['value']:.3f}, {check['target']}: {'' if check['reached'] else 'not '}reached")
    console.print(f"written: {written} and .png")
