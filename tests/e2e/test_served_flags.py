"""Flags of SGLang that work with a policy: each on a server of its own (slow), and many of them on one."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import zmq

from vlcache_sgl.client.client import Client, data_url
from vlcache_sgl.client.server import ServerProcess, free_port

POLICY = ("--kv-policy", "vlcache", "--kv-budget", "0.1")
BUNDLED = Path(__file__).parents[2] / "models/tinyvlm/grounded"
FLAGS: dict[str, tuple[str, ...]] = {
    "no prefix cache": ("--disable-radix-cache",),
    "mixed chunks": ("--enable-mixed-chunk",),
    "prefill in one piece": ("--chunked-prefill-size", "-1"),
    "longest prefix first": ("--schedule-policy", "lpm"),
    "heaviest branch first": ("--schedule-policy", "dfs-weight"),
    "longest output first": ("--schedule-policy", "lof"),
    "highest response ratio first": ("--schedule-policy", "hrrn"),
    "two copies": ("--dp-size", "2"),
    "several tokenizers": ("--tokenizer-worker-num", "2"),
    "least frequently used goes first": ("--radix-eviction-policy", "lfu"),
    "several decode steps": ("--num-continuous-decode-steps", "4"),
    "transformers' model": ("--model-impl", "transformers"),
}
UNSHARED = ("no prefix cache", "two copies", "transformers' model")
"""A second question computes its image again, or may; SGLang turns its prefix cache off for images in models of
transformers."""
TOGETHER = (
    *("--enable-mixed-chunk", "--schedule-policy", "dfs-weight", "--radix-eviction-policy", "lfu"),
    *("--num-continuous-decode-steps", "2", "--constrained-json-disable-any-whitespace"),
)
"""Served together in the default run, beside KV events.  SGLang's LoRA needs a GPU."""


def states(server: Any) -> list[dict[str, Any]]:
    """`kv_policy` of each scheduler."""
    return [state["kv_policy"] for state in server.process.server_info()["internal_states"]]


def serves(server: Any, picture: Any, an_ask: Any, shares: bool = True) -> None:
    """Right answers of the full cache, compression of a tenth, books that agree, at several requests at once."""
    server.flush()
    before = sum(state["requests_compressed"] for state in states(server))
    drawn = [picture(8500 + number, 16, 16) for number in range(4)]
    full = [
        an_ask(question.text, (one.image,), {"max_tokens": 8, "custom_params": {"kv_budget": 1.0}})
        for one in drawn
        for question in one.questions[:2]
    ]
    right = [
        question.answer in answer.text
        for question, answer in zip(asked(drawn, 2), server.ask_all(full, 4), strict=True)
    ]
    assert sum(right) >= len(right) - 1, right
    told = {"max_tokens": 8, "return_meta_info": True}
    tenth = server.ask_all([an_ask(one.questions[0].text, (one.image,), told) for one in drawn], 4)
    for answer in tenth:
        assert answer.report["policy"] == "vlcache"
        assert answer.report["ratio"] < 0.2
    again = server.ask(drawn[0].questions[1].text, drawn[0].image, **told)
    if shares:
        assert again.cached_tokens >= 256
    after = states(server)
    assert sum(state["requests_compressed"] for state in after) >= before + 4
    for state in after:
        assert state["policy_failures"] == 0
        assert state["integrity"] == []
        assert state["cells_used"] + state["cells_free"] == state["cells_total"]
    server.flush()
    assert [state["cells_used"] for state in states(server)] == [0] * len(after)
    server.assert_alive()


def asked(drawn: list[Any], number: int) -> list[Any]:
    return [question for one in drawn for question in one.questions[:number]]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag(servers: Any, forked_servers: Any, picture: Any, an_ask: Any, name: str) -> None:
    # Workers of uvicorn are started anew by it, not forked.
    pool = servers if name == "several tokenizers" else forked_servers
    serves(pool.get(*POLICY, *FLAGS[name]), picture, an_ask, shares=name not in UNSHARED)


@pytest.mark.slow
def test_a_prompt_of_vectors_is_left_whole(forked_servers: Any) -> None:
    """Where images lie in it nobody says; the report does."""
    server = forked_servers.get(*POLICY, *FLAGS["no prefix cache"])
    width = json.loads((BUNDLED / "config.json").read_text())["text_config"]["hidden_size"]
    sampling = {"max_new_tokens": 2, "temperature": 0.0}
    body = {"input_embeds": torch.randn(200, width).tolist(), "sampling_params": sampling}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["meta_info"]["kv_compression"] == [{"skipped": "embeds"}]
    assert server.settled()["requests_skipped"]["embeds"] >= 1
    server.assert_alive()


