"""The arithmetic of capacity against what a server measured: the committed results of benchmarks/capacity."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from vlcache_sgl.capacity import (
    KVShape,
    Pool,
    cached_prompts,
    compressed_pool,
    longest_answer,
    requests_in_flight,
    resident_tokens,
)
from vlcache_sgl.config import KVBudget, KVConfig

(RESULT,) = (Path(__file__).parents[1] / "benchmarks/results").glob("*-tinyvlm-capacity-in-flight-*.json")
MEASURED = json.loads(RESULT.read_text())
TOLERANCE = 0.05
"""Of the measured running requests, and at least 1: prompts differ by a few tokens, the last may be computed beside
others in one pass."""
POOL_TOLERANCE = 0.01
SHAPE = KVShape(layers=6, kv_heads=2, head_dim=32, element_bytes=4)
"""Of the bundled model in float32, which the benchmark serves."""


def stock_tokens() -> int:
    flags = MEASURED["server_flags"]
    return int(flags[flags.index("--max-total-tokens") + 1])


@pytest.mark.parametrize("row", MEASURED["rows"], ids=[row["server"] for row in MEASURED["rows"]])
def test_predicts_what_was_measured(row: dict[str, Any]) -> None:
    state = row["kv_policy_at_end"]
    prompt = round(statistics.mean(outcome["prompt_tokens"] for outcome in row["outcomes"]))
    (new,) = {outcome["completion_tokens"] for outcome in row["outcomes"]}
    budget = None
    pool = Pool(stock_tokens(), stock_tokens())
    if state:
        assert (SHAPE.cell_bytes, SHAPE.planes) == (state["bytes_per_cell"], state["cells_per_token"])
        budget = KVBudget.parse(state["budget"])
        factor = KVConfig("vlcache", budget=budget).overcommit_factor
        pool = compressed_pool(stock_tokens(), SHAPE, factor, graph_lists=False)
        assert pool.physical_tokens == pytest.approx(state["physical_tokens_total"], rel=POOL_TOLERANCE)
        assert pool.slots == pytest.approx(state["virtual_slots_total"], rel=POOL_TOLERANCE)
    predicted = requests_in_flight(pool, prompt, resident_tokens(prompt, SHAPE, budget), new)
    assert predicted == pytest.approx(row["running_peak"], abs=max(1, TOLERANCE * row["running_peak"]))


def test_the_last_request_is_still_whole() -> None:
    pool = Pool(physical_tokens=100, slots=10_000)
    assert requests_in_flight(pool, 50, 5, 5) == 1 + (100 - 55) // 10
    assert requests_in_flight(pool, 50, 50, 0) == 2
    assert requests_in_flight(pool, 90, 9, 9) == 0  # it would not be answered in full
    assert requests_in_flight(pool, 99, 9, 0) == 0


def test_slots_run_out_too() -> None:
    assert requests_in_flight(Pool(1000, 400), 90, 9, 10) == 4


def test_cached_prompts_hold_no_answers() -> None:
    pool = Pool(1000, 100_000)
    assert cached_prompts(pool, 100, 10) == 91
    assert cached_prompts(pool, 100, 100) == 10


def test_short_of_memory_by_a_token() -> None:
    assert longest_answer(97, 5, 100) == 1
    assert longest_answer(98, 5, 100) == 0
    assert longest_answer(99, 5, 100) is None


@pytest.mark.parametrize("layers", [1, 7, 28])
def test_budget_in_tokens_and_in_shares(layers: int) -> None:
    shape = KVShape(layers, 4, 128, 2)
    assert resident_tokens(1000, shape, KVBudget(tokens=64)) == pytest.approx(64)
    assert resident_tokens(1000, shape, KVBudget(fraction=0.1)) == pytest.approx(100)
    assert resident_tokens(1000, shape, KVBudget(fraction=1.0)) == resident_tokens(1000, shape, None) == 1000
