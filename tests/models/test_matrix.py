"""The matrix of architectures says what is wrong with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from models.matrix import FILE, Row, main, problems, read_rows

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


def test_a_case_that_was_renamed_ends_the_script_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "matrix.toml"
    table.write_text(FILE.read_text().replace('::glm4v"', '::glm4w"'))
    assert main(table) == 1
    assert "no case 'glm4w'" in capsys.readouterr().out
    assert main() == 0
