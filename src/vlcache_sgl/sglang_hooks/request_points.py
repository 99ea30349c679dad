"""Every place of SGLang that --kv-policy replaces in the process that reads requests.  A test resolves all of them."""

from __future__ import annotations

import struct

from PIL import Image

from vlcache_sgl.sglang_hooks import background_calibration
from vlcache_sgl.sglang_hooks.gate import (
    Gate,
    count_placeholders,
    into_chat_request,
    into_sampling_params,
    refuse_misplaced,
    serve_generate,
)
from vlcache_sgl.sglang_hooks.patching import PatchPoint

_ENTRYPOINTS = "sglang.srt.entrypoints"
_PROCESSORS = "sglang.srt.multimodal.processors"

UNREADABLE_MEDIA = (OSError, EOFError, struct.error, Image.DecompressionBombError)
"""What opening a client's image may raise besides SGLang's own list: no such file, cut off, absurdly large."""


def _client_errors(known: tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    return (*known, *UNREADABLE_MEDIA)


MEDIA_POINTS = (
    *(
        PatchPoint(
            f"{_PROCESSORS}.{module}:CLIENT_MEDIA_EXCEPTIONS",
            "replace",
            _client_errors,
            "answering unreadable images with a 400 instead of a 500",
        )
        for module in ("base_processor", "llava")
    ),
    PatchPoint(
        f"{_PROCESSORS}.base_processor:BaseMultimodalProcessor._process_and_collect_mm_items",
        "around",
        count_placeholders,
        "answering placeholders without an image with a 400",
    ),
)
"""How the process that reads requests reads images."""

_IGNORED = "a 400 for what endpoints would ignore"
HTTP_POINTS = (
    PatchPoint(f"{_ENTRYPOINTS}.http_server:serve_generate_request", "around", serve_generate, _IGNORED),
    PatchPoint(
        f"{_ENTRYPOINTS}.http_server:_wait_and_warmup",
        "after",
        background_calibration.start,
        "measuring what layers and heads of a model need on its first start",
    ),
    PatchPoint(
        f"{_ENTRYPOINTS}.openai.serving_base:OpenAIServingBase.handle_request", "around", refuse_misplaced, _IGNORED
    ),
)
"""What it does as an HTTP server; not in `sgl.Engine`."""


def gate_points(gate: Gate) -> list[PatchPoint]:
    """Where requests pass on their way to the scheduler."""
    return [
        PatchPoint(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
            "after",
            gate.check,
            "refusing what cannot be served before a stream begins",
        )
    ]


def gate_http_points(gate: Gate) -> list[PatchPoint]:
    """Endpoints of other APIs, which do not read `custom_params`; not in `sgl.Engine`."""
    why = "custom_params on endpoints that do not read them"
    return [
        *(
            PatchPoint(f"{_ENTRYPOINTS}.{target}", "around", gate.hand_on, why)
            for target in (
                "openai.serving_responses:OpenAIServingResponses.create_responses",
                "anthropic.serving:AnthropicServing.handle_messages",
                "ollama.serving:OllamaServing.handle_chat",
                "ollama.serving:OllamaServing.handle_generate",
            )
        ),
        PatchPoint(
            f"{_ENTRYPOINTS}.anthropic.serving:AnthropicServing._convert_to_chat_completion_request",
            "after",
            into_chat_request,
            why,
        ),
        *(
            PatchPoint(f"{_ENTRYPOINTS}.{target}", "after", into_sampling_params, why)
            for target in (
                "openai.protocol:ResponsesRequest.to_sampling_params",
                "ollama.serving:OllamaServing._convert_options_to_sampling_params",
            )
        ),
    ]
