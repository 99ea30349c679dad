"""`vlcache calibrate` against a running server, and its profile at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlcache_sgl.cli import calibrate
from vlcache_sgl.policy import resolve

NEEDED = 2
"""The layer of `grounded` that later questions cannot do without."""


def run(server: Any, folder: Path, *arguments: str) -> int:
    return calibrate.main(["--base-url", server.url, "--output", str(folder), "--pictures", "2", *arguments])


@pytest.mark.timeout(300)
def test_a_calibration_goes_on_where_it_stopped(ours_tenth: Any, tmp_path: Path, capsys: Any) -> None:
    """No time asks nothing; then eight trials; then the same without asking; then two more."""
    few = ("--questions", "3", "--max-trials", "8")
    assert run(ours_tenth, tmp_path, *few, "--time-limit", "1e-6") == 3
    assert not (tmp_path / "profile.json").exists()
    assert run(ours_tenth, tmp_path, *few) == 0
    printed = capsys.readouterr().out
    assert "6 layers; at most 8 trials of 2 pictures and 6 questions" in printed
    assert "stopped after 8 trials" in printed
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["n"] == {"pictures": 2, "questions": 6, "later": 4}
    assert not profile["finished"]
    assert profile["full_score"] == 1.0
    assert profile["score"] >= profile["full_score"] - profile["tolerance"]
    # Six layers emptied alone, then two that are not missed lowered together.
    assert [trial["weights"].count(0.0) for trial in profile["trials"]] == [1] * 6 + [0, 0]
    assert [trial["weights"].count(0.1) for trial in profile["trials"]] == [0] * 6 + [1, 2]
    assert profile["without"][str(NEEDED)] == min(profile["without"].values()) < 1.0
    assert profile["weights"][NEEDED] == 1.0
    assert profile["share"] == pytest.approx(sum(profile["weights"]) / 6, abs=1e-4)
    # The text of the prompt stays too.
    assert profile["share"] < profile["kept"] < profile["share"] + 0.05

    answers = (tmp_path / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 1 + 2 * (2 + 8)
    assert run(ours_tenth, tmp_path, *few) == 0
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert json.loads((tmp_path / "profile.json").read_text())["trials"] == profile["trials"]
    assert run(ours_tenth, tmp_path, *few[:2], "--max-trials", "10") == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 2 * (2 + 10)

    policy = resolve(f"scorer=keydiff,allocator=table,file={tmp_path / 'profile.json'},basis=vision,protect=text")
    assert list(policy.allocator.numbers) == json.loads((tmp_path / "profile.json").read_text())["weights"]


def test_a_server_that_does_not_allow_it_says_so(limited: Any, tmp_path: Path, capsys: Any) -> None:
    assert run(limited, tmp_path) == 2
    printed = capsys.readouterr().out
    assert "is not allowed on this server; choose one of: vlcache, snapkv, knorm" in " ".join(printed.split())
    assert "Traceback" not in printed
