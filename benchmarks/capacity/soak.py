"""For some minutes: everything clients do, and what they should not, to one compressing server on a small pool.

Drawn from a seed: images that recur and images that do not, in several sizes, texts, streams, long and short
answers, policies and budgets per request, requests that are aborted or whose client goes away, requests that are wrong,
and flushes under load.  The pool makes requests wait, evict and retract each other, and host memory is too small for
the images.  The same questions are asked again and again: at budget 1.0, where stock SGLang's answers are known, and at
the server's budget, where the answers of the same questions asked alone (`kv_share: off`, nobody else there) are known.

The exit code is 0 when every request was answered as it should be (wrong ones with a 4xx), the answers at budget 1.0
are stock's and those at the server's budget are the ones that were given alone, requests were retracted, host memory
overflowed, no cell and no row of host memory was lost, the processes' memory stayed bounded and the server lives.  An
answer of a request that was retracted is only counted at the server's budget: what it had answered is computed again
behind another selection.  The JSON file has the outcomes, and memory, cells and host memory over time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.common.host import ROOT, command_line, device_name, host_block
from benchmarks.common.load import PLACE, Prompt, make_prompt
from benchmarks.common.results import folder, save
from vlcache_sgl.client.client import data_url
from vlcache_sgl.client.server import ServerProcess, interruptible
from vlcache_sgl.evaluation.tasks.receipts import CELL, Receipt, make_receipt

POLICY = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--kv-host-memory", "12MB")
"""Host memory for 4,096 tokens: five of the larger images, or one of the longest prompts and little beside it."""
FLAGS = (
    *("--dtype", "float32", "--chunked-prefill-size", "512", "--max-total-tokens", "3072"),
    *("--max-running-requests", "16", "--schedule-conservativeness", "0.1", "--skip-server-warmup"),
)
ENVIRONMENT = {
    # glibc would keep each request's pixels in fragments of its heap, stock or not: that is not what is watched here.
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    # So that memory has levelled off after a minute: a full cache of image embeddings is no leak.
    "SGLANG_VLM_CACHE_SIZE_MB": "16",
    # Or SGLang admits nobody whose own answer might not fit, and nobody is ever retracted.
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "64",
}
TROUBLE = re.compile(r"leak detected|double free|use-after-free|hit an exception", re.IGNORECASE)
RETRACTED = re.compile(r"#retracted_reqs: (\d+)")
GRIDS = ((6, 10), (12, 12), (16, 16), (20, 24), (24, 32))
CHOICES: tuple[dict[str, Any] | None, ...] = (
    None,
    None,
    {"kv_budget": 0.02},
    {"kv_budget": 0.5},
    {"kv_policy": "snapkv", "kv_budget": 0.2},
    {"kv_policy": "scorer=knorm,allocator=uniform"},
    {"kv_budget": 1.0},
    {"kv_share": "policy"},
    {"kv_share": "off"},
)
GROWTH_ALLOWED = 0.15
"""Of resident memory, from the first third of the time to the last."""
TALKERS, TALK_TOKENS = 4, 900
POPULAR = 10
KNOWN = 16
ANSWER_TOKENS = 12
MINUTES = 20.0
COMPARED = ("in full, as stock", "compressed, as alone")
FAILED = "failed"
"""How outcomes begin that should not be."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py soak`."""
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"default {MINUTES:g}")
    parser.add_argument("--clients", type=int, default=12, help="requests in flight; default 12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(ROOT / "models/tinyvlm/grounded"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/, out/ for a shorter run")


def known_questions(seed: int) -> list[dict[str, Any]]:
    """Requests whose answers end by themselves: three questions about each of some images, and texts."""
    bodies = []
    for number in range(KNOWN):
        image, question = divmod(number, 4)
        if question == 3:
            text, images = f"Number {number}?", []
        else:
            drawn = sheet(70_000 + 1000 * seed + image, *GRIDS[-1 - image])
            text, images = drawn.questions[question].text, [data_url(drawn.image)]
        bodies.append(
            {
                "text": f"<|im_start|>user\n{PLACE * len(images)}{text}<|im_end|>\n<|im_start|>assistant\n",
                "image_data": images,
                "sampling_params": {"temperature": 0.0, "max_new_tokens": ANSWER_TOKENS},
            }
        )
    return bodies


@cache
def sheet(seed: int, rows: int, cols: int) -> Receipt:
    """Drawn once; what must be new is shifted by whole cells, because drawing takes longer than answering."""
    return make_receipt(seed, rows, cols, num_questions=6)


