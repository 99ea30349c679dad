"""The log-probability of a right answer behind a compressed prompt is what greedy decoding reports for it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import data_url, user_says
from vlcache_sgl.evaluation.forced import Forced, Forcing, NotMeasured

TOLERANCE = 1e-3
"""Nats: an answer that is prefilled is multiplied in other shapes than one that is decoded."""


def greedy(
    server: Any, question: str, images: Sequence[str], params: dict[str, Any], tokens: int
) -> tuple[str, Forced]:
    """What the server answers to the same prompt, and the sum of the log-probabilities that it reports."""
    ids = httpx.post(f"{server.url}/v1/tokenize", json={"messages": [user_says(question, *images)]}).json()["tokens"]
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": params}
    body: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
    body["extra_key"] = uuid.uuid4().hex
    if images:
        body["image_data"] = list(images)
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    scored = answer["meta_info"]["output_token_logprobs"]
    return answer["text"], Forced(sum(logprob for logprob, *_ in scored), len(scored))


def forced(server: Any, question: str, images: Sequence[str], answer: str, params: dict[str, Any]) -> Forced:
    return Forcing(server.url)(question, images, answer, params, uuid.uuid4().hex)


@pytest.mark.parametrize(
    "params", [{}, {"kv_policy": "snapkv", "kv_budget": 0.3}, {"kv_budget": 1.0}], ids=["own", "another", "full"]
)
def test_the_sum_is_that_of_greedy_decoding(ours_tenth: Any, picture: Any, params: dict[str, Any]) -> None:
    drawn = picture(7930, 20, 24)
    question, images = drawn.questions[0], [data_url(drawn.image)]
    text, expected = greedy(ours_tenth, question.text, images, params, tokens=4)
    assert text == question.answer  # four tokens, all right
    found = forced(ours_tenth, question.text, images, question.answer, params)
    assert found.tokens == expected.tokens
    assert found.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)


def test_what_was_evicted_makes_the_right_answer_improbable(ours_tenth: Any, picture: Any) -> None:
    """The answer attends to the compressed prompt, not to the whole one: a policy that keeps noise loses it."""
    drawn = picture(7931, 20, 24)
    question, images = drawn.questions[0], [data_url(drawn.image)]
    full, ours, noise = (
        forced(ours_tenth, question.text, images, question.answer, params).logprob
        for params in ({"kv_budget": 1.0}, {}, {"kv_policy": "random", "kv_budget": 0.1})
    )
    assert full == pytest.approx(ours, abs=0.5)
    assert noise < ours - 3.0


def test_later_questions_read_what_the_first_has_left(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(7932, 20, 24)
    first, second = drawn.questions[:2]
    images, forcing, salt = [data_url(drawn.image)], Forcing(ours_tenth.url), uuid.uuid4().hex
    policy = {"kv_share": "policy"}
    forcing(first.text, images, first.answer, policy, salt)
    shared = forcing(second.text, images, second.answer, policy, salt)
    private = forcing(second.text, images, second.answer, policy, uuid.uuid4().hex)
    exact = forcing(second.text, images, second.answer, {}, salt)
    assert shared.logprob < private.logprob - 3.0
    assert exact.logprob == pytest.approx(private.logprob, abs=TOLERANCE)


def test_an_answer_of_one_token(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(7933, 20, 24)
    images = [data_url(drawn.image)]
    question, answer = drawn.questions[0].text, drawn.questions[0].answer[0]
    text, expected = greedy(ours_tenth, question, images, {}, tokens=1)
    assert text == answer
    found = forced(ours_tenth, question, images, answer, {})
    assert (found.tokens, found.logprob) == (1, pytest.approx(expected.logprob, abs=TOLERANCE))


def test_a_prompt_that_is_not_shared_cannot_be_measured(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(7934, 20, 24)
    question = drawn.questions[0]
    with pytest.raises(NotMeasured, match="tokens were found in the prefix cache"):
        forced(ours_tenth, question.text, [data_url(drawn.image)], question.answer, {"kv_share": "off"})


def test_what_the_server_refuses_is_said(ours_tenth: Any) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="unknown policy 'nope'"):
        forced(ours_tenth, "red K?", (), "AB", {"kv_policy": "nope"})


@pytest.mark.parametrize("params", [{}, {"kv_policy": "snapkv", "kv_budget": 0.2}], ids=["own", "another"])
def test_texts_are_measured_too(limited: Any, params: dict[str, Any]) -> None:
    """Whatever the model says to a text that it was not made for: forced, it is as probable as when it was chosen."""
    question = " ".join(f"line {number}: the code is {number * 7919 % 9973}" for number in range(60))
    text, expected = greedy(limited, question, (), params, tokens=4)  # before it ends the text
    before = limited.settled()["requests_compressed"]
    found = forced(limited, question, (), text, params)
    assert limited.settled()["requests_compressed"] == before + 1
    assert found.tokens == expected.tokens
    assert found.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)
