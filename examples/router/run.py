"""Two compressing servers behind SGLang's router: start, ask, kill one server, ask again, check what is promised.

    python examples/router/run.py [--router-python PYTHON] [--model PATH]

The exit code is 1 when a check fails.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Table

from vlcache_sgl.client.bundled import bundled_model
from vlcache_sgl.client.client import data_url, user_says
from vlcache_sgl.client.server import BUNDLED_FLAGS, LOOPBACK, ServerProcess, free_port, interruptible
from vlcache_sgl.evaluation.tasks.receipts import Receipt, make_receipt

IMAGES = 12
AT_ONCE = 4
SEED = 90
MOSTLY = 0.8
"""Of a prompt's tokens from the cache: the image was there."""
POLICIES = ("cache_aware", "manual")
ROUTER_FLAGS = (
    # A server that is gone is left alone after one failure, and looked for again every few seconds.
    *("--cb-failure-threshold", "1", "--cb-timeout-duration-secs", "10"),
    *("--health-check-interval-secs", "2", "--health-failure-threshold", "1", "--log-level", "warn"),
    *("--worker-startup-check-interval", "1", "--assignment-mode", "min_group"),
)


class Router(ServerProcess):
    """`sglang_router` in front of running servers, in whichever Python has it installed."""

    def __init__(self, python: str, policy: str, servers: Sequence[ServerProcess]) -> None:
        super().__init__("", title=f"router ({policy})", timeout_s=60)
        self.command = [python, "-m", "sglang_router.launch_router", "--host", LOOPBACK, "--port", str(self.port)]
        self.command += ["--prometheus-port", str(free_port()), "--policy", policy, *ROUTER_FLAGS]
        self.command += ["--worker-urls", *(server.url for server in servers)]


def routing_key(url: str) -> dict[str, str]:
    """The header by which the router's policy `manual` keeps requests about one image together."""
    return {"X-SMG-Routing-Key": hashlib.sha256(url.encode()).hexdigest()[:32]}


@dataclass(frozen=True)
class Reply:
    """One answer, or why there is none."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def hit(self) -> bool:
        return self.cached_tokens > MOSTLY * self.prompt_tokens


def ask(router: Router, drawn: Receipt, question: int) -> Reply:
    """One question about an image, as any client would send it, with the key."""
    client = openai.OpenAI(base_url=router.openai_url, api_key="none", timeout=120, max_retries=0)
    url = data_url(drawn.image)
    try:
        reply = client.chat.completions.create(
            model="default",
            messages=[user_says(drawn.questions[question].text, url)],  # type: ignore[list-item]
            max_tokens=4,
            temperature=0,
            extra_headers=routing_key(url),
        )
    except openai.OpenAIError as error:
        return Reply(error=f"{type(error).__name__}: {error}"[:200])
    assert reply.usage is not None
    details = reply.usage.prompt_tokens_details
    return Reply(reply.usage.prompt_tokens, (details.cached_tokens if details else None) or 0)


def ask_all(router: Router, drawn: Sequence[Receipt], question: int) -> list[Reply]:
    """The same question about all images."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda receipt: ask(router, receipt, question), drawn))


def compressed(server: ServerProcess) -> int:
    return int(server.kv_policy()["requests_compressed"])


def versions(router_python: str) -> dict[str, str]:
    """Of what took part."""
    program = "import importlib.metadata as m; print(m.version('sglang-router'))"
    router = subprocess.run([router_python, "-c", program], capture_output=True, text=True, check=True)
    here = {name: importlib.metadata.version(name) for name in ("sglang", "vlcache-sgl")}
    return {**here, "sglang-router": router.stdout.strip()}


def main() -> int:
    """Run, print a table and the checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--router-python", default=sys.executable, help="with sglang-router; default: this one")
    parser.add_argument("--model", default=os.fspath(bundled_model()), help="default: the bundled model")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    console = Console()
    drawn = [make_receipt(SEED + number, 16, 16, num_questions=3) for number in range(IMAGES)]
    flags = [*BUNDLED_FLAGS, "--kv-policy", "vlcache", "--kv-budget", "0.1"]
    rows: list[dict[str, object]] = []
    with interruptible(), ExitStack() as stack:
        servers = [ServerProcess(arguments.model, flags, title=f"server {n}", console=console) for n in (1, 2)]
        for server in servers:
            stack.callback(server.stop)
            server.launch()
        for server in servers:
            server.wait_until_ready()
        for policy in POLICIES:
            for server in servers:
                server.flush_cache()
            before = [compressed(server) for server in servers]
            with Router(arguments.router_python, policy, servers) as router:
                first = ask_all(router, drawn, 0)
                spread = [compressed(server) - count for server, count in zip(servers, before, strict=True)]
                second = ask_all(router, drawn, 1)
                row: dict[str, object] = {
                    "policy": policy,
                    "images": IMAGES,
                    "images_per_server": spread,
                    "second_question_hits": sum(reply.hit for reply in second),
                    "errors": [reply.error for reply in (*first, *second) if reply.error],
                }
                rows.append(row)
                if policy == POLICIES[-1]:
                    servers[0].stop()
                    third, again = ask_all(router, drawn, 2), ask_all(router, drawn, 1)
                    row["after_a_death_answered"] = sum(not reply.error for reply in third)
                    row["after_a_death_hits"] = sum(reply.hit for reply in again)
                    row["errors"] = [reply.error for reply in (*first, *second, *third, *again) if reply.error]
    table = Table(title=f"{IMAGES} images, three questions each, two servers", title_justify="left")
    for name in ("router policy", "images per server", "second question hits", "errors"):
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("policy", "images_per_server", "second_question_hits", "errors")))
    console.print(table)
    keyed = rows[-1]
    spread = keyed["images_per_server"]  # type: ignore[assignment]
    checks = {
        "every second question found its image": keyed["second_question_hits"] == IMAGES,
        "both servers hold images, each one once": min(spread) > 0 and sum(spread) == IMAGES,
        "with one server dead everybody was answered": keyed["after_a_death_answered"] == IMAGES,
        "and found all images on the other one next": keyed["after_a_death_hits"] == IMAGES,
        "no request failed": not any(row["errors"] for row in rows),
    }
    for name, passed in checks.items():
        console.print(f"{'ok    ' if passed else 'FAILED'} {name}", style="green" if passed else "red")
    if arguments.output:
        about = {"command": "python examples/router/run.py", "versions": versions(arguments.router_python)}
        arguments.output.write_text(json.dumps({**about, "rows": rows, "checks": checks}, indent=1) + "\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
