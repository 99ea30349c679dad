"""Each request its own policy: in one batch, by both APIs, within the server's limits, never sharing by accident."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import data_url, user_says

TENTH = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
TEMPLATE = 8
"""Prompt tokens before the image, which all prompts share."""
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 128
"""Long enough that requests which arrive together also decode together."""
ROUNDS = 5

COPY = {"kv_share": "policy"}
"""Others find what the first request's policy kept, under its name and budget."""
TOGETHER: dict[str, dict[str, Any]] = {
    "post-vision rows, maxima": {},  # the server's own
    "post-vision rows, sums and density": {"kv_policy": "scorer=vlcache,allocator=vlcache"},
    "last rows, entropy": {"kv_policy": "cake", "kv_budget": 0.2},
    "all rows": {"kv_policy": "h2o", "kv_budget": 0.3},
    "keys, values and rotary positions": {"kv_policy": "expected_attention", "kv_budget": 0.15},
    "a free composition, all layers in one ranking": {
        "kv_policy": "scorer=tova,allocator=global,sink=4,recent=8",
        "kv_budget": 64,
    },
}
"""Choices of requests that need different statistics, as `custom_params`."""


def body(drawn: Any, question: int = 0, params: Any = None, tokens: int = 8, **sampling: Any) -> dict[str, Any]:
    """A native request about an image."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, **sampling}
    if params is not None:
        sampling["custom_params"] = params
    text = PROMPT.format(text=drawn.questions[question].text)
    return {"text": text, "image_data": [data_url(drawn.image)], "sampling_params": sampling}


def generate(server: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a native request: text, tokens, metadata."""
    reply = httpx.post(f"{server.url}/generate", json=request, timeout=300)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def generate_together(server: Any, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All at the same moment."""
    gate = threading.Barrier(len(requests))

    def send(request: Mapping[str, Any]) -> dict[str, Any]:
        gate.wait()
        return generate(server, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def most_running(log: str) -> int:
    """The largest batch that was decoded, or that a prefilled request joined."""
    batches = re.findall(r"(Prefill|Decode) batch.*?#running-req: (\d+)", log)
    return max(int(count) + (kind == "Prefill") for kind, count in batches)


def report_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata says was done to the prompt."""
    (report,) = answer["meta_info"]["kv_compression"]
    assert isinstance(report, dict)
    return report


def chat(server: Any, drawn: Any, question: int = 0, **fields: Any) -> Any:
    """The first choice of an answer through the OpenAI client; `fields` go into `extra_body`."""
    reply = server.client.openai.chat.completions.create(
        model="default",
        messages=[user_says(drawn.questions[question].text, drawn.image)],
        max_tokens=8,
        temperature=0.0,
        extra_body=fields,
    )
    return reply.choices[0]


# -- one batch --------------------------------------------------------------------------------------------------------


def test_many_policies_in_one_batch_answer_as_alone(ours_tenth: Any, picture: Any) -> None:
    """The same tokens, and in every layer the same number of tokens kept."""
    server = ours_tenth
    requests = [
        body(picture(7500 + i, 16, 16 + 2 * i), params={**COPY, **params}, tokens=TOKENS, ignore_eos=True)
        for i, params in enumerate(TOGETHER.values())
    ]
    server.flush()
    alone = [generate(server, request) for request in requests]
    specs = [report_of(answer)["policy"] for answer in alone]
    assert len(set(specs)) == len(TOGETHER)
    before = server.settled()
    met: list[Any] = []
    while len(met) < 2 or max(met) < len(TOGETHER):  # a busy machine may let the first one end before the last begins
        assert len(met) < ROUNDS, f"they never met in one batch: {met}"
        server.flush()
        seen = len(server.log)
        together = generate_together(server, requests)
        met.append(most_running(server.log[seen:]))
        for name, one, other in zip(TOGETHER, alone, together, strict=True):
            assert len(one["output_ids"]) == TOKENS
            assert other["output_ids"] == one["output_ids"], name
            assert report_of(other) == report_of(one), name
    after = server.settled()
    assert after["requests_compressed"] - before["requests_compressed"] == len(met) * len(TOGETHER)
    assert after["policy_failures"] == before["policy_failures"]
    server.flush()
    assert server.settled()["cells_used"] == 0


# -- both APIs, and what they report ---------------------------------------------------------------------------------


def test_both_apis_choose_and_report_alike(ours_tenth: Any, picture: Any) -> None:
    """OpenAI: `extra_body={"custom_params": ...}`; native: `sampling_params.custom_params`."""
    server, drawn = ours_tenth, picture(7510, 20, 20)
    params = {"kv_policy": "snapkv:window=64,pool=max", "kv_budget": 0.25}
    server.flush()
    native = generate(server, body(drawn, params=params))
    server.flush()
    choice = chat(server, drawn, custom_params=params, return_meta_info=True)
    assert choice.message.content == native["text"]
    report = report_of(native)
    assert report_of(choice.model_extra) == report
    assert report["policy"] == params["kv_policy"]
    assert report["budget"] == "0.25"


def test_report_says_what_was_done(ours_tenth: Any, picture: Any) -> None:
    """Its figures are those of `/server_info`."""
    server, drawn = ours_tenth, picture(7511, 24, 24)
    server.flush()
    before = server.settled()
    answer = generate(server, body(drawn, params={"kv_policy": "pyramidkv", "kv_budget": 0.2}))
    after = server.settled()
    report, length = report_of(answer), answer["meta_info"]["prompt_tokens"]
    kept = report["kept_tokens_per_layer"]
    sizes = {"prompt_tokens", "shared_tokens", "front_tokens", "kept_tokens_per_layer", "ratio"}
    assert set(report) - {"staged"} == {
        "policy",
        "budget",
        *sizes,
    }  # of a prompt in several chunks, also what was staged
    assert report["prompt_tokens"] == length
    assert report["shared_tokens"] == answer["meta_info"]["cached_tokens"] == 0
    front = report["front_tokens"]  # the chat template in front of the image stays, beside the budget of the rest
    assert 0 < front < 60
    expected = front * len(kept) + round(0.2 * (length - front) * len(kept))
    assert sum(kept) == after["cells_kept"] - before["cells_kept"] == expected
    assert report["ratio"] == round(expected / (length * len(kept)), 4)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]  # a pyramid


