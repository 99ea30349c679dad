"""Two ranks hold different KV heads and keep the same tokens."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from vlcache_sgl.sglang_hooks.weight_knobs import knobs_of
from vlcache_sgl.weights import ModelWeights

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
        two_ranks.ask(drawn[0].questions[0].text, drawn[0].image, custom_params={"kv_report": "attention"})
    two_ranks.flush()
    assert two_ranks.settled()["cells_used"] == 0
    two_ranks.assert_alive()


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


@pytest.mark.slow
@pytest.mark.usefixtures("ours_tenth")  # as the tests before, which leave both servers running
def test_two_ranks_change_to_measured_weights_together(two_ranks: Any, picture: Any) -> None:
    """Between the same two requests; the last test of `two_ranks`, which keeps them."""
    drawn, weights = picture(7990, 24, 24), ModelWeights((0.2, 0.2, 1.0, 0.2, 0.2, 0.2))
    server, options = two_ranks, {"max_tokens": 8, "return_meta_info": True}
    server.flush()
    before = server.ask(drawn.questions[0].text, drawn.image, **options).report["kept_tokens_per_layer"]
    reply = httpx.post(f"{server.url}/set_internal_state", json={"server_args": knobs_of(weights)}, timeout=60)
    assert reply.json() == [True]
    assert server.kv_state()["weights"] == weights.digest
    answer = server.ask(drawn.questions[0].text, drawn.image, **options)
    after = answer.report["kept_tokens_per_layer"]
    assert answer.cached_tokens < drawn.num_image_tokens
    assert answer.text.strip() == drawn.questions[0].answer
    assert after != before
    assert sum(after) == pytest.approx(sum(before), abs=6)
    assert max(after) == after[2] > 1.5 * after[3]
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()
