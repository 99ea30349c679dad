"""`--kv-host-memory` on a real server: questions about a shared prefix answer as if they had been asked alone.

The reference is another server with a large arena on which every request is private (`kv_share: off`).
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.models.make_model import make_model
from vlcache_sgl.client.client import data_url, user_says

POOL = 900
"""Uncompressed tokens of the server `small`."""
HEADS = (
    *("--kv-policy", "snapkv:heads=split", "--kv-head-cells", "--kv-min-tokens", "16"),
    *("--kv-host-memory", "16MB", "--kv-recall", "24"),
)
RANKS = ("--tp", "2")
POLICIES = ("vlcache:density", "vlcache", "snapkv:window=8", "keydiff", "pyramidkv")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def options(tokens: int = 6, **params: Any) -> dict[str, Any]:
    return {"max_tokens": tokens, "return_meta_info": True, "custom_params": {"kv_recall": "off", **params}}


def both(small: Any, alone: Any, an_ask: Any, asked: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Answers of the small server, eight at a time, after they were compared with those of requests alone."""
    asked = [(turns, images, {"kv_policy": "vlcache:density", **params}) for turns, images, params in asked]
    ours = small.ask_all([an_ask(turns, images, options(**params)) for turns, images, params in asked], at_once=8)
    private = [an_ask(turns, images, options(kv_share="off", **params)) for turns, images, params in asked]
    theirs = alone.ask_all(private, at_once=4)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    return ours


def test_every_question_is_answered_as_if_alone(small: Any, ours_tenth: Any, an_ask: Any, picture: Any) -> None:
    """Five policies and budgets, one prefix for all of them."""
    drawn = [picture(60_000 + i, 16, 16 + 4 * i) for i in range(2)]
    asked = [
        (question.text, (d.image,), {"kv_policy": policy, "kv_budget": budget})
        for policy, budget in zip(POLICIES, (0.1, 0.2, 0.05, 0.4, 0.3), strict=True)
        for d in drawn
        for question in d.questions
    ]
    answers = both(small, ours_tenth, an_ask, asked)
    hits = sum(answer.cached_tokens >= 256 for answer in answers)
    assert hits >= len(answers) - 2 * 4  # those that are computed at the same time find nothing
    assert all(answer.report["kept_tokens_per_layer"] for answer in answers)
    small.assert_nothing_held()


def test_shared_images_are_answered_right(small: Any, picture: Any) -> None:
    """Another question's copy would answer next to none of them."""
    right = 0
    for seed in range(60_100, 60_103):
        drawn = picture(seed, 24, 24)
        for question in drawn.questions:
            answer = small.ask(question.text, drawn.image, **options())
            right += answer.text.strip() == question.answer
        assert answer.cached_tokens >= drawn.num_image_tokens
        assert answer.report["shared_tokens"] == answer.cached_tokens
    assert right >= 11
    state = small.settled()
    assert state["cells_requests"] == state["cells_used"] - state["cells_tree"] == 0
    assert state["cells_tree"] <= 6, "the prefix tree holds host memory, not cells"
    small.assert_nothing_held()


def test_several_images_and_turns(small: Any, ours_tenth: Any, an_ask: Any, picture: Any) -> None:
    """A prompt that another one continues, with a further image, or with the answer and a further question."""
    first, second = picture(60_200, 16, 16), picture(60_201, 16, 20)
    one, two, three = (question.text for question in first.questions[:3])
    reply = small.ask(one, first.image, **options()).text
    asked: list[Any] = [
        (one, (first.image, second.image), {}),
        (two, (first.image,), {}),
        ([user_says(one, first.image), {"role": "assistant", "content": reply}, user_says(three)], (), {}),
        (second.questions[0].text, (first.image, second.image), {"kv_budget": 0.3}),
    ]
    for ask in asked:
        (answer,) = both(small, ours_tenth, an_ask, [ask])
        assert answer.cached_tokens >= 256
    small.assert_nothing_held()


