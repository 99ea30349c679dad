"""How fast: stock SGLang, ours at budget 1.0, ours at budget 0.1, interleaved in one run.

The three servers are alive together and asleep while idle; one is asked at a time, in an order that rotates from
repeat to repeat, so that a slow minute of the machine falls on all of them.  Every prompt is new to its server: its
caches are flushed and the images change with the repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from benchmarks.common.host import ROOT, command_line, device_name, host_block
from benchmarks.common.load import Timeline, decode_tokens_per_s, make_prompt, prefill_ms, send_together
from benchmarks.common.results import folder, save
from benchmarks.models.make_model import BYTES_PER_CELL, TEXT, make_model
from vlcache_sgl.client.server import ServerProcess, interruptible


class Contender(NamedTuple):
    """A server in the comparison."""

    name: str
    flags: tuple[str, ...]


class Point(NamedTuple):
    """What is asked."""

    tokens: int
    """Of one prompt, about."""
    batch: int
    """Prompts at the same moment."""


CONTENDERS = (
    Contender("stock", ()),
    Contender("ours 1.0", ("--kv-policy", "vlcache", "--kv-budget", "1.0")),
    Contender("ours 0.1", ("--kv-policy", "vlcache", "--kv-budget", "0.1")),
)
POINTS = tuple(Point(tokens, batch) for tokens in (2048, 4096, 8192) for batch in (1, 8))
QUICK_POINTS = (Point(2048, 1), Point(2048, 4))
MODEL_NAME = "qwen2.5-vl-12x512"
DECODE_TOKENS = 64
TARGETS = {
    "decode, ours 1.0 / stock": ("at least", 1.0),
    "decode, ours 0.1 / stock, 8192 x 8": ("at least", 2.5),
    "prefill, ours 0.1 / stock": ("at most", 1.05),
    "KV bytes, ours 0.1 / stock": ("at most", 0.105),
}
"""From the issue; checked on the medians."""


def server_flags(points: Sequence[Point]) -> list[str]:
    """Flags of all three: a pool that holds the largest point in full, with what it decodes."""
    need = max(point.batch * (point.tokens + DECODE_TOKENS) for point in points)
    flags = ["--dtype", "float32", "--chunked-prefill-size", "1024", "--max-total-tokens", str(need + 4096)]
    flags += ["--max-running-requests", str(max(point.batch for point in points)), "--stream-interval", "1"]
    return [*flags, "--enable-metrics", "--skip-server-warmup", "--sleep-on-idle"]


def measure(server: ServerProcess, point: Point, repeat: int) -> dict[str, Any]:
    """One sample: times of the batch, and what the server's books say it cost."""
    server.flush_cache()
    before = server.kv_policy()
    prompts = [make_prompt(point.tokens, seed=1000 * repeat + i) for i in range(point.batch)]
    lines = send_together(server.url, prompts, DECODE_TOKENS)
    after = server.kv_policy()
    if any(line.meta.get("num_retractions") for line in lines):
        raise RuntimeError("a request was retracted: the pool is too small for this point")
    return {
        "tokens": point.tokens,
        "batch": point.batch,
        "repeat": repeat,
        "prompt_tokens": [int(line.meta["prompt_tokens"]) for line in lines],
        "ttft_ms": [round(line.ttft_ms, 1) for line in lines],
        "prefill_ms": round(prefill_ms(lines), 1),
        "decode_tokens_per_s": round(decode_tokens_per_s(lines), 2),
        "kv_bytes_per_request": round(tokens_held(lines, before, after) * TEXT["num_hidden_layers"] * BYTES_PER_CELL),
        "compression_ms": round(sum(_gain(before, after, key) for key in ("scoring_ms", "selection_ms")), 1),
        "compressed_prefill_ms": round(_gain(before, after, "prefill_ms"), 1),
    }


def tokens_held(lines: Sequence[Timeline], before: dict[str, Any], after: dict[str, Any]) -> float:
    """Tokens per layer that one prompt holds, averaged over layers and requests."""
    prompt_tokens = statistics.mean(int(line.meta["prompt_tokens"]) for line in lines)
    if not after:
        return prompt_tokens
    seen, kept = _gain(before, after, "cells_seen"), _gain(before, after, "cells_kept")
    return prompt_tokens - (seen - kept) / (int(after["cells_per_token"]) * len(lines))


def _gain(before: dict[str, Any], after: dict[str, Any], key: str) -> float:
    return float(after.get(key, 0)) - float(before.get(key, 0))


