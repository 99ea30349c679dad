"""`--kv-recall` on a real server: a decode step reads evicted tokens again, from host memory."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from vlcache_sgl.client.client import user_says

POLICIES = ("vlcache:density", "keydiff", "snapkv:window=8")
HEADS = (
    *("--kv-policy", "snapkv:heads=split", "--kv-head-cells", "--kv-min-tokens", "16"),
    *("--kv-host-memory", "16MB", "--kv-recall", "24"),
)


def options(tokens: int, **params: Any) -> dict[str, Any]:
    return {"max_tokens": tokens, "return_meta_info": True, "ignore_eos": True, "custom_params": params}


def alone(server: Any, an_ask: Any, asked: list[Any]) -> list[str]:
    """What a server says to each of `asked` when nothing is cached."""
    texts = []
    for turns, images, extra in asked:
        server.flush()
        texts.append(server.ask_all([an_ask(turns, images, extra)])[0].text)
    return texts


@pytest.mark.parametrize("policy", POLICIES)
def test_what_comes_back_whole_is_the_full_cache(small: Any, picture: Any, policy: str) -> None:
    """An area for every evicted token: the tokens of the full cache, to the last."""
    drawn = picture(61_000, 20, 20)
    for question in drawn.questions[:2]:
        full = small.ask(question.text, drawn.image, **options(24, kv_budget=1.0))
        params = {"kv_policy": policy, "kv_budget": 0.05, "kv_recall": 4096}
        back = small.ask(question.text, drawn.image, **options(24, **params))
        assert back.text == full.text
        assert back.report["ratio"] < 0.1
        assert back.report["recall"]["from_host"] == 0
    small.assert_nothing_held()


def test_what_the_policy_lost_is_found(small: Any, picture: Any) -> None:
    """Keys alone do not say what will be asked for; a step does."""
    right = {"off": 0, "full": 0, 24: 0}
    for seed in range(61_100, 61_104):
        drawn = picture(seed, 24, 24)
        for question in drawn.questions:
            for recall in right:
                params = {"kv_budget": 1.0} if recall == "full" else {"kv_policy": "keydiff", "kv_recall": recall}
                answer = small.ask(question.text, drawn.image, max_tokens=6, custom_params=params)
                right[recall] += answer.text.strip() == question.answer
    assert right["off"] <= 5
    assert right[24] >= right["full"] - 1 >= 13
    small.assert_nothing_held()


def test_company_and_prefixes_change_nothing(small: Any, an_ask: Any, picture: Any) -> None:
    """Eight at a time behind shared images, some without recall, as each alone."""
    drawn = [picture(61_200 + i, 16, 16 + 4 * i) for i in range(2)]
    asked = [
        (question.text, (d.image,), options(12, kv_policy=policy, kv_budget=0.1, kv_recall=recall))
        for policy, recall in zip(POLICIES, (8, 24, "off"), strict=True)
        for d in drawn
        for question in d.questions[:3]
    ]
    expected = alone(small, an_ask, asked)
    answers = small.ask_all([an_ask(*ask) for ask in asked], at_once=8)
    assert [answer.text for answer in answers] == expected
    assert sum(answer.cached_tokens >= 256 for answer in answers) >= len(answers) - 8
    small.assert_nothing_held()


def test_a_second_turn(small: Any, an_ask: Any, picture: Any) -> None:
    """The answer that recall gave is part of the next prompt; the image behind it is found."""
    drawn = picture(61_300, 16, 20)
    one, two = (question.text for question in drawn.questions[:2])
    reply = small.ask(one, drawn.image, max_tokens=6, custom_params={"kv_policy": "keydiff"}).text
    turns = [user_says(one, drawn.image), {"role": "assistant", "content": reply}, user_says(two)]
    ask = (turns, (), options(8, kv_policy="keydiff"))
    (answer,) = small.ask_all([an_ask(*ask)])
    assert answer.cached_tokens >= 320
    assert [answer.text] == alone(small, an_ask, [ask])
    small.assert_nothing_held()


def test_pauses_that_retract(small: Any, an_ask: Any, picture: Any) -> None:
    """Whoever comes back from a retraction reads what it would have read."""
    drawn = [picture(61_400 + i, 16, 24) for i in range(2)]
    asked = [
        (question.text, (d.image,), options(2, kv_policy="keydiff", kv_recall=16))
        for d in drawn
        for question in d.questions
    ]
    expected = alone(small, an_ask, asked)
    with small.retracting(every_s=0.3):
        answers = [answer.text for answer in small.ask_all([an_ask(*ask) for ask in asked], at_once=4)]
    assert answers == expected
    small.assert_nothing_held()


def test_what_is_reported(small: Any, picture: Any) -> None:
    drawn = picture(61_500, 24, 24)
    before = small.settled()
    answer = small.ask(drawn.questions[0].text, drawn.image, **options(5, kv_policy="keydiff", kv_recall=16))
    after = small.settled()
    recall = answer.report["recall"]
    assert recall["steps"] in (4, 5)  # overlap computes one more
    assert recall["tokens"] == 16
    assert 0 < recall["from_host"] <= 1
    layers = len(answer.report["kept_tokens_per_layer"])
    recalled = after["recalled_tokens"] - before["recalled_tokens"]
    assert recalled == recall["steps"] * layers * 16
    fetched = after["recalled_tokens_fetched"] - before["recalled_tokens_fetched"]
    assert fetched == round(recall["from_host"] * recalled)
    assert after["host_bytes_read"] - before["host_bytes_read"] >= fetched * after["bytes_per_cell"]
    without = small.ask(drawn.questions[1].text, drawn.image, **options(5, kv_recall=0))
    assert "recall" not in without.report


def test_what_is_whole_recalls_nothing(small: Any, picture: Any) -> None:
    """A prompt that nothing was evicted of has no recall area: no step ranks anything for it."""
    drawn = picture(61_550, 24, 24)
    before = small.settled()
    whole = small.ask(drawn.questions[0].text, drawn.image, **options(5, kv_budget=1.0, kv_recall=16))
    after = small.settled()
    assert whole.text.strip().startswith(drawn.questions[0].answer)
    assert "recall" not in whole.report
    assert after["recalled_tokens"] == before["recalled_tokens"]
    small.assert_nothing_held()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"kv_recall": "many"}, "kv_recall must be `off` or a whole number"),
        ({"kv_recall": True}, "kv_recall must be"),
        ({"kv_recall": -1}, "kv_recall must be"),
        ({"kv_recall": 8, "kv_share": "off"}, "kv_share is off"),
        ({"kv_recall": 8, "kv_policy": "kvzip"}, "one selection for all"),
    ],
)
def test_what_cannot_be_had(small: Any, picture: Any, params: dict[str, Any], reason: str) -> None:
    drawn = picture(61_600, 16, 16)
    with pytest.raises(openai.BadRequestError, match=reason):
        small.ask(drawn.questions[0].text, drawn.image, custom_params=params)


def test_a_server_without_recall(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(61_600, 16, 16)
    with pytest.raises(openai.BadRequestError, match="needs a server with --kv-recall"):
        ours_tenth.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_recall": 8})


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--enable-mixed-chunk",),
        ("--disable-overlap-schedule",),
        ("--tp", "2"),
        ("head-cells",),
        ("head-cells", "--tp", "2"),
    ],
    ids=" ".join,
)
def test_other_servers(
    servers: Any, small: Any, small_flags: tuple[str, ...], an_ask: Any, picture: Any, flags: tuple[str, ...]
) -> None:
    """Prefills beside decode steps in one forward, no overlap, two ranks, cells per KV head."""
    heads = flags[0] == "head-cells"
    given = (*HEADS, *flags[1:]) if heads else (*small_flags, *flags)
    server = servers.get(*given, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if "--tp" in flags else {})
    drawn = [picture(61_700 + i, 24, 24) for i in range(2)]
    params: dict[str, Any] = {"kv_budget": 0.1, "kv_recall": 24}
    params |= {} if heads else {"kv_policy": "keydiff"}
    asked = [(question.text, (d.image,), options(10, **params)) for d in drawn for question in d.questions]
    expected = alone(server, an_ask, asked)
    answers = server.ask_all([an_ask(*ask) for ask in asked], at_once=8)
    assert [answer.text for answer in answers] == expected
    if not heads:
        # Two ranks add up in another order: what follows an answer may tip, the answer does not.
        length = 4 if "--tp" in flags else None
        assert [text[:length] for text in expected] == [text[:length] for text in alone(small, an_ask, asked)]
    server.assert_nothing_held()
