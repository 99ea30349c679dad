"""Budget 0.1 gives memory back: what `/server_info` says is held, shared and returned, and who shares with whom."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import model_says, user_says

BUDGET = 0.1
TEMPLATE = 8
"""Prompt tokens before the image, which all prompts share."""


def num_layers(state: dict[str, Any]) -> int:
    return int(state["cells_per_token"])


POLICY: dict[str, Any] = {"custom_params": {"kv_share": "policy"}}
"""What is shared is what the first question's policy kept, and lies in the arena."""


def gained(before: dict[str, Any], after: dict[str, Any], key: str) -> int:
    return int(after[key]) - int(before[key])


@pytest.mark.parametrize(
    "grids",
    [[(16, 16)], [(20, 20)], [(24, 24)], [(32, 32)], [(16, 16), (12, 20)], [(24, 24), (16, 16), (16, 16)]],
    ids=lambda grids: "+".join(f"{rows}x{cols}" for rows, cols in grids),
)
@pytest.mark.parametrize("share", ["policy", "exact"])
def test_holds_a_tenth_after_prefill_and_nothing_after_flush(
    ours_tenth: Any, picture: Any, grids: Any, share: str
) -> None:
    """Within 1 % of the target, for one chunk and for several, for one image and for three."""
    server = ours_tenth
    server.flush()
    before = server.kv_state()
    assert before["cells_used"] == 0
    drawn = [picture(6000 + i, rows, cols) for i, (rows, cols) in enumerate(grids)]
    options = {"max_tokens": 1, "return_meta_info": True, "custom_params": {"kv_share": share}}
    answer = server.ask(drawn[0].questions[0].text, *(d.image for d in drawn), **options)
    after = server.settled()
    assert answer.prompt_tokens >= 256
    full = answer.prompt_tokens * num_layers(after)
    assert gained(before, after, "requests_compressed") == 1
    assert gained(before, after, "cells_seen") == full
    front = answer.report["front_tokens"] * num_layers(after)  # stays whole, beside the budget of the rest
    target = front + BUDGET * (full - front)
    assert gained(before, after, "cells_kept") == pytest.approx(target, rel=0.01)
    # Host memory holds what others may find; cells are the request's own, and go with it.
    assert after["cells_used"] == (pytest.approx(target, rel=0.01) if share == "policy" else 0)
    assert after["host_tokens_used"] == (0 if share == "policy" else answer.prompt_tokens)
    assert sum(after["kept_by_layer"]) == after["cells_kept"]
    server.flush()
    assert server.settled()["cells_used"] == 0


def test_state_names_policy_budget_and_sizes(ours_tenth: Any) -> None:
    state = ours_tenth.kv_state()
    assert state["policy"].startswith("vlcache")
    assert float(state["budget"]) == BUDGET
    # Two KV heads of 32, key and value, float32.
    assert state["bytes_per_cell"] == 2 * 32 * 2 * 4
    assert state["virtual_slots_total"] * num_layers(state) >= state["cells_total"]


def test_statistics_count_memory(ours_tenth: Any, picture: Any) -> None:
    """Ours say who holds what; SGLang's own, in log and load report, count physical tokens and not slots."""
    server = ours_tenth
    server.flush()
    drawn = picture(6050, 32, 32)
    seen = len(server.log)
    answer = server.ask("red K?", drawn.image, max_tokens=100, ignore_eos=True, return_meta_info=True, **POLICY)
    state = server.settled()
    assert state["cells_requests"] == 0
    assert state["cells_tree"] == state["cells_evictable"] == state["cells_used"] > 0
    front = answer.report["front_tokens"]
    held = front + BUDGET * (answer.prompt_tokens - front) + answer.completion_tokens
    slots = state["virtual_slots_total"] - state["virtual_slots_free"]
    assert state["realised_ratio"] == pytest.approx(held / slots, rel=0.03)
    assert state["cells_fragmented"] < num_layers(state)
    # While it ran, its own tokens were in use: a tenth of the prompt and the answer so far.
    used = [int(n) for n in re.findall(r"Decode batch, .*?#token: (\d+)", server.log[seen:])]
    assert used
    assert all(0.09 * answer.prompt_tokens < n < held + 8 for n in used), used
    load = httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]
    assert load["max_total_num_tokens"] == state["physical_tokens_total"]
    assert load["num_used_tokens"] == 0


