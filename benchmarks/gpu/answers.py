"""Answers on a CUDA device: `python -m benchmarks.gpu.answers`.

Stock SGLang and ours serve the bundled model side by side, with SGLang's Triton attention and recorded decode steps.
Real questions about real images are asked under each condition:

* **stock**, and **ours 1.0**: the same tokens are expected.
* **alone**: at budget 0.1, one at a time, nothing cached.
* **together**: the same at budget 0.1, eight at a time behind shared images; the tokens of `alone` are expected.
* **recall**: at budget 0.1 under `keydiff`, which does not know the question, without recall and with it.

The model computes in bfloat16: SGLang's kernels of a GPU have no float32.  What it has counted is written after every
condition.  Exit status: 0 when every expectation holds, 1 otherwise, 2 when there is no device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlcache_sgl.client.client import Answer, Client
    from vlcache_sgl.client.server import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.1
AT_ONCE = 8
POOL_TOKENS = 32768
FLAGS = (
    *("--dtype", "bfloat16", "--max-total-tokens", str(POOL_TOKENS), "--mem-fraction-static", "0.9"),
    *("--attention-backend", "triton", "--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch"),
    *("--enable-cache-report", "--skip-server-warmup"),
)
OURS = ("--kv-policy", "vlcache", "--kv-budget", str(BUDGET))
RECALLING = ("--kv-policy", "keydiff", "--kv-budget", str(BUDGET), "--kv-recall", "64")


@dataclass(frozen=True)
class Asked:
    """One question and what is right."""

    text: str
    image: Any
    answer: str


def questions(images: int) -> list[Asked]:
    """All questions about so many images, held-out ones."""
    from vlcache_sgl.evaluation.data import requery

    found = []
    for number in range(images):
        sample = requery(number)
        (image,) = sample.open_images()
        found += [Asked(question.text, image, question.answers[0]) for question in sample.questions]
    return found


def ask_alone(server: ServerProcess, client: Client, asked: Sequence[Asked], **params: object) -> list[Answer]:
    """One at a time, each on an empty cache."""
    answers = []
    for one in asked:
        server.flush_cache()
        answers.append(client.ask(one.text, one.image, logprobs=True, custom_params=params))
    return answers


def ask_together(server: ServerProcess, client: Client, asked: Sequence[Asked], **params: object) -> list[Answer]:
    """Eight at a time, on a cache that is empty at first."""
    server.flush_cache()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda one: client.ask(one.text, one.image, logprobs=True, custom_params=params), asked))


def same(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    """How many answers consist of the same tokens."""
    return sum(a.choices[0].tokens == b.choices[0].tokens for a, b in zip(left, right, strict=True))


def right(answers: Sequence[Answer], asked: Sequence[Asked]) -> int:
    return sum(answer.text.strip() == one.answer for answer, one in zip(answers, asked, strict=True))


TWINS = {
    "ours 1.0": "stock",
    "ours 1.0, together": "stock, together",
    "together": "alone",
}
"""Conditions that give the same tokens."""


def run(
    servers: Mapping[str, ServerProcess], asked: Sequence[Asked], done: Callable[[str, dict[str, Any]], None]
) -> list[str]:
    """Every condition, each reported to `done` with what was counted; what is not as expected."""
    from vlcache_sgl.client.client import Client

    clients = {name: Client(server.openai_url) for name, server in servers.items()}
    stock, ours, recalling = (partial(ask_alone, servers[n], clients[n], asked) for n in ("stock", "ours", "recall"))
    answers: dict[str, list[Answer]] = {}
    problems: list[str] = []
    for name, ask in {
        "stock": stock,
        "stock, together": partial(ask_together, servers["stock"], clients["stock"], asked),
        "ours 1.0": partial(ours, kv_budget=1.0),
        "ours 1.0, together": partial(ask_together, servers["ours"], clients["ours"], asked, kv_budget=1.0),
        "alone": ours,
        "together": partial(ask_together, servers["ours"], clients["ours"], asked),
        "keydiff": partial(recalling, kv_recall="off"),
        "keydiff, recall": recalling,
    }.items():
        answers[name] = ask()
        counts = {
            "right": right(answers[name], asked),
            "questions": len(asked),
            "cached_tokens": sum(answer.cached_tokens or 0 for answer in answers[name]),
        }
        if name in TWINS:
            counts[f"same tokens as {TWINS[name]}"] = count = same(answers[name], answers[TWINS[name]])
            if count != len(asked):
                problems.append(f"{name}: {count} of {len(asked)} answers have the tokens of {TWINS[name]}")
        done(name, counts)
    for name in ("ours", "recall"):
        state = servers[name].kv_policy()
        problems += [f"{name}: {line}" for line in state.get("integrity", [])]
        problems += [f"{name}: a policy failed"] * bool(state["policy_failures"])
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6, help="of eight questions each; default 6")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results, with --smoke in out")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, one image: does the program run?")
    args = parser.parse_args(argv)
    import torch

    if not args.smoke and not torch.cuda.is_available():
        print("gpu_answers: no CUDA device; --smoke runs the program on a CPU, without a result", file=sys.stderr)
        return 2
    from rich.console import Console

    from benchmarks.common.host import command_line, device_name, host_block
    from vlcache_sgl.client.server import BUNDLED_FLAGS, ServerProcess, interruptible

    console = Console(width=140)
    flags = BUNDLED_FLAGS if args.smoke else FLAGS
    model = ROOT / "models/tinyvlm/grounded"
    servers = {
        name: ServerProcess(model, [*flags, *own], title=name, timeout_s=600)
        for name, own in {"stock": (), "ours": OURS, "recall": RECALLING}.items()
    }
    asked = questions(1 if args.smoke else args.images)
    folder = ROOT / ("out" if args.smoke else "benchmarks/results")
    out = args.out or folder / f"gpu-answers-{device_name()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "task": "gpu-answers",
        "smoke": args.smoke,
        "command": command_line(),
        "host": host_block(),
        "summary": [],
    }

    def done(condition: str, counts: dict[str, Any]) -> None:
        console.print(f"{condition}: {counts}")
        result["summary"].append({"condition": condition, **counts})
        out.write_text(json.dumps(result, indent=1) + "\n")

    with interruptible(), ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)
            server.launch()
        for server in servers.values():
            server.wait_until_ready()
        result["problems"] = run(servers, asked, done)
        out.write_text(json.dumps(result, indent=1) + "\n")
    for line in result["problems"]:
        console.print(f"WRONG {line}")
    console.print(f"written: {out}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