@cache
def long_prompt(tokens: int, seed: int) -> Prompt:
    """Several images; there are 80 of these."""
    return make_prompt(tokens, seed)


def with_choice(body: dict[str, Any], choice: dict[str, Any] | None) -> dict[str, Any]:
    """The request under another policy or budget."""
    if choice is None:
        return body
    return {**body, "sampling_params": {**body["sampling_params"], "custom_params": choice}}


def wrong_requests() -> list[Any]:
    """Bodies that must be answered with a 4xx; a text is sent as it is."""
    good = {"text": "red K?", "sampling_params": {"temperature": 0.0, "max_new_tokens": 2}}
    choices: list[Any] = [{"kv_budget": bad} for bad in ("much", 0, -1, 1.5, [0.1], True, 1e300)]
    choices += [{"kv_policy": bad} for bad in ("no-such-policy", "os.system:x=1", "snapkv:window=many", 7, "")]
    choices += [["kv_budget", 0.1]]
    return [
        *(with_choice(good, choice) for choice in choices),
        {**good, "text": f"<|im_start|>user\n{PLACE}red K?", "image_data": ["data:image/png;base64,AAAA"]},
        {**good, "text": "K " * 20_000},
        "{not json",
    ]


@dataclass(frozen=True)
class Plan:
    """What all clients draw from."""

    url: str
    deadline: float
    known: Sequence[dict[str, Any]]
    answers: Sequence[str]
    """Of stock SGLang, to `known`."""
    alone: Sequence[str]
    """Of the server itself, to `known`, each computed alone."""
    wrong: Sequence[Any]


