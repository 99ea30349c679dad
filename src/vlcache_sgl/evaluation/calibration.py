"""Measures what each layer and KV head of a model needs, without labels: KVzip divides its budget, we look how.

Generic prompts are compressed by the policy ``kvzip`` (arXiv 2505.23416), which ranks the tokens of all layers and
heads by what the model looks at while it reads the prompt a second time.  The share of its tokens that a layer or head
keeps is its weight.  How stable that is over prompts and kinds of prompts is in docs/calibrate.md.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
from PIL import Image, ImageDraw, ImageFont

from vlcache_sgl.client.client import Client, said
from vlcache_sgl.evaluation.tasks import reading
from vlcache_sgl.weights import ModelWeights

POLICY = "kvzip"
BUDGET = 0.3
"""Where layers differ most: at larger budgets all keep much, at smaller ones the needy keep little as well."""
PROMPTS = 6
"""Prompts of each kind: the weights of two halves of so many agree within 0.01 on a pretrained model."""
TOKENS = 400
PAGE_PIXELS, PAGE_LINE, PAGE_COLUMNS = 448, 14, 70
"""Side of an image of a text, height of its lines and their characters."""
DECIMALS = 4
KINDS = ("text", "image")
"""Kinds of prompts."""

Ask = Callable[[str, Sequence[Image.Image], Mapping[str, Any]], Mapping[str, Any]]
"""Sends a prompt of a text and images with fields for the request's body; the report of its compression."""


class CalibrationError(RuntimeError):
    """The model could not be measured; the message is one line for the user."""


@dataclass(frozen=True)
class Sample:
    """One generic prompt."""

    text: str
    images: tuple[Image.Image, ...] = ()

    @property
    def kind(self) -> str:
        return "image" if self.images else "text"


@dataclass(frozen=True)
class Shares:
    """What one prompt's layers and heads kept of their tokens, in [0, 1]."""

    kind: str
    layers: np.ndarray
    """`[L]` float64."""
    heads: np.ndarray | None
    """`[L, K]` float64; None where the server keeps one set for all heads."""


def kinds(scope: str, reads_images: bool) -> tuple[str, ...]:
    """Those of `KINDS` that a server compresses.

    Args:
        scope: its ``--kv-scope``.
        reads_images: whether the model does.

    Raises:
        CalibrationError: there are none.
    """
    found = tuple(kind for kind, used in zip(KINDS, (scope == "all", reads_images), strict=True) if used)
    if not found:
        raise CalibrationError("the model reads no images, and the server compresses no texts (--kv-scope all)")
    return found


def asker(client: Client) -> Ask:
    """How a server is asked over its public API."""

    def ask(text: str, images: Sequence[Image.Image], body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer = client.ask(text, *images, max_tokens=1, return_meta_info=True, **body)
        except openai.OpenAIError as error:
            raise CalibrationError(f"the server did not answer a prompt: {said(error)}") from error
        return answer.report

    return ask


def samples(count: int, asked: Sequence[str]) -> Iterator[Sample]:
    """The bundled prompts, the same on every machine: everyday prose with a few facts, as texts and as pages.

    Args:
        count: of each kind.
        asked: which of `KINDS`.
    """
    for seed in range(count):
        text = reading.make_document("several", TOKENS, seed).text
        if "text" in asked:
            yield Sample(f"{text}\n\nWhat is this text about?")
        if "image" in asked:
            yield Sample("What does this page say?", (page(text),))


def page(text: str) -> Image.Image:
    """A text as black letters on a white square, as much of it as fits."""
    image = Image.new("RGB", (PAGE_PIXELS, PAGE_PIXELS), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(PAGE_LINE - 3)
    lines: list[str] = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= PAGE_COLUMNS:
            lines.append("")
        lines[-1] += f"{word} "
    for number, line in enumerate(lines):
        draw.text((4, 4 + number * PAGE_LINE), line, fill="black", font=font)
    return image


def calibrate(
    ask: Ask, prompts: Sequence[Sample], model: str, note: Callable[[Shares, float], None] | None = None
) -> ModelWeights:
    """Measure a model over prompts; kinds count alike, however many prompts each has.

    Args:
        model: `model_key` of what is served.
        note: told of every prompt, with the seconds that it took.

    Raises:
        CalibrationError: the server did not read a prompt twice, or answered something else.
    """
    if not prompts:
        raise CalibrationError("no prompts to calibrate with")
    started, found = time.monotonic(), []
    for sample in prompts:
        began = time.monotonic()
        body = {
            # Not shared: a server that makes copies for all questions would refuse the policy.
            "custom_params": {"kv_policy": POLICY, "kv_budget": BUDGET, "kv_share": "off"},
            "cache_salt": uuid.uuid4().hex,  # what an earlier calibration has left must not be found
        }
        found.append(shares_of(ask(sample.text, sample.images, body), sample.kind))
        if note is not None:
            note(found[-1], time.monotonic() - began)
    return merged(found, model, time.monotonic() - started)


def shares_of(report: Mapping[str, Any], kind: str) -> Shares:
    """What a compressed prompt's report says about its layers and heads.

    Raises:
        CalibrationError: the prompt was not compressed.
    """
    kept = report.get("kept_tokens_per_layer")
    if kept is None:
        reason = report.get("failed") or report.get("skipped") or "it reports no compression"
        raise CalibrationError(f"the server did not compress a prompt of kind {kind}: {reason}")
    front = report.get("front_tokens", 0)
    owned = report["prompt_tokens"] - report.get("shared_tokens", 0) - front
    heads = report.get("kept_tokens_per_head")
    return Shares(
        kind,
        (np.array(kept, dtype=np.float64) - front) / owned,
        None if heads is None else np.array(heads, dtype=np.float64) / owned,
    )


def merged(found: Sequence[Shares], model: str, seconds: float) -> ModelWeights:
    """The mean over prompts of each kind, then over kinds."""
    layers = _mean([(one.kind, one.layers) for one in found])
    heads = [(one.kind, one.heads) for one in found if one.heads is not None]
    measured = {
        "policy": POLICY,
        "budget": BUDGET,
        "prompts": {kind: sum(one.kind == kind for one in found) for kind in sorted({one.kind for one in found})},
        "spread": round(spread(found), DECIMALS),
        "seconds": round(seconds, 1),
    }
    return ModelWeights(
        tuple(np.round(layers, DECIMALS).tolist()),
        tuple(tuple(layer) for layer in np.round(_mean(heads), DECIMALS).tolist()) if len(heads) == len(found) else (),
        model,
        measured,
    )


def spread(found: Sequence[Shares]) -> float:
    """How much a layer's share differs between prompts of one kind: standard deviation, mean over layers."""
    kinds = {one.kind for one in found}
    return max(float(np.std([one.layers for one in found if one.kind == kind], axis=0).mean()) for kind in kinds)


def _mean(values: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    kinds = sorted({kind for kind, _ in values})
    means = np.stack([np.stack([value for of, value in values if of == kind]).mean(0) for kind in kinds])
    return np.asarray(means.mean(0), dtype=np.float64)
