"""How many users fit: stock SGLang and ours in equally many bytes, under four loads, one server after another.

The pool holds about eight uncompressed requests of one 32 x 32 picture (1024 image tokens).  What SGLang gives its KV
cache in bytes is what ours gets for cells, residency table and slots together.  Pictures, questions and arrivals are
drawn from a seed: every server is sent the same.

* in-flight: all requests at once, each about a picture of its own; how many decode together?
* working-set: repeated questions about 40 pictures, Zipf-distributed; what does the prefix cache still know?
* multi-turn: 20 chats of 6 turns, each about its picture.
* mixed: texts, pictures at the server's budget, pictures that ask for another policy or for no compression.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import openai
from host import ROOT, command_line, device_name, host_block
from make_model import make_model
from rich.console import Console
from rich.table import Table
from speed import MODEL_NAME

from vlcache_sgl.cli.client import Message, model_says, user_says
from vlcache_sgl.cli.server import ServerProcess, interruptible
from vlcache_sgl.tasks.receipts import Picture, make_picture

MODELS: dict[str, Callable[[], Path]] = {
    "tinyvlm": lambda: ROOT / "models/tinyvlm/grounded",
    MODEL_NAME: lambda: make_model(ROOT / "out/bench-model"),
}
"""The bundled model, which answers; and one of random weights, whose prefill is dear beside reading a picture."""
SIDE = 32
REQUEST_TOKENS = SIDE * SIDE + 48 + 32
"""Of one uncompressed request: picture, template and question, answer."""
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
PAGE = ROOT / "docs/capacity.md"
BEGIN = "<!-- results:begin (written by benchmarks/capacity.py from benchmarks/results) -->"
END = "<!-- results:end -->"
TIMEOUT_S = 900.0
FIRST_SEED = 40_000


class Contender(NamedTuple):
    """A server in the comparison."""

    name: str
    flags: tuple[str, ...]


STOCK = "stock"
CONTENDERS = (
    Contender(STOCK, ()),
    *(
        Contender(f"ours {budget}", ("--kv-policy", "vlcache", "--kv-budget", budget))
        for budget in ("1.0", "0.2", "0.1")
    ),
)


# -- what is sent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[Message, ...]
    expected: str | None = None
    """The right answer, where there is one."""
    max_tokens: int = 8
    ignore_eos: bool = False
    custom_params: dict[str, Any] | None = None
    kind: str = "picture"


@dataclass
class Outcome:
    """What came back."""

    kind: str
    sent_s: float
    """Since the load began."""
    ttft_ms: float
    latency_ms: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    right: bool | None
    """None where no answer is right or wrong."""
    text: str = field(repr=False, default="")


Send = Callable[[Ask], Awaitable[Outcome]]


class Sender:
    """Streams requests to one server and takes the times."""

    def __init__(self, url: str, with_policies: bool) -> None:
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=TIMEOUT_S, max_retries=0)
        self._with_policies = with_policies
        self.started = time.perf_counter()

    async def __call__(self, ask: Ask) -> Outcome:
        """Send one request; raises what the client raises."""
        extra: dict[str, Any] = {"ignore_eos": ask.ignore_eos}
        if ask.custom_params is not None and self._with_policies:
            extra["custom_params"] = ask.custom_params
        sent = time.perf_counter()
        first = usage = None
        text = ""
        stream = await self._client.chat.completions.create(
            model="default",
            messages=ask.messages,  # type: ignore[arg-type]
            max_tokens=ask.max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.perf_counter()
                    text += choice.delta.content
        end = time.perf_counter()
        assert usage is not None, "the stream ended without its usage"
        details = usage.prompt_tokens_details
        return Outcome(
            kind=ask.kind,
            sent_s=round(sent - self.started, 3),
            ttft_ms=round(((first or end) - sent) * 1e3, 1),
            latency_ms=round((end - sent) * 1e3, 1),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens if details else None) or 0,
            completion_tokens=usage.completion_tokens,
            right=None if ask.expected is None else text.strip().startswith(ask.expected),
            text=text,
        )

    async def close(self) -> None:
        await self._client.close()


@cache
def picture(number: int, num_questions: int) -> Picture:
    """A picture of 1024 image tokens, drawn once."""
    return make_picture(FIRST_SEED + number, SIDE, SIDE, num_questions=num_questions)


@cache
def _first_turn(number: int, num_questions: int, question: int) -> Message:
    drawn = picture(number, num_questions)
    return user_says(drawn.questions[question].text, drawn.image)


def about(number: int, question: int = 0, num_questions: int = 1, **fields: Any) -> Ask:
    """A question about a picture."""
    expected = picture(number, num_questions).questions[question].answer
    return Ask((_first_turn(number, num_questions, question),), expected=expected, **fields)


async def closed_loop(send: Send, asks: Sequence[Ask], users: int) -> list[Outcome]:
    """`users` users, each sending its next request when the last is answered; outcomes in the order of `asks`."""
    waiting = iter(enumerate(asks))
    outcomes: dict[int, Outcome] = {}

    async def user() -> None:
        for number, ask in waiting:
            outcomes[number] = await send(ask)

    await asyncio.gather(*(user() for _ in range(users)))
    return [outcomes[number] for number in range(len(asks))]


@dataclass(frozen=True)
class Load:
    """What all servers are sent."""

    name: str
    about: str
    prepare: Callable[[bool], Any]
    """Draws the pictures; gets whether it is a quick run; returns what `run` gets."""
    run: Callable[[Send, Any], Awaitable[list[Outcome]]]
    warm_up: Callable[[Send, Any], Awaitable[Any]] | None = None
    """Sent before, after the flush, and not counted."""


def _in_flight(quick: bool) -> list[Ask]:
    return [about(i, max_tokens=32, ignore_eos=True) for i in range(16 if quick else 64)]


async def _all_at_once(send: Send, asks: list[Ask]) -> list[Outcome]:
    return await closed_loop(send, asks, len(asks))


WORKING_SET = 40
QUESTIONS = 6
ZIPF = 0.8


def _working_set(quick: bool) -> tuple[list[Ask], list[Ask]]:
    pictures = 12 if quick else WORKING_SET
    draw = random.Random(1)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(pictures)]
    numbers = draw.choices(range(pictures), weights, k=24 if quick else 120)
    asks = [about(200 + n, draw.randrange(QUESTIONS), QUESTIONS) for n in numbers]
    # Least popular first: what an LRU cache should still know at the end are the popular ones.
    warm_up = [about(200 + n, draw.randrange(QUESTIONS), QUESTIONS) for n in reversed(range(pictures))]
    return warm_up, asks


async def _warm_working_set(send: Send, prepared: tuple[list[Ask], list[Ask]]) -> None:
    await closed_loop(send, prepared[0], 1)


async def _ask_working_set(send: Send, prepared: tuple[list[Ask], list[Ask]]) -> list[Outcome]:
    return await closed_loop(send, prepared[1], 8)


CHATS, TURNS = 20, 6


def _chats(quick: bool) -> list[int]:
    numbers = list(range(400, 400 + (6 if quick else CHATS)))
    for number in numbers:
        _first_turn(number, TURNS, 0)
    return numbers


async def _all_chats(send: Send, numbers: list[int]) -> list[Outcome]:
    async def chat(number: int) -> list[Outcome]:
        drawn = picture(number, TURNS)
        turns = [_first_turn(number, TURNS, 0)]
        outcomes = []
        for turn, question in enumerate(drawn.questions):
            if turn:
                turns.append(user_says(question.text))
            outcome = await send(Ask(tuple(turns), expected=question.answer, kind=f"turn {turn + 1}"))
            outcomes.append(outcome)
            turns.append(model_says(outcome.text))
        return outcomes

    return list(itertools.chain.from_iterable(await asyncio.gather(*map(chat, numbers))))


TEXT = "Count the letters of this sentence, and then those of the next one, and then stop counting. " * 4


def _mixed(quick: bool) -> list[Ask]:
    draw = random.Random(2)
    asks = []
    for i in range(20 if quick else 100):
        number, kind = draw.randrange(600, 630), draw.random()
        if kind < 0.3:
            asks.append(Ask((user_says(f"{i}. {TEXT}"),), max_tokens=64, ignore_eos=True, kind="text"))
        elif kind < 0.7:
            asks.append(about(number, max_tokens=32, ignore_eos=True))
        elif kind < 0.85:
            params = {"kv_policy": "snapkv", "kv_budget": 0.2}
            asks.append(about(number, max_tokens=32, ignore_eos=True, custom_params=params, kind="picture, snapkv 0.2"))
        else:
            params = {"kv_budget": 1.0}
            asks.append(about(number, max_tokens=32, ignore_eos=True, custom_params=params, kind="picture, in full"))
    return asks


async def _mixed_users(send: Send, asks: list[Ask]) -> list[Outcome]:
    return await closed_loop(send, asks, 32)


LOADS = (
    Load("in-flight", "64 requests at once, each about its own picture, 32 tokens each", _in_flight, _all_at_once),
    Load(
        "working-set",
        f"120 questions about {WORKING_SET} pictures, Zipf {ZIPF:g}, 8 users; each picture was asked about once before",
        _working_set,
        _ask_working_set,
        _warm_working_set,
    ),
    Load("multi-turn", f"{CHATS} chats at once, {TURNS} turns each, a picture in the first", _chats, _all_chats),
    Load("mixed", "100 texts and pictures under several policies, 32 users", _mixed, _mixed_users),
)


# -- what is measured -------------------------------------------------------------------------------------------------

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
    steps = list(decode_steps(new))
    crowded = [running for running, waiting in steps if waiting] or [running for running, _ in steps]
    judged = [outcome.right for outcome in outcomes if outcome.right is not None]
    state = server.kv_policy()
    return {
        "requests": len(outcomes),
        "seconds": round(seconds, 2),
        "running_peak": max((running for running, _ in steps), default=0),
        "running_mean_while_others_wait": round(statistics.mean(crowded), 2) if crowded else 0,
        "retracted": sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", new)),
        "tokens_per_s": round(sum(outcome.completion_tokens for outcome in outcomes) / seconds, 2),
        "hit_rate": round(sum(o.cached_tokens for o in outcomes) / sum(o.prompt_tokens for o in outcomes), 4),
        "ttft_mean_ms": round(statistics.mean(o.ttft_ms for o in outcomes), 1),
        "ttft_p95_ms": percentile([o.ttft_ms for o in outcomes], 0.95),
        "latency_p50_ms": percentile([o.latency_ms for o in outcomes], 0.5),
        "latency_p95_ms": percentile([o.latency_ms for o in outcomes], 0.95),
        "right": sum(judged),
        "judged": len(judged),
        "kv_policy_at_end": {key: value for key, value in state.items() if not isinstance(value, list)},
        "decode_steps": [list(step) for step in steps],
        "outcomes": [{key: value for key, value in asdict(o).items() if key != "text"} for o in outcomes],
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row its ratios to stock."""
    stock = next((row for row in rows if row["server"] == STOCK), None)
    for row in rows if stock else ():
        for key in ("running_peak", "running_mean_while_others_wait", "tokens_per_s", "ttft_mean_ms", "latency_p95_ms"):
            row[f"{key}_ratio"] = round(row[key] / stock[key], 3) if stock[key] else None


