"""Three minutes of `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_minutes_of_abuse() -> None:
    command = [sys.executable, "benchmarks/run.py", "soak", "--minutes", "3"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert "passed" in ran.stdout
