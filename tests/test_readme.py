"""The first screen says what is true, and the citation is one."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_first_screen_says_that_nothing_has_run_on_a_gpu() -> None:
    """In a line before the first figure, as long as docs/gpu.md says so."""
    begun = (ROOT / "README.md").read_text().partition("![")[0]
    assert ("Nothing of this has run on a GPU yet" in begun) == (
        "Nothing in this repository has run on a GPU yet" in (ROOT / "docs/gpu.md").read_text()
    )


def test_the_citation_has_what_cff_requires() -> None:
    """The required keys of version 1.2.0, and authors that are persons or entities."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for work in (citation, *citation["references"]):
        assert work["authors"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert all(reference["type"] and reference["title"] for reference in citation["references"])
