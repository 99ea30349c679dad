"""The matrix of architectures: `matrix.toml` read, and checked against the tests that it names.

    python -m models.matrix

prints what is wrong and ends with 1: a row without a test, a test that is not there, a gap without its reason.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_suffix(".toml")
VALUES = ("yes", "no", "not tried", "refused")
CLAIMS = ("tokens", "accounting", "sharing", "video")
"""Fields of a row that say whether something was seen."""


@dataclass(frozen=True)
class Row:
    """An architecture; what the fields mean is said in `matrix.toml`."""

    architecture: str
    models: str
    attention: str
    tokens: str
    accounting: str
    sharing: str
    video: str
    inspect: str
    on: str
    tests: tuple[str, ...] = ()
    note: str = ""

    @property
    def cases(self) -> tuple[tuple[str, str], ...]:
        """File and case of each test; the case is empty where the whole file is meant."""
        return tuple((file, case) for file, _, case in (test.partition("::") for test in self.tests))


def read_rows(path: Path = FILE) -> list[Row]:
    """All rows, in the order of the file.

    Raises:
        TypeError: for a field that rows do not have, or one that is missing.
    """
    rows = tomllib.loads(path.read_text())["model"]
    return [Row(**{**row, "tests": tuple(row.get("tests", ()))}) for row in rows]


def problems(rows: Sequence[Row], root: Path = ROOT) -> Iterator[str]:
    """One line for each thing that is wrong.

    Args:
        root: folder that paths of tests begin at.
    """
    names = [row.architecture for row in rows]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"{name} has more than one row"
    for row in rows:
        claims = [getattr(row, claim) for claim in CLAIMS]
        for claim, value in zip(CLAIMS, claims, strict=True):
            if value not in VALUES:
                yield f"{row.architecture}: {claim} is {value!r}, not one of: {', '.join(VALUES)}"
        if {"no", "not tried"} & {*claims, row.inspect} and not row.note:
            yield f"{row.architecture}: why something is missing is to be said in its note"
        if not row.tests and set(claims) != {"not tried"}:
            yield f"{row.architecture} has no test"
        for file, case in row.cases:
            if not (root / file).exists():
                yield f"{row.architecture}: {file} does not exist"
            elif case and case not in _texts(root / file):
                yield f"{row.architecture}: {file} has no case {case!r}"


def _texts(path: Path) -> set[str]:
    """Texts in a Python file, where the names of its cases stand; names of attributes too, such as `BUNDLED.name`."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row of the page's table."""
    files = dict.fromkeys(file for file, _ in row.cases)
    first = f"`{row.architecture}`"
    told = (row.models, row.attention, row.tokens, row.accounting, row.sharing, row.video, row.inspect, row.on)
    return (first, *told, ", ".join(f"`{file.rpartition('/')[2]}`" for file in files))


HEAD: tuple[str, ...] = (
    *("architecture", "models", "attention", "tokens at 1.0", "accounting at 0.1", "sharing", "video"),
    *("`vlcache inspect`", "on", "test"),
)


def notes(rows: Sequence[Row]) -> str:
    """A line per row that has a note."""
    return "\n".join(f"* `{row.architecture}`: {row.note}." for row in rows if row.note)


def main(path: Path = FILE) -> int:
    """Print what is wrong; 1 if anything is."""
    rows = read_rows(path)
    found = list(problems(rows))
    print("\n".join(found) or f"{len(rows)} architectures, each with its tests")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
