"""Requests that end early, late or not at all: no cell is lost, nothing crashes, the next answer is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import data_url

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def native(text: str, images: list[Any], tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a `/generate` request that runs to its last token."""
    prompt = f"<|im_start|>user\n{IMAGE * len(images)}{text}<|im_end|>\n<|im_start|>assistant\n"
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text": prompt, "image_data": [data_url(i) for i in images], "sampling_params": sampling, **fields}


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def failures(small: Any) -> int:
    """Policies that have failed on the server `small` so far: other tests ask it for broken ones."""
    return int(small.kv_state()["policy_failures"])


def assert_nothing_lost(server: Any, picture: Any, failures: int = 0) -> None:
    """All cells come back, and the server answers as if nothing had been."""
    server.flush()
    assert server.settled()["cells_used"] == 0
    drawn = [picture(7000 + i) for i in range(3)]
    assert sum(server.ask(d.questions[0].text, d.image).text == d.questions[0].answer for d in drawn) >= 2
    assert server.kv_state()["policy_failures"] == failures
    server.assert_alive()


def test_abort_in_prefill(ours_tenth: Any, picture: Any) -> None:
    """Between the chunks of a prompt of three large images."""
    server = ours_tenth
    server.flush()
    body = native("red K?", [picture(7010 + i, 32, 32).image for i in range(3)], 4, rid="abort-prefill")
    seen = len(server.log)
    sender = threading.Thread(target=lambda: httpx.post(f"{server.url}/generate", json=body, timeout=120))
    sender.start()
    wait_for(lambda: "Prefill batch" in server.log[seen:])
    httpx.post(f"{server.url}/abort_request", json={"rid": "abort-prefill"}, timeout=30).raise_for_status()
    sender.join(60)
    assert not sender.is_alive()
    assert_nothing_lost(server, picture)


def test_abort_in_decode(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    body = native("red K?", [picture(7020).image], 4000, rid="abort-decode", stream=True)
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data:"))
        for _ in range(5):
            next(lines)
        httpx.post(f"{server.url}/abort_request", json={"rid": "abort-decode"}, timeout=30).raise_for_status()
        assert sum(1 for _ in lines) < 3900
    assert_nothing_lost(server, picture)


def test_client_goes_away(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    body = native("red K?", [picture(7030).image], 4000, stream=True)
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data:"):
                break
    assert_nothing_lost(server, picture)


def test_one_token(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    """The request ends in the very forward that compresses it."""
    drawn = [picture(7040 + i) for i in range(8)]
    asks = [an_ask(d.questions[0].text, (d.image,), {"max_tokens": 1}) for d in drawn]
    for at_once in (1, 8):
        answers = ours_tenth.ask_all(asks, at_once)
        assert [a.completion_tokens for a in answers] == [1] * len(asks)
        right = sum(d.questions[0].answer.startswith(a.text) for a, d in zip(answers, drawn, strict=True))
        assert right >= len(asks) - 1
    assert_nothing_lost(ours_tenth, picture)


def test_stop_strings(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(7050, 24, 24)
    question = drawn.questions[0]
    answer = ours_tenth.ask(question.text, drawn.image, stop=[question.answer[2]])
    assert answer.text == question.answer.partition(question.answer[2])[0]
    assert answer.choices[0].finish_reason == "stop"
    assert_nothing_lost(ours_tenth, picture)


def test_prompt_that_fills_the_arena(small: Any, picture: Any, failures: int) -> None:
    """Nearly all physical tokens in one prompt, again and again: each needs the memory that the last gave back."""
    physical = small.settled()["physical_tokens_total"]
    for seed in range(7060, 7064):
        large, little = picture(seed, 24, 28), picture(seed + 10, 6, 10)
        options = {"custom_params": {"kv_share": "off"}} if seed % 2 else {}
        answer = small.ask(large.questions[0].text, little.image, large.image, max_tokens=2, **options)
        assert 0.85 * physical < answer.prompt_tokens < physical
    assert_nothing_lost(small, picture, failures)


@pytest.mark.parametrize(("images", "share"), [(2, "off"), (6, "exact")])
def test_prompt_that_does_not_fit(small: Any, picture: Any, failures: int, images: int, share: str) -> None:
    """Neither the arena nor host memory holds it: refused with a client error that says why; the server lives."""
    body = native("red K?", [picture(7070 + i, 32, 32).image for i in range(images)], 2)
    body["sampling_params"]["custom_params"] = {"kv_share": share}
    reply = httpx.post(f"{small.url}/generate", json=body, timeout=120)
    assert 400 <= reply.status_code < 500, reply.text
    assert "token" in reply.text
    assert_nothing_lost(small, picture, failures)
