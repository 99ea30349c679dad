"""Two ranks hold different KV heads and keep the same tokens."""

from __future__ import annotations

from typing import Any

import openai
import pytest

TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
POLICIES = ("vlcache", "vlcache:paper", "snapkv", "pyramidkv", "knorm")


@pytest.fixture
def two_ranks(servers: Any) -> Any:
    """The first two cores, one rank each."""
    return servers.get(*TENTH, "--tp", "2", env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})


@pytest.mark.slow
def test_two_ranks_answer_like_one(ours_tenth: Any, two_ranks: Any, picture: Any, an_ask: Any) -> None:
    drawn = [picture(9000 + i, 24, 24) for i in range(2 * len(POLICIES))]
    asks = [
        an_ask(
            d.questions[0].text,
            (d.image,),
            {"logprobs": True, "custom_params": {"kv_policy": POLICIES[i % len(POLICIES)]}},
        )
        for i, d in enumerate(drawn)
    ]
    for server in (ours_tenth, two_ranks):
        server.flush()
    for at_once in (1, 4):
        one, two = ours_tenth.ask_all(asks, at_once), two_ranks.ask_all(asks, at_once)
        assert [a.choices[0].tokens for a in two] == [a.choices[0].tokens for a in one]
    one_state, two_state = ours_tenth.settled(), two_ranks.settled()
    assert two_state["policy_failures"] == 0
    assert two_state["bytes_per_cell"] * 2 == one_state["bytes_per_cell"]
    with pytest.raises(openai.BadRequestError, match="without tensor parallelism"):
        two_ranks.ask(drawn[0].questions[0].text, drawn[0].image, custom_params={"kv_report": "recall"})
    two_ranks.flush()
    assert two_ranks.settled()["cells_used"] == 0
    two_ranks.assert_alive()


@pytest.mark.slow
def test_two_ranks_bring_a_picture_back_together(servers: Any, picture: Any, an_ask: Any) -> None:
    """Each reads its own heads; both must come to the same verdict."""
    guard = ("--kv-guard", "enforce", "--kv-guard-threshold", "0.1")
    server = servers.get(*TENTH, *guard, "--tp", "2", env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    server.flush()
    drawn = picture(9500, 24, 24, 4)
    asks = [an_ask(q.text, (drawn.image,), {"max_tokens": 8, "return_meta_info": True}) for q in drawn.questions]
    answers = [*server.ask_all(asks[:1]), *server.ask_together(asks[1:])]
    right = [a.text.strip() == q.answer for a, q in zip(answers, drawn.questions, strict=True)]
    assert sum(right) >= 3, [a.report for a in answers]
    state = server.settled()
    assert state["expansions"] >= 1
    assert state["integrity"] == []
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


@pytest.mark.slow
def test_two_ranks_read_an_image_twice_together(ours_tenth: Any, two_ranks: Any, picture: Any, an_ask: Any) -> None:
    """Each rank makes its own internal request; both must make the same ones, and keep the same tokens."""
    drawn = picture(9600, 24, 24)
    options = {"max_tokens": 8, "return_meta_info": True, "custom_params": {"kv_policy": "kvzip", "kv_budget": 0.3}}
    asks = [an_ask(question.text, (drawn.image,), options) for question in drawn.questions[:3]]
    reports = []
    for server in (ours_tenth, two_ranks):
        server.flush()
        before = server.settled()
        reports.append([answer.report for answer in server.ask_together(asks)])
        after = server.settled()
        assert after["second_readings"] - before["second_readings"] == 1
        assert after["policy_failures"] == before["policy_failures"]
        server.flush()
        assert server.settled()["cells_used"] == 0
        server.assert_alive()
    assert reports[0] == reports[1]
