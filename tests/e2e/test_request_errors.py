"""What a request says wrong is a 400 before anything is sent, streamed or not, on every endpoint."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from vlcache_sgl.client.client import data_url

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"kv_budgt": 0.2}, "did you mean kv_budget"),
    "unknown policy": ({"kv_policy": "nosuch"}, "nosuch"),
    "unknown parameter": ({"kv_policy": "snapkv:windw=3"}, "windw"),
    "budget": ({"kv_budget": 0.001}, "kv_budget 0.001 is out of"),
    "weights for another model": ({"kv_policy": "scorer=snapkv,allocator=table,weights=1/2"}, "layers"),
    "report": ({"kv_report": "all"}, "kv_report must be one of"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("params", "message"), WRONG.values(), ids=WRONG.keys())
def test_on_every_endpoint_that_reads_them(
    ours_tenth: Any, picture: Any, params: dict[str, Any], message: str, stream: bool
) -> None:
    client = openai.OpenAI(base_url=ours_tenth.url + "/v1", api_key="none", max_retries=0)
    image = {"type": "image_url", "image_url": {"url": data_url(picture(8400, 12, 12).image)}}
    content: Any = [image, {"type": "text", "text": "red K?"}]
    extra = {"custom_params": params}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": content}], stream=stream, extra_body=extra
        )
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(model="default", prompt="red K?", stream=stream, extra_body=extra)
    body = {"text": "red K?", "sampling_params": {"max_new_tokens": 1, **extra}, "stream": stream}
    reply = httpx.post(f"{ours_tenth.url}/generate", json=body, timeout=60)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert "\n" not in reply.json()["error"]["message"]


ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "red K?"}], "max_tokens": 1}),
    "completions": ("/v1/completions", {"prompt": "red K?", "max_tokens": 1}),
    "generate": ("/generate", {"text": "red K?", "sampling_params": {"max_new_tokens": 1}}),
    "responses": ("/v1/responses", {"input": "red K?", "max_output_tokens": 8}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": "red K?"}], "max_tokens": 1}),
    "ollama": ("/api/chat", {"messages": [{"role": "user", "content": "red K?"}], "options": {"num_predict": 1}}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS.values(), ids=ENDPOINTS.keys())
def test_what_an_endpoint_would_ignore(ours_tenth: Any, path: str, body: dict[str, Any], stream: bool) -> None:
    name = httpx.get(f"{ours_tenth.url}/v1/models").json()["data"][0]["id"]  # /v1/responses takes no other

    def send(**more: Any) -> httpx.Response:
        model = {} if path == "/generate" else {"model": name}
        return httpx.post(ours_tenth.url + path, json={**model, **body, "stream": stream, **more}, timeout=60)

    assert send().status_code == 200
    for misplaced in ({"kv_policy": "snapkv"}, {"kv_polcy": "snapkv"}):
        reply = send(**misplaced)
        assert reply.status_code == 400, reply.text[:300]
        assert next(iter(misplaced)) in reply.text
    if path == "/generate":
        reply = send(custom_params={"kv_budget": 0.5})
        assert reply.status_code == 400
        assert "kv_budget" in reply.text
    else:
        reply = send(custom_params={"kv_budget": 7.5})
        assert reply.status_code == 400
        assert "kv_budget" in reply.text
    assert send(custom_params={"thinking_budget": 5}).status_code == 200


OTHER_APIS = {name: ENDPOINTS[name] for name in ("responses", "messages")}
"""SGLang reads no `custom_params` there."""


def content_of(path: str, url: str) -> list[dict[str, Any]]:
    """An image and a question, as the API of `path` has them."""
    if path == "/v1/responses":
        return [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What is the code of red K?"}]
    source = {"type": "base64", "media_type": "image/png", "data": url.partition("base64,")[2]}
    return [{"type": "image", "source": source}, {"type": "text", "text": "What is the code of red K?"}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), OTHER_APIS.values(), ids=OTHER_APIS.keys())
def test_custom_params_of_other_apis(
    ours_tenth: Any, picture: Any, path: str, body: dict[str, Any], stream: bool
) -> None:
    """What they say is done, and what is wrong with them is a 400 before a stream begins."""
    name = httpx.get(f"{ours_tenth.url}/v1/models").json()["data"][0]["id"]
    content = content_of(path, data_url(picture(8402, 16, 16).image))
    place = "input" if path == "/v1/responses" else "messages"

    def send(params: Any) -> httpx.Response:
        asked = {**body, "model": name, place: [{"role": "user", "content": content}], "stream": stream}
        return httpx.post(ours_tenth.url + path, json={**asked, "custom_params": params}, timeout=60)

    for params, message in [*WRONG.values(), ("kv_budget", "custom_params must be an object")]:
        reply = send(params)
        assert reply.status_code == 400, reply.text[:300]
        assert message in reply.text
    kept = []
    for budget in (0.5, 0.1):
        ours_tenth.flush()
        before = ours_tenth.settled()
        assert send({"kv_budget": budget, "kv_policy": "snapkv"}).status_code == 200
        after = ours_tenth.settled()
        assert after["requests_compressed"] == before["requests_compressed"] + 1
        kept.append(after["cells_kept"] - before["cells_kept"])
    assert 3 < kept[0] / kept[1] < 5


def test_a_stream_that_is_right_is_unchanged(ours_tenth: Any) -> None:
    body = {"text": "red K?", "sampling_params": {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}}
    whole = httpx.post(f"{ours_tenth.url}/generate", json=body, timeout=60).json()
    with httpx.stream("POST", f"{ours_tenth.url}/generate", json={**body, "stream": True}, timeout=60) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert reply.status_code == 200
    assert 2 < len(lines) <= 5  # a token that comes while the one before is on its way shares its line
    assert lines[-1] == "data: [DONE]"
    assert httpx.Response(200, content=lines[-2].removeprefix("data: ")).json()["text"] == whole["text"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_placeholder_without_an_image(ours_tenth: Any, picture: Any, stream: bool) -> None:
    """SGLang alone never answers it."""
    image = {"type": "image_url", "image_url": {"url": data_url(picture(8401, 12, 12).image)}}
    content = [image, {"type": "text", "text": "what is <|image_pad|> in it?"}]
    body = {"model": "default", "max_tokens": 2, "stream": stream, "messages": [{"role": "user", "content": content}]}
    reply = httpx.post(f"{ours_tenth.url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 400
    assert "placeholders" in reply.text
    ours_tenth.assert_alive()