def check_targets(load: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was to be reached, and whether it was."""
    found = {row["server"]: row for row in rows}
    stock, tenth = found.get(STOCK), found.get("ours 0.1")
    if stock is None or tenth is None:
        return {}
    checks: dict[str, tuple[float, str, float]] = {}
    if load == "in-flight":
        checks["running requests, ours 0.1 / stock"] = (tenth["running_peak_ratio"], "at least", 6.0)
    if load == "working-set":
        checks["hit rate, ours 0.1"] = (tenth["hit_rate"], "at least", 0.9)
        checks["hit rate, stock"] = (stock["hit_rate"], "at most", 0.4)
        checks["mean first token, stock / ours 0.1"] = (1 / tenth["ttft_mean_ms_ratio"], "at least", 3.0)
    return {
        name: {
            "target": f"{direction} {bound:g}",
            "value": round(value, 3),
            "reached": value >= bound if direction == "at least" else value <= bound,
        }
        for name, (value, direction, bound) in checks.items()
    }


def table_of(load: Load, rows: Sequence[dict[str, Any]]) -> Table:
    """One row per server."""
    table = Table(title=f"{load.name}: {load.about}", title_justify="left")
    table.add_column("server", no_wrap=True)
    for name in ("running: most", "mean", "tokens/s", "hit rate", "TTFT mean, p95 ms", "latency p50, p95 ms", "right"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["server"],
            str(row["running_peak"]),
            f"{row['running_mean_while_others_wait']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['hit_rate']:.3f}",
            f"{row['ttft_mean_ms']:.0f}, {row['ttft_p95_ms']:.0f}",
            f"{row['latency_p50_ms']:.0f}, {row['latency_p95_ms']:.0f}",
            f"{row['right']}/{row['judged']}",
        )
    return table


def plot(load: str, about: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Requests that decode together over the run, and the figures beside each other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *right) = pyplot.subplots(1, 4, figsize=(14, 3.6), width_ratios=(2.2, 1, 1, 1), layout="constrained")
    names = [row["server"] for row in rows]
    colours = [f"C{[c.name for c in CONTENDERS].index(name)}" for name in names]
    for row, colour in zip(rows, colours, strict=True):
        running = sorted((running for running, _ in row["decode_steps"]), reverse=True)
        share = [(i + 1) / len(running) for i in range(len(running))]
        style = "--" if row["server"] == STOCK else "-"
        left.step(share, running, style, label=row["server"], color=colour, where="pre", zorder=3 - len(style))
    left.set(
        xlabel="decode steps, most crowded first", ylabel="requests decoding together", ylim=(0, None), xlim=(0, 1)
    )
    left.legend()
    middle = ("most together", "running_peak", 1.0) if load == "in-flight" else ("prefix hit rate", "hit_rate", 1.0)
    panels = (("tokens / s", "tokens_per_s", 1.0), middle, ("first token, mean s", "ttft_mean_ms", 1e-3))
    for axis, (title, key, scale) in zip(right, panels, strict=True):
        bars = axis.bar(names, [row[key] * scale for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.3g")
        axis.set(title=title)
        axis.tick_params(axis="x", rotation=30)
        axis.margins(y=0.15)
    figure.suptitle(f"{load}: {about}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def result_paths() -> list[Path]:
    """The committed results, the loads in the order of `LOADS`."""
    found = (ROOT / "benchmarks/results").glob("*-capacity-*.json")
    names = [load.name for load in LOADS]
    return sorted(found, key=lambda path: (MODEL_NAME in path.name, [n in path.name for n in names].index(True)))


def block(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The Markdown between the markers, from (path of the picture, result)."""
    parts = []
    for picture_path, result in results:
        host = result["host"]
        parts += [
            f"### {result['load']}, {result['model']}",
            "",
            f"{result['about'].capitalize()}.",
            "",
            "| server | decode together: most, mean while others wait | tokens/s | prefix hit rate "
            "| first token ms: mean, p95 | latency ms: p50, p95 | right |",
            "|---" * 7 + "|",
        ]
        for row in result["rows"]:
            first = f"{row['ttft_mean_ms']:.0f}, {row['ttft_p95_ms']:.0f}"
            latency = f"{row['latency_p50_ms']:.0f}, {row['latency_p95_ms']:.0f}"
            parts.append(
                f"| {row['server']} | {row['running_peak']}, {row['running_mean_while_others_wait']:.1f} "
                f"| {row['tokens_per_s']:.1f} | {row['hit_rate']:.3f} | {first} | {latency} "
                f"| {row['right']} of {row['judged']} |"
            )
        parts.append("")
        for name, check in result["targets"].items():
            reached = "reached" if check["reached"] else "**not reached**"
            parts.append(f"* {name}: {check['value']:.2f}; wanted {check['target']}: {reached}")
        parts += [
            "",
            f"`{result['command']}`; SGLang {host['packages']['sglang']}, {host['cores']} CPU cores, float32.",
            "",
            f"![{result['load']}]({picture_path})",
            "",
        ]
    return "\n".join(parts).rstrip()


def rendered(page: str) -> str:
    """The page with the table of the committed results."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks the markers {BEGIN} and {END}")
    results = [
        (f"../{path.with_suffix('.png').relative_to(ROOT)}", json.loads(path.read_text())) for path in result_paths()
    ]
    return f"{before}{BEGIN}\n{block(results)}\n{END}{after}"


# -- the task ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `run.py capacity`."""
    parser.add_argument("--quick", action="store_true", help="few requests: does it run?")
    names = [load.name for load in LOADS]
    parser.add_argument("--loads", nargs="+", choices=names, default=names, metavar="LOAD", help=", ".join(names))
    parser.add_argument("--model", choices=MODELS, default="tinyvlm", help=", ".join(MODELS) + "; default tinyvlm")
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="some of: " + ", ".join(c.name for c in CONTENDERS))
    parser.add_argument("--flags", default="", help="further flags for all servers, as one text")
    parser.add_argument("--page", action="store_true", help="only draw the results again and rewrite docs/capacity.md")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/, out/ for anything but a whole run")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and write a JSON file and a picture per load; the exit code says whether it could be measured."""
    if arguments.page:
        for path in result_paths():
            result = json.loads(path.read_text())
            plot(result["load"], result["about"], result["rows"], path.with_suffix(".png"))
        PAGE.write_text(rendered(PAGE.read_text()))
        return 0
    loads = [load for load in LOADS if load.name in arguments.loads]
    contenders = [c for c in CONTENDERS if not arguments.only or c.name in arguments.only]
    flags = [*FLAGS, *arguments.flags.split()]
    host = host_block()
    model = MODELS[arguments.model]()
    with console.status("drawing pictures"):
        prepared = {load.name: load.prepare(arguments.quick) for load in loads}
    rows: dict[str, list[dict[str, Any]]] = {load.name: [] for load in loads}
    with interruptible():
        for contender in contenders:
            with ServerProcess(
                model, [*flags, *contender.flags], title=contender.name, env=ENVIRONMENT, console=console
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
    folder = arguments.output or (ROOT / "benchmarks/results" if whole else ROOT / "out")
    folder.mkdir(parents=True, exist_ok=True)
    for load in loads:
        add_ratios(rows[load.name])
        write(load, arguments.model, rows[load.name], folder, flags, host, console)
    if whole and arguments.output is None:
        PAGE.write_text(rendered(PAGE.read_text()))
    return 0


async def _one(server: ServerProcess, ask: Ask) -> None:
    sender = Sender(server.openai_url, False)
    await sender(ask)
    await sender.close()


def write(
    load: Load,
    model: str,
    rows: list[dict[str, Any]],
    folder: Path,
    flags: list[str],
    host: dict[str, Any],
    console: Console,
) -> None:
    """Table on the console, JSON and PNG in `folder`."""
    result = {
        "task": "capacity",
        "load": load.name,
        "about": load.about,
        "command": command_line(),
        "host": host,
        "model": model,
        "server_flags": flags,
        "servers": {c.name: list(c.flags) for c in CONTENDERS if any(row["server"] == c.name for row in rows)},
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "targets": check_targets(load.name, rows),
        "rows": rows,
    }
    stem = f"{device_name()}-{model}-capacity-{load.name}-sglang{host['packages']['sglang']}"
    path = folder / f"{stem}.json"
    text = json.dumps(result, indent=1)
    # Long lists of numbers on one line each.
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    path.write_text(text + "\n")
    plot(load.name, load.about, rows, path.with_suffix(".png"))
    console.print(table_of(load, rows))
    for name, check in result["targets"].items():
        console.print(f"{name}: {check['value']:.3f}, {check['target']}: {'' if check['reached'] else 'not '}reached")
    console.print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} and .png")
