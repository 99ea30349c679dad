"""One image, many questions, on a real server: copies for everybody, the guard, and images that are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from vlcache_sgl.client.client import Answer, data_url
from vlcache_sgl.evaluation.tasks.receipts import Picture, make_picture

PROFILE = Path(__file__).parents[2] / "models/tinyvlm/profiles/grounded.json"
THRESHOLD = 0.15
FLAGS = (
    *("--kv-policy", "vlcache", "--kv-budget", "0.1"),
    *("--kv-guard", "enforce", "--kv-guard-threshold", str(THRESHOLD), "--kv-profile", str(PROFILE)),
    *("--kv-share", "policy"),
)
UNGROUNDED = Path(__file__).parents[2] / "models/tinyvlm/ungrounded"
JUST_IN_TIME = ("--kv-policy", "vlcache", "--kv-budget", "0.1", "--kv-guard", "enforce")
QUESTIONS = 6


@pytest.fixture
def server(servers: Any) -> Any:
    """Shares what policies keep, unless a request asks for something else."""
    server = servers.get(*FLAGS)
    server.flush()
    return server


def picture(seed: int) -> Picture:
    return make_picture(seed=seed, rows=24, cols=24, num_questions=QUESTIONS)


@pytest.fixture
def asks(an_ask: Any) -> Callable[..., list[Any]]:
    """`asks(picture, kv_share)`: its questions."""
    return partial(_asks, an_ask)


def _asks(an_ask: Any, drawn: Picture, share: str | None = None) -> list[Any]:
    params = {} if share is None else {"custom_params": {"kv_share": share}}
    options = {"max_tokens": 8, "return_meta_info": True, **params}
    return [an_ask(question.text, (drawn.image,), options) for question in drawn.questions]


def right(drawn: Picture, answers: Sequence[Answer]) -> int:
    return sum(a.text.strip() == q.answer for a, q in zip(answers, drawn.questions, strict=True))


def test_a_copy_for_everybody_answers_everybody(server: Any, asks: Any) -> None:
    before = server.kv_state()
    total = 0
    for seed in (70_000, 70_001):
        drawn = picture(seed)
        answers = server.ask_all(asks(drawn, "tiered"))
        total += right(drawn, answers)
        first, *later = answers
        assert first.report["share"] == "tiered"
        assert first.report["ratio"] <= 0.25
        assert all(answer.cached_tokens > drawn.num_image_tokens for answer in later)
        assert all(not answer.report["guard"]["tripped"] for answer in later), "nothing is missing"
        assert all(0 <= answer.report["guard"]["missing_in_decode"] < THRESHOLD for answer in answers)
    assert total >= 2 * QUESTIONS - 1
    state = server.settled()
    assert state["guard_readings"] - before["guard_readings"] == 2 * (QUESTIONS - 1)
    assert state["expansions"] == before["expansions"]
    assert 0 < state["sketch_bytes"] < 0.03 * state["cells_total"] * state["bytes_per_cell"]
    assert state["integrity"] == []


def test_a_question_that_misses_too_much_gets_the_picture_back(server: Any, asks: Any) -> None:
    drawn = picture(70_010)
    before = server.kv_state()
    answers = server.ask_all(asks(drawn))
    assert right(drawn, answers) >= QUESTIONS - 1, [a.report for a in answers]
    state = server.settled()
    recomputed = [answer for answer in answers if answer.report.get("recomputed")]
    assert recomputed
    assert len(recomputed) == state["expansions"] - before["expansions"]
    assert all(answer.completion_tokens == 5 for answer in answers), "no token is said twice"
    readings = [a.report["guard"] for a in answers if "guard" in a.report]
    assert all(reading.get("missing", 0) <= THRESHOLD for reading in readings)
    assert all(reading["missing_in_decode"] <= THRESHOLD for reading in readings)
    assert not any(reading["tripped"] for reading in readings), "a question that trips is not answered from that copy"
    assert state["cells_requests"] == 0
    assert state["integrity"] == []
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


def test_many_questions_at_once(server: Any, asks: Any) -> None:
    drawn = picture(70_020)
    before = server.kv_state()
    first, *rest = asks(drawn)
    answers = [*server.ask_all([first]), *server.ask_together(rest)]
    state = server.settled()
    assert right(drawn, answers) >= QUESTIONS - 1
    assert state["guard_trips"] - before["guard_trips"] >= 1
    assert 1 <= state["expansions"] - before["expansions"] <= 3, "a storm is bounded"
    assert state["integrity"] == []
    server.flush()
    assert server.settled()["cells_used"] == 0


def test_streams_begin_once(server: Any, asks: Any) -> None:
    """A request that starts over has said nothing before."""
    drawn = picture(70_030)
    ask = asks(drawn)
    whole = server.ask_all(ask)
    server.flush()
    server.ask_all(ask[:1])
    for question, answer in zip(drawn.questions[1:], whole[1:], strict=True):
        assert len(_streamed(server, drawn, question.text)) == len(answer.text.strip()) == 4


def _streamed(server: Any, drawn: Picture, question: str) -> str:
    """All that a stream says."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")
    content = [{"type": "image_url", "image_url": {"url": data_url(drawn.image)}}, {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices).strip()


def test_an_answer_that_looks_things_up_just_in_time_gets_the_whole_picture(servers: Any, asks: Any) -> None:
    """No row of its prompt shows what it will need; also the first question is sent back, and says nothing twice."""
    server = servers.get(*JUST_IN_TIME, model=UNGROUNDED)
    server.flush()
    before = server.kv_state()
    total = 0
    for seed in (70_060, 70_061):
        drawn = picture(seed)
        answers = server.ask_all(asks(drawn))
        total += right(drawn, answers)
        assert {answer.completion_tokens for answer in answers} == {5}
        first = answers[0].report
        assert first.get("missed_in") == "decode" or not first["guard"]["tripped"]
    assert total >= 2 * QUESTIONS - 1
    streamed = picture(70_062)
    assert [_streamed(server, streamed, question.text) for question in streamed.questions] == [
        question.answer for question in streamed.questions
    ]
    state = server.settled()
    assert state["guard_trips_in_decode"] > before["guard_trips_in_decode"]
    assert state["pictures_whole"] >= 1
    assert state["integrity"] == []
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


def test_private_copies_leave_nothing_behind(server: Any, asks: Any) -> None:
    drawn = picture(70_040)
    answers = server.ask_all(asks(drawn, "off")[:3])
    assert [a.text.strip() for a in answers] == [q.answer for q in drawn.questions[:3]]
    assert all(answer.cached_tokens < 10 for answer in answers)
    assert server.settled()["cells_tree"] == 0


@pytest.mark.slow
def test_without_overlap_and_in_chunks(servers: Any, asks: Any) -> None:
    server = servers.get(*FLAGS, "--disable-overlap-schedule", "--chunked-prefill-size", "128")
    server.flush()
    drawn = picture(70_050)
    first, *rest = asks(drawn)
    answers = [*server.ask_all([first]), *server.ask_together(rest)]
    assert right(drawn, answers) >= QUESTIONS - 1
    state = server.settled()
    assert state["expansions"] >= 1
    assert state["integrity"] == []
    server.flush()
    assert server.settled()["cells_used"] == 0