def test_report_says_why_nothing_was_done(ours_tenth: Any, picture: Any) -> None:
    server, drawn = ours_tenth, picture(7512, 20, 20)
    server.flush()
    assert report_of(generate(server, body(drawn, params={"kv_budget": 1.0})))["skipped"] == "budget"
    text = {"text": "red K? " * 100, "sampling_params": {"max_new_tokens": 1}}
    assert report_of(generate(server, text))["skipped"] == "scope"
    generate(server, body(drawn, params=COPY))
    follow_up = generate(server, body(drawn, question=1, params=COPY))
    assert follow_up["meta_info"]["cached_tokens"] >= drawn.num_image_tokens
    assert report_of(follow_up)["skipped"] == "short"


def test_shared_tokens_are_those_of_the_prefix(ours_tenth: Any, picture: Any) -> None:
    """A second image in the conversation: the first is shared, only the second is compressed."""
    server, first, second = ours_tenth, picture(7513, 16, 16), picture(7514, 20, 20)
    server.flush()
    opening = body(first, params=COPY)
    answer = generate(server, opening)
    longer = body(second, params=COPY)
    longer["text"] = opening["text"] + answer["text"] + "<|im_end|>\n" + longer["text"]
    longer["image_data"] = opening["image_data"] + longer["image_data"]
    reply = generate(server, longer)
    report = report_of(reply)
    assert report["shared_tokens"] == reply["meta_info"]["cached_tokens"] >= first.num_image_tokens
    assert report["front_tokens"] == 0
    own = report["prompt_tokens"] - report["shared_tokens"]
    assert sum(report["kept_tokens_per_layer"]) == round(0.1 * own * len(report["kept_tokens_per_layer"]))


def test_budget_one_keeps_everything(ours_tenth: Any, picture: Any) -> None:
    """The request is not compressed: its cells are prompt times planes, and the answer's."""
    server, drawn = ours_tenth, picture(7520, 24, 24)
    server.flush()
    before = server.settled()
    answer = server.ask(drawn.questions[0].text, drawn.image, custom_params={"kv_budget": 1.0})
    after = server.settled()
    assert answer.text == drawn.questions[0].answer
    planes = after["cells_per_token"]
    held = after["cells_used"] - before["cells_used"]
    assert answer.prompt_tokens * planes <= held <= (answer.prompt_tokens + answer.completion_tokens) * planes
    assert after["requests_compressed"] == before["requests_compressed"]
    assert after["requests_skipped"]["budget"] == before["requests_skipped"].get("budget", 0) + 1


# -- namespaces -------------------------------------------------------------------------------------------------------


