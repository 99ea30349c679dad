"""What requests find of each other: the text in front of images, images of the same patches, their own prompt."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vlcache_sgl.client.client import data_url

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\n" + "Read the code next to the label that is asked for. " * 6 + "<|im_end|>\n"


CELL = 28
"""Pixels of the side of one token."""


def prompt(question: str, system: str = "", images: int = 1) -> str:
    return f"{system}<|im_start|>user\n{IMAGE * images}{question}<|im_end|>\n<|im_start|>assistant\n"


def rearranged(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """The same tokens row by row on a grid of another shape: a processor gives the same patches in the same order."""
    high, wide = image.height // CELL, image.width // CELL
    cells = np.asarray(image).reshape(high, CELL, wide, CELL, 3).swapaxes(1, 2).reshape(rows, columns, CELL, CELL, 3)
    return Image.fromarray(cells.swapaxes(1, 2).reshape(rows * CELL, columns * CELL, 3))


def generate(server: Any, text: str, *images: Image.Image, tokens: int = 1, **more: Any) -> dict[str, Any]:
    """The whole answer; `more` may have `params`, the request's `custom_params`."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, **more.pop("sampling", {})}
    sampling["custom_params"] = more.pop("params", None)
    body = {"text": text, "image_data": [*map(data_url, images)], "sampling_params": sampling, **more}
    answer: dict[str, Any] = httpx.post(f"{server.url}/generate", json=body, timeout=120).raise_for_status().json()
    return answer


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = answer["meta_info"]["kv_compression"][0]
    return report


POLICY: dict[str, Any] = {"kv_share": "policy"}
"""What others find is what the first request's policy kept."""


def test_the_text_in_front_of_an_image_is_whole_for_the_next_image(ours_tenth: Any, picture: Any) -> None:
    """An image that nobody has asked about answers as if it were alone: its rows see all of the system prompt."""
    ours_tenth.flush()
    for number in range(4):
        drawn = picture(8500 + number, 16, 16)
        text = prompt(drawn.questions[0].text, SYSTEM)
        options = {"params": {**POLICY, "kv_report": "positions"}, "return_logprob": True}
        shared = generate(ours_tenth, text, drawn.image, **options)
        alone = generate(ours_tenth, text, drawn.image, cache_salt=str(number), **options)
        cached, report = shared["meta_info"]["cached_tokens"], report_of(shared)
        front = report["vision"][0]["begin"]
        assert number == 0 or cached == front
        assert all(positions[:front] == list(range(front)) for positions in report["kept_positions"])
        assert report["shared_tokens"] + report["front_tokens"] == front
        assert shared["meta_info"]["output_token_logprobs"][0][1] == alone["meta_info"]["output_token_logprobs"][0][1]
        assert shared["meta_info"]["output_token_logprobs"][0][0] == pytest.approx(
            alone["meta_info"]["output_token_logprobs"][0][0], abs=1e-3
        )


@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_the_same_patches_in_another_arrangement_are_another_image(
    ours_tenth: Any, picture: Any, budget: float
) -> None:
    """SGLang names an image by its patches; an image of other rows and columns would be answered from its keys."""
    drawn, options = picture(8540, 16, 20), {"params": {"kv_budget": budget}, "tokens": 6, "return_logprob": True}
    text, other = prompt(drawn.questions[0].text), rearranged(drawn.image, 20, 16)
    assert drawn.image.size == other.size[::-1]
    ours_tenth.flush()
    generate(ours_tenth, text, other, **options)
    after = generate(ours_tenth, text, drawn.image, **options)
    alone = generate(ours_tenth, text, drawn.image, **options, cache_salt="alone")
    assert after["meta_info"]["cached_tokens"] < 16
    assert after["text"] == alone["text"] == drawn.questions[0].answer
    log, log_alone = ([token[0] for token in one["meta_info"]["output_token_logprobs"]] for one in (after, alone))
    assert log == pytest.approx(log_alone, abs=1e-3)


def test_a_further_image_finds_the_first(ours_tenth: Any, picture: Any) -> None:
    """What the first image is called depends on itself alone."""
    first, second = picture(8541, 16, 20), rearranged(picture(8541, 16, 20).image, 20, 16)
    ours_tenth.flush()
    generate(ours_tenth, prompt(first.questions[0].text), first.image)
    answer = generate(ours_tenth, prompt(first.questions[1].text, images=2), first.image, second)
    assert 16 * 20 < answer["meta_info"]["cached_tokens"] < 16 * 20 + 16


def test_a_follow_up_reports_what_it_was_served(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(8520, 20, 20)
    ours_tenth.flush()
    generate(ours_tenth, prompt(drawn.questions[0].text), drawn.image, params=POLICY)
    params = {**POLICY, "kv_report": "positions"}
    answer = generate(ours_tenth, prompt(drawn.questions[1].text), drawn.image, params=params)
    report, cached = report_of(answer), answer["meta_info"]["cached_tokens"]
    assert report["shared_tokens"] == cached > 400
    there = [sum(position < cached for position in layer) for layer in report["kept_positions"]]
    assert report["shared_kept_per_layer"] == [round(count / cached, 4) for count in there]
    assert max(report["shared_kept_per_layer"]) < 0.5
    assert report["skipped"] == "short"  # its own tokens


@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_a_retracted_request_reports_and_counts_what_was_done(ours_tenth: Any, picture: Any, budget: float) -> None:
    server, drawn = ours_tenth, picture(8530, 20, 20)
    server.flush()
    text, params = prompt(drawn.questions[0].text), {**POLICY, "kv_budget": budget}
    undisturbed = report_of(generate(server, text, drawn.image, params=params))
    server.flush()
    before, seen, answers = server.settled(), len(server.log), []

    def ask() -> None:
        answers.append(generate(server, text, drawn.image, tokens=400, params=params, sampling={"ignore_eos": True}))

    thread = threading.Thread(target=ask)
    thread.start()
    end = time.monotonic() + 60
    while "Decode batch" not in server.log[seen:] and time.monotonic() < end:
        time.sleep(0.02)
    httpx.post(f"{server.url}/pause_generation", json={"mode": "retract"}, timeout=60).raise_for_status()
    httpx.post(f"{server.url}/continue_generation", json={}, timeout=60).raise_for_status()
    thread.join()
    after = server.settled()
    assert answers[0]["meta_info"]["num_retractions"] == 1
    assert report_of(answers[0]) == undisturbed
    compressed = after["requests_compressed"] - before["requests_compressed"]
    skipped = sum(after["requests_skipped"].values()) - sum(before["requests_skipped"].values())
    assert (compressed, skipped) == ((1, 0) if budget < 1 else (0, 1))
    assert after["prefix_hits"] == before["prefix_hits"]
