"""The table of docs/gpu.md says of every part how far it was tried: each entry is a test that does that."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("part", "read", "compiled", "interpreted", "pretended", "run")
EVIDENCE = {
    "read": ("flashinfer", "sglang", "triton"),
    "compiled": ("compile_offline.py", "build_module"),
    "interpreted": ("triton", "backend", "--dry-run", "use_our_kernels", "provider_bench", "run.sh"),
    "pretended": ("pretend", "standin", "provider_bench", "simplenamespace", "servers", "serverprocess"),
}
"""By column, one of these words is in the text of a test, in lower case."""


def rows() -> list[dict[str, str]]:
    text = (ROOT / "docs/gpu.md").read_text()
    table = text.split("<!-- begin levels -->")[1].split("<!-- end levels -->")[0]
    lines = [line.strip("|\n ") for line in table.strip().splitlines()]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert tuple(cells[0]) == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]]


def gpu_results() -> list[Path]:
    return sorted((ROOT / "benchmarks/results").glob("gpu-*"))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["part"])
def test_an_entry_is_a_test_that_does_what_its_column_says(row: dict[str, str]) -> None:
    listed = {name for names in tomllib.loads((ROOT / "tests/manifest.toml").read_text()).values() for name in names}
    named = 0
    for level in COLUMNS[1:-1]:
        if row[level] == "-":
            continue
        match = re.fullmatch(r"`([^`]+)`( \(slow\))?", row[level])
        assert match is not None, f"{level}: a test or -"
        assert match[1] in listed, f"{match[1]} is no test"
        text = (ROOT / "tests" / match[1]).read_text().lower()
        assert any(word in text for word in EVIDENCE[level]), f"{match[1]} does not show that anything was {level}"
        named += 1
    assert named, "nothing speaks for this part"


def test_nothing_claims_to_have_run_without_a_result() -> None:
    ran = [row["part"] for row in rows() if row["run"] != "no"]
    assert bool(ran) <= bool(gpu_results()), f"no result of a GPU is there, and yet: {ran}"
    devices = {row["run"] for row in rows()} - {"no"}
    named = " ".join(path.stem for path in gpu_results()).lower()
    assert all(device.lower() in named for device in devices), devices
