"""`manifest.toml` lists every test file once, by what it needs, and says what the markers say."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MANIFEST: dict[str, list[str]] = tomllib.loads((TESTS / "manifest.toml").read_text())
STARTS_SERVERS = {"servers", "ours_full", "ours_tenth", "ServerProcess"}
"""Names that only a test with a server has a use for: the fixtures of `e2e/conftest.py` and what they start."""


def names(path: Path) -> set[str]:
    """Names that a file uses: variables, attributes, parameters, and what it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
                found.add(name)
    return found


def marks(path: Path) -> set[str]:
    """Names of the markers that a file gives its tests."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
    }


def test_every_test_file_is_listed_once() -> None:
    listed = Counter(file for files in MANIFEST.values() for file in files)
    assert set(MANIFEST) == {"cpu", "server", "gpu"}
    assert [file for file, count in listed.items() if count > 1] == []
    assert set(listed) == {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}


@pytest.mark.parametrize("need", sorted(MANIFEST))
def test_the_lists_are_in_order(need: str) -> None:
    assert MANIFEST[need] == sorted(MANIFEST[need])


@pytest.mark.parametrize("file", [file for files in MANIFEST.values() for file in files])
def test_a_file_needs_what_it_is_listed_under(file: str) -> None:
    """Without importing it: marked for a GPU or not, in the folder of tests with servers or not."""
    path = TESTS / file
    assert ("gpu" in marks(path)) == (file in MANIFEST["gpu"])
    assert (path.parent.name == "e2e") == (file in MANIFEST["server"])
    if file not in MANIFEST["server"]:
        assert not names(path) & STARTS_SERVERS


def test_the_markers_of_this_run_say_the_same(request: pytest.FixtureRequest) -> None:
    """Of what was collected beside this test: all of it in a whole run."""
    for item in request.session.items:
        file = item.path.relative_to(TESTS).as_posix()
        assert (item.get_closest_marker("e2e") is not None) == (file in MANIFEST["server"]), item.nodeid
        assert item.get_closest_marker("gpu") is None or file in MANIFEST["gpu"], item.nodeid
