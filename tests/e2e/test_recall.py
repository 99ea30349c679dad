"""`kv_report: recall`: what a decision would have kept of an answer's attention, measured on the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

ROOT = Path(__file__).parents[2]


def ask(server: Any, drawn: Any, *, max_tokens: int = 8, question: int = 0, **params: Any) -> Any:
    text = drawn.questions[question].text
    return server.ask(text, drawn.image, max_tokens=max_tokens, custom_params=params, return_meta_info=True)


def test_nothing_is_evicted_and_nothing_left_behind(ours_tenth: Any, picture: Any) -> None:
    server, drawn = ours_tenth, picture(8100, 24, 28)  # two chunks
    server.flush()
    compressed = ask(server, drawn)
    full = ask(server, drawn, kv_budget=1.0)
    before = server.settled()
    answer = ask(server, drawn, kv_report="recall")
    after = server.settled()
    assert answer.cached_tokens == 0  # neither the compressed image nor the full one was used
    assert answer.text == full.text
    for key in ("cells_used", "cells_tree", "requests_compressed", "virtual_slots_free"):
        assert after[key] == before[key], key
    assert after["requests_skipped"]["recall"] == before["requests_skipped"].get("recall", 0) + 1
    recall = answer.report["recall"]
    assert {**answer.report, "recall": None} == {**compressed.report, "recall": None}
    assert recall["steps"] == answer.completion_tokens - 1
    layers = len(compressed.report["kept_tokens_per_layer"])
    for figures in (recall["attention_mass"], recall["cache_hit_rate"]):
        assert len(figures) == layers
        assert all(0 < figure <= 1 for figure in figures)
    assert ask(server, drawn, question=1, kv_report="recall").cached_tokens == 0  # nor does it serve others of its kind


def test_the_better_policy_has_the_better_recall(ours_tenth: Any, picture: Any) -> None:
    """On a model that was trained to attend in prefill to what its answer needs."""
    masses = {}
    for policy in ("vlcache", "random"):
        mass = ask(ours_tenth, picture(8101, 24, 24), kv_policy=policy, kv_report="recall").report["recall"]
        masses[policy] = sum(mass["attention_mass"]) / len(mass["attention_mass"])
    assert masses["random"] < 0.6 < 0.8 < masses["vlcache"]


@pytest.mark.parametrize("policy", ["vlcache", "snapkv", "random"])
def test_as_transformers_attends(ours_tenth: Any, picture: Any, policy: str) -> None:
    """The first decoded token's attention in the stock model, and the positions that the server says it keeps."""
    from models.tinyvlm.probe import Probe

    drawn = picture(8102, 24, 24)
    row = Probe(ROOT / "models/tinyvlm/grounded").prefill(drawn, drawn.questions[0]).first_row.double()
    kept = torch.zeros_like(row, dtype=torch.bool)
    listed = ask(ours_tenth, drawn, max_tokens=1, kv_policy=policy, kv_report="positions", kv_budget=0.15).report
    for layer, positions in enumerate(listed["kept_positions"]):
        kept[layer, positions] = True
    report = ask(ours_tenth, drawn, max_tokens=2, kv_policy=policy, kv_report="recall", kv_budget=0.15).report
    assert report["kept_tokens_per_layer"] == kept.sum(1).tolist()
    recall = report["recall"]
    assert recall["steps"] == 1
    assert recall["attention_mass"] == pytest.approx((1 - (row * ~kept).sum(1)).tolist(), abs=1e-3)
    for layer, hits in enumerate(recall["cache_hit_rate"]):
        k = int(kept[layer].sum())
        expected = int(kept[layer, row[layer].topk(k).indices].sum())
        assert abs(hits * k - expected) <= 1.01  # two tokens of equal attention to rounding may change places


def test_together_with_others(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    """In a batch with requests that are compressed, each gets what it gets alone."""
    server, drawn = ours_tenth, picture(8103, 20, 20)

    def the(question: int, **params: Any) -> Any:
        options = {"max_tokens": 6, "custom_params": params, "return_meta_info": True, "cache_salt": f"own {question}"}
        return an_ask(drawn.questions[question].text, (drawn.image,), options)

    asks = [the(0, kv_report="recall"), the(1), the(2, kv_report="recall", kv_policy="snapkv"), the(3)]
    alone = [server.ask_all([one])[0] for one in asks]
    server.flush()
    for together, single in zip(server.ask_together(asks), alone, strict=True):
        assert together.text == single.text
        ours, theirs = dict(together.report).pop("recall", None), dict(single.report).pop("recall", None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours["steps"] == theirs["steps"] > 0
            assert ours["attention_mass"] == pytest.approx(theirs["attention_mass"], abs=1e-3)
            assert ours["cache_hit_rate"] == pytest.approx(theirs["cache_hit_rate"], abs=0.05)


def test_a_stream_cannot_carry_it(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(8104, 8, 10)
    with pytest.raises(openai.APIError, match="ask without stream"):
        ours_tenth.ask(drawn.questions[0].text, drawn.image, stream=True, custom_params={"kv_report": "recall"})
    ours_tenth.assert_alive()


def test_nothing_to_measure_at_full_budget(ours_tenth: Any, picture: Any) -> None:
    assert ask(ours_tenth, picture(8104, 16, 16), kv_budget=1.0, kv_report="recall").report == {"skipped": "budget"}
