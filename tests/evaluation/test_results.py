"""From records to tables: intervals, comparisons, resuming.  The server is real in tests/e2e/test_fidelity.py."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlcache_sgl.cli import compare as compare_command
from vlcache_sgl.cli.eval import dump, write_results
from vlcache_sgl.evaluation import report, run, stats
from vlcache_sgl.evaluation.compare import compare, select
from vlcache_sgl.evaluation.data import TASKS
from vlcache_sgl.evaluation.report import by_index, divergence, markdown, paired, summarise
from vlcache_sgl.evaluation.run import Answers, Condition, EvalError, missing, parse_condition


def record(sample: str, condition: str, *scores: float, task: str = "t", **more: Any) -> dict[str, Any]:
    questions = [
        {"answer": f"{score}", "score": score, "prompt_tokens": 100, "cached_tokens": 40, "ratio": 1.0, **more}
        for score in scores
    ]
    return {"sample": sample, "task": task, "condition": condition, "questions": questions}


@pytest.mark.parametrize("module", [stats, run, report])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "condition",
    [
        Condition(None, "1.0"),
        Condition("vlcache", "0.1"),
        Condition("scorer=a,allocator=b,recent=0.1", "0.05", "private"),
    ],
)
def test_names_and_conditions(condition: Condition) -> None:
    assert parse_condition(condition.name) == condition


def test_only_paired_samples_are_compared() -> None:
    """Sample c is not answered under the second policy; the third is of an earlier run and has one sample."""
    records = [record(name, "full", 1.0) for name in "abc"]
    records += [record(name, "p@0.1", 0.0) for name in "abc"]
    records += [record(name, "q@0.1", 1.0) for name in "ab"]
    records += [record("a", "r@0.1", 1.0)]
    rows = {row["condition"]: row for row in summarise(paired(records, ["full", "p@0.1", "q@0.1"]))}
    assert {name: row["questions"] for name, row in rows.items()} == {"full": 2, "p@0.1": 2, "q@0.1": 2}
    assert len(paired(records, ["r@0.1"])) == 4


def test_shared_and_private_have_the_same_questions() -> None:
    """A sample with one question is asked once for both; no arm lacks it."""
    several = [record("a", name, 1.0, 0.0) for name in ("full", "p@0.1", "p@0.1 private")]
    one = [record("b", name, 1.0) for name in ("full", "p@0.1")]
    rows = summarise(paired([*several, *one], ["full", "p@0.1", "p@0.1 private"]))
    assert [(row["condition"], row["questions"]) for row in rows] == [
        ("full", 3),
        ("p@0.1 private", 3),
        ("p@0.1", 3),
    ]


def test_a_server_that_does_not_count_cached_tokens_is_not_said_to_have_none() -> None:
    (row,) = summarise([record("a", "full", 1.0, cached_tokens=None)])
    assert row["cached"] is None
    assert "not reported" in markdown([row])


# -- intervals --------------------------------------------------------------------------------------------------------


def test_wilson_for_single_questions() -> None:
    assert stats.interval({str(i): [float(i < 19)] for i in range(20)}) == stats.wilson(19, 20)


def test_questions_of_one_picture_are_not_independent() -> None:
    """Ten images with eight equal answers each say no more than ten questions."""
    rng = np.random.default_rng(0)
    per_picture = rng.integers(0, 2, 10).astype(float)
    low, high = stats.interval({str(i): [s] * 8 for i, s in enumerate(per_picture)})
    single_low, single_high = stats.bootstrap({str(i): [s] for i, s in enumerate(per_picture)})
    assert (low, high) == (single_low, single_high)
    assert high - low > 0.4


def test_no_spread_is_not_certainty() -> None:
    low, high = stats.interval({str(i): [1.0, 0.0] for i in range(5)})
    assert low < 0.3
    assert high > 0.7


def test_a_bootstrap_covers() -> None:
    """About 95 % of intervals hold the truth."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        low, high = stats.bootstrap({str(i): list(rng.random(4) < 0.6) for i in range(40)})
        hits += low <= 0.6 <= high
    assert hits >= 88


