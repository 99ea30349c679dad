"""`--kv-head-cells` on a real server: heads that keep tokens of their own, beside stock, and shared."""

from __future__ import annotations

from typing import Any

import pytest

BUDGET = 0.2
"""Of the server `by_head`."""
KV_HEADS = 2
WHOLE: dict[str, Any] = {"custom_params": {"kv_budget": 1.0}}


def test_whole_caches_answer_as_stock(by_head: Any, stock: Any, picture: Any, an_ask: Any) -> None:
    """Cells per head, several chunks, hits and misses, eight at a time: the same tokens."""
    drawn = [picture(7900 + i, 16, 16 + 4 * i) for i in range(4)]
    asked = [(question.text, d.image) for d in drawn for question in d.questions[:2]]
    ours = by_head.ask_all([an_ask(text, (image,), WHOLE) for text, image in asked], at_once=8)
    theirs = stock.ask_all([an_ask(text, (image,)) for text, image in asked], at_once=8)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]


def test_each_head_keeps_its_own(by_head: Any, picture: Any) -> None:
    drawn = picture(7910, 24, 24)
    options = {"max_tokens": 8, "return_meta_info": True, "custom_params": {"kv_report": "positions"}}
    answer = by_head.ask(drawn.questions[0].text, drawn.image, **options)
    state = by_head.settled()
    layers = len(answer.report["kept_positions"])
    assert state["cells_per_token"] == layers * KV_HEADS
    front = answer.report["front_tokens"]  # stays whole, beside the budget of the rest
    kept = front + BUDGET * (answer.prompt_tokens - front)
    assert answer.report["kept_tokens_per_layer"] == pytest.approx([kept] * layers, abs=1)
    # Positions are those that any head keeps.
    assert all(len(positions) > 1.05 * kept for positions in answer.report["kept_positions"])
    own = answer.completion_tokens * state["cells_per_token"]
    assert state["cells_used"] <= kept * state["cells_per_token"] * 1.01 + own
    assert answer.text.strip() == drawn.questions[0].answer


def test_each_head_keeps_as_many_as_it_wins(by_head: Any, picture: Any) -> None:
    """The default policy ranks all heads of all layers where the model's weights are not known; the sum is exact."""
    drawn = picture(7912, 24, 24)
    before = by_head.settled()
    params = {"kv_policy": "vlcache", "kv_report": "positions"}
    answer = by_head.ask(
        drawn.questions[0].text, drawn.image, max_tokens=8, return_meta_info=True, custom_params=params
    )
    after, kept = by_head.settled(), answer.report["kept_tokens_per_layer"]
    front = answer.report["front_tokens"]
    total = len(kept) * front + round(BUDGET * len(kept) * (answer.prompt_tokens - front))
    assert after["cells_kept"] - before["cells_kept"] == total * KV_HEADS
    assert sum(kept) == pytest.approx(total, abs=0.001 * len(kept))
    assert max(kept) > 1.1 * min(kept)
    per_head = answer.report["kept_tokens_per_head"]
    assert [front + sum(heads) / KV_HEADS for heads in per_head] == kept
    assert any(len(set(heads)) > 1 for heads in per_head), "the heads of no layer differ"
    assert answer.text.strip() == drawn.questions[0].answer


@pytest.mark.parametrize("share", ["exact", "policy"])
def test_a_second_question_shares_the_image(by_head: Any, picture: Any, share: str) -> None:
    drawn = picture(7911, 24, 24)
    options = {"max_tokens": 8, "return_meta_info": True, "custom_params": {"kv_share": share}}
    answers = [by_head.ask(question.text, drawn.image, **options) for question in drawn.questions[:2]]
    assert answers[1].cached_tokens > 0.9 * drawn.num_image_tokens  # `exact` computes all query rows
    right = [answer.text.strip() == q.answer for answer, q in zip(answers, drawn.questions, strict=False)]
    assert right == [True, share == "exact"]
    by_head.flush()
    state = by_head.settled()
    assert state["cells_used"] == 0
    assert state["integrity"] == []
    by_head.assert_alive()