@pytest.mark.slow
def test_a_language_model_beside_an_encoder(picture: Any) -> None:
    """What the encoder has made of an image is compressed like what a server makes itself."""
    common = (
        *("--dtype", "float32", "--max-total-tokens", "16384", "--skip-server-warmup", "--sleep-on-idle"),
        *("--encoder-transfer-backend", "zmq_to_tokenizer"),
    )
    encoder = ServerProcess(BUNDLED, [*common, "--encoder-only"])
    encoder.launch()
    try:
        flags = (*POLICY, *common, "--enable-cache-report", "--language-only", "--encoder-urls", encoder.url)
        with ServerProcess(BUNDLED, flags) as language:
            wait_for_encoder(encoder)
            client, drawn = Client(language.openai_url), picture(8590, 16, 16)
            first, second = (
                client.ask(question.text, drawn.image, max_tokens=4, return_meta_info=True)
                for question in drawn.questions[:2]
            )
            assert (first.report["policy"], first.report["front_tokens"]) == ("vlcache", 4)
            assert first.report["ratio"] < 0.2
            assert second.cached_tokens >= 256
            assert language.kv_policy()["integrity"] == []
    finally:
        encoder.stop()


def wait_for_encoder(encoder: ServerProcess) -> None:
    for _ in range(120):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{encoder.url}/health", timeout=10).status_code == 200:
                return
        assert encoder.running, encoder.log_tail()
        time.sleep(1)
    raise AssertionError(encoder.log_tail())


# -- one server for many ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events() -> int:
    """The port of KV events."""
    return free_port()


@pytest.fixture
def together(forked_servers: Any, events: int) -> Any:
    told = {"publisher": "zmq", "topic": "kv", "endpoint": f"tcp://*:{events}"}
    return forked_servers.get(*POLICY, *TOGETHER, "--kv-events-config", json.dumps(told))


def test_flags_together(together: Any, picture: Any, an_ask: Any) -> None:
    serves(together, picture, an_ask)


@contextlib.contextmanager
def listener(port: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 20000)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        yield socket


def test_kv_events_are_published(together: Any, picture: Any, events: int) -> None:
    with listener(events) as socket, ThreadPoolExecutor(1) as pool:
        heard = pool.submit(socket.recv_multipart)
        for seed in range(8520, 8530):  # a subscriber that has just come may miss the first
            together.ask("red K?", picture(seed, 12, 12).image, max_tokens=1)
            if heard.done():
                break
        assert b"BlockStored" in heard.result()[-1]


def test_json_schema(together: Any, picture: Any) -> None:
    code = {"type": "string", "pattern": "^[A-Z0-9]{4}$"}
    schema = {"type": "object", "properties": {"code": code}, "required": ["code"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "code", "schema": schema}}
    answer = together.ask(
        "What is the code of red K?",
        picture(8511, 16, 16).image,
        max_tokens=64,
        response_format=form,
        return_meta_info=True,
    )
    assert set(json.loads(answer.text)) == {"code"}
    assert answer.report["policy"] == "vlcache"


def test_a_session(together: Any, picture: Any) -> None:
    """Its second turn goes on after the first one's answer."""
    url = together.url
    session = httpx.post(f"{url}/open_session", json={"capacity_of_str_len": 100000}, timeout=60).json()
    image = data_url(picture(8512, 16, 16).image)
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red K?<|im_end|>\n<|im_start|>assistant\n"

    def turn(previous: str | None, **body: Any) -> Any:
        params = {"id": session, "rid": previous, "offset": -1, "replace": False}
        sampling = {"max_new_tokens": 4, "temperature": 0.0}
        reply = httpx.post(
            f"{url}/generate", json={**body, "session_params": params, "sampling_params": sampling}, timeout=60
        )
        assert reply.status_code == 200, reply.text
        return reply.json()["meta_info"]

    first = turn(None, text=text, image_data=[image])
    assert first["kv_compression"][0]["policy"] == "vlcache"
    second = turn(first["id"], text="<|im_end|>\n<|im_start|>user\nblue A?<|im_end|>\n<|im_start|>assistant\n")
    assert second["prompt_tokens"] > first["prompt_tokens"]
    httpx.post(f"{url}/close_session", json={"session_id": session}, timeout=60)
    together.flush()
    assert together.settled()["cells_used"] == 0
    together.assert_alive()