def test_a_prompt_larger_than_the_arena(small: Any, ours_tenth: Any, an_ask: Any, picture: Any) -> None:
    images = tuple(picture(60_300 + i, 24, 24).image for i in range(4))
    for question in picture(60_303, 24, 24).questions[:2]:
        ((answer),) = both(small, ours_tenth, an_ask, [(question.text, images, {"kv_budget": 0.05})])
        assert answer.prompt_tokens > 2.5 * POOL
        staged = answer.report["staged"]
        assert staged["chunks"] >= (answer.prompt_tokens - answer.cached_tokens) // 128 - 1
        assert staged["tokens"] >= answer.cached_tokens
        assert 0 < staged["seconds"] < 60
    state = small.settled()
    assert state["host_bytes_written"] > answer.prompt_tokens * state["host_bytes_per_token"]
    assert state["staged_tokens"] > 0
    assert state["staged_forwards"] >= staged["chunks"]
    assert state["staged_ms"] > 1e3 * staged["seconds"] - 1
    small.assert_nothing_held()


def test_a_failing_policy_keeps_what_fits_and_refuses_what_does_not(small: Any, picture: Any) -> None:
    """Kept whole where the arena holds the prompt, a 400 where only the policy would have made it fit."""
    drawn = [picture(60_350 + i, 24, 24) for i in range(3)]
    question = drawn[0].questions[0]
    fits, too_large = (drawn[0].image,), tuple(d.image for d in drawn)
    for policy, complaint in (("raises", "broken on purpose"), ("nan", "NaN")):
        failing = options(kv_policy=f"scorer={policy},allocator=uniform")
        answer = small.ask(question.text, *fits, **failing)
        assert answer.text.strip() == question.answer
        assert complaint in answer.report["failed"]
        with pytest.raises(openai.BadRequestError, match=f"scorer={policy}.*{complaint}.*tokens does not fit"):
            small.ask(question.text, *too_large, **failing)
    # What the failing ones have left in host memory serves those that work.
    answer = small.ask(question.text, *too_large, **options())
    assert answer.cached_tokens > POOL
    assert "failed" not in answer.report
    small.assert_nothing_held()


def test_what_fits_neither_is_refused(small: Any, picture: Any) -> None:
    images = [data_url(picture(60_400 + i, 32, 32).image) for i in range(6)]
    for budget, status in ((0.3, 400), (1.0, 400)):
        body = {
            "text": f"<|im_start|>user\n{IMAGE * len(images)}red K?<|im_end|>\n<|im_start|>assistant\n",
            "image_data": images,
            "sampling_params": {"max_new_tokens": 2, "custom_params": {"kv_budget": budget}},
        }
        reply = httpx.post(f"{small.url}/generate", json=body, timeout=120)
        assert reply.status_code == status, reply.text
        assert "tokens" in reply.text
    small.assert_nothing_held()


def test_host_memory_overflows(small: Any, picture: Any) -> None:
    """More images than it holds, in turns: whole prefixes go, nothing is wrong."""
    capacity = small.settled()["host_tokens_total"]
    drawn = [picture(60_500 + i, 24, 24) for i in range(capacity // 576 + 3)]
    right = 0
    for turn in range(2):
        for d in drawn:
            question = d.questions[turn]
            right += small.ask(question.text, d.image, **options()).text.strip() == question.answer
    assert right >= 2 * len(drawn) - 1
    state = small.settled()
    assert state["host_tokens_used"] <= capacity
    assert state["integrity"] == []
    small.assert_nothing_held()


def test_disconnects_and_retractions(small: Any, picture: Any) -> None:
    """Clients that leave at any moment of a prefill, and answers that outgrow the arena."""
    drawn = [picture(60_600 + i, 24, 24) for i in range(4)]

    def body(d: Any, tokens: int) -> dict[str, Any]:
        text = f"<|im_start|>user\n{IMAGE}{d.questions[0].text}<|im_end|>\n<|im_start|>assistant\n"
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        return {"text": text, "image_data": data_url(d.image), "sampling_params": sampling}

    def leave(number: int) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{small.url}/generate", json=body(drawn[number % 4], 200), timeout=0.05 + 0.04 * number)

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda d: httpx.post(f"{small.url}/generate", json=body(d, 400), timeout=400).json(), drawn)
        )
    assert [reply["meta_info"]["completion_tokens"] for reply in replies] == [400] * 4
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0
    assert all(reply["text"].startswith(d.questions[0].answer) for reply, d in zip(replies, drawn, strict=True))
    small.assert_nothing_held()


