"""Calibration: what is asked, what is read from reports, and how it is put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vlcache_sgl.evaluation import calibration
from vlcache_sgl.evaluation.calibration import (
    KINDS,
    CalibrationError,
    Sample,
    Shares,
    calibrate,
    kinds,
    merged,
    page,
    samples,
    shares_of,
    spread,
)

REPORT: dict[str, Any] = {
    "prompt_tokens": 120,
    "shared_tokens": 16,
    "front_tokens": 4,
    "kept_tokens_per_layer": [54.0, 14.0],
    "kept_tokens_per_head": [[75.0, 25.0], [20.0, 0.0]],
}
"""100 tokens that may go: the first layer keeps a half of them, the second a tenth."""


def shares(kind: str, layers: list[float], heads: list[list[float]] | None = None) -> Shares:
    return Shares(kind, np.array(layers), None if heads is None else np.array(heads))


def test_shares_are_those_of_the_tokens_that_could_go() -> None:
    """Neither what the prefix cache had nor the text in front of an image, which all layers keep."""
    found = shares_of(REPORT, "image")
    assert found.kind == "image"
    assert found.layers.tolist() == [0.5, 0.1]
    assert found.heads is not None
    assert found.heads.tolist() == [[0.75, 0.25], [0.2, 0.0]]
    plain = {"prompt_tokens": 200, "kept_tokens_per_layer": [100.0, 20.0]}
    assert shares_of(plain, "text").layers.tolist() == [0.5, 0.1]
    assert shares_of(plain, "text").heads is None


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"skipped": "short"}, "short"),
        ({"failed": "no room"}, "no room"),
        ({}, "it reports no compression"),
    ],
)
def test_a_prompt_that_was_not_compressed_says_why(report: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(CalibrationError, match=f"did not compress a prompt of kind text: {reason}"):
        shares_of(report, "text")


def test_kinds_count_alike() -> None:
    texts = [shares("text", [0.2, 0.4], [[0.1, 0.3], [0.4, 0.4]])] * 3
    images = [shares("image", [0.6, 0.0], [[0.6, 0.6], [0.0, 0.0]])]
    weights = merged([*texts, *images], "key", 12.34)
    assert weights.layers == (0.4, 0.2)
    assert weights.heads == ((0.35, 0.45), (0.2, 0.2))
    assert weights.model == "key"
    assert weights.measured["prompts"] == {"image": 1, "text": 3}
    assert (weights.measured["spread"], weights.measured["seconds"]) == (0.0, 12.3)


def test_heads_are_there_only_if_all_prompts_have_them() -> None:
    found = [shares("text", [0.5], [[0.5]]), shares("text", [0.5])]
    assert merged(found, "", 0.0).heads == ()


def test_the_spread_is_that_between_prompts_of_a_kind() -> None:
    found = [shares("text", [0.2, 0.5]), shares("text", [0.4, 0.5]), shares("image", [0.9, 0.9])]
    assert spread(found) == pytest.approx(0.05)
    assert spread(found[2:]) == 0.0


def test_what_a_server_compresses() -> None:
    assert kinds("all", reads_images=True) == KINDS
    assert kinds("vision", reads_images=True) == ("image",)
    assert kinds("all", reads_images=False) == ("text",)
    with pytest.raises(CalibrationError, match="reads no images"):
        kinds("vision", reads_images=False)


def test_samples_are_the_same_everywhere() -> None:
    once, again = list(samples(2, KINDS)), list(samples(2, KINDS))
    assert [sample.kind for sample in once] == ["text", "image"] * 2
    assert [sample.text for sample in once] == [sample.text for sample in again]
    assert [image.tobytes() for s in once for image in s.images] == [i.tobytes() for s in again for i in s.images]
    assert len({sample.text for sample in once if sample.kind == "text"}) == 2
    assert [sample.kind for sample in samples(1, ["image"])] == ["image"]


def test_a_page_holds_the_whole_text() -> None:
    """Ink on its last line, none on its border."""
    for sample in samples(calibration.PROMPTS, ["text"]):
        ink = np.asarray(page(sample.text.partition("\n\nWhat is this")[0]).convert("L")) < 128
        assert not ink[:, -4:].any()
        assert not ink[-4:].any()
        rows = np.flatnonzero(ink.any(1))
        assert rows[-1] > 0.6 * calibration.PAGE_PIXELS, "most of the page is used"


def test_prompts_are_asked_apart_and_noted() -> None:
    bodies: list[Mapping[str, Any]] = []
    noted: list[Shares] = []

    def ask(text: str, images: Any, body: Mapping[str, Any]) -> Mapping[str, Any]:
        bodies.append(body)
        return REPORT

    weights = calibrate(ask, [Sample("a"), Sample("b")], "key", lambda found, seconds: noted.append(found))
    assert weights.layers == (0.5, 0.1)
    assert len(noted) == 2
    assert len({body["cache_salt"] for body in bodies}) == 2
    assert all(body["custom_params"]["kv_policy"] == "kvzip" for body in bodies)
    with pytest.raises(CalibrationError, match="no prompts"):
        calibrate(ask, [], "key")


def test_a_note_may_end_it() -> None:
    asked = []

    def ask(text: str, images: Any, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(text)
        return REPORT

    def note(found: Shares, seconds: float) -> None:
        raise CalibrationError("takes too long")

    with pytest.raises(CalibrationError, match="takes too long"):
        calibrate(ask, [Sample("a"), Sample("b")], "key", note)
    assert asked == ["a"]
