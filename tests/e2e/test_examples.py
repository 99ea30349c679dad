"""The programs of examples/ run as their README says, and print what it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, which must end well."""
    command = [sys.executable, f"examples/{name}", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_quickstart(ours_tenth: Any) -> None:
    """All questions are answered, the later ones find the image in the cache."""
    ours_tenth.flush()
    lines = run("quickstart.py", "--url", ours_tenth.url).splitlines()
    found = [re.search(r"\? +(\w*) +\(expected (\w+)\); (\d+) of (\d+)", line) for line in lines]
    assert len(found) == 3
    assert all(found), lines
    assert [match[1] for match in found] == [match[2] for match in found]
    assert int(found[0][3]) == 0
    assert all(int(length) - 64 < int(cached) < int(length) for *_, cached, length in map(re.Match.groups, found[1:]))


def test_the_snippet_of_the_readme(ours_tenth: Any, picture: Any, tmp_path: Path) -> None:
    """As it stands there, but for the port: it prints an answer, and what was done to the prompt."""
    (snippet,) = re.findall(r"^```python\n(import base64.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert snippet.count("http://127.0.0.1:30000") == 1
    drawn = picture(8610, 24, 24)
    drawn.image.save(tmp_path / "page.png")
    code = snippet.replace("http://127.0.0.1:30000", ours_tenth.url)
    ours_tenth.flush()
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    *answer, report = ran.stdout.splitlines()
    assert "".join(answer).strip()
    (done,) = ast.literal_eval(report)
    assert done["policy"] == "snapkv"
    assert done["ratio"] == pytest.approx(0.2, abs=0.01)  # what lies in front of the image is kept in addition
    assert done["prompt_tokens"] > drawn.num_image_tokens


def test_per_request_policy(ours_tenth: Any) -> None:
    """Five choices, five reports, one refusal."""
    ours_tenth.flush()
    before = ours_tenth.settled()
    text = run("per_request_policy.py", "--url", ours_tenth.url)
    after = ours_tenth.settled()
    for words in ("'policy': 'snapkv:window=64'", "'budget': '0.3'", "'budget': '100'", "'skipped': 'budget'"):
        assert words in text
    assert re.search(r"\d{3} of \d{3} prompt tokens from the cache", text)
    assert "  400: " in text
    assert "unknown policy 'snapvk'" in text
    assert after["requests_compressed"] == before["requests_compressed"] + 5  # the repeated one selects anew
    assert after["policy_failures"] == before["policy_failures"]


def test_frontend_dsl(ours_tenth: Any) -> None:
    """Compressed as the endpoint says, whether the program generates, selects or forks."""
    ours_tenth.flush()
    before = ours_tenth.settled()
    text = run("frontend_dsl.py", "--url", ours_tenth.url)
    after = ours_tenth.settled()
    read, report, choose, early, full = text.splitlines()
    code, expected = re.search(r": (\w+) \(expected (\w+)\)", read).groups()
    assert code == expected
    assert "'policy': 'vlcache'" in report
    code, expected = re.search(r": (\w+) of .* \(expected (\w+)\)", choose).groups()
    assert code == expected
    assert "vlcache" in early
    codes, expected = re.search(r": (\[.*\]) \(expected (\[.*\])\)", full).groups()
    assert codes == expected
    assert after["requests_compressed"] >= before["requests_compressed"] + 3
    assert after["policy_failures"] == before["policy_failures"]


def test_engine() -> None:
    """In process: compressed, then shared."""
    lines = run("engine.py").splitlines()
    first, report, _, shared = lines[-4:]
    code, expected = re.search(r"\? (\w*) \(expected (\w+)\)", first).groups()
    assert code == expected
    assert "'kept_tokens_per_layer'" in report
    cached, length = map(int, re.search(r"(\d+) of (\d+) tokens cached", shared).groups())
    assert length - 64 < cached < length


@pytest.mark.slow
def test_router() -> None:
    """Its own checks pass; needs sglang-router, here or in the Python that ROUTER_PYTHON names."""
    python = os.environ.get("ROUTER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import sglang_router"], capture_output=True).returncode:
        pytest.skip("sglang-router is not installed")
    text = run("router/run.py", "--router-python", python)
    assert text.count("ok    ") == 5
