"""Questions with images to an OpenAI-compatible server, and answers as plain records."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpx
import openai
from PIL import Image

Message = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One answer to a question."""

    text: str
    finish_reason: str | None
    tokens: tuple[str, ...] = ()
    """Texts of the tokens; only when log probabilities were asked for."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithm of each token's probability."""
    report: Mapping[str, Any] | None = None
    """What was done to the prompt, `meta_info.kv_compression`; only when `return_meta_info` was asked for."""


@dataclass(frozen=True)
class Answer:
    """What a server said to one request, and what it counted."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int | None
    """Prompt tokens that came from the prefix cache; None: the server did not say."""
    completion_tokens: int
    """Over all choices."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def report(self) -> Mapping[str, Any]:
        """What the server did to the prompt; empty when it did not say."""
        return self.choices[0].report or {}

    @property
    def new_tokens(self) -> int | None:
        """Prompt tokens that this request computed itself; None: the server did not say."""
        return None if self.cached_tokens is None else self.prompt_tokens - self.cached_tokens


def data_url(image: Image.Image) -> str:
    """The image inside a URL, as lossless PNG: the model sees every pixel as drawn."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user_says(text: str, *images: Image.Image | str) -> Message:
    """A user's turn: the images (or their URLs), then the text."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def model_says(text: str) -> Message:
    """An answer, as a turn of the conversation."""
    return {"role": "assistant", "content": text}


def said(error: Exception) -> str:
    """What a server said when it refused a request; other errors as they are."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, Mapping) else None
    return str(message or error)


class Client:
    """Greedy questions to one server.  Threads may share it.

    Args:
        http: sends them; where the server's certificate is not everybody's.
    """

    def __init__(
        self, openai_url: str, timeout_s: float = 300.0, *, key: str | None = None, http: httpx.Client | None = None
    ) -> None:
        # No retries: a request that fails must be seen to fail.
        self.openai = openai.OpenAI(
            base_url=openai_url, api_key=key or "none", timeout=timeout_s, max_retries=0, http_client=http
        )

    def ask(
        self,
        turns: str | Message | Sequence[Message],
        *images: Image.Image | str,
        max_tokens: int = 8,
        n: int = 1,
        stream: bool = False,
        logprobs: bool = False,
        stop: Sequence[str] = (),
        **extra: Any,
    ) -> Answer:
        """Answer a conversation greedily.

        Args:
            turns: a question, which `images` precede, or the turns of a conversation.
            stream: read the answer as a stream; the result is the same record.
            extra: further fields of the request's body, SGLang's own included.
        """
        if isinstance(turns, str):
            turns = user_says(turns, *images)
        messages = [turns] if isinstance(turns, dict) else list(turns)
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0, "n": n, "logprobs": logprobs}
        if stop:
            body["stop"] = list(stop)
        request = {"model": "default", "messages": messages, **body, "extra_body": extra}
        return self._streamed(request) if stream else self._whole(request)

    def _whole(self, request: dict[str, Any]) -> Answer:
        reply = self.openai.chat.completions.create(**request)
        choices: list[Choice] = []
        cached: list[int] = []
        for choice in sorted(reply.choices, key=lambda choice: choice.index):
            scored = (choice.logprobs.content if choice.logprobs else None) or []
            tokens, logprobs = tuple(t.token for t in scored), tuple(t.logprob for t in scored)
            meta = (choice.model_extra or {}).get("meta_info") or {}
            cached += [meta["cached_tokens"]] if "cached_tokens" in meta else []
            reports = meta.get("kv_compression") or [None]
            choices.append(Choice(choice.message.content or "", choice.finish_reason, tokens, logprobs, reports[0]))
        return _answer(choices, reply.usage, sum(cached) if cached else None)

    def _streamed(self, request: dict[str, Any]) -> Answer:
        parts: dict[int, dict[str, Any]] = {}
        usage = None
        for chunk in self.openai.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                part = parts.setdefault(choice.index, {"text": "", "finish": None, "tokens": [], "logprobs": []})
                part["text"] += choice.delta.content or ""
                part["finish"] = choice.finish_reason or part["finish"]
                for scored in (choice.logprobs.content if choice.logprobs else None) or []:
                    part["tokens"].append(scored.token)
                    part["logprobs"].append(scored.logprob)
        choices = [
            Choice(part["text"], part["finish"], tuple(part["tokens"]), tuple(part["logprobs"]))
            for _, part in sorted(parts.items())
        ]
        return _answer(choices, usage)


def _answer(choices: Sequence[Choice], usage: Any, cached: int | None = None) -> Answer:
    """`cached` is what the choices' metadata said; a server with --enable-cache-report says it in `usage` too."""
    details = getattr(usage, "prompt_tokens_details", None)
    if cached is None and details is not None:
        cached = cast(int, details.cached_tokens or 0)
    return Answer(tuple(choices), usage.prompt_tokens, cached, usage.completion_tokens)
