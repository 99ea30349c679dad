"""For some minutes: mixed requests to one compressed server, half of them cut short; then its books must balance.

What is sent is drawn from a seed: pictures that recur and pictures that do not, texts, streams, long and short
answers, requests that are aborted or whose client goes away.  The small pool makes requests wait, evict and retract
each other.  The exit code is 0 when every answered request had a sound answer, no cell was lost and the server lives.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import threading
import time
from collections import Counter
from typing import Any

import httpx
from host import ROOT
from load import make_prompt
from rich.console import Console

from vlcache_sgl.cli.server import ServerProcess, interruptible

POLICY = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
FLAGS = (
    *("--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "6144"),
    *("--max-running-requests", "16", "--schedule-conservativeness", "0.3", "--skip-server-warmup"),
)
TROUBLE = re.compile(r"leak detected|double free|use-after-free|hit an exception", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py soak`."""
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8, help="requests in flight; default 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(ROOT / "models/tinyvlm/grounded"))


class Client(threading.Thread):
    """One user after another, until the deadline."""

    def __init__(self, url: str, seed: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._random = random.Random(seed)
        self._deadline = deadline
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        while time.monotonic() < self._deadline:
            try:
                self.outcomes[self._one()] += 1
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.outcomes[f"failed: {type(error).__name__}"] += 1

    def _one(self) -> str:
        draw = self._random
        # One in two pictures recurs: 20 popular ones, shared by all clients.
        seed = draw.randrange(20) if draw.random() < 0.5 else draw.randrange(10**6)
        prompt = make_prompt(draw.choice([300, 600, 1200, 2400]), seed)
        body = prompt.body(draw.choice([1, 8, 64, 256]))
        if draw.random() < 0.2:
            body["image_data"] = []
            body["text"] = f"<|im_start|>user\nNumber {seed}?<|im_end|>\n<|im_start|>assistant\n"
        body["rid"] = f"soak-{draw.getrandbits(64):x}"
        fate = draw.choice(["read", "read", "leave", "abort"])
        count = 0
        with httpx.stream("POST", f"{self._url}/generate", json=body, timeout=300) as reply:
            if reply.status_code != 200:
                return f"failed: status {reply.status_code}"
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                message = json.loads(line.removeprefix("data: "))
                if "error" in message:
                    return "failed: error in stream"
                count = int(message["meta_info"]["completion_tokens"])
                if fate == "leave":
                    return "left"
                if fate == "abort":
                    httpx.post(f"{self._url}/abort_request", json={"rid": body["rid"]}, timeout=60)
                    fate = "aborted"
        if fate != "read":
            return "aborted"
        return "answered" if count == body["sampling_params"]["max_new_tokens"] else f"failed: {count} tokens"


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run for the given minutes; returns the exit code."""
    with interruptible():
        server = ServerProcess(arguments.model, [*FLAGS, *POLICY], title="soak", console=console)
        with server:
            deadline = time.monotonic() + 60 * arguments.minutes
            clients = [Client(server.url, 1000 * arguments.seed + i, deadline) for i in range(arguments.clients)]
            for client in clients:
                client.start()
            problems = []
            with console.status("soaking") as status:
                while any(client.is_alive() for client in clients):
                    time.sleep(2)
                    if not server.running:
                        problems.append("the server died")
                        break
                    state = server.kv_policy()
                    problems += unbalanced(state)
                    sent = sum((client.outcomes for client in clients), Counter())
                    status.update(f"{sent.total()} requests, {state['cells_used']} of {state['cells_total']} cells")
            outcomes = sum((client.outcomes for client in clients), Counter())
            if server.running:
                server.flush_cache()
                time.sleep(1)
                state = server.kv_policy()
                problems += unbalanced(state)
                if state["cells_used"]:
                    problems.append(f"{state['cells_used']} cells are still used after the flush")
                if state["policy_failures"]:
                    problems.append(f"the policy failed {state['policy_failures']} times")
            problems += [outcome for outcome in outcomes if outcome.startswith("failed")]
            if found := TROUBLE.search(log := server.log_tail(100_000)):
                problems.append(f"the log says: {log[found.start() : found.start() + 300]}")
            console.print(dict(sorted(outcomes.items())))
            for problem in dict.fromkeys(problems):
                console.print(problem, style="red", markup=False)
            console.print("[red]failed[/red]" if problems else "[green]passed[/green]: nothing lost")
            return 1 if problems else 0


def unbalanced(state: dict[str, Any]) -> list[str]:
    """A line when cells are lost or counted twice."""
    if state["cells_used"] + state["cells_free"] == state["cells_total"]:
        return []
    return [f"{state['cells_used']} used + {state['cells_free']} free cells are not {state['cells_total']}"]