def test_pauses_that_retract(small: Any, picture: Any) -> None:
    """At any moment of prefills in chunks and of decoding, again and again: every question is answered, and right."""
    drawn = [picture(60_850 + i, 24, 24) for i in range(3)]
    asked = [(d, question) for d in drawn for question in d.questions]
    with small.retracting(every_s=0.4), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ask: small.ask(ask[1].text, ask[0].image, max_tokens=4), asked))
    right = [answer.text.strip() == question.answer for answer, (_, question) in zip(answers, asked, strict=True)]
    assert sum(right) >= len(right) - 1
    small.assert_nothing_held()


@pytest.mark.slow
def test_a_prompt_of_ten_times_the_arena(servers: Any, tmp_path: Path, picture: Any) -> None:
    """On a model of 12 layers, whose answers mean nothing: the same tokens as in an arena that holds the prompt."""
    model = make_model(tmp_path / "model")
    common = (*("--kv-policy", "vlcache:density", "--kv-budget", "0.02"), "--dtype", "float32", "--skip-server-warmup")
    small = ("--kv-host-memory", "512MB", "--kv-overcommit", "2", "--max-total-tokens", "1500")
    large = ("--kv-host-memory", "off", "--max-total-tokens", "20000")
    images = [picture(60_900 + i, 32, 32).image for i in range(14)]
    texts = []
    for flags in (small, large):
        server = servers.get(*common, *flags, "--chunked-prefill-size", "256", model=model, common=())
        answers = [server.ask(text, *images, max_tokens=16, return_meta_info=True) for text in ("red K?", "blue J?")]
        texts.append([answer.text for answer in answers])
        state = server.settled()
        if flags is small:
            assert answers[0].prompt_tokens > 10 * state["physical_tokens_total"]
            server.assert_nothing_held()
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("head_cells", [False, True], ids=["layer-cells", "head-cells"])
def test_two_ranks_share_without_loss(
    servers: Any, ours_tenth: Any, an_ask: Any, picture: Any, small_flags: tuple[str, ...], head_cells: bool
) -> None:
    """Each rank has its own heads of the prefix; all decide alike, and answer as one rank that computes all."""
    two = servers.get(*(HEADS if head_cells else small_flags), *RANKS, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    drawn = [picture(60_700 + i, 24, 24) for i in range(2)]
    asked: list[Any] = [(question.text, (d.image,), {}) for d in drawn for question in d.questions]
    answers = both(two, ours_tenth, an_ask, asked)
    assert sum(answer.cached_tokens >= 576 for answer in answers) >= 4
    two.assert_nothing_held()


@pytest.mark.slow
def test_streams_without_overlap_and_heads_of_their_own(servers: Any, an_ask: Any, picture: Any) -> None:
    """Cells per KV head, no overlap, whole prefills: a stream says what a request says that computes all."""
    server = servers.get(*HEADS, "--disable-overlap-schedule", "--chunked-prefill-size", "-1")
    drawn = picture(60_800, 24, 24)
    for question in drawn.questions:
        exact, alone = (
            server.ask(question.text, drawn.image, stream=True, custom_params=params)
            for params in ({"kv_budget": 0.2, "kv_recall": "off"}, {"kv_budget": 0.2, "kv_share": "off"})
        )
        assert exact.text == alone.text
    server.assert_nothing_held()
