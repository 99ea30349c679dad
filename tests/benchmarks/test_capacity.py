"""What is said of a load and of a soak, from what a server logs and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity import report, soak
from benchmarks.capacity.loads import Outcome
from benchmarks.capacity.main import decode_steps, figures, unbalanced

LOG = """
[2026-01-02 03:04:05] Prefill batch, #new-seq: 1, #new-token: 512, #running-req: 9, #queue-req: 7
[2026-01-02 03:04:05] Decode batch, #running-req: 3, #token: 900, token usage: 0.90, gen throughput: 9, #queue-req: 2,
[2026-01-02 03:04:06] Decode batch, #running-req: 5, #token: 950, token usage: 0.95, gen throughput: 9, #queue-req: 1,
[2026-01-02 03:04:07] Decode batch, #running-req: 1, #token: 100, token usage: 0.10, gen throughput: 9, #queue-req: 0,
"""


def outcome(ms: float, cached: int, right: bool | None) -> Outcome:
    return Outcome("image", 0.0, ms, 10 * ms, 100, cached, 4, right)


def test_steps_are_read_from_the_log_of_decode() -> None:
    assert list(decode_steps(LOG)) == [(3, 2), (5, 1), (1, 0)]


def test_figures_of_a_load() -> None:
    outcomes = [outcome(10, 0, True), outcome(20, 50, None), outcome(30, 100, False), outcome(60, 90, True)]
    found = figures(outcomes, list(decode_steps(LOG)), 8.0)
    assert (found["requests"], found["right"], found["judged"]) == (4, 2, 3)
    assert (found["running_peak"], found["running_mean_while_others_wait"]) == (5, 4)
    assert found["tokens_per_s"] == 2.0
    assert found["hit_rate"] == 0.6
    assert (found["ttft_mean_ms"], found["ttft_p95_ms"]) == (30.0, 60)
    assert (found["latency_p50_ms"], found["latency_p95_ms"]) == (200, 600)


@pytest.mark.parametrize("path", report.result_paths(), ids=lambda path: path.stem)
def test_committed_figures_are_those_of_their_samples(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["targets"] == report.check_targets(result["load"], result["rows"])
    for row in result["rows"]:
        outcomes = [Outcome(**outcome) for outcome in row["outcomes"]]
        found = figures(outcomes, [tuple(step) for step in row["decode_steps"]], row["seconds"])
        # The time of the load is rounded in the file.
        assert row["tokens_per_s"] == pytest.approx(found.pop("tokens_per_s"), rel=1e-3)
        assert {key: row[key] for key in found} == found


def test_a_server_whose_books_do_not_balance_is_named() -> None:
    row: dict[str, Any] = {"server": "ours 0.1", "books": {"cells_used_after_flush": 0, "problems": []}}
    assert unbalanced({"server": "stock", "books": None}) == unbalanced(row) == []
    row["books"] = {"cells_used_after_flush": 7, "problems": ["3 cells are lost"]}
    assert unbalanced(row) == ["ours 0.1: 7 cells are used after a flush", "ours 0.1: 3 cells are lost"]


def samples(*memory: float) -> list[soak.Sample]:
    return [soak.Sample(float(second), int(1e9 * gb), 0, 0) for second, gb in enumerate(memory)]


def test_memory_that_goes_on_growing_is_said() -> None:
    assert soak.grown(samples()) == soak.grown(samples(1.0, 9.0)) == []
    assert soak.grown(samples(1.0, 2.0, 2.0, 2.0, 2.0, 2.0)) == []  # the first third may grow
    (line,) = soak.grown(samples(1.0, 2.0, 2.0, 2.0, 2.0, 2.0 * (1.001 + soak.GROWTH_ALLOWED)))
    assert "resident memory grew from 2.00 to" in line


@pytest.mark.parametrize("path", report.soak_paths(), ids=lambda path: path.stem)
def test_the_verdict_of_a_committed_soak_is_that_of_its_samples(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["problems"] == soak.grown([soak.Sample(*sample) for sample in result["samples"]]) == []
