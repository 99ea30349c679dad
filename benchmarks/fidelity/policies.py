"""Every recipe on one real server: is the first question answered, what is kept, what does deciding it cost?

One server compresses to a fifth by default; each request names its own policy.  Held-out images of 24 x 24 cells,
one question each; the outer loop is over images, the inner one over policies, which begins with another policy at
each image, so that a slow minute of the machine falls on all.  The bundled model was trained for the idea of one of
these methods (its card says how): the table shows that all of them run, not which is best.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common.host import ROOT, command_line, device_name, host_block
from benchmarks.common.pages import with_block
from benchmarks.common.results import RESULTS, folder, save
from vlcache_sgl.client.client import Client
from vlcache_sgl.client.server import ServerProcess, interruptible
from vlcache_sgl.evaluation import stats
from vlcache_sgl.evaluation.tasks.receipts import make_receipt
from vlcache_sgl.policy import registry
from vlcache_sgl.policy.describe import describe

MODEL = "models/tinyvlm/grounded"
MODEL_NAME = "tinyvlm"
PAGE = ROOT / "docs/policies-measured.md"
MARKERS = "policies-measured"
OWN = "vlcache-sgl"
"""Only recipes of this distribution are measured, whatever else is installed."""
BUDGET = 0.2
FULL = "budget 1.0"
SIDE = 24
FIRST_SEED = 31_000
WARM_UP_SEED = 30_999
IMAGES = 20
QUICK_IMAGES = 5
FLAGS = (
    *("--kv-policy", "vlcache", "--kv-budget", str(BUDGET)),
    *("--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "4"),
    *("--enable-cache-report", "--skip-server-warmup", "--sleep-on-idle"),
)
ENVIRONMENT = {
    # No cache of image embeddings: every prefill runs the vision tower, whichever policy asks first.
    "SGLANG_VLM_CACHE_SIZE_MB": "0",
    # glibc would keep each request's pixels (10 MB) in fragments of its heap: gigabytes over this run, stock or not.
    "MALLOC_MMAP_THRESHOLD_": "4194304",
}
Z = stats.Z


class Contender(NamedTuple):
    """One row of the table."""

    policy: str
    made_of: str
    query_aware: bool | None
    params: Mapping[str, Any]
    """The request's `custom_params`."""


def contenders() -> list[Contender]:
    """The uncompressed request, every recipe, every variant of a recipe."""
    found = [Contender(FULL, "", None, {"kv_budget": 1.0})]
    for item in describe(registry()):
        if item.kind == "policy" and item.provider.split()[0] == OWN:
            names = [item.name, *(f"{item.name}:{variant.split()[0]}" for variant in item.variants)]
            found += [
                Contender(name, item.parts, item.query_aware, {"kv_policy": name, "kv_budget": BUDGET})
                for name in names
            ]
    return found


def measure(server: ServerProcess, client: Client, contender: Contender, seed: int) -> dict[str, Any]:
    """One question with one policy; figures are differences of the server's running totals."""
    drawn = make_receipt(seed, SIDE, SIDE, num_questions=1)
    question = drawn.questions[0]
    before = server.kv_policy()
    started = time.perf_counter()
    answer = client.ask(question.text, drawn.image, max_tokens=8, custom_params=dict(contender.params))
    elapsed = time.perf_counter() - started
    after = server.kv_policy()

    def gain(key: str) -> Any:
        return round(after[key] - before[key], 3)

    return {
        "policy": contender.policy,
        "image": seed,
        "question": question.text,
        "expected": question.answer,
        "answer": answer.text.strip(),
        "right": answer.text.strip() == question.answer,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "request_ms": round(elapsed * 1e3, 1),
        "compressed": gain("requests_compressed"),
        "failures": gain("policy_failures"),
        **{key: gain(key) for key in ("cells_seen", "cells_kept", "prefill_ms", "scoring_ms", "selection_ms")},
    }


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `right` of `count` were seen."""
    low, high = stats.wilson(right, count)
    return round(low, 3), round(high, 3)


def summarise(samples: Sequence[Mapping[str, Any]], listed: Sequence[Contender]) -> list[dict[str, Any]]:
    """One row per policy, the most right answers first; the uncompressed request leads."""
    rows = []
    for contender in listed:
        mine = [sample for sample in samples if sample["policy"] == contender.policy]
        if not mine:
            continue
        right, seen = sum(s["right"] for s in mine), sum(s["cells_seen"] for s in mine)

        def share(key: str, mine: list[Mapping[str, Any]] = mine) -> float | None:
            """Median of the requests' shares: one hiccup of the machine does not move it."""
            shares = [s[key] / s["prefill_ms"] for s in mine if s["prefill_ms"]]
            return round(statistics.median(shares), 4) if shares else None

        rows.append(
            {
                "policy": contender.policy,
                "made_of": contender.made_of,
                "query_aware": contender.query_aware,
                "questions": len(mine),
                "right": right,
                "interval": wilson(right, len(mine)),
                "ratio": round(sum(s["cells_kept"] for s in mine) / seen, 4) if seen else 1.0,
                "prefill_ms": round(statistics.median(s["prefill_ms"] for s in mine), 1) if seen else None,
                "scoring_share": share("scoring_ms"),
                "selection_share": share("selection_ms"),
                "failures": sum(s["failures"] for s in mine),
            }
        )
    return sorted(rows, key=lambda row: (row["policy"] != FULL, -row["right"], row["policy"]))


