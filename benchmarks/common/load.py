"""Requests with many images to `/generate`, sent at one moment, timed by the token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from vlcache_sgl.client.client import data_url
from vlcache_sgl.evaluation.tasks.receipts import CELL, make_receipt

SIDE = 16
"""Images are 16 x 16 cells: 256 image tokens and two that delimit them."""
IMAGE_TOKENS = SIDE * SIDE + 2
TEXT_TOKENS = 48
"""About what question and chat template need."""
WORDS = (" red", " green", " cyan", " purple", " pink", " orange", " blue", " brown")
"""One token each in the bundled tokenizer."""
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Prompt:
    """A user's turn with images, as `/generate` takes it."""

    text: str
    image_data: tuple[str, ...]

    def body(self, tokens: int, **sampling: Any) -> dict[str, Any]:
        """The request for exactly `tokens` greedy tokens, streamed; `sampling` adds to SGLang's parameters."""
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True, **sampling}
        images = list(self.image_data)
        return {"text": self.text, "image_data": images, "sampling_params": sampling, "stream": True}


@dataclass
class Timeline:
    """When one request's tokens arrived."""

    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Seconds of `time.perf_counter`, tokens so far."""
    text: str = ""
    """The answer."""
    meta: dict[str, Any] = field(default_factory=dict)
    """SGLang's `meta_info` of the last message."""

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals[0][0] - self.sent) * 1e3

    def tokens_until(self, moment: float) -> int:
        return max((count for at, count in self.arrivals if at <= moment), default=0)


def make_prompt(tokens: int, seed: int) -> Prompt:
    """About `tokens` prompt tokens of distinct images and a question; another seed shares none of the images.

    An image is drawn once and then shifted by whole cells, around its edges: drawing 31 would take seconds.
    """
    count = max(1, (tokens - TEXT_TOKENS) // IMAGE_TOKENS)
    drawn = make_receipt(seed, SIDE, SIDE, num_questions=1)
    pixels = np.asarray(drawn.image)
    shifts = [(CELL * (i // SIDE), CELL * (i % SIDE)) for i in range(count)]
    images = [data_url(Image.fromarray(np.roll(pixels, shift, axis=(0, 1)))) for shift in shifts]
    text = f"<|im_start|>user\n{PLACE * count}{drawn.questions[0].text}<|im_end|>\n<|im_start|>assistant\n"
    return Prompt(text, tuple(images))


def make_long_prompt(tokens: int, seed: int) -> Prompt:
    """About `tokens` prompt tokens: an image, words, then another image and a question.

    What lies in front of the first image is never evicted, and what follows the last one scores: few query rows meet
    many keys.  128k tokens of images would be gigabytes of pixels to unpack, which is not what is measured.
    """
    two = make_prompt(2 * IMAGE_TOKENS + TEXT_TOKENS, seed)
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS, max(0, tokens - 2 * IMAGE_TOKENS - TEXT_TOKENS))
    return Prompt(two.text.replace(PLACE, PLACE + "".join(words), 1), two.image_data)


def stream(http: httpx.Client, url: str, payload: str) -> Timeline:
    """Send one request, made into JSON beforehand, and read its answer to the end."""
    line = Timeline(sent=time.perf_counter())
    headers = {"Content-Type": "application/json"}
    with http.stream("POST", f"{url}/generate", content=payload, headers=headers) as reply:
        reply.raise_for_status()
        for text in reply.iter_lines():
            if not text.startswith("data: {"):
                continue
            message = json.loads(text.removeprefix("data: "))
            if "error" in message:
                raise RuntimeError(message["error"])
            line.text, line.meta = message["text"], message["meta_info"]
            line.arrivals.append((time.perf_counter(), int(line.meta["completion_tokens"])))
    return line


def send_together(url: str, prompts: Sequence[Prompt], tokens: int, timeout_s: float = 1800.0) -> list[Timeline]:
    """All prompts at the same moment; returns when all are answered."""
    gate = threading.Barrier(len(prompts))

    def send(prompt: Prompt) -> Timeline:
        payload = json.dumps(prompt.body(tokens))
        with httpx.Client(timeout=timeout_s) as http:
            gate.wait()
            return stream(http, url, payload)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(send, prompts))


def decode_tokens_per_s(lines: Sequence[Timeline]) -> float:
    """Tokens of all requests per second, between the last first token and the first last token.

    In that window the whole batch decodes and nothing is prefilled.
    """
    begin = max(line.arrivals[0][0] for line in lines)
    end = min(line.arrivals[-1][0] for line in lines)
    count = sum(line.tokens_until(end) - line.tokens_until(begin) for line in lines)
    if end <= begin or count < len(lines):
        raise RuntimeError("the requests did not decode together: ask for more tokens")
    return count / (end - begin)


def prefill_ms(lines: Sequence[Timeline]) -> float:
    """From the first forward of the batch to the end of its last prefill, by the server's clock."""
    begin = min(float(line.meta["forward_entry_time"]) for line in lines)
    end = max(float(line.meta["prefill_finished_time"]) for line in lines)
    return (end - begin) * 1e3
