"""From answers to the tables of docs/sharing.md."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.sharing import identity, questions
from benchmarks.sharing.questions import ARMS, EXACT, FULL, OFF, POLICY, Asked


def result(**texts: str) -> dict[str, Any]:
    """Two images, two questions each: milliseconds by arm, and what the second question is answered."""
    times = {FULL: 10.0, EXACT: 12.0, OFF: 40.0, POLICY: 10.0}
    answers = [
        Asked(image, question, arm, text := texts.get(arm, "A") if question else "A", text == "A", times[arm], 0, 9)
        for image in range(2)
        for question in range(2)
        for arm in ARMS
    ]
    return {
        "model": "tinyvlm",
        "command": "python benchmarks/run.py questions",
        "host": {"date": "2026-01-01T00:00:00+00:00", "device": "here"},
        "answers": [asdict(answer) for answer in answers],
        "cells_held": dict.fromkeys(ARMS, 0.5),
    }


def test_later_questions_are_counted_apart() -> None:
    rows = {row["arm"]: row for row in questions.summary(result(policy="B"))}
    assert (rows[POLICY]["first"], rows[POLICY]["later"]) == (1.0, 0.0)
    assert (rows[EXACT]["first"], rows[EXACT]["later"]) == (1.0, 1.0)
    assert (rows[EXACT]["same"], rows[POLICY]["same"]) == (4, 2)
    assert rows[EXACT]["over_hit"] == pytest.approx(1.2)
    assert rows[EXACT]["off_over"] == pytest.approx(40 / 12)


def test_the_table_names_its_command() -> None:
    table = questions.table(result())
    assert "| exact | 1.00 | 1.000 | 4 of 4 | 12 | 1.20x | 3.33x | 0.500 |" in table
    assert "`python benchmarks/run.py questions`, tinyvlm, 2026-01-01, here." in table


@pytest.mark.parametrize("benchmark", [questions, identity], ids=["questions", "identity"])
def test_the_page_is_current(benchmark: Any) -> None:
    """After a new result: `python benchmarks/run.py questions --page`, and `identity --page`."""
    page = benchmark.PAGE.read_text()
    assert page == benchmark.rendered(page)


def modes(*answers: identity.Asked) -> dict[str, Any]:
    host = {"date": "2026-01-01T00:00:00+00:00", "device": "here"}
    answered = {"a mode": {"flags": [], "answers": [asdict(answer) for answer in answers]}}
    return {"command": "python benchmarks/run.py identity", "host": host, "modes": answered}


def test_answers_that_differ_are_named() -> None:
    same = identity.Asked("image 1, question 0", "A", "A", True, True, 100, 90)
    tie = identity.Asked("image 2, question 0", "B", "A", False, True, 100, 0, 0.0004)
    table = identity.table(modes(same, same, tie))
    assert "| a mode | 3 | 2 | 2 | 2, 3 of 3 |" in table
    assert "| **together** | 3 | 2 | 2 | 2, 3 of 3 |" in table
    assert "* image 2, question 0: `B`, alone `A`; first and second choice were 0.000400 nats apart, a tie" in table
    wrong = identity.Asked("image 3, question 0", "B", "A", False, True, 100, 0, 0.5)
    assert "0.500000 nats apart\n" in identity.table(modes(wrong))
    assert identity.unexplained(modes(same, tie, wrong)) == [wrong]
