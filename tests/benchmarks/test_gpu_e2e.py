"""Whole servers of `benchmarks/gpu` without a GPU: the programs refuse in a line, and a figure of a server that did
something else shows.

Its smoke test starts three servers: `python -m benchmarks.gpu.e2e --smoke`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import e2e

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it would run")
@pytest.mark.parametrize("program", ["e2e", "answers"])
def test_without_a_device_it_refuses(program: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.gpu.{program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def line(*arrivals: tuple[float, int]) -> SimpleNamespace:
    return SimpleNamespace(arrivals=list(arrivals))


def test_decode_is_timed_while_all_decode() -> None:
    together = [line((1.0, 1), (7.0, 101)), line((2.0, 1), (7.0, 101))]
    assert e2e.decode_speed(together) == 2 * 100 / 5
    assert e2e.decode_speed([line((1.0, 1), (3.0, 101)), line((4.0, 1), (9.0, 101))]) is None
    assert e2e.decode_speed([line((1.0, 101))]) is None


GOOD: dict[str, Any] = {
    "tokens": 2048,
    "batch": 2,
    "repeat": 0,
    "prompt_tokens": [2040, 2050],
    "cached_tokens": [0, 4],
    "completion_tokens": [100, 100],
    "retractions": 0,
    "integrity": [],
    "books": {"requests_compressed": 2.0, "policy_failures": 0.0, "cells_seen": 1000.0, "cells_kept": 100.0},
}


@pytest.mark.parametrize(
    ("server", "change", "problem"),
    [
        ("ours 0.1", {}, None),
        ("ours 0.1", {"completion_tokens": [100, 7]}, r"generated \[100, 7\]"),
        ("ours 0.1", {"cached_tokens": [0, 2000]}, "prefix hit of 2000"),
        ("ours 0.1", {"prompt_tokens": [300, 2050]}, "prompts of 300"),
        ("ours 0.1", {"integrity": ["3 cells are lost"]}, "do not balance"),
        ("ours 0.1", {"books": GOOD["books"] | {"policy_failures": 1.0}}, "a policy failed"),
        ("ours 0.1", {"books": GOOD["books"] | {"requests_compressed": 1.0}}, "1 requests were compressed"),
        ("ours 0.1", {"books": GOOD["books"] | {"cells_kept": 1000.0}}, "1.0000 of the cells"),
        ("ours 0.1", {"books": {}}, "a policy is on where it should not be, or off"),
        ("ours 1.0", {}, "2 requests were compressed"),
        ("stock", {}, "a policy is on where it should not be, or off"),
        ("stock", {"books": {}}, None),
        ("stock as it is", {"books": {}}, None),
        ("stock as it is", {}, "a policy is on where it should not be, or off"),
    ],
)
def test_a_sample_is_checked(server: str, change: dict[str, Any], problem: str | None) -> None:
    found = e2e.sample_problems(server, GOOD | change, 100)
    if problem is None:
        assert found == []
    else:
        assert any(re.search(problem, text) for text in found), found


def test_one_server_chooses_its_attention_itself() -> None:
    """The others are told, so that they use the same kernels."""
    setting = e2e.settings(False, "triton")
    assert setting.attention == ("--attention-backend", "triton")
    assert "--attention-backend" not in setting.flags
    assert [name for name in e2e.CONTENDERS if name == e2e.AS_IT_IS]
    assert ("ours 0.1", e2e.AS_IT_IS) in e2e.RATIOS


def test_ratios_compare_medians_at_the_same_point() -> None:
    def sample(server: str, decode: float | None, total: float) -> dict[str, Any]:
        return {"server": server, "tokens": 8, "batch": 4, "decode_tokens_per_s": decode, "end_to_end_ms": total}

    samples = [sample("stock", 100.0, 50.0), sample("ours 1.0", None, 40.0)]
    samples += [sample("ours 0.1", decode, 10.0) for decode in (150.0, 900.0, 200.0)]
    (row,) = e2e.summarise(samples)
    assert row["speedup"]["ours 0.1 / stock"] == {"decode": 2.0, "end_to_end": 5.0}
    assert row["speedup"]["ours 0.1 / ours 1.0"] == {"decode": None, "end_to_end": 4.0}
    skipped = {"server": "stock", "tokens": 9, "batch": 64, "skipped": "would take 11 minutes"}
    assert e2e.summarise([*samples, skipped])[1]["speedup"] == {}
    e2e.table_of(e2e.summarise([*samples, skipped]))
