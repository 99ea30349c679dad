"""Are answers from a shared prefix those of requests computed alone?  The same questions both ways, mode by mode.

*Alone* is a request with `kv_share: off` that nobody else runs beside, on the same server; *shared* is the same request
with `kv_share: exact`, at the mode's concurrency, after others have asked about its images.  Greedy, float32, the
bundled model.  An answer that differs is asked for once more with probabilities: where the two answers part, the
model's first and second choice may be closer than float32 tells batches of different shapes apart, which is a tie.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from benchmarks.common.host import ROOT, command_line, host_block
from benchmarks.common.pages import with_block
from benchmarks.common.results import RESULTS, folder, save
from vlcache_sgl.client.client import Answer, Client, Message, model_says, user_says
from vlcache_sgl.client.server import ServerProcess, interruptible
from vlcache_sgl.evaluation.tasks.receipts import Receipt, make_receipt

PAGE = ROOT / "docs/sharing.md"
MARKERS = "sharing-identity"
STEM = "sharing-identity"
MODEL = ROOT / "models/tinyvlm/grounded"
FIRST_SEED = 210_000
SIDE = 16
"""Image tokens along each side."""
POLICIES = ("vlcache:density", "vlcache", "snapkv:window=8", "keydiff", "pyramidkv")
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.4)
ANSWER_TOKENS = 8
FLAGS = (
    *("--kv-policy", "vlcache:density", "--kv-budget", "0.1", "--kv-host-memory", "64MB"),
    *("--dtype", "float32", "--max-total-tokens", "32768", "--enable-cache-report"),
    *("--skip-server-warmup", "--sleep-on-idle"),
)
TIE_NATS = 1e-3
"""Two choices that are closer than this are a tie."""


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    name: str
    turns: tuple[Message, ...]
    expected: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    """`custom_params`, beside the way to share."""
    stream: bool = False


@dataclass(frozen=True)
class Asked:
    """The two answers to one prompt."""

    prompt: str
    shared: str
    alone: str
    right_shared: bool | None
    """None where no answer is right or wrong."""
    right_alone: bool | None
    prompt_tokens: int
    cached_tokens: int
    """Of the shared one."""
    gap_nats: float | None = None
    """Where the answers part, how much more probable the first choice was alone than the second; None: they do not."""

    @property
    def same(self) -> bool:
        return self.shared == self.alone


Say = Callable[[str, Sequence[Message]], str]
"""Answers a prompt alone: turns of a conversation that need an answer of their own server."""


@dataclass(frozen=True)
class Mode:
    """One row of the table."""

    name: str
    prompts: Callable[[Say], list[Prompt]]
    flags: tuple[str, ...] = ()
    """Of the server, beside `FLAGS`; modes of the same ones share it."""
    at_once: int = 1
    environment: tuple[tuple[str, str], ...] = ()


@cache
def image(number: int) -> Receipt:
    """Drawn once, a few tokens wider with every number."""
    return make_receipt(FIRST_SEED + number, SIDE, SIDE + number % 5, num_questions=8)


def questions(first: int, images: int, each: int, *, stream: bool = False, **params: Any) -> list[Prompt]:
    """`each` questions about each of so many images, one image after another."""
    return [
        Prompt(f"image {number}, question {place}", (user_says(q.text, image(number).image),), q.answer, params, stream)
        for number in range(first, first + images)
        for place, q in enumerate(image(number).questions[:each])
    ]


def _single(_: Say) -> list[Prompt]:
    return questions(0, 10, 8)


def _policies(_: Say) -> list[Prompt]:
    """Every policy at every budget; all of them share one prefix."""
    return [
        Prompt(f"{prompt.name}, {policy}, {budget:g}", prompt.turns, None, {"kv_policy": policy, "kv_budget": budget})
        for number, (policy, budget) in enumerate(itertools.product(POLICIES, BUDGETS))
        for prompt in questions(20 + number % 2, 1, 4)
    ]


def _several_images(_: Say) -> list[Prompt]:
    """Two and three images in one prompt; the first ones recur, with others behind them."""
    prompts = []
    for first, count in itertools.product((30, 34), (2, 3)):
        images: list[Image.Image] = [image(first + i).image for i in range(count)]
        for place, q in enumerate(image(first + count - 1).questions[:5]):
            prompts.append(Prompt(f"images {first} to {first + count - 1}, {place}", (user_says(q.text, *images),)))
    return prompts


def _chats(say: Say) -> list[Prompt]:
    """The second turn continues the first one's prompt, its answer computed alone."""
    prompts = []
    for number in range(40, 46):
        for one, two in itertools.pairwise(image(number).questions[:4]):
            first = user_says(one.text, image(number).image)
            name = f"image {number}, {one.text} {two.text}"
            turns = (first, model_says(say(name, [first])), user_says(two.text))
            prompts += [Prompt(f"{name} turn 1", (first,), one.answer), Prompt(f"{name} turn 2", turns)]
    return prompts