class Client(threading.Thread):
    """One user after another, until the deadline."""

    def __init__(self, plan: Plan, seed: int, talks: bool = False) -> None:
        super().__init__(daemon=True)
        self._plan = plan
        self._talks = talks
        self._random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        deeds = [self._converse, self._check_known, self._send_wrong, self._flush]
        while time.monotonic() < self._plan.deadline:
            deed = self._talk if self._talks else self._random.choices(deeds, [60, 25, 10, 2])[0]
            try:
                self.outcomes[deed()] += 1
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.outcomes[f"{FAILED}: {deed.__name__}: {type(error).__name__}"] += 1

    def _post(self, path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self._plan.url}{path}", content=content, headers=headers, timeout=600)

    def _check_known(self) -> str:
        """A question that was asked before: in full it must have stock's answer, compressed its own of when alone."""
        number = self._random.randrange(len(self._plan.known))
        choice = self._random.choice([{"kv_budget": 1.0}, {"kv_budget": 1.0}, None])
        reply = self._post("/generate", with_choice(self._plan.known[number], choice))
        if reply.status_code != 200:
            return f"{FAILED}: a known question: status {reply.status_code}: {reply.text[:200]}"
        text = reply.json()["text"]
        if choice is None:
            if reply.json()["meta_info"]["num_retractions"]:
                return "compressed, retracted"
            if text != self._plan.alone[number]:
                return f"{FAILED}: question {number}: {text!r}, alone it was {self._plan.alone[number]!r}"
            return "compressed, as alone"
        if text != self._plan.answers[number]:
            return f"{FAILED}: question {number} in full: {text!r}, stock said {self._plan.answers[number]!r}"
        return "in full, as stock"

    def _send_wrong(self) -> str:
        body = self._random.choice(self._plan.wrong)
        reply = self._post("/generate", body)
        if 400 <= reply.status_code < 500:
            return "refused"
        return f"{FAILED}: status {reply.status_code} for {str(body)[:200]}"

    def _talk(self) -> str:
        """A long answer, read to its end: `TALKERS` of these at once are more than the pool holds."""
        sampling = {"temperature": 0.0, "max_new_tokens": TALK_TOKENS, "min_new_tokens": TALK_TOKENS}
        text = f"<|im_start|>user\nNumber {self._random.randrange(10**6)}?<|im_end|>\n<|im_start|>assistant\n"
        reply = self._post("/generate", {"text": text, "sampling_params": sampling})
        if reply.status_code != 200:
            return f"{FAILED}: a long answer: status {reply.status_code}: {reply.text[:200]}"
        count = int(reply.json()["meta_info"]["completion_tokens"])
        return "talked" if count == TALK_TOKENS else f"{FAILED}: {count} tokens of a long answer"

    def _flush(self) -> str:
        """SGLang refuses while requests run, and that is fine."""
        return f"flush: {self._post('/flush_cache', {}).status_code}"

    def _request(self) -> dict[str, Any]:
        draw = self._random
        # One in two recurs, policy included: prefixes are shared by all clients.
        popular = draw.random() < 0.5
        seed = draw.randrange(POPULAR if popular else 10**6)
        what = random.Random(seed)
        choice, kind = what.choice(CHOICES), what.random()
        if kind < 0.2:
            body: dict[str, Any] = {"text": f"<|im_start|>user\nNumber {seed}?<|im_end|>\n<|im_start|>assistant\n"}
        elif kind < 0.5:
            rows, cols = what.choice(GRIDS)
            drawn = sheet(seed % 4, rows, cols)
            again = what.random() < 0.5  # the same image, another question
            shift = (0, 0) if again else (CELL * what.randrange(rows), CELL * what.randrange(cols))
            image = Image.fromarray(np.roll(np.asarray(drawn.image), shift, axis=(0, 1)))
            question = draw.choice(drawn.questions) if again else drawn.questions[0]
            text = f"<|im_start|>user\n{PLACE}{question.text}<|im_end|>\n<|im_start|>assistant\n"
            body = {"text": text, "image_data": [data_url(image)]}
        else:
            body = long_prompt(what.choice([300, 600, 1200, 2400]), seed % 20).body(1)
        tokens = draw.choice([1, 8, 64, 256])
        body["sampling_params"] = {"temperature": 0.0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        body |= {"stream": True, "rid": f"soak-{draw.getrandbits(64):x}"}
        return with_choice(body, choice)

    def _converse(self) -> str:
        body = self._request()
        fate = self._random.choice(["read", "read", "leave", "abort"])
        count = 0
        with httpx.stream("POST", f"{self._plan.url}/generate", json=body, timeout=600) as reply:
            if reply.status_code != 200:
                return f"{FAILED}: status {reply.status_code}"
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                message = json.loads(line.removeprefix("data: "))
                if "error" in message:
                    return f"{FAILED}: error in stream: {str(message['error'])[:200]}"
                count = int(message["meta_info"]["completion_tokens"])
                if fate == "leave":
                    return "left"
                if fate == "abort":
                    self._post("/abort_request", {"rid": body["rid"]})
                    fate = "aborted"
        if fate != "read":
            return "aborted"
        return "answered" if count == body["sampling_params"]["max_new_tokens"] else f"{FAILED}: {count} tokens"


def ask_stock(model: str, known: Sequence[dict[str, Any]], console: Console) -> list[str]:
    """What SGLang without a policy answers, one by one."""
    with ServerProcess(model, FLAGS, title="stock", env=ENVIRONMENT, console=console) as server:
        replies = [httpx.post(f"{server.url}/generate", json=body, timeout=300) for body in known]
    return [reply.raise_for_status().json()["text"] for reply in replies]


def ask_alone(server: ServerProcess, known: Sequence[dict[str, Any]]) -> list[str]:
    """What the server answers to each when it computes it alone and has nothing else to do."""
    bodies = [with_choice(body, {"kv_share": "off"}) for body in known]
    replies = [httpx.post(f"{server.url}/generate", json=body, timeout=300) for body in bodies]
    return [reply.raise_for_status().json()["text"] for reply in replies]


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run for the given minutes and write a JSON file; the exit code says whether all was well."""
    host = host_block()
    known = known_questions(arguments.seed)
    with interruptible():
        answers = ask_stock(arguments.model, known, console)
        flags = [*FLAGS, *POLICY]
        with ServerProcess(arguments.model, flags, title="soak", env=ENVIRONMENT, console=console) as server:
            alone = ask_alone(server, known)
            deadline = time.monotonic() + 60 * arguments.minutes
            plan = Plan(server.url, deadline, known, answers, alone, wrong_requests())
            clients = [
                Client(plan, 1000 * arguments.seed + number, talks=number < TALKERS)
                for number in range(arguments.clients)
            ]
            problems, samples = watch(server, clients, console)
            outcomes = sum((client.outcomes for client in clients), Counter())
            problems += aftermath(server, outcomes)
            problems += grown(samples)
            retracted = sum(map(int, RETRACTED.findall(server.log_tail(10**6))))
            if not retracted:
                problems.append("nobody was retracted: the pool is too large to show anything")
            state = server.kv_policy() if server.running else {}
    result = {
        "task": "soak",
        "command": command_line(),
        "host": host,
        "model": Path(arguments.model).parent.name,
        "server_flags": flags,
        "environment": ENVIRONMENT,
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "problems": list(dict.fromkeys(problems)),
        "requests": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "retracted": retracted,
        "alone_as_stock": sum(ours == theirs for ours, theirs in zip(alone, answers, strict=True)),
        "known": len(known),
        "kv_policy_at_end": {key: value for key, value in state.items() if not isinstance(value, list)},
        "samples": [list(sample) for sample in samples],
    }
    write(result, arguments, console)
    return 1 if problems else 0


def write(result: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    """The result on the console and as JSON."""
    stem = f"{device_name()}-{result['model']}-soak-sglang{result['host']['packages']['sglang']}"
    path = folder(arguments.output, arguments.minutes >= MINUTES) / f"{stem}.json"
    text = re.sub(r"\[\s+([\d.]+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", json.dumps(result, indent=1))
    written = save(path, result, text)
    memory = max((memory for _, memory, *_ in result["samples"]), default=0)
    console.print(result["outcomes"])
    console.print(f"{result['retracted']} requests were retracted; resident memory at most {memory / 1e9:.2f} GB")
    for problem in result["problems"]:
        console.print(problem, style="red", markup=False)
    console.print("[red]failed[/red]" if result["problems"] else "[green]passed[/green]: nothing lost")
    console.print(f"written: {written}")


class Sample(NamedTuple):
    """The server at one moment."""

    seconds: float
    """Since the clients started."""
    memory: int
    """Resident bytes of all its processes."""
    cells_used: int
    host_tokens_used: int


def watch(server: ServerProcess, clients: Sequence[Client], console: Console) -> tuple[list[str], list[Sample]]:
    """Let the clients run; problems seen meanwhile, and the server over time."""
    problems: list[str] = []
    samples: list[Sample] = []
    started = time.monotonic()
    for client in clients:
        client.start()
    with console.status("soaking") as status:
        while any(client.is_alive() for client in clients):
            time.sleep(3)
            if not server.running:
                return [*problems, "the server died"], samples
            state = server.kv_policy()
            problems += unbalanced(state)
            memory, used = server.memory_bytes(), state["cells_used"]
            samples.append(Sample(round(time.monotonic() - started, 1), memory, used, state["host_tokens_used"]))
            sent = sum((client.outcomes for client in clients), Counter())
            status.update(f"{sent.total()} requests, {used} of {state['cells_total']} cells, {memory / 1e9:.2f} GB")
    return problems, samples


def aftermath(server: ServerProcess, outcomes: Counter[str]) -> list[str]:
    """What is wrong when all clients have gone."""
    problems = [outcome for outcome in outcomes if outcome.startswith(FAILED)]
    problems += [f"no answer was compared: {what}" for what in COMPARED if not outcomes[what]]
    if server.running:
        server.flush_cache()
        time.sleep(1)
        state = server.kv_policy()
        problems += unbalanced(state)
        problems += state["integrity"]
        if state["cells_used"]:
            problems.append(f"{state['cells_used']} cells are still used after the flush")
        if state["host_tokens_used"]:
            problems.append(f"{state['host_tokens_used']} tokens are still in host memory after the flush")
        if state["host_bytes_written"] <= state["host_bytes_per_token"] * state["host_tokens_total"]:
            problems.append("host memory never overflowed: it is too large to show anything")
        if not state["prefix_hits"]:
            problems.append("nobody found a compressed prefix")
        if state["policy_failures"]:
            problems.append(f"the policy failed {state['policy_failures']} times")
    if found := TROUBLE.search(log := server.log_tail(10**6)):
        problems.append(f"the log says: {log[found.start() : found.start() + 300]}")
    return problems


def grown(samples: Sequence[Sample]) -> list[str]:
    """A line when resident memory went on growing after the first third of the time."""
    memory = [sample.memory for sample in samples]
    third = len(memory) // 3
    if third == 0:
        return []
    early, late = max(memory[:third]), max(memory[-third:])
    if late <= early * (1 + GROWTH_ALLOWED):
        return []
    return [f"resident memory grew from {early / 1e9:.2f} to {late / 1e9:.2f} GB"]


def unbalanced(state: dict[str, Any]) -> list[str]:
    """A line when cells are lost or counted twice."""
    if state["cells_used"] + state["cells_free"] == state["cells_total"]:
        return []
    return [f"{state['cells_used']} used + {state['cells_free']} free cells are not {state['cells_total']}"]
