"""`kv_report: attention`: what a decision would have kept of an answer's attention, measured on the full cache."""

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
    answer = ask(server, drawn, kv_report="attention")
    after = server.settled()
    assert answer.cached_tokens == 0  # neither the compressed image nor the full one was used
    assert answer.text == full.text
    for key in ("cells_used", "cells_tree", "requests_compressed", "virtual_slots_free"):
        assert after[key] == before[key], key
    assert after["requests_skipped"]["measured"] == before["requests_skipped"].get("measured", 0) + 1
    measured = answer.report["attention"]
    other = {"attention": None, "staged": None}  # nothing is staged for who keeps everything
    assert {**answer.report, **other} == {**compressed.report, **other}
    assert measured["steps"] == answer.completion_tokens - 1
    layers = len(compressed.report["kept_tokens_per_layer"])
    for figures in (measured["attention_mass"], measured["cache_hit_rate"]):
        assert len(figures) == layers
        assert all(0 < figure <= 1 for figure in figures)
    # Nor does it serve others of its kind.
    assert ask(server, drawn, question=1, kv_report="attention").cached_tokens == 0


def test_the_better_policy_has_the_better_figures(ours_tenth: Any, picture: Any) -> None:
    """On a model that was trained to attend in prefill to what its answer needs."""
    masses = {}
    for policy in ("vlcache", "random"):
        mass = ask(ours_tenth, picture(8101, 24, 24), kv_policy=policy, kv_report="attention").report["attention"]
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
    report = ask(ours_tenth, drawn, max_tokens=2, kv_policy=policy, kv_report="attention", kv_budget=0.15).report
    assert report["kept_tokens_per_layer"] == kept.sum(1).tolist()
    measured = report["attention"]
    assert measured["steps"] == 1
    assert measured["attention_mass"] == pytest.approx((1 - (row * ~kept).sum(1)).tolist(), abs=1e-3)
    for layer, hits in enumerate(measured["cache_hit_rate"]):
        k = int(kept[layer].sum())
        expected = int(kept[layer, row[layer].topk(k).indices].sum())
        assert abs(hits * k - expected) <= 1.01  # two tokens of equal attention to rounding may change places


def test_together_with_others(ours_tenth: Any, picture: Any, an_ask: Any) -> None:
    """In a batch with requests that are compressed, each gets what it gets alone."""
    server, drawn = ours_tenth, picture(8103, 20, 20)

    def the(question: int, **params: Any) -> Any:
        options = {"max_tokens": 6, "custom_params": params, "return_meta_info": True, "cache_salt": f"own {question}"}
        return an_ask(drawn.questions[question].text, (drawn.image,), options)

    asks = [the(0, kv_report="attention"), the(1), the(2, kv_report="attention", kv_policy="snapkv"), the(3)]
    alone = [server.ask_all([one])[0] for one in asks]
    server.flush()
    for together, single in zip(server.ask_together(asks), alone, strict=True):
        assert together.text == single.text
        ours, theirs = dict(together.report).pop("attention", None), dict(single.report).pop("attention", None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours["steps"] == theirs["steps"] > 0
            assert ours["attention_mass"] == pytest.approx(theirs["attention_mass"], abs=1e-3)
            assert ours["cache_hit_rate"] == pytest.approx(theirs["cache_hit_rate"], abs=0.05)


def test_a_stream_cannot_carry_it(ours_tenth: Any, picture: Any) -> None:
    drawn = picture(8104, 8, 10)
    with pytest.raises(openai.APIError, match="ask without stream"):
        ours_tenth.ask(drawn.questions[0].text, drawn.image, stream=True, custom_params={"kv_report": "attention"})
    ours_tenth.assert_alive()


def test_nothing_to_measure_at_full_budget(ours_tenth: Any, picture: Any) -> None:
    assert ask(ours_tenth, picture(8104, 16, 16), kv_budget=1.0, kv_report="attention").report == {"skipped": "budget"}
