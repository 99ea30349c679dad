"""The matrix of architectures says what is wrong with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from models.matrix import FILE, Row, problems, read_rows

ROOT = Path(__file__).parents[2]
GOOD = Row("A", "a-1B", "full", "yes", "yes", "yes", "not tried", "any", "CPU", ("tests/test_a.py::one",), "no film")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text('CASES = {"one": 1}\n')
    return tmp_path


def test_every_row_has_its_tests() -> None:
    assert list(problems(read_rows())) == []


def test_a_good_row_passes(root: Path) -> None:
    assert list(problems([GOOD], root)) == []


WRONG: dict[str, tuple[Row, str]] = {
    "no test": (dataclasses.replace(GOOD, tests=()), "A has no test"),
    "file gone": (dataclasses.replace(GOOD, tests=("tests/test_b.py",)), "test_b.py does not exist"),
    "case gone": (dataclasses.replace(GOOD, tests=("tests/test_a.py::two",)), "no case 'two'"),
    "gap without a reason": (dataclasses.replace(GOOD, note=""), "why something is missing"),
    "unknown word": (dataclasses.replace(GOOD, sharing="perhaps"), "'perhaps', not one of"),
}


@pytest.mark.parametrize(("row", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(root: Path, row: Row, words: str) -> None:
    (problem,) = problems([row], root)
    assert words in problem


def test_an_architecture_has_one_row(root: Path) -> None:
    assert list(problems([GOOD, GOOD], root)) == ["A has more than one row"]


@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "a test renamed"])
def test_the_script_ends_with_1(tmp_path: Path, broken: bool) -> None:
    """Where somebody renames a case, or drops it."""
    program = (ROOT / "models/matrix.py").read_text().replace("parents[1]", f"joinpath({str(ROOT)!r})", 1)
    (tmp_path / "matrix.py").write_text(program)
    table = FILE.read_text()
    (tmp_path / "matrix.toml").write_text(table.replace('::glm4v"', '::glm4w"') if broken else table)
    ran = subprocess.run([sys.executable, str(tmp_path / "matrix.py")], capture_output=True, text=True, check=False)
    assert ran.returncode == int(broken), ran.stdout + ran.stderr
    assert ("glm4w" in ran.stdout) == broken
