"""The process that reads requests: what is not understood is answered with a 400 before a stream begins.

SGLang sends the head of a stream's response before its scheduler has seen the request, so the scheduler can only put an
error into the stream.  What it checks is therefore checked here as well, by the same code.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import torch

from vlcache_sgl.api import Prompt
from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.config import ConfigError, KVConfig
from vlcache_sgl.policy import PolicyError
from vlcache_sgl.policy.choice import Choice, Choices
from vlcache_sgl.policy.custom_params import RequestParams, misplaced
from vlcache_sgl.sglang_hooks.facades import ModelConfig, SamplingParams, TokenizedRequest
from vlcache_sgl.sglang_hooks.kv_layers import kv_layers

NAMESPACE = "|kv:"
"""Begins what is appended to the radix key of a compressed request: a policy's fingerprint follows."""

_HANDED_ON: ContextVar[dict[str, Any] | None] = ContextVar("custom_params", default=None)
"""`custom_params` of the request that is being read, where SGLang's endpoint does not read them."""


def read_request(
    choices: Choices, sampling_params: SamplingParams, *, extra_key: str | None, length: int, stream: bool
) -> tuple[RequestParams, Choice]:
    """What a request asks for, and what serves it.

    Args:
        sampling_params: SGLang's.
        length: tokens of the prompt.

    Raises:
        ConfigError, PolicyError: it cannot be served; the message is for the client.
    """
    if (sampling_params.beam_width or 1) > 1:
        raise ConfigError("beam search is not supported with --kv-policy: beams exchange their KV rows")
    if NAMESPACE in (extra_key or ""):
        # It would meet prefixes that are compressed in another way, or not at all.
        raise ConfigError(f"extra_key must not contain {NAMESPACE!r}: that is the server's to append")
    params = RequestParams.read(sampling_params.custom_params)
    choice = choices.select(params, length)
    if params.report == "attention" and stream:
        raise ConfigError("kv_report attention is known at the end of the answer: ask without stream")
    return params, choice


class Gate:
    """Checks requests on their way to the scheduler.

    Args:
        config: the server's settings.
        model_config: SGLang's description of the model.
        ranks: over which attention heads are divided.
    """

    def __init__(self, config: KVConfig, model_config: ModelConfig, ranks: int) -> None:
        self._choices = Choices(config)
        model = Prompt(
            length=0,
            start=0,
            vision=(),
            num_layers=len(kv_layers(model_config)),
            num_heads=int(model_config.num_attention_heads),
            num_kv_heads=int(model_config.get_total_num_kv_heads()),
            head_dim=int(model_config.head_dim),
            device=torch.device("cpu"),
            # Whether the model's own is known only the scheduler can tell, which has the model.
            rotary=PlainRotary(),
        )
        self._choices.serve(model, ranks)

    def check(self, tokenized: TokenizedRequest, *_: Any, **__: Any) -> None:
        """After SGLang has tokenized a request: an error here is its 400."""
        read_request(
            self._choices,
            tokenized.sampling_params,
            extra_key=tokenized.extra_key,
            length=len(tokenized.input_ids or ()),
            stream=tokenized.stream,
        )

    async def hand_on(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Around an endpoint that was given ``(..., request, raw_request)`` and does not read `custom_params`.

        They are checked here as far as that needs no prompt, and reach the scheduler with the request.
        """
        from fastapi import HTTPException

        request, raw_request = arguments[-2:]
        if raw_request is None:  # SGLang asks itself
            return await original(*arguments, **options)
        body = await raw_request.json()
        params = body.get("custom_params")
        problem = misplaced(body, request, reads=True)
        try:
            self._choices.select(RequestParams.read(params), None)
        except (ConfigError, PolicyError) as error:
            problem = problem or str(error)
        if problem:
            raise HTTPException(400, problem)
        token = _HANDED_ON.set(params)
        try:
            return await original(*arguments, **options)
        finally:
            _HANDED_ON.reset(token)


def into_chat_request(chat_request: Any, *_: Any, **__: Any) -> None:
    """After SGLang has turned a request of another API into one of its own."""
    if (params := _HANDED_ON.get()) is not None:
        chat_request.custom_params = params


def into_sampling_params(params: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
    """After SGLang has read the sampling parameters of a request of another API."""
    return params if _HANDED_ON.get() is None else {**params, "custom_params": _HANDED_ON.get()}


async def refuse_misplaced(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Around an endpoint that was given ``(..., request, raw_request)``: nothing that is meant for us is ignored."""
    from fastapi import HTTPException

    request, raw_request = arguments[-2:]
    # SGLang's endpoints have parsed the body before: this is the same object again.
    if raw_request is not None and (problem := misplaced(await raw_request.json(), request)):
        raise HTTPException(400, problem)
    return await original(*arguments, **options)


async def serve_generate(original: Callable[..., Any], request: Any, raw_request: Any) -> Any:
    """Around `/generate`: the same, and a stream that begins with an error is that error, with its status.

    SGLang does so on its OpenAI endpoints: it waits for the first chunk before it sends the head of the response.
    """
    from fastapi.responses import JSONResponse, StreamingResponse

    response = await refuse_misplaced(original, request, raw_request)
    if not isinstance(response, StreamingResponse):
        return response
    chunks = aiter(response.body_iterator)
    first: Any = await anext(chunks, b"")
    if first.startswith(b'data: {"error":'):
        error = json.loads(first.removeprefix(b"data: "))
        return JSONResponse(error, status_code=int(error["error"]["code"]))

    async def all_chunks() -> AsyncIterator[Any]:
        yield first
        async for chunk in chunks:
            yield chunk

    response.body_iterator = all_chunks()
    return response


def count_placeholders(original: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    """Around the model's own image processor, which stops iterating where a text has more placeholders than images.

    Nothing can await a StopIteration: the request would never be answered.
    """
    try:
        return original(*arguments, **options)
    except StopIteration as error:
        raise ValueError(
            "the prompt has more placeholders for images or videos than there are images or videos"
        ) from error