def _streams(_: Say) -> list[Prompt]:
    return questions(50, 5, 4, stream=True)


def _crowd(first: int, images: int, _: Say) -> list[Prompt]:
    """One question about each image, then the next about each."""
    prompts = questions(first, images, 8)
    return [prompts[8 * number + place] for place in range(8) for number in range(images)]


MODES = (
    Mode("one at a time", _single),
    Mode("five policies, budgets 0.05 to 0.4", _policies),
    Mode("several images per prompt", _several_images),
    Mode("two-turn chats", _chats),
    Mode("streamed", _streams),
    Mode("eight at a time", partial(_crowd, 60, 8), at_once=8),
    Mode("prefill in chunks of 64, eight at a time", partial(_crowd, 70, 4), ("--chunked-prefill-size", "64"), 8),
    Mode("prefill in chunks of 8192, eight at a time", partial(_crowd, 75, 4), ("--chunked-prefill-size", "8192"), 8),
    Mode("without overlap, eight at a time", partial(_crowd, 80, 4), ("--disable-overlap-schedule",), 8),
    Mode(
        "two ranks, eight at a time",
        partial(_crowd, 85, 4),
        ("--tp", "2"),
        8,
        (("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    numbers = ", ".join(f"{number}: {mode.name}" for number, mode in enumerate(MODES))
    parser.add_argument(
        "--modes", nargs="+", type=int, choices=range(len(MODES)), default=range(len(MODES)), help=numbers
    )
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/ for all modes, out/ for less")
    parser.add_argument(
        "--into", action="store_true", help="into the result that is there: other modes stay as they are"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the table again")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and write down; 1 where a difference is no tie."""
    if arguments.page:
        PAGE.write_text(rendered(PAGE.read_text()))
        return 0
    modes = [MODES[number] for number in arguments.modes]
    path = folder(arguments.output, len(modes) == len(MODES) or arguments.into) / f"{STEM}.json"
    before = json.loads(path.read_text())["modes"] if arguments.into and path.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    with interruptible():
        for (flags, environment), group in itertools.groupby(modes, key=lambda mode: (mode.flags, mode.environment)):
            flags = (*FLAGS, *flags)
            with ServerProcess(MODEL, flags, title=" ".join(flags), env=dict(environment), console=console) as server:
                for mode in group:
                    asked = measure(server, mode)
                    found[mode.name] = {"flags": list(mode.flags), "answers": [asdict(answer) for answer in asked]}
                    console.print(f"{mode.name}: {sum(answer.same for answer in asked)} of {len(asked)} the same")
                problems = server.kv_policy()["integrity"]
                assert not problems, problems
    together = {**before, **found}
    result = {
        "task": "sharing-identity",
        "command": command_line(),
        "host": host_block(),
        "model": "tinyvlm",
        "server_flags": list(FLAGS),
        "modes": {mode.name: together[mode.name] for mode in MODES if mode.name in together},
    }
    console.print("written:", save(path, result))
    console.print(table(result))
    return 1 if unexplained(result) else 0


def measure(server: ServerProcess, mode: Mode) -> list[Asked]:
    """All prompts of a mode, alone and shared."""
    client = Client(server.openai_url)
    server.flush_cache()

    def say(_: str, turns: Sequence[Message]) -> str:
        return client.ask(list(turns), max_tokens=ANSWER_TOKENS, custom_params={"kv_share": "off"}).text

    prompts = mode.prompts(say)
    alone = [ask(client, prompt, "off") for prompt in prompts]
    with ThreadPoolExecutor(mode.at_once) as pool:
        shared = list(pool.map(lambda prompt: ask(client, prompt, "exact"), prompts))
    return [compare(client, *three) for three in zip(prompts, shared, alone, strict=True)]


def ask(client: Client, prompt: Prompt, share: str, **options: Any) -> Answer:
    """One answer."""
    params = {**prompt.params, "kv_share": share}
    return client.ask(
        list(prompt.turns), max_tokens=ANSWER_TOKENS, stream=prompt.stream, custom_params=params, **options
    )


def compare(client: Client, prompt: Prompt, shared: Answer, alone: Answer) -> Asked:
    """What is said of one prompt."""

    def right(answer: Answer) -> bool | None:
        return None if prompt.expected is None else answer.text.strip() == prompt.expected

    return Asked(
        prompt.name,
        shared.text,
        alone.text,
        right(shared),
        right(alone),
        shared.prompt_tokens,
        shared.cached_tokens or 0,
        None if shared.text == alone.text else gap(client, prompt, shared.text),
    )


def gap(client: Client, prompt: Prompt, other: str) -> float | None:
    """How far the first two choices are apart, in nats, where the answer alone leaves the text `other`."""
    reply = client.openai.chat.completions.create(
        model="default",
        messages=list(prompt.turns),  # type: ignore[arg-type]
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"custom_params": {**prompt.params, "kv_share": "off"}},
    )
    scored = reply.choices[0].logprobs
    text = ""
    for token in (scored.content if scored else None) or []:
        text += token.token
        if not other.startswith(text):
            first, second = token.top_logprobs[:2]
            return round(first.logprob - second.logprob, 6)
    return None


# -- the table ---------------------------------------------------------------------------------------------------------


def answers_of(result: Mapping[str, Any], mode: str | None = None) -> list[Asked]:
    """Answers of one mode, or of all."""
    modes = result["modes"]
    return [Asked(**answer) for name in modes if mode in (None, name) for answer in modes[name]["answers"]]


def unexplained(result: Mapping[str, Any]) -> list[Asked]:
    """Answers that differ and are no tie."""
    return [a for a in answers_of(result) if not a.same and (a.gap_nats is None or a.gap_nats > TIE_NATS)]


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| mode | questions | found a prefix | the same tokens as alone | right, alone |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (*result["modes"], None):
        asked = answers_of(result, name)
        judged = [answer for answer in asked if answer.right_alone is not None]
        right = [sum(bool(getattr(a, which)) for a in judged) for which in ("right_shared", "right_alone")]
        lines.append(
            f"| {name or '**together**'} | {len(asked)} | {sum(a.cached_tokens > a.prompt_tokens / 2 for a in asked)} "
            f"| {sum(a.same for a in asked)} | {f'{right[0]}, {right[1]} of {len(judged)}' if judged else ''} |"
        )
    differing = [answer for answer in answers_of(result) if not answer.same]
    lines.append("")
    lines += [
        f"* {answer.prompt}: `{answer.shared}`, alone `{answer.alone}`; first and second choice were "
        f"{answer.gap_nats:.6f} nats apart{', a tie' if answer.gap_nats <= TIE_NATS else ''}"
        for answer in differing
        if answer.gap_nats is not None
    ]
    host = result["host"]
    lines += ["", f"`{result['command']}`, tinyvlm, {host['date'][:10]}, {host['device']}."]
    return "\n".join(lines)


def rendered(page: str, results: Path = RESULTS) -> str:
    """`page` with the table of the committed result."""
    path = results / f"{STEM}.json"
    return with_block(page, MARKERS, table(json.loads(path.read_text()))) if path.exists() else page
