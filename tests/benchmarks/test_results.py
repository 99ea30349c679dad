"""A result says where it came from, and what is committed says so too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import results
from benchmarks.common.host import PACKAGES, ROOT, command_line, host_block


def whole() -> dict[str, Any]:
    return {
        "task": "test",
        "command": "python benchmarks/run.py test",
        "host": {**host_block(), "commit": "0123456789ab"},
        "summary": [],
    }


def committed() -> list[Path]:
    return sorted(results.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_what_is_committed_says_where_it_came_from(path: Path) -> None:
    assert results.problems(json.loads(path.read_text())) == []


def test_what_a_program_writes_is_whole() -> None:
    """Of this machine, with the packages that are installed here."""
    result = whole()
    assert results.problems(result) == []
    assert results.problems(json.loads(json.dumps(result))) == []
    assert set(result["host"]["packages"]) == set(PACKAGES)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda r: r.pop("command"), "command is missing"),
        (lambda r: r.pop("task"), "task is missing"),
        (lambda r: r.pop("host"), "host is missing"),
        (lambda r: r.update(host="here"), "host is str"),
        (lambda r: r.update(command=["python"]), "command is list"),
        (lambda r: r["host"].pop("date"), "host.date is missing"),
        (lambda r: r["host"].update(date="yesterday"), "host.date is no time with a zone: 'yesterday'"),
        (lambda r: r["host"].update(date="2026-11-21T14:00:00"), "host.date is no time with a zone"),
        (lambda r: r["host"].update(commit=None), "host.commit is empty"),
        (lambda r: r["host"].update(cores=True), "host.cores is bool"),
        (lambda r: r["host"].update(cores="2"), "host.cores is str"),
        (lambda r: r["host"]["packages"].pop("sglang"), "host.packages lacks sglang"),
        (lambda r: r["host"]["packages"].update(torch="main"), "host.packages.torch is no version: 'main'"),
    ],
)
def test_what_is_missing_is_named(spoil: Callable[[dict[str, Any]], object], problem: str) -> None:
    result = json.loads(json.dumps(whole()))
    spoil(result)
    (found,) = results.problems(result)
    assert found.startswith(problem)


def test_a_result_is_written_as_it_is_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert results.save(path, {"a": [1]}, '{"a": [1]}') == str(path)
    assert path.read_text() == '{"a": [1]}\n'
    results.save(path, {"a": [2]})
    assert json.loads(path.read_text()) == {"a": [2]}
    assert path.read_text().endswith("}\n")


def test_only_whole_runs_go_where_results_are_committed(tmp_path: Path) -> None:
    assert results.folder(None, whole=True) == results.RESULTS
    assert results.folder(None, whole=False) == results.OUT
    assert results.folder(tmp_path, whole=True) == results.folder(tmp_path, whole=False) == tmp_path


def test_the_command_is_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/run.py"), "speed", "--points", "2048x1"])
    assert command_line() == "python benchmarks/run.py speed --points 2048x1"
    from benchmarks import judge

    monkeypatch.setattr(main, "__spec__", judge.__spec__)
    assert command_line() == "python -m benchmarks.judge speed --points 2048x1"
