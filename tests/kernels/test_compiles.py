"""Every kernel compiles for a Hopper GPU, here without one; see `compile_offline.py` for what that shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlcache_kernels

SCRIPT = Path(__file__).with_name("compile_offline.py")
# What one block may use on compute capability 9.0.
SHARED_MEMORY = 227 * 1024
KERNELS = {
    "row_kernel",
    "merge_kernel",
    "column_kernel",
    "count_kernel",
    "write_kernel",
    "copy_kernel",
    "schedule_kernel",
    "store_kernel",
    "append_kernel",
    "select_kernel",
    "evicted_kernel",
    "free_kernel",
    "score_kernel",
}


def compile_all(tmp_path: Path, *options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile, whatever was compiled before
    environment["PYTHONPATH"] = str(Path(vlcache_kernels.__file__).parents[1])
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict]) -> None:
    assert {line["kernel"] for line in lines} == KERNELS
    for line in lines:
        assert line["shared"] <= SHARED_MEMORY, line
        # A few bytes are the calling convention of a 64-bit atomic, more is registers spilled to memory.
        assert line.get("stack", 0) <= 16, f"spills registers: {line}"


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    check(compile_all(tmp_path))


@pytest.mark.slow
def test_all_shapes_compile_for_hopper(tmp_path: Path) -> None:
    check(compile_all(tmp_path, "--full"))