# -- summary ----------------------------------------------------------------------------------------------------------


def test_summary_compares_with_the_full_cache() -> None:
    records = [
        record("a", "full", 1.0, 1.0),
        record("b", "full", 1.0, 0.0),
        record("a", "p@0.1", 1.0, 0.0, ratio=0.1),
        record("b", "p@0.1", 1.0, 0.0, ratio=0.1),
        record("b", "p@0.2", 1.0, 0.0, failed="x"),
    ]
    full, larger, smaller = summarise(records)
    assert [row["condition"] for row in (full, larger, smaller)] == ["full", "p@0.2", "p@0.1"]
    assert (full["score"], smaller["score"]) == (0.75, 0.5)
    assert (full["same"], smaller["same"]) == (1.0, 0.75)
    assert (full["ratio"], smaller["ratio"]) == (1.0, 0.1)
    assert smaller["cached"] == 0.4
    assert (full["failed"], larger["failed"]) == (0, 2)
    rows = by_index(records, "p@0.1", "t")
    assert [(row["index"], row["questions"], row["score"]) for row in rows] == [(1, 2, 1.0), (2, 2, 0.0)]
    text = markdown([full, larger, smaller])
    assert "| `p@0.1` | 4 | 0.500 |" in text


def test_without_a_full_cache_nothing_is_the_same() -> None:
    (row,) = summarise([record("a", "p@0.1", 1.0)])
    assert row["same"] is None


def test_divergence_ends_where_contexts_part() -> None:
    ours = {"tokens": ["a", "b", "x", "d"], "logprobs": [-1.0, -2.0, -9.0, -9.0]}
    theirs = {"tokens": ["a", "b", "c", "d"], "logprobs": [-1.5, -2.0, -1.0, -1.0]}
    assert divergence(ours, theirs) == pytest.approx(0.25)
    assert divergence(theirs, theirs) == 0.0


def test_results_are_files(tmp_path: Path) -> None:
    records = [record("a", "full", 1.0), record("a", "p@0.1", 0.0), record("a", "p@0.2", 1.0)]
    rows = write_results(tmp_path, records, records, {"model": "m"})
    saved = json.loads((tmp_path / "result.json").read_text())
    assert (saved["records"], saved["summary"], saved["model"]) == (records, rows, "m")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(dump(saved).splitlines()) > len(records)


def test_forced_answers_have_a_mean_of_their_own() -> None:
    """Of the questions that could be measured; the others are counted."""
    records = [record("a", "full", 1.0, answer_logprob=-0.5), record("b", "full", 1.0, not_forced="no")]
    records += [record("a", "p@0.1", 0.0, answer_logprob=-7.5), record("b", "p@0.1", 0.0, answer_logprob=-2.5)]
    full, ours = summarise(records)
    assert (full["answer_logprob"], full["answers_forced"]) == (-0.5, 1)
    assert (ours["answer_logprob"], ours["answer_interval"]) == (-5.0, [-7.5, -2.5])
    assert "-0.50 (-0.50 to -0.50), 1 left out" in markdown([full, ours])


def test_what_lacks_a_forced_answer_is_asked_again(tmp_path: Path) -> None:
    """And the later record counts, here and when the folder is opened again."""
    answers = Answers(tmp_path, "m")
    answers.add(record("a", "full", 1.0))
    assert answers.done() == {("a", "full")}
    assert answers.done(forced=True) == set()
    answers.add(record("a", "full", 0.0, answer_logprob=-1.0))
    for opened in (answers, Answers(tmp_path, "m")):
        assert opened.done(forced=True) == {("a", "full")}
        assert [one["questions"][0]["score"] for one in opened.records] == [0.0]
        assert opened.of(Condition(None, "1.0"), [replace(TASKS["single"](0), id="a")]) == opened.records
        assert opened.of(Condition(None, "1.0"), [TASKS["single"](0)]) == []


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    samples = [TASKS["single"](i) for i in range(3)]
    conditions = [Condition(None, "1.0"), Condition("vlcache", "0.1"), Condition("vlcache", "0.1", "private")]
    answers = Answers(tmp_path, "m")
    work = missing(samples, conditions, answers.done())
    assert len(work) == 6  # one question each: private is the same as shared
    for sample, condition in work[:4]:
        answers.add(record(sample.id, condition.name, 1.0))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"sample": "single-2", "cond')  # killed while writing
    again = Answers(tmp_path, "m")
    assert again.records == answers.records
    assert missing(samples, conditions, again.done()) == work[4:]
    again.add(record("single-2", "full", 1.0))
    assert len(Answers(tmp_path, "m").records) == 5
    with pytest.raises(EvalError, match="answers of m, not of other"):
        Answers(tmp_path, "other")


