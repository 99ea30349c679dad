"""The table of speed: it has enough repeats and shows their spread, or there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import main as speed
from benchmarks.speed import readme


def sample(server: str, repeat: int, decode: float, prefill: float, kv: int) -> dict[str, Any]:
    """As `speed.measure` makes them, of one point."""
    return {
        "server": server,
        "tokens": 2048,
        "batch": 1,
        "repeat": repeat,
        "ttft_ms": [prefill, prefill + 2],
        "decode_tokens_per_s": decode,
        "prefill_ms": prefill,
        "kv_bytes_per_request": kv,
        "compression_ms": 0.0,
        "compressed_prefill_ms": 0.0,
    }


DECODES = (45, 48, 51, 54, 60)
"""Tokens per second of ours in each repeat, where stock has 30."""


def result(repeats: int) -> dict[str, Any]:
    """The machine is slower from repeat to repeat, for all servers."""
    samples = []
    for repeat in range(repeats):
        slow = 1 + repeat
        samples += [
            sample("stock", repeat, 30 / slow, 100 * slow, 1000),
            sample("ours 1.0", repeat, 33 / slow, 100 * slow, 1000),
            sample("ours 0.1", repeat, DECODES[repeat] / slow, 90 * slow, 100),
        ]
    host = {"packages": {"sglang": "0.5.23"}, "cores": 2}
    return {"summary": speed.summarise(samples), "host": host, "command": "the command"}


def test_ratios_are_formed_within_a_repeat() -> None:
    """A machine that becomes slower moves no ratio; their spread is that of ours."""
    rows = {row["server"]: row for row in result(5)["summary"]}
    tenth = rows["ours 0.1"]
    assert tenth["decode_tokens_per_s_ratio"] == 1.7
    assert tenth["decode_tokens_per_s_ratio_range"] == [1.5, 2.0]
    assert tenth["prefill_ms_ratio_range"] == [0.9, 0.9]
    assert tenth["ttft_ms"] == 271
    assert rows["stock"]["decode_tokens_per_s_ratio_range"] == [1.0, 1.0]


def test_the_table_shows_the_spread() -> None:
    text = readme.block(result(5))
    row = "| 2048 x 1 | **1.10x** (1.10 to 1.10) | **1.70x** (1.50 to 2.00) | **0.90x** (0.90 to 0.90) | 0.100x |"
    assert row in text
    assert "5 interleaved repeats" in text
    assert "`the command`" in text


@pytest.mark.parametrize("repeats", [1, 4])
def test_too_few_repeats_are_refused(tmp_path: Path, repeats: int) -> None:
    few = result(repeats)
    with pytest.raises(readme.TooFewRepeats, match=f"has {repeats} repeats, the table needs 5: .*--repeats 5"):
        readme.block(few)
    (tmp_path / "x-speed-sglang0.json").write_text(json.dumps(few))
    assert readme.speed_result(tmp_path) is None
    assert "|" not in readme.block(None)
    (tmp_path / "a-speed-sglang0.json").write_text(json.dumps(result(5)))
    assert readme.speed_result(tmp_path)["summary"][0]["samples"] == 5