def percent(share: float | None) -> str:
    """A share for a table.

    >>> percent(0.0123), percent(None)
    ('1.2 %', '')
    """
    return "" if share is None else f"{share * 100:.1f} %"


HEAD = ("policy", "made of", "query-aware", "right", "95 % interval", "kept", "scoring", "selection")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of `summarise` as text, in the columns of HEAD."""
    return (
        row["policy"],
        row["made_of"],
        {True: "yes", False: "no", None: ""}[row["query_aware"]],
        f"{row['right']} of {row['questions']}",
        "{:.2f} to {:.2f}".format(*row["interval"]),
        f"{row['ratio']:.3f}",
        percent(row["scoring_share"]),
        percent(row["selection_share"]),
    )


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For the terminal."""
    table = Table(title=f"First questions, budget {BUDGET:g}; cost as share of the prefill", title_justify="left")
    for name in HEAD:
        table.add_column(name, no_wrap=True, justify="left" if name in HEAD[:3] else "right")
    for row in rows:
        table.add_row(*cells(row), end_section=row["policy"] == FULL)
    return table


def block(result: Mapping[str, Any]) -> str:
    """The Markdown between the page's markers."""
    host = result["host"]
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---|---|---|---|---|---|"]
    for row in result["summary"]:
        name, made_of, *others = cells(row)
        lines.append("| " + " | ".join([f"`{name}`" if row["made_of"] else name, made_of, *others]) + " |")
    lines += [
        "",
        f"`{result['command']}`, {host['date'][:10]}, SGLang {host['packages']['sglang']}, {host['processor']}, "
        f"{host['cores']} cores. Load average at start {host['load_average_at_start']:g}, at the end "
        f"{result['load_average_at_end']:g}. Requests: {len(result['samples'])}. Failed policies: "
        f"{sum(row['failures'] for row in result['summary'])}.",
    ]
    return "\n".join(lines)


def result_path() -> Path:
    """The committed result.

    Raises:
        FileNotFoundError: when there is none.
    """
    paths = sorted(RESULTS.glob(f"*-{MODEL_NAME}-policies-sglang*.json"))
    if not paths:
        raise FileNotFoundError("no policy result in benchmarks/results: run `make bench-policies`")
    return paths[-1]


def rendered(page: str, result: Mapping[str, Any]) -> str:
    """`page` with the block between its markers made anew."""
    return with_block(page, MARKERS, block(result))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options, also those of `run.py policies`."""
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_IMAGES} images; writes to out/")
    parser.add_argument("--images", type=int, help=f"default {IMAGES}, quick {QUICK_IMAGES}")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="some policies; writes to out/")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/, out/ for less than all")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the table into docs/ again")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, write the file and the page; the exit code is 1 when a policy failed or did not compress."""
    if arguments.page:
        PAGE.write_text(rendered(PAGE.read_text(), json.loads(result_path().read_text())))
        return 0
    listed = contenders()
    if unknown := set(arguments.only or ()) - {contender.policy for contender in listed}:
        console.print(f"not among the built-in policies: {', '.join(sorted(unknown))}", style="red")
        return 2
    chosen = [c for c in listed if not arguments.only or c.policy in arguments.only]
    images = arguments.images or (QUICK_IMAGES if arguments.quick else IMAGES)
    host = host_block()
    samples: list[dict[str, Any]] = []
    process = ServerProcess(ROOT / MODEL, FLAGS, title="policies", env=ENVIRONMENT, console=console)
    with interruptible(), process as server:
        client = Client(server.openai_url)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("warming up", total=len(chosen) * (images + 1))
            for contender in chosen:  # the first request of a policy pays for lazy imports and first allocations
                measure(server, client, contender, WARM_UP_SEED)
                progress.advance(task)
            for number in range(images):
                server.flush_cache()
                for i in range(len(chosen)):
                    contender = chosen[(number + i) % len(chosen)]
                    progress.update(task, description=f"image {number + 1}: {contender.policy}")
                    samples.append({"place": i, **measure(server, client, contender, FIRST_SEED + number)})
                    progress.advance(task)
    rows = summarise(samples, chosen)
    result = {
        "task": "policies",
        "command": command_line(),
        "host": host,
        "model": {"name": MODEL_NAME, "path": MODEL},
        "server_flags": list(FLAGS),
        "environment": ENVIRONMENT,
        "budget": BUDGET,
        "grid": [SIDE, SIDE],
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "summary": rows,
        "samples": samples,
    }
    whole = not (arguments.quick or arguments.only)
    device = "cpu" if device_name().startswith("cpu-") else device_name()
    name = f"{device}-{MODEL_NAME}-policies-sglang{host['packages']['sglang']}.json"
    written = save(folder(arguments.output, whole) / name, result)
    console.print(table_of(rows))
    console.print(f"written: {written}")
    if whole and not arguments.output:
        PAGE.write_text(rendered(PAGE.read_text(), result))
    wrong = [s["policy"] for s in samples if s["failures"] or s["compressed"] != (s["policy"] != FULL)]
    for policy in dict.fromkeys(wrong):
        console.print(f"{policy} did not compress every prompt", style="red")
    return 1 if wrong else 0
