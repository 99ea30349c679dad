"""KVzip on real servers: an image is read twice once, whoever asks; heads keep different numbers; text prompts."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import data_url

BUDGET = 0.3
OF_IMAGE = (4 + BUDGET * 256) / 260
"""Kept share of the prefix of an image of 16 x 16 tokens: the four in front of it stay."""
ZIP: dict[str, Any] = {
    "max_tokens": 8,
    "return_meta_info": True,
    "custom_params": {"kv_policy": "kvzip", "kv_budget": BUDGET},
}
KV_HEADS = 2
TOTALS = ("requests_compressed", "policy_failures", "second_readings", "prefix_hits")


def grown(server: Any, before: dict[str, Any]) -> dict[str, int]:
    after = server.settled()
    assert after["integrity"] == []
    return {name: after[name] - before[name] for name in TOTALS}


def assert_empty_after_flush(server: Any) -> None:
    state = server.settled()
    assert state["cells_requests"] == 0
    server.flush()
    state = server.settled()
    assert state["cells_used"] == 0
    assert state["virtual_slots_free"] == state["virtual_slots_total"]
    server.assert_alive()


def test_all_questions_about_an_image_share_what_was_read_twice(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    """At the same moment, in several chunks, beside requests of another policy; and one more later."""
    server, drawn, other = ours_tenth, picture(7950, 20, 28, 4), picture(7951, 24, 24)
    server.flush()
    before = server.settled()
    asks = [an_ask(question.text, (drawn.image,), ZIP) for question in drawn.questions[:3]]
    plain = an_ask(other.questions[0].text, (other.image,), {"max_tokens": 8, "return_meta_info": True})
    *answers, untouched = server.ask_together([*asks, plain])
    assert grown(server, before) == {
        "requests_compressed": 2,
        "policy_failures": 0,
        "second_readings": 1,
        "prefix_hits": 3,
    }
    reports = [answer.report for answer in answers]
    assert all(answer.cached_tokens >= drawn.num_image_tokens for answer in answers)
    first = reports[0]
    assert all(report == first for report in reports), "they waited for the same reading, and say what it did"
    assert first["ratio"] == pytest.approx(BUDGET, abs=0.01)
    assert first["second_reading"]["tokens"] > drawn.num_image_tokens
    assert len(set(first["kept_tokens_per_layer"])) > 1, "one ranking over all layers"
    assert "second_reading" not in untouched.report
    seconds = server.kv_state()["second_reading_ms"]
    last = server.ask(drawn.questions[3].text, drawn.image, **ZIP)
    assert last.cached_tokens >= drawn.num_image_tokens
    assert last.report["skipped"] == "short"
    assert server.kv_state()["second_reading_ms"] == seconds, "nobody reads it again"
    assert_empty_after_flush(server)


def test_nothing_is_shared_where_that_was_asked_for(ours_tenth: Any, picture: Any) -> None:
    server, drawn = ours_tenth, picture(7952, 16, 16)
    server.flush()
    before = server.settled()
    options = {**ZIP, "custom_params": {**ZIP["custom_params"], "kv_share": "off"}}
    answers = [server.ask(question.text, drawn.image, **options) for question in drawn.questions[:2]]
    assert grown(server, before)["second_readings"] == 2
    assert all(answer.report["ratio"] == pytest.approx(OF_IMAGE, abs=0.002) for answer in answers)
    assert_empty_after_flush(server)


def test_what_cannot_be_read_twice_stays_whole_and_says_so(ours_tenth: Any, picture: Any) -> None:
    """Log-probabilities of the prompt need all of it; figures of attention need a decision in its own prefill."""
    server, drawn = ours_tenth, picture(7953, 16, 16)
    server.flush()
    before = server.settled()
    body: dict[str, Any] = {
        "text": f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{drawn.questions[0].text}",
        "image_data": [data_url(drawn.image)],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "custom_params": ZIP["custom_params"]},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    (report,) = reply.json()["meta_info"]["kv_compression"]
    assert report["skipped"] == "second_reading"
    assert "log-probabilities" in report["second_reading"]["failed"]
    body["sampling_params"] = {"custom_params": {**ZIP["custom_params"], "kv_report": "attention"}}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert reply.status_code == 400
    assert "attention" in reply.text
    assert grown(server, before)["second_readings"] == 0
    assert server.ask(drawn.questions[0].text, drawn.image, **ZIP).report["ratio"] == pytest.approx(OF_IMAGE, abs=0.002)
    assert_empty_after_flush(server)


def test_each_head_keeps_as_many_as_it_wins(by_head: Any, picture: Any) -> None:
    drawn = picture(7954, 24, 24)
    before = by_head.settled()
    answers = [by_head.ask(question.text, drawn.image, **ZIP) for question in drawn.questions[:2]]
    after = by_head.settled()
    assert after["second_readings"] - before["second_readings"] == 1
    assert after["policy_failures"] == before["policy_failures"]
    report = answers[0].report
    kept = report["kept_tokens_per_head"]
    layers = len(kept)
    assert all(len(layer) == KV_HEADS for layer in kept)
    assert any(len(set(layer)) > 1 for layer in kept)
    front = report["front_tokens"]
    owned = report["prompt_tokens"] - report["shared_tokens"] - front
    assert sum(map(sum, kept)) + front * layers * KV_HEADS == after["cells_kept"] - before["cells_kept"]
    assert sum(map(sum, kept)) == round(BUDGET * owned * layers) * KV_HEADS
    assert all(answer.cached_tokens >= drawn.num_image_tokens for answer in answers)
    assert_empty_after_flush(by_head)


def test_text_is_read_twice_where_all_prompts_are_compressed(by_head: Any) -> None:
    """A document, two questions behind it: the first one's reading serves the second."""
    document = " ".join(f"line {number} says {number * 7 % 100}" for number in range(60))
    before = by_head.settled()
    options = {**ZIP, "max_tokens": 4}
    first, second = (by_head.ask(f"{document} {question}", **options) for question in ("line 5?", "line 40?"))
    assert grown(by_head, before)["second_readings"] == 1
    assert first.report["ratio"] == pytest.approx(BUDGET, abs=0.01)
    assert first.report["prompt_tokens"] == first.prompt_tokens - 1
    assert second.cached_tokens > 0.8 * second.prompt_tokens
    assert second.report["skipped"] == "short"
    assert_empty_after_flush(by_head)