def test_leaves_short_and_imageless_prompts_alone(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    server.flush()
    before = server.kv_state()
    server.ask("red K? " * 100, max_tokens=2)
    server.ask(picture(6100, 5, 8).questions[0].text, picture(6100, 5, 8).image, max_tokens=2)
    after = server.settled()
    assert gained(before, after, "requests_compressed") == 0
    assert after["requests_skipped"].get("scope", 0) > before["requests_skipped"].get("scope", 0)
    assert after["requests_skipped"].get("short", 0) > before["requests_skipped"].get("short", 0)


def test_second_question_shares_the_picture(ours_tenth: Any, picture: Any) -> None:
    """The second question reports the cached tokens, and adds its own tokens only."""
    server, drawn = ours_tenth, picture(6200, 24, 24)
    server.flush()
    server.ask(drawn.questions[0].text, drawn.image, **POLICY)
    before = server.settled()
    for question in drawn.questions[1:]:
        second = server.ask(question.text, drawn.image, **POLICY)
        after = server.settled()
        assert second.cached_tokens >= drawn.num_image_tokens
        assert second.new_tokens < 64
        own = (second.new_tokens + second.completion_tokens) * num_layers(after)
        assert gained(before, after, "cells_used") <= own
        before = after


def test_two_at_once_end_in_one_copy(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    server, drawn = ours_tenth, picture(6300, 24, 24)
    asks = [an_ask(question.text, (drawn.image,), POLICY) for question in drawn.questions[:2]]
    server.flush()
    answers = server.ask_together(asks)
    state = server.settled()
    layers = num_layers(state)
    text = sum(answer.prompt_tokens - drawn.num_image_tokens + answer.completion_tokens for answer in answers)
    one_copy = BUDGET * answers[0].prompt_tokens * layers
    assert state["cells_used"] <= one_copy * 1.01 + text * layers
    third = server.ask(drawn.questions[2].text, drawn.image, **POLICY)
    assert third.cached_tokens >= drawn.num_image_tokens


def test_other_pictures_do_not_share(ours_tenth: Any, picture: Any) -> None:
    server = ours_tenth
    server.flush()
    for seed in (6400, 6401, 6402):
        drawn = picture(seed, 16, 16)
        assert server.ask(drawn.questions[0].text, drawn.image).cached_tokens <= TEMPLATE


def test_other_budgets_and_policies_share_no_copy(ours_tenth: Any, picture: Any) -> None:
    server, drawn = ours_tenth, picture(6500, 20, 20)
    question = drawn.questions[0].text
    server.flush()
    variants: list[dict[str, Any]] = [
        POLICY,
        {"custom_params": {"kv_share": "policy", "kv_budget": 0.3}},
        {"custom_params": {"kv_share": "policy", "kv_policy": "scorer=random,allocator=uniform"}},
    ]
    for variant in variants:
        assert server.ask(question, drawn.image, **variant).cached_tokens <= TEMPLATE
    for variant in variants:
        assert server.ask(question, drawn.image, **variant).cached_tokens >= drawn.num_image_tokens


@pytest.mark.parametrize("key", ["extra_key", "cache_salt"])
def test_tenants_do_not_share(ours_tenth: Any, picture: Any, key: str) -> None:
    server, drawn = ours_tenth, picture(6600, 16, 16)
    server.flush()
    question = drawn.questions[0].text
    assert server.ask(question, drawn.image, **{key: "a"}).cached_tokens == 0
    assert server.ask(question, drawn.image, **{key: "b"}).cached_tokens == 0
    assert server.ask(question, drawn.image).cached_tokens == 0
    assert server.ask(question, drawn.image, **{key: "a"}).cached_tokens >= drawn.num_image_tokens


def test_conversation_with_a_second_picture(ours_tenth: Any, picture: Any) -> None:
    """Receipt in turn 1, a question about it in turn 2, a second image in turn 3: each turn builds on the cache."""
    server, first, second = ours_tenth, picture(6700, 24, 24), picture(6701, 20, 20)
    server.flush()
    turns = [user_says(first.questions[0].text, first.image)]
    answer = server.ask(turns, **POLICY)
    assert answer.text == first.questions[0].answer
    turns += [model_says(answer.text), user_says(first.questions[1].text)]
    answer = server.ask(turns, **POLICY)
    assert answer.cached_tokens >= first.num_image_tokens
    before = server.settled()
    turns += [model_says(answer.text), user_says(second.questions[0].text, second.image)]
    answer = server.ask(turns, **POLICY)
    after = server.settled()
    assert first.num_image_tokens <= answer.cached_tokens < first.num_image_tokens + 96
    assert gained(before, after, "requests_compressed") == 1
    assert gained(before, after, "cells_seen") == answer.new_tokens * num_layers(after)
    server.flush()
    assert server.settled()["cells_used"] == 0


def test_compressed_answers_are_right(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    """A tenth of the cache still answers the first question about an image: one by one, and eight at a time."""
    server = ours_tenth
    for at_once in (1, 8):
        drawn = [picture(6800 + 20 * at_once + i, 24, 24) for i in range(8)]
        server.flush()
        answers = server.ask_all([an_ask(d.questions[0].text, (d.image,)) for d in drawn], at_once)
        right = sum(a.text == d.questions[0].answer for a, d in zip(answers, drawn, strict=True))
        assert right >= 7, [(a.text, d.questions[0].answer) for a, d in zip(answers, drawn, strict=True)]
    server.assert_alive()
