"""Stock SGLang, no policy asked for, on whatever this machine has: without an accelerator that is our CPU platform."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest


def test_answers_text(stock: Any) -> None:
    answer = stock.ask("What is the code of red K?", max_tokens=4)
    assert answer.completion_tokens == 4 or answer.choices[0].finish_reason == "stop"
    assert answer.prompt_tokens < 64


@pytest.mark.parametrize(("rows", "cols"), [(10, 11), (16, 16), (24, 24), (32, 32)], ids=lambda n: str(n))
def test_reads_pictures(stock: Any, picture: Any, rows: int, cols: int) -> None:
    """Every cell of the image is one prompt token, and the codes are read."""
    right = 0
    for seed in range(4000, 4003):
        drawn = picture(seed, rows, cols)
        answer = stock.ask(drawn.questions[0].text, drawn.image)
        assert rows * cols < answer.prompt_tokens < rows * cols + 64
        right += answer.text == drawn.questions[0].answer
    assert right >= 2


def test_streams_the_same_answer(stock: Any, picture: Any) -> None:
    drawn = picture(4100)
    question = drawn.questions[0]
    whole = stock.ask(question.text, drawn.image)
    streamed = stock.ask(question.text, drawn.image, stream=True)
    assert streamed.text == whole.text == question.answer
    assert streamed.completion_tokens == whole.completion_tokens


def test_answers_twice(stock: Any, picture: Any) -> None:
    drawn = picture(4101)
    answer = stock.ask(drawn.questions[0].text, drawn.image, n=2)
    assert [choice.text for choice in answer.choices] == [drawn.questions[0].answer] * 2


def test_tells_log_probabilities(stock: Any, picture: Any) -> None:
    drawn = picture(4102)
    answer = stock.ask(drawn.questions[0].text, drawn.image, logprobs=True)
    (choice,) = answer.choices
    assert len(choice.logprobs) == answer.completion_tokens
    assert all(-20 < value <= 0 for value in choice.logprobs)
    assert "".join(choice.tokens).startswith(choice.text)


def test_second_question_hits_the_prefix(stock: Any, picture: Any) -> None:
    drawn = picture(4103, 24, 24)
    stock.flush()
    first, second = (stock.ask(question.text, drawn.image) for question in drawn.questions[:2])
    assert first.cached_tokens == 0
    assert second.cached_tokens >= drawn.num_image_tokens
    assert second.text == drawn.questions[1].answer


def test_prefills_in_chunks(stock: Any, picture: Any) -> None:
    """A prompt of 1050 tokens takes three chunks of at most 512."""
    drawn = picture(4104, 32, 32)
    stock.flush()
    seen = len(stock.log)
    answer = stock.ask(drawn.questions[0].text, drawn.image)
    assert answer.text == drawn.questions[0].answer
    chunks = [int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", stock.log[seen:])]
    assert sum(chunks) == answer.prompt_tokens
    assert max(chunks) <= 512
    assert len(chunks) >= 3


def test_answers_eight_at_once(stock: Any, picture: Any, an_ask: Any) -> None:
    drawn = [picture(4200 + i) for i in range(8)]
    answers = stock.ask_all([an_ask(d.questions[0].text, (d.image,)) for d in drawn], at_once=8)
    right = sum(answer.text == d.questions[0].answer for answer, d in zip(answers, drawn, strict=True))
    assert right >= 7


def test_refuses_a_broken_picture_and_lives(stock: Any) -> None:
    url = {"url": "data:image/png;base64,bm90IGEgcGljdHVyZQ=="}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "red K?"}]
    body = {"model": "default", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    reply = httpx.post(f"{stock.url}/v1/chat/completions", json=body, timeout=60)
    assert 400 <= reply.status_code < 500, reply.text
    stock.ask("red K?", max_tokens=1)


def test_nothing_of_ours_is_active(stock: Any) -> None:
    assert stock.kv_state() == {}
