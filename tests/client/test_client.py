"""What a client makes of a server's replies; the server is real in tests/e2e."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from vlcache_sgl.client.client import Answer, Client


def answer(monkeypatch: pytest.MonkeyPatch, usage: dict[str, Any], *metas: dict[str, Any] | None) -> Answer:
    """Of a reply with such a usage, and a choice per metadata."""
    choices = []
    for index, meta in enumerate(metas):
        message = {"role": "assistant", "content": "a"}
        choices.append({"index": index, "finish_reason": "stop", "message": message})
        if meta is not None:
            choices[-1]["meta_info"] = meta
    counts = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101, **usage}
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    reply = ChatCompletion.model_validate({**head, "choices": choices, "usage": counts})
    client = Client("http://127.0.0.1:9/v1")
    monkeypatch.setattr(client.openai.chat.completions, "create", lambda **_: reply)
    return client.ask("q?")


@pytest.mark.parametrize(
    ("usage", "metas", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 40}}, (None,), 40),
        ({"prompt_tokens_details": {}}, (None,), 0),
        ({}, ({"cached_tokens": 40},), 40),  # a server without --enable-cache-report says it here
        ({}, ({"cached_tokens": 40}, {"cached_tokens": 90}), 130),
        ({}, (None,), None),
        ({}, ({},), None),
    ],
)
def test_cached_tokens_come_from_what_the_reply_has(
    monkeypatch: pytest.MonkeyPatch, usage: Any, metas: Any, cached: int | None
) -> None:
    found = answer(monkeypatch, usage, *metas)
    assert found.cached_tokens == cached
    assert found.new_tokens == (None if cached is None else 100 - cached)