MEASURED = ("decode_tokens_per_s", "ttft_ms", "prefill_ms", "kv_bytes_per_request")
"""Figures of a sample that are compared with stock's."""


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per server and point: medians over repeats, and ratios to stock at the same point.

    Servers take turns within a repeat, so a ratio is formed within each; `_ratio` is their median, `_ratio_range` the
    smallest and the largest.
    """
    rows = []
    for point in dict.fromkeys((s["tokens"], s["batch"]) for s in samples):
        here = [s for s in samples if (s["tokens"], s["batch"]) == point]
        stock = {s["repeat"]: s for s in here if s["server"] == CONTENDERS[0].name}
        for contender in CONTENDERS:
            mine = [s for s in here if s["server"] == contender.name]
            if not mine:
                continue
            row = {"server": contender.name, "tokens": point[0], "batch": point[1], "samples": len(mine)}
            for key in MEASURED:
                ratios = [_figure(s, key) / _figure(stock[s["repeat"]], key) for s in mine]
                row[key] = statistics.median(_figure(s, key) for s in mine)
                row[f"{key}_ratio"] = round(statistics.median(ratios), 3)
                row[f"{key}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            shares = [s["compression_ms"] / s["compressed_prefill_ms"] for s in mine if s["compressed_prefill_ms"]]
            row["compression_share_of_prefill"] = round(statistics.median(shares), 4) if shares else 0.0
            rows.append(row)
    return rows


def _figure(sample: dict[str, Any], key: str) -> float:
    """A figure of one sample; of times per request the median."""
    value = sample[key]
    return float(statistics.median(value) if isinstance(value, list) else value)


def check_targets(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The worst ratio for each target, and whether it is reached."""

    def ratios(server: str, key: str, point: tuple[int, int] | None = None) -> list[float]:
        mine = [r for r in rows if r["server"] == server and point in (None, (r["tokens"], r["batch"]))]
        return [row[f"{key}_ratio"] for row in mine]

    found = {
        "decode, ours 1.0 / stock": ratios("ours 1.0", "decode_tokens_per_s"),
        "decode, ours 0.1 / stock, 8192 x 8": ratios("ours 0.1", "decode_tokens_per_s", (8192, 8)),
        "prefill, ours 0.1 / stock": ratios("ours 0.1", "prefill_ms"),
        "KV bytes, ours 0.1 / stock": ratios("ours 0.1", "kv_bytes_per_request"),
    }
    checks = {}
    for name, (direction, bound) in TARGETS.items():
        if values := found[name]:
            worst = min(values) if direction == "at least" else max(values)
            reached = worst >= bound if direction == "at least" else worst <= bound
            checks[name] = {"target": f"{direction} {bound:g}", "worst": worst, "reached": reached}
    return checks


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The medians; ratios to stock in brackets."""
    table = Table(title="Medians, and ratios to stock", title_justify="left")
    for name in ("prompt x batch", "server"):
        table.add_column(name, no_wrap=True)
    for name in ("decode tokens/s", "first token ms", "prefill ms", "compression", "KV per request"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            f"{row['tokens']} x {row['batch']}",
            row["server"],
            f"{row['decode_tokens_per_s']:.1f} ({row['decode_tokens_per_s_ratio']:.2f})",
            f"{row['ttft_ms']:.0f} ({row['ttft_ms_ratio']:.2f})",
            f"{row['prefill_ms']:.0f} ({row['prefill_ms_ratio']:.2f})",
            f"{row['compression_share_of_prefill']:.1%}",
            f"{decimal(int(row['kv_bytes_per_request']))} ({row['kv_bytes_per_request_ratio']:.3f})",
            end_section=i + 1 == len(rows) or rows[i + 1]["server"] == CONTENDERS[0].name,
        )
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py speed`."""
    parser.add_argument("--quick", action="store_true", help="two small points, one repeat: does it run?")
    parser.add_argument("--repeats", type=int, help="samples of each server and point; default 5, quick 1")
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="some of: " + ", ".join(c.name for c in CONTENDERS))
    parser.add_argument("--points", nargs="+", metavar="TOKENSxBATCH", help="for instance 8192x8")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/, out/ for anything but a whole run")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and write the file; the exit code says whether it could be measured, not whether it was fast."""
    points: Sequence[Point] = QUICK_POINTS if arguments.quick else POINTS
    if arguments.points:
        points = [Point(*map(int, text.split("x"))) for text in arguments.points]
    contenders = [c for c in CONTENDERS if not arguments.only or c.name in arguments.only]
    repeats = arguments.repeats or (1 if arguments.quick else 5)
    host = host_block()
    flags = server_flags(points)
    model = make_model(ROOT / "out/bench-model")
    samples: list[dict[str, Any]] = []
    with interruptible(), contextlib.ExitStack() as stack:
        servers = {}
        for contender in contenders:
            process = ServerProcess(model, [*flags, *contender.flags], title=contender.name, console=console)
            servers[contender.name] = stack.enter_context(process)
        for server in servers.values():  # the first request of a process pays for lazy imports and first allocations
            send_together(server.url, [make_prompt(300, seed=999_000 + i) for i in range(2)], 4)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(points) * repeats * len(contenders))
            for point in points:
                for repeat in range(repeats):
                    for i in range(len(contenders)):
                        name = contenders[(i + repeat) % len(contenders)].name
                        progress.update(task, description=f"{point.tokens} x {point.batch}: {name}")
                        samples.append({"server": name, "place": i, **measure(servers[name], point, repeat)})
                        progress.advance(task)
        rows = summarise(samples) if contenders[0].name == "stock" else []
    sglang = host["packages"]["sglang"]
    targets = check_targets(rows)
    result = {
        "task": "speed",
        "command": command_line(),
        "host": host,
        "model": {"name": MODEL_NAME, "made_by": "benchmarks/models/make_model.py"},
        "server_flags": flags,
        "servers": {contender.name: list(contender.flags) for contender in contenders},
        "decode_tokens": DECODE_TOKENS,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "targets": targets,
        "summary": rows,
        "samples": samples,
    }
    whole = not (arguments.quick or arguments.points or arguments.only)
    name = f"{device_name()}-{MODEL_NAME}-speed-sglang{sglang}.json"
    written = save(folder(arguments.output, whole) / name, result)
    console.print(table_of(rows))
    for name, check in targets.items():
        console.print(f"{name}: {check['worst']:.3f}, {check['target']}: {'' if check['reached'] else 'not '}reached")
    console.print(f"written: {written}")
    return 0