def test_only_equal_choices_share(ours_tenth: Any, picture: Any) -> None:
    """Another name, parameter, selection or budget is another prefix; another spelling of the same is not."""
    server, drawn = ours_tenth, picture(7530, 20, 20)
    first, second = (question.text for question in drawn.questions[:2])
    choices: list[dict[str, Any]] = [
        {},
        {"kv_budget": 1.0},
        {"kv_budget": 0.2},
        {"kv_budget": 40},
        {"kv_policy": "vlcache:recent=0.2"},
        {"kv_policy": "vlcache:paper"},
        {"kv_policy": "snapkv"},
        {"kv_policy": "snapkv:window=64"},
        {"kv_policy": "snapkv:sink=4"},
        {"kv_policy": "scorer=snapkv,allocator=pyramid"},
        {"kv_policy": "scorer=snapkv,allocator=uniform"},
        {"kv_policy": "knorm"},
    ]
    spellings: list[dict[str, Any]] = [
        {"kv_policy": "vlcache"},
        {"kv_budget": "0.1"},
        {"kv_policy": "scorer=snapkv,allocator=model"},
        {"kv_policy": " snapkv:pool=avg, window=32 "},
        {"kv_policy": "pyramidkv"},
    ]
    server.flush()
    for choice in choices:
        assert server.ask(first, drawn.image, custom_params={**COPY, **choice}).cached_tokens <= TEMPLATE, choice
    for choice in choices + spellings:
        again = server.ask(second, drawn.image, custom_params={**COPY, **choice})
        assert again.cached_tokens >= drawn.num_image_tokens, choice
    server.flush()
    assert server.settled()["cells_used"] == 0


# -- refusals ---------------------------------------------------------------------------------------------------------

NAMES = ("vlcache", "snapkv", "h2o", "knorm")
REFUSED: dict[str, tuple[Any, Sequence[str]]] = {
    "unknown policy": ({"kv_policy": "nope"}, ("unknown policy 'nope'", *NAMES)),
    "unknown scorer": ({"kv_policy": "scorer=nope,allocator=uniform"}, ("unknown scorer 'nope'", *NAMES)),
    "unknown allocator": ({"kv_policy": "scorer=tova,allocator=nope"}, ("unknown allocator 'nope'", "pyramid")),
    "unknown variant": ({"kv_policy": "snapkv:nope"}, ("nope", "max")),
    "unknown parameter": ({"kv_policy": "snapkv:nope=1"}, ("unknown parameter 'nope'", "window", "kernel", "sink")),
    "parameter no number": ({"kv_policy": "snapkv:window=many"}, ("window", "a whole number", "'many'")),
    "parameter no choice": ({"kv_policy": "snapkv:pool=median"}, ("pool", "avg, max", "'median'")),
    "parameter out of range": ({"kv_policy": "snapkv:window=-1"}, ("window", "-1")),
    "half a composition": ({"kv_policy": "scorer=tova"}, ("scorer=A,allocator=B",)),
    "empty policy": ({"kv_policy": ""}, ("expected NAME",)),
    "a file of the server": (
        {"kv_policy": "scorer=tova,allocator=table,file=/etc/passwd"},
        ("file", "--kv-policy", "not by a request"),
    ),
    "impossible pair": ({"kv_policy": "scorer=knorm,allocator=global"}, ("global", "knorm")),
    "needs a flag": ({"kv_policy": "snapkv:heads=split"}, ("--kv-head-cells",)),
    "policy is a number": ({"kv_policy": 3}, ("kv_policy must be a text", "3")),
    "policy is null": ({"kv_policy": None}, ("kv_policy must be a text", "None")),
    "policy is a list": ({"kv_policy": ["snapkv"]}, ("kv_policy must be a text", "snapkv")),
    "budget zero": ({"kv_budget": 0}, ("kv_budget", "(0, 1]")),
    "budget negative": ({"kv_budget": -0.5}, ("kv_budget", "-0.5")),
    "budget between numbers": ({"kv_budget": 2.5}, ("kv_budget", "2.5", "whole number")),
    "budget below the least": ({"kv_budget": 0.001}, ("kv_budget", "0.001", "0.01 to 1")),
    "budget no number": ({"kv_budget": "much"}, ("kv_budget", "much")),
    "budget not finite": ({"kv_budget": "inf"}, ("kv_budget", "inf")),
    "budget beyond all floats": ({"kv_budget": "1e999"}, ("kv_budget", "1e999")),
    "budget is a switch": ({"kv_budget": True}, ("kv_budget", "True")),
    "budget is a list": ({"kv_budget": [0.1]}, ("kv_budget", "[0.1]")),
    "budget is null": ({"kv_budget": None}, ("kv_budget", "None")),
}
"""`custom_params`, and what the message must name."""


