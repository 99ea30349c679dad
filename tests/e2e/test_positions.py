"""`kv_report: positions`: which tokens each layer keeps, as the server says it, against what its books say."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from vlcache_sgl.client.client import data_url

PROMPT = "<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"
PAD = "<|vision_start|><|image_pad|><|vision_end|>"


def ask(server: Any, *pictures: Any, question: int = 0, **params: Any) -> dict[str, Any]:
    """The report of one native request about images."""
    text = PROMPT.format(images=PAD * len(pictures), text=pictures[-1].questions[question].text)
    sampling = {"temperature": 0.0, "max_new_tokens": 4, "custom_params": {"kv_report": "positions", **params}}
    images = [data_url(one.image) for one in pictures]
    reply = httpx.post(
        f"{server.url}/generate", json={"text": text, "image_data": images, "sampling_params": sampling}, timeout=300
    )
    assert reply.status_code == 200, reply.text
    (report,) = reply.json()["meta_info"]["kv_compression"]
    assert isinstance(report, dict)
    return report


@pytest.mark.parametrize("policy", ["vlcache", "snapkv", "streaming"])
def test_positions_are_those_of_the_plan(ours_tenth: Any, picture: Any, policy: str) -> None:
    server, drawn = ours_tenth, picture(7800, 24, 28)  # two chunks
    server.flush()
    report = ask(server, drawn, kv_policy=policy)
    kept = report["kept_positions"]
    assert [len(layer) for layer in kept] == report["kept_tokens_per_layer"]
    for layer in kept:
        assert layer == sorted(set(layer))
        assert layer[0] >= 0
        assert (
            layer[-1] == report["prompt_tokens"] - 1 if policy == "streaming" else layer[-1] < report["prompt_tokens"]
        )
    (run,) = report["vision"]
    assert run["end"] - run["begin"] == drawn.num_image_tokens
    assert (run["modality"], run["item"]) == ("image", 0)
    assert run["grids"] == [{"rows": 24, "columns": 28, "newlines": False, "fit": "stretch"}]


def test_the_answer_is_among_what_is_kept(ours_tenth: Any, picture: Any) -> None:
    """The bundled model's upper layers look at the record before they answer."""
    server, drawn = ours_tenth, picture(7801, 24, 24)
    server.flush()
    report = ask(server, drawn)
    begin = report["vision"][0]["begin"]
    needed = {begin + cell for cell in drawn.questions[0].cells}
    assert needed <= set(report["kept_positions"][-1])


def test_a_follow_up_shows_what_it_shares(ours_tenth: Any, picture: Any) -> None:
    """Nothing is compressed, yet the image is as small as its first user left it."""
    server, drawn = ours_tenth, picture(7802, 20, 20)
    server.flush()
    first, second = (ask(server, drawn, question=number, kv_share="policy") for number in range(2))
    assert second["skipped"] == "short"
    end = first["vision"][0]["end"]
    assert second["vision"] == first["vision"]
    for before, after in zip(first["kept_positions"], second["kept_positions"], strict=True):
        assert [p for p in after if p < end] == [p for p in before if p < end]
        own = [p for p in after if p >= end]
        assert own[-1] - own[0] + 1 == len(own)  # its own text is whole


def test_several_pictures(ours_tenth: Any, picture: Any) -> None:
    server, drawn = ours_tenth, [picture(7803, 16, 20), picture(7804, 20, 16)]
    server.flush()
    report = ask(server, *drawn)
    assert [run["item"] for run in report["vision"]] == [0, 1]
    assert [(grid["rows"], grid["columns"]) for run in report["vision"] for grid in run["grids"]] == [
        (16, 20),
        (20, 16),
    ]
    assert [run["end"] - run["begin"] for run in report["vision"]] == [320, 320]


def test_off_by_default(ours_tenth: Any, picture: Any) -> None:
    assert "kept_positions" not in ask(ours_tenth, picture(7800, 24, 28), kv_report="summary")


def test_nothing_to_list_at_full_budget(ours_tenth: Any, picture: Any) -> None:
    assert ask(ours_tenth, picture(7800, 24, 28), kv_budget=1.0) == {"skipped": "budget"}


@pytest.mark.parametrize("asked", ["everything", True, ["positions"], None])
def test_refuses_unknown_reports(ours_tenth: Any, picture: Any, asked: Any) -> None:
    with pytest.raises(AssertionError, match="kv_report must be one of: summary, positions, attention"):
        ask(ours_tenth, picture(7805, 8, 10), kv_report=asked)
