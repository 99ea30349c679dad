"""The loads of `main.py`: what all servers are sent, and the client that sends it and takes the times.

Images, questions and arrivals are drawn from a seed: every server is sent the same.

* in-flight: all requests at once, each about an image of its own; how many decode together?
* working-set: repeated questions about 40 images, Zipf-distributed; what does the prefix cache still know?
* multi-turn: 20 chats of 6 turns, each about its image.
* mixed: texts, images at the server's budget, images that ask for another policy or for no compression.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import openai

from vlcache_sgl.client.client import Message, model_says, user_says
from vlcache_sgl.evaluation.tasks.receipts import Receipt, make_receipt

SIDE = 32
TIMEOUT_S = 900.0
FIRST_SEED = 40_000


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[Message, ...]
    expected: str | None = None
    """The right answer, where there is one."""
    max_tokens: int = 8
    ignore_eos: bool = False
    custom_params: dict[str, Any] | None = None
    kind: str = "image"


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
        stream = await self._client.chat.completions.create(  # type: ignore[call-overload]
            model="default",
            messages=ask.messages,
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
def receipt(number: int, num_questions: int) -> Receipt:
    """An image of 1024 image tokens, drawn once."""
    return make_receipt(FIRST_SEED + number, SIDE, SIDE, num_questions=num_questions)


@cache
def _first_turn(number: int, num_questions: int, question: int) -> Message:
    drawn = receipt(number, num_questions)
    return user_says(drawn.questions[question].text, drawn.image)


def about(number: int, question: int = 0, num_questions: int = 1, **fields: Any) -> Ask:
    """A question about an image."""
    expected = receipt(number, num_questions).questions[question].answer
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
    """With a place for the count."""
    count: int
    """Of requests, or of chats, unless told otherwise."""
    quick_count: int
    prepare: Callable[[int], Any]
    """Draws the images; gets the count, returns what `run` gets."""
    run: Callable[[Send, Any], Awaitable[list[Outcome]]]
    warm_up: Callable[[Send, Any], Awaitable[Any]] | None = None
    """Sent before, after the flush, and not counted."""


def _in_flight(count: int) -> list[Ask]:
    return [about(i, max_tokens=32, ignore_eos=True) for i in range(count)]


async def _all_at_once(send: Send, asks: list[Ask]) -> list[Outcome]:
    return await closed_loop(send, asks, len(asks))


WORKING_SET = 40
QUESTIONS = 6
ZIPF = 0.8


def _working_set(count: int) -> tuple[list[Ask], list[Ask]]:
    draw = random.Random(1)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(WORKING_SET)]
    numbers = draw.choices(range(WORKING_SET), weights, k=count)
    asks = [about(200 + n, draw.randrange(QUESTIONS), QUESTIONS) for n in numbers]
    # Least popular first: what an LRU cache should still know at the end are the popular ones.
    warm_up = [about(200 + n, draw.randrange(QUESTIONS), QUESTIONS) for n in reversed(range(WORKING_SET))]
    return warm_up, asks


async def _warm_working_set(send: Send, prepared: tuple[list[Ask], list[Ask]]) -> None:
    await closed_loop(send, prepared[0], 1)


async def _ask_working_set(send: Send, prepared: tuple[list[Ask], list[Ask]]) -> list[Outcome]:
    return await closed_loop(send, prepared[1], 8)


TURNS = 6


def _chats(count: int) -> list[int]:
    numbers = list(range(400, 400 + count))
    for number in numbers:
        _first_turn(number, TURNS, 0)
    return numbers


async def _all_chats(send: Send, numbers: list[int]) -> list[Outcome]:
    async def chat(number: int) -> list[Outcome]:
        drawn = receipt(number, TURNS)
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


def _mixed(count: int) -> list[Ask]:
    draw = random.Random(2)
    asks = []
    for i in range(count):
        number, kind = draw.randrange(600, 630), draw.random()
        if kind < 0.3:
            asks.append(Ask((user_says(f"{i}. {TEXT}"),), max_tokens=64, ignore_eos=True, kind="text"))
        elif kind < 0.7:
            asks.append(about(number, max_tokens=32, ignore_eos=True))
        elif kind < 0.85:
            params = {"kv_policy": "snapkv", "kv_budget": 0.2}
            asks.append(about(number, max_tokens=32, ignore_eos=True, custom_params=params, kind="image, snapkv 0.2"))
        else:
            params = {"kv_budget": 1.0}
            asks.append(about(number, max_tokens=32, ignore_eos=True, custom_params=params, kind="image, in full"))
    return asks


async def _mixed_users(send: Send, asks: list[Ask]) -> list[Outcome]:
    return await closed_loop(send, asks, 32)


LOADS = (
    Load(
        "in-flight",
        "{} requests at once, each about its own image, 32 tokens each",
        64,
        16,
        _in_flight,
        _all_at_once,
    ),
    Load(
        "working-set",
        f"{{}} questions about {WORKING_SET} images, Zipf {ZIPF:g}, 8 users; each was asked about once before",
        120,
        WORKING_SET,
        _working_set,
        _ask_working_set,
        _warm_working_set,
    ),
    Load(
        "multi-turn",
        f"{{}} chats at once, {TURNS} turns each, an image in the first",
        20,
        6,
        _chats,
        _all_chats,
    ),
    Load(
        "mixed",
        "{} texts and images under several policies, 32 users",
        100,
        20,
        _mixed,
        _mixed_users,
    ),
)
