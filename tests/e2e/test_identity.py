"""Budget 1.0 changes nothing: the same greedy tokens as stock SGLang, whatever is asked and however it is scheduled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vlcache_sgl.client.client import model_says, user_says

FULL = ("--kv-policy", "vlcache", "--kv-budget", "1.0")
UNCHUNKED, SEQUENTIAL = ("--chunked-prefill-size", "-1"), ("--disable-overlap-schedule",)
OTHER_SCHEDULES = {
    "unchunked-overlap": UNCHUNKED,
    "chunked-sequential": SEQUENTIAL,
    "unchunked-sequential": (*UNCHUNKED, *SEQUENTIAL),
}
TOLERANCES = {"float32": 2e-3, "bfloat16": 0.25}
"""Largest difference of a chosen token's log probability.  bfloat16 has 8 bits: logits near 16 step by 1/16."""
GRIDS = [(8, 10), (10, 11), (12, 20), (16, 16), (16, 16), (20, 32), (24, 24), (24, 24), (32, 32), (32, 32)]
TEXTS = [
    "red K?",
    "What is the code of blue A?",
    "Hello.",
    "Which code is printed after the green letter T? " * 3,
    "7F3A",
    "Read the code next to the pink Z. And then the next one.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
]


@pytest.fixture(scope="module")
def asks(picture: Any, an_ask: Any) -> list[Any]:
    """40 requests: 1 to 3 images, text only, long, streamed, n = 2, conversations; all with log probabilities."""

    def one(turns: Any, *images: Any, **options: Any) -> Any:
        return an_ask(turns, images, {"max_tokens": 8, "logprobs": True, **options})

    asks = []
    for i, (rows, cols) in enumerate(GRIDS):  # 10 of one image
        drawn = picture(5000 + i, rows, cols)
        asks.append(one(drawn.questions[0].text, drawn.image))
    for i in range(6):  # of two
        left, right = picture(5100 + i, 16, 16), picture(5200 + i, 12, 20)
        asks.append(one(right.questions[0].text, left.image, right.image))
    for i in range(3):  # of three
        drawn = [picture(5300 + 10 * i + k, 10, 11) for k in range(3)]
        asks.append(one(drawn[i].questions[0].text, *(d.image for d in drawn)))
    asks += [one(text, max_tokens=24) for text in TEXTS]  # 7 of text
    for i in range(4):  # long texts, of about 300 to 1200 tokens
        asks.append(one("Which code is printed after the orange letter K? " * (8 * (i + 1)), max_tokens=16))
    for i in range(5):  # streamed
        drawn = picture(5400 + i)
        asks.append(one(drawn.questions[1].text, drawn.image, stream=True))
    for i in range(3):  # two choices each
        drawn = picture(5500 + i)
        asks.append(one(drawn.questions[0].text, drawn.image, n=2))
    for i in range(2):  # conversations, the second with a second image
        first, second = picture(5600 + i), picture(5610 + i, 12, 20)
        turns = [user_says(first.questions[0].text, first.image), model_says(first.questions[0].answer)]
        turns.append(user_says(second.questions[0].text, *([second.image] if i else [])))
        asks.append(one(turns))
    assert len(asks) >= 40
    return asks


STOP = "<|im_end|>"


def largest_difference(stock: Any, ours: Any, asks: list[Any], at_once: int, same_tokens: bool = True) -> float:
    """Send all to both servers, in full to ours; the largest difference of log probabilities over tokens that agree."""
    largest = 0.0
    for server in (stock, ours):
        server.flush()
    expected = stock.ask_all(asks, at_once)
    whole = {"custom_params": {"kv_budget": 1.0}}
    got = ours.ask_all([replace(ask, options={**ask.options, **whole}) for ask in asks], at_once)
    for number, (left, right) in enumerate(zip(expected, got, strict=True)):
        assert left.prompt_tokens == right.prompt_tokens
        for a, b in zip(left.choices, right.choices, strict=True):
            if same_tokens:
                theirs, mine = a.tokens, b.tokens
                if asks[number].options.get("stream"):
                    # Whether a stream's last chunk reports the stop token depends on how SGLang's processes interleave.
                    theirs, mine = ([t for t in tokens if t != STOP] for tokens in (theirs, mine))
                assert mine == theirs, f"request {number}: {asks[number].turns!r:.200}"
                assert (b.text, b.finish_reason) == (a.text, a.finish_reason)
            for token, other, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
                if token != other:
                    break
                largest = max(largest, abs(p - q))
    return largest


def assert_same_tokens(
    stock: Any, ours: Any, asks: list[Any], record_property: Callable[[str, object], None], name: str
) -> None:
    for at_once in (1, 8):
        largest = largest_difference(stock, ours, asks, at_once)
        record_property(f"largest_logprob_difference_{at_once}", largest)
        print(f"{name}, {at_once} at once: largest log probability difference {largest:.2e}")
        assert largest < TOLERANCES["float32"]
    ours.assert_alive()
    assert ours.kv_state()["policy_failures"] == 0


def test_same_tokens_as_stock(
    stock: Any, ours_tenth: Any, asks: list[Any], record_property: Callable[[str, object], None]
) -> None:
    """In chunks and with overlap, as SGLang does by default."""
    assert_same_tokens(stock, ours_tenth, asks, record_property, "chunked overlap")


@pytest.mark.slow
@pytest.mark.parametrize("flags", OTHER_SCHEDULES.values(), ids=OTHER_SCHEDULES.keys())
def test_same_tokens_however_it_is_scheduled(
    servers: Any, asks: list[Any], record_property: Callable[[str, object], None], flags: tuple[str, ...]
) -> None:
    stock, ours = servers.get(*flags), servers.get(*FULL, *flags)
    assert_same_tokens(stock, ours, asks, record_property, " ".join(flags))


@pytest.mark.slow
def test_bfloat16_within_rounding(
    servers: Any, asks: list[Any], record_property: Callable[[str, object], None]
) -> None:
    """Rounding may turn a tie, so tokens are compared as far as they agree."""
    flags = ("--dtype", "bfloat16")
    stock, ours = servers.get(*flags), servers.get(*FULL, *flags)
    largest = largest_difference(stock, ours, asks, at_once=1, same_tokens=False)
    record_property("largest_logprob_difference", largest)
    print(f"bfloat16: largest log probability difference {largest:.2e}")
    assert largest < TOLERANCES["bfloat16"]
