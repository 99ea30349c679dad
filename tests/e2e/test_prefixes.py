"""What requests find of each other: the text in front of images, images of the same patches, their own prompt."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from vlcache_sgl.client.client import data_url

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\n" + "Read the code next to the label that is asked for. " * 6 + "<|im_end|>\n"


def prompt(question: str, system: str = "") -> str:
    return f"{system}<|im_start|>user\n{IMAGE}{question}<|im_end|>\n<|im_start|>assistant\n"


def generate(server: Any, text: str, image: Image.Image, tokens: int = 1, **more: Any) -> dict[str, Any]:
    """The whole answer; `more` may have `params`, the request's `custom_params`."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, **more.pop("sampling", {})}
    sampling["custom_params"] = more.pop("params", None)
    body = {"text": text, "image_data": [data_url(image)], "sampling_params": sampling, **more}
    answer: dict[str, Any] = httpx.post(f"{server.url}/generate", json=body, timeout=120).raise_for_status().json()
    return answer


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = answer["meta_info"]["kv_compression"][0]
    return report


def test_the_text_in_front_of_an_image_is_whole_for_the_next_image(ours_tenth: Any, picture: Any) -> None:
    """An image that nobody has asked about answers as if it were alone: its rows see all of the system prompt."""
    ours_tenth.flush()
    for number in range(4):
        drawn = picture(8500 + number, 16, 16)
        text = prompt(drawn.questions[0].text, SYSTEM)
        options = {"params": {"kv_report": "positions"}, "return_logprob": True}
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


def test_a_follow_up_reports_what_it_was_served(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(8520, 20, 20)
    ours_tenth.flush()
    generate(ours_tenth, prompt(drawn.questions[0].text), drawn.image)
    answer = generate(ours_tenth, prompt(drawn.questions[1].text), drawn.image, params={"kv_report": "positions"})
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
    text, params = prompt(drawn.questions[0].text), {"kv_budget": budget}
    undisturbed = report_of(generate(server, text, drawn.image, params=params))
    server.flush()
    before, seen, answers = server.settled(), len(server.log), []

    def ask() -> None:
        answers.append(generate(server, text, drawn.image, 400, params=params, sampling={"ignore_eos": True}))

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
