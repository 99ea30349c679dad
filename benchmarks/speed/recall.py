"""What recall costs: stock SGLang, ours at budget 0.1, and the same with recall, interleaved in one run.

As `speed`, whose prompts and figures these are.  Beside them stands what a decode step reads of a prompt: kept and
recalled cells, copies from host memory, and sketches, against the full cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.host import ROOT, command_line, device_name, host_block
from benchmarks.common.load import make_prompt, send_together
from benchmarks.common.pages import with_block
from benchmarks.common.results import folder, save
from benchmarks.models.make_model import TEXT, make_model
from benchmarks.speed.main import MODEL_NAME, Contender, Point, measure, server_flags
from vlcache_sgl.capacity import KVShape
from vlcache_sgl.client.server import ServerProcess, interruptible

PAGE = ROOT / "docs/recall.md"
MARKERS = "recall-speed"
TOKENS = 64
TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
STOCK = Contender("stock", ())
CONTENDERS = (
    STOCK,
    Contender("budget 0.1", (*TENTH, "--kv-recall", "off")),
    Contender(f"budget 0.1, recall {TOKENS}", (*TENTH, "--kv-recall", str(TOKENS))),
)
POINTS = (Point(2048, 8), Point(8192, 8))
SHAPE = KVShape(
    layers=TEXT["num_hidden_layers"],
    kv_heads=TEXT["num_key_value_heads"],
    head_dim=TEXT["hidden_size"] // TEXT["num_attention_heads"],
    element_bytes=4,
)
"""Of the served model, in float32."""


def bytes_read(before: dict[str, Any], after: dict[str, Any], sample: dict[str, Any]) -> dict[str, float]:
    """What a decode step reads of a prompt, each in parts of the full cache.

    Args:
        before, after: the server's books around `sample`.
    """
    kept = sample["kv_bytes_per_request"] / (statistics.mean(sample["prompt_tokens"]) * SHAPE.token_bytes)
    recalled = after.get("recalled_tokens", 0) - before.get("recalled_tokens", 0)
    fetched = after.get("recalled_tokens_fetched", 0) - before.get("recalled_tokens_fetched", 0)
    if not recalled:
        return {"kept": round(kept, 4), "all": round(kept, 4)}
    share = TOKENS / statistics.mean(sample["prompt_tokens"])
    sketches = SHAPE.sketch_bytes / SHAPE.token_bytes
    hit = 1 - fetched / recalled
    return {
        "kept": round(kept, 4),
        "recalled": round(share, 4),
        "copied from the host": round(share * (1 - hit), 4),
        "sketches": round(sketches, 4),
        "all": round(kept + share * (2 - hit) + sketches, 4),
        "still there": round(hit, 4),
    }


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per server and point: medians, and the median and the ends of ratios to stock in the same repeat."""
    rows = []
    for point in dict.fromkeys((s["tokens"], s["batch"]) for s in samples):
        here = [s for s in samples if (s["tokens"], s["batch"]) == point]
        stock = {s["repeat"]: s["decode_tokens_per_s"] for s in here if s["server"] == STOCK.name}
        for name in dict.fromkeys(s["server"] for s in here):
            mine = [s for s in here if s["server"] == name]
            ratios = [s["decode_tokens_per_s"] / stock[s["repeat"]] for s in mine]
            parts = mine[0]["read"]
            rows.append(
                {
                    "server": name,
                    "tokens": point[0],
                    "batch": point[1],
                    "samples": len(mine),
                    "decode_tokens_per_s": statistics.median(s["decode_tokens_per_s"] for s in mine),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                    "read": {part: round(statistics.median(s["read"][part] for s in mine), 4) for part in parts},
                }
            )
    return rows


def block(result: dict[str, Any]) -> str:
    """The table of docs/recall.md."""
    lines = [
        "| prompt tokens x requests | server | decode over stock's | read per step: all | kept | recalled "
        "| copied from the host | sketches | still there |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["summary"]:
        low, high = row["ratio_range"]
        parts = ("all", "kept", "recalled", "copied from the host", "sketches", "still there")
        read = [f"{row['read'][part]:.3f}" if part in row["read"] else "" for part in parts]
        lines.append(
            f"| {row['tokens']} x {row['batch']} | {row['server']} | {row['ratio']:.2f}x ({low:.2f} to {high:.2f}) | "
            + " | ".join(read)
            + " |"
        )
    host = result["host"]
    lines += ["", f"`{result['command']}`, {MODEL_NAME}, {host['date'][:10]}, {device_name()}."]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py recall`."""
    parser.add_argument("--repeats", type=int, default=5, help="samples of each server and point; default 5")
    parser.add_argument("--points", nargs="+", metavar="TOKENSxBATCH", help="for instance 8192x8")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/; elsewhere no page is written")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, write the file and the table."""
    points = [Point(*map(int, text.split("x"))) for text in arguments.points] if arguments.points else list(POINTS)
    host, flags, model = host_block(), server_flags(points), make_model(ROOT / "out/bench-model")
    samples: list[dict[str, Any]] = []
    with interruptible(), contextlib.ExitStack() as stack:
        servers = {}
        for contender in CONTENDERS:
            process = ServerProcess(model, [*flags, *contender.flags], title=contender.name, console=console)
            servers[contender.name] = stack.enter_context(process)
        for server in servers.values():  # the first request of a process pays for lazy imports and first allocations
            send_together(server.url, [make_prompt(300, seed=999_000 + i) for i in range(2)], 4)
        for point in points:
            for repeat in range(arguments.repeats):
                for i in range(len(CONTENDERS)):
                    name = CONTENDERS[(i + repeat) % len(CONTENDERS)].name
                    before = servers[name].kv_policy()
                    sample = measure(servers[name], point, repeat)
                    sample["read"] = bytes_read(before, servers[name].kv_policy(), sample)
                    samples.append({"server": name, "place": i, **sample})
                    console.print(f"{point.tokens} x {point.batch}, {name}: {sample['decode_tokens_per_s']:g} tokens/s")
    result = {
        "task": "recall",
        "command": command_line(),
        "host": host,
        "model": {"name": MODEL_NAME, "made_by": "benchmarks/models/make_model.py"},
        "server_flags": flags,
        "servers": {contender.name: list(contender.flags) for contender in CONTENDERS},
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "summary": summarise(samples),
        "samples": samples,
    }
    name = f"{device_name()}-{MODEL_NAME}-recall-sglang{host['packages']['sglang']}.json"
    console.print(f"written: {save(folder(arguments.output, whole=True) / name, result)}")
    console.print(block(result))
    if arguments.output is None:
        PAGE.write_text(with_block(PAGE.read_text(), MARKERS, block(result)))
    return 0
