"""Several questions about one image: all of it from host memory, the first one's copy, nothing shared, the full cache.

One server answers all arms, image after image and question after question, so that noise meets all alike; the arms take
turns in being first, because the first one of an image also pays for reading it.  Answers are those of the bundled
model; the model of 12 layers has random weights and says what a prefill costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.capacity.main import MODELS
from benchmarks.common.host import ROOT, command_line, host_block
from benchmarks.common.pages import with_block
from benchmarks.common.results import RESULTS, folder, save
from vlcache_sgl.client.client import data_url
from vlcache_sgl.client.server import ServerProcess, interruptible
from vlcache_sgl.evaluation.tasks.receipts import Question, Receipt, make_receipt

PAGE = ROOT / "docs/sharing.md"
FULL, EXACT, OFF, POLICY = "full cache", "exact", "off", "policy"
ARMS: dict[str, dict[str, Any]] = {
    FULL: {"kv_budget": 1.0},
    EXACT: {"kv_share": "exact"},
    OFF: {"kv_share": "off"},
    POLICY: {"kv_share": "policy"},
}
"""What each arm asks for."""
BUDGET = 0.1
SIDE = {"tinyvlm": 24, "qwen2.5-vl-12x512": 32}
"""Image tokens along each side."""
FIRST_SEED = 200_000
FLAGS = (
    *("--kv-policy", "vlcache:density", "--kv-budget", str(BUDGET), "--kv-host-memory", "2GB"),
    *("--dtype", "float32", "--chunked-prefill-size", "2048", "--enable-cache-report"),
    *("--skip-server-warmup", "--sleep-on-idle"),
)
POOL = {"tinyvlm": 131072, "qwen2.5-vl-12x512": 65536}
"""Uncompressed tokens: every arm's images fit side by side."""
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """One answer."""

    image: int
    question: int
    arm: str
    text: str
    right: bool
    first_token_ms: float
    cached_tokens: int
    prompt_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/ for all, out/ for less")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables again")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and write down; 0."""
    if not arguments.page:
        whole = arguments.images >= 50 and arguments.questions >= 8
        for name in arguments.models:
            with interruptible():
                result = measure(name, arguments.images, arguments.questions, console)
            path = folder(arguments.output, whole) / f"sharing-{name}.json"
            console.print("written:", save(path, result))
            console.print(table(result))
    if not arguments.page and arguments.output is not None:
        return 0
    PAGE.write_text(rendered(PAGE.read_text()))
    return 0


def measure(name: str, images: int, questions: int, console: Console) -> dict[str, Any]:
    """All arms on one server."""
    flags = (*FLAGS, "--max-total-tokens", str(POOL[name]))
    with ServerProcess(MODELS[name](), flags, title=name, console=console) as server:
        side = SIDE[name]
        warm_up(server, side)
        asked: list[Asked] = []
        cells: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(images):
            drawn = make_receipt(FIRST_SEED + number, side, side, num_questions=questions)
            asked += ask_image(server, number, drawn)
            for arm, share in held(server, number, drawn).items():
                cells[arm].append(share)
            if number % 10 == 9:
                console.print(f"{name}: {number + 1} of {images} images")
        state = server.kv_policy()
    head = {"task": "sharing", "command": command_line(), "server_flags": list(flags), "host": host_block()}
    return {
        **head,
        "model": name,
        "image_tokens": side * side,
        "budget": BUDGET,
        "answers": [asdict(answer) for answer in asked],
        "cells_held": {arm: round(statistics.fmean(shares), 4) for arm, shares in cells.items()},
        "integrity": state["integrity"],
        "host_bytes_per_token": state["host_bytes_per_token"],
    }


def warm_up(server: ServerProcess, side: int) -> None:
    """Every arm once, on an image that is not counted."""
    drawn = make_receipt(FIRST_SEED - 1, side, side)
    for arm in ARMS:
        for question in drawn.questions[:2]:
            ask(server, -1, 0, arm, drawn, question, data_url(drawn.image))
    server.flush_cache()


def ask_image(server: ServerProcess, number: int, drawn: Receipt) -> Iterator[Asked]:
    """All questions about one image, each in all arms."""
    url = data_url(drawn.image)
    names = list(ARMS)
    for place, question in enumerate(drawn.questions):
        turn = (number + place) % len(names)
        for arm in (*names[turn:], *names[:turn]):
            yield ask(server, number, place, arm, drawn, question, url)


def ask(
    server: ServerProcess, number: int, place: int, arm: str, drawn: Receipt, question: Question, url: str
) -> Asked:
    """One streamed answer."""
    body = {
        "model": "default",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question.text},
                ],
            }
        ],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "custom_params": ARMS[arm],
    }
    started, first, text = time.perf_counter(), 0.0, ""
    usage: dict[str, Any] = {}
    with httpx.stream("POST", f"{server.openai_url}/chat/completions", json=body, timeout=300) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if piece and not first:
                first = time.perf_counter()
            text += piece
            usage = event.get("usage") or usage
    first_ms = ((first or time.perf_counter()) - started) * 1e3
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    right = text.strip() == question.answer
    return Asked(number, place, arm, text, right, round(first_ms, 2), cached, int(usage["prompt_tokens"]))


def held(server: ServerProcess, number: int, drawn: Receipt) -> dict[str, float]:
    """Cells that the prefix tree holds after all questions about one image, each arm alone, as a share of the image's
    full cache; every fifth image, because the cache is flushed between the arms."""
    if number % 5:
        return {}
    shares = {}
    for arm in ARMS:
        server.flush_cache()
        for place, question in enumerate(drawn.questions):
            ask(server, number, place, arm, drawn, question, data_url(drawn.image))
        state = server.kv_policy()
        shares[arm] = state["cells_used"] / (drawn.num_image_tokens * state["cells_per_token"])
    server.flush_cache()
    return shares


# -- tables ------------------------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm."""
    answers = [Asked(**answer) for answer in result["answers"]]
    by_key = {(answer.image, answer.question, answer.arm): answer for answer in answers}
    later = [(answer.image, answer.question) for answer in answers if answer.arm == FULL and answer.question > 0]

    def of(arm: str) -> list[Asked]:
        return [by_key[*key, arm] for key in later]

    def ratio(over: str, under: str) -> float:
        pairs = zip(of(over), of(under), strict=True)
        return statistics.median(a.first_token_ms / b.first_token_ms for a, b in pairs)

    rows = []
    for arm in ARMS:
        mine = [answer for answer in answers if answer.arm == arm]
        alone = [by_key[answer.image, answer.question, OFF] for answer in mine]
        rows.append(
            {
                "arm": arm,
                "first": statistics.fmean(answer.right for answer in mine if answer.question == 0),
                "later": statistics.fmean(answer.right for answer in of(arm)),
                "same": sum(answer.text == other.text for answer, other in zip(mine, alone, strict=True)),
                "asked": len(mine),
                "ms": statistics.median(answer.first_token_ms for answer in of(arm)),
                "over_hit": ratio(arm, FULL),
                "off_over": ratio(OFF, arm),
                "cells": result["cells_held"][arm],
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| arm | right, question 1 | right, questions 2 to 8 | answers as alone | first token ms | over a hit "
        "| off over this | cells held, of the image |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary(result):
        answers = result["model"] == "tinyvlm"
        lines.append(
            f"| {row['arm']} | {row['first']:.2f} | {row['later']:.3f} " if answers else f"| {row['arm']} | | "
        )
        lines[-1] += (
            f"| {row['same']} of {row['asked']} | {row['ms']:.0f} | {row['over_hit']:.2f}x | {row['off_over']:.2f}x "
            f"| {row['cells']:.3f} |"
        )
    host = result["host"]
    lines += ["", f"`{result['command']}`, {result['model']}, {host['date'][:10]}, {host['device']}."]
    return "\n".join(lines)


def rendered(page: str, results: Path = RESULTS) -> str:
    """`page` with the tables of the committed results."""
    for name in MODELS:
        path = results / f"sharing-{name}.json"
        if path.exists():
            page = with_block(page, f"sharing-{name}", table(json.loads(path.read_text())))
    return page