def refused(server: Any, path: str, request: Mapping[str, Any], words: Sequence[str]) -> None:
    """The request gets a 400 whose message holds all `words`."""
    reply = httpx.post(f"{server.url}{path}", json=request, timeout=60)
    assert reply.status_code == 400, (reply.status_code, reply.text)
    content = reply.json()
    message = content["error"]["message"] if "error" in content else content["message"]
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_choices(ours_tenth: Any, picture: Any, case: str) -> None:
    """A 400 from both APIs, and nothing is counted."""
    server, drawn, (params, words) = ours_tenth, picture(7540, 8, 10), REFUSED[case]
    before = server.settled()
    refused(server, "/generate", body(drawn, params=params), words)
    messages = [user_says(drawn.questions[0].text, drawn.image)]
    openai = {"model": "default", "messages": messages, "max_tokens": 2, "custom_params": params}
    refused(server, "/v1/chat/completions", openai, words)
    after = server.settled()
    for key in ("requests_compressed", "requests_skipped", "policy_failures"):
        assert after[key] == before[key]


@pytest.mark.parametrize("params", ["kv_policy", ["kv_policy"], 3], ids=["text", "list", "number"])
def test_custom_params_must_be_an_object(ours_tenth: Any, picture: Any, params: Any) -> None:
    """The native API passes on whatever it is given."""
    reply = httpx.post(f"{ours_tenth.url}/generate", json=body(picture(7541), params=params), timeout=60)
    assert 400 <= reply.status_code < 500, reply.text
    ours_tenth.assert_alive()


def test_other_custom_params_are_not_ours(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(7542)
    answer = generate(ours_tenth, body(drawn, params={"somebody": "else's", "kv_budget": 0.3}))
    assert report_of(answer)["budget"] == "0.3"


def test_the_server_outlives_all_refusals(ours_tenth: Any, picture: Any) -> None:
    """Sent together with requests that are fine."""
    server, drawn = ours_tenth, [picture(7550 + i, 24, 24) for i in range(4)]
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(refused, server, "/generate", body(drawn[0], params=p), w) for p, w in REFUSED.values()]
        good = [pool.submit(server.ask, d.questions[0].text, d.image) for d in drawn]
        for future in bad:
            future.result()
        right = sum(f.result().text == d.questions[0].answer for f, d in zip(good, drawn, strict=True))
    assert right >= len(drawn) - 1
    server.flush()
    assert server.settled()["cells_used"] == 0
    server.assert_alive()


# -- the operator's limits --------------------------------------------------------------------------------------------


BEYOND: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "below": ({"kv_budget": 0.15}, ("kv_budget", "0.2 to 0.5")),
    "above": ({"kv_budget": 0.6}, ("kv_budget", "0.2 to 0.5")),
    "uncompressed": ({"kv_budget": 1.0}, ("kv_budget", "0.2 to 0.5")),
    "too many tokens": ({"kv_budget": 10_000}, ("kv_budget", "0.2 to 0.5")),
    "too few tokens": ({"kv_budget": 2}, ("kv_budget", "0.2 to 0.5")),
    "another policy": ({"kv_policy": "tova"}, ("tova", "vlcache, snapkv, knorm")),
    "its parameters too": ({"kv_policy": "tova:sink=4"}, ("tova", "vlcache, snapkv, knorm")),
    "an unknown one": ({"kv_policy": "nope"}, ("nope", "vlcache, snapkv, knorm")),
    "a composition": ({"kv_policy": "scorer=snapkv,allocator=uniform"}, ("not allowed", "vlcache, snapkv, knorm")),
}


@pytest.mark.parametrize("case", BEYOND)
def test_refuses_what_the_operator_does_not_allow(limited: Any, picture: Any, case: str) -> None:
    params, words = BEYOND[case]
    refused(limited, "/generate", body(picture(7560), params=params), words)
    limited.assert_alive()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"kv_budget": 0.3},
        {"kv_policy": "vlcache"},
        {"kv_budget": 0.2},
        {"kv_budget": 0.5, "kv_policy": "knorm"},
        {"kv_budget": 80, "kv_policy": "snapkv:window=64"},
    ],
    ids=str,
)
def test_serves_what_the_operator_allows(limited: Any, picture: Any, params: dict[str, Any]) -> None:
    """The server's own policy and budget always, others within the limits."""
    limited.flush()
    report = report_of(generate(limited, body(picture(7561), params=params)))
    assert report["policy"].strip() == params.get("kv_policy", "vlcache")
    assert len(report["kept_tokens_per_layer"]) > 0