def test_conditions_take_turns() -> None:
    """An evaluation that is cut short has asked all conditions about as often."""
    samples = [TASKS["single"](i) for i in range(4)]
    conditions = [Condition("a", "0.1"), Condition("b", "0.1")]
    names = [condition.name for _, condition in missing(samples, conditions, set())]
    assert names == ["a@0.1", "b@0.1", "b@0.1", "a@0.1"] * 2


# -- comparing --------------------------------------------------------------------------------------------------------


def test_paired_difference() -> None:
    a = [record(str(i), "full", 1.0) for i in range(20)]
    b = [record(str(i), "p@0.1", float(i >= 8)) for i in range(20)]
    found = compare(a, b)
    assert (found.questions, found.samples, found.difference) == (20, 20, pytest.approx(-0.4))
    assert found.interval[1] < 0
    assert found.verdict == "B is worse"
    assert [flip.lost for flip in found.flips] == [True] * 8
    back = compare(b, a)
    assert back.difference == pytest.approx(0.4)
    assert back.verdict == "B is better"
    assert compare(a, a).verdict == "no question scores differently"


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Half of the questions are hard for both; B loses few of the others, always the same way."""
    a = [record(str(i), "full", float(i % 2)) for i in range(60)]
    b = [record(str(i), "p", float(i % 2 and i > 11)) for i in range(60)]
    first, second = (stats.interval({r["sample"]: [r["questions"][0]["score"]] for r in rs}) for rs in (a, b))
    assert second[1] > first[0]  # they overlap
    assert compare(a, b).interval[1] < 0


def test_chance_is_called_chance() -> None:
    a = [record(str(i), "full", float(i % 3 > 0)) for i in range(30)]
    b = [record(str(i), "p", float((i + 1) % 3 > 0)) for i in range(30)]
    assert compare(a, b).verdict == "no difference beyond chance"


def test_only_common_samples_count() -> None:
    assert compare([record("a", "x", 1.0), record("b", "x", 1.0)], [record("b", "y", 0.0)]).samples == 1
    with pytest.raises(EvalError, match="no sample in common"):
        compare([record("a", "x", 1.0)], [record("b", "y", 1.0)])
    with pytest.raises(EvalError, match="1 questions in A, 2 in B"):
        compare([record("a", "x", 1.0)], [record("a", "y", 1.0, 1.0)])


def test_unknown_conditions_are_listed() -> None:
    with pytest.raises(EvalError, match=r"choose one of: full, p@0\.1"):
        select({"records": [record("a", "full", 1.0), record("a", "p@0.1", 1.0)]}, "q")


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    records = [record(str(i), "full", 1.0) for i in range(9)] + [record(str(i), "p@0.1", 0.0) for i in range(9)]
    write_results(tmp_path, records, records, {})
    assert compare_command.main([f"{tmp_path}#full", "p@0.1"]) == 1
    printed = capsys.readouterr().out
    assert "B - A: -1.000" in printed
    assert "9 right ones became wrong" in printed
    assert compare_command.main([f"{tmp_path}#p@0.1", f"{tmp_path}/result.json#full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 1.0
    assert compare_command.main([str(tmp_path), "nothing"]) == 2
    assert compare_command.main([str(tmp_path / "none"), "full"]) == 2
