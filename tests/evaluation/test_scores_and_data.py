"""Metrics against their definitions; datasets of one's own, and what is said of broken ones."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlcache_sgl.evaluation import scores
from vlcache_sgl.evaluation.data import TASKS, DataError, load_jsonl
from vlcache_sgl.evaluation.scores import METRICS, agreement, anls, levenshtein, relaxed, score

TEXT = st.text("abc d1", max_size=12)


def test_examples() -> None:
    assert doctest.testmod(scores).failed == 0


@given(TEXT, TEXT, TEXT)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@given(TEXT, TEXT)
def test_metrics_are_shares(answer: str, expected: str) -> None:
    for metric in METRICS.values():
        assert 0.0 <= metric(answer, expected) <= 1.0
        assert metric(expected, expected) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("$1,050", "1000", 1),
        ("0", "0", 1),
        ("1", "0", 0),
        ("inf", "1", 0),
        ("a", "1", 0),
    ],
)
def test_relaxed_tolerance(answer: str, expected: str, right: int) -> None:
    assert relaxed(answer, expected) == right


def test_the_best_answer_counts() -> None:
    assert score("exact", "b", ("a", "B")) == 1.0
    assert score("anls", "hallo", ("hello", "x")) == pytest.approx(anls("hallo", "hello")) == pytest.approx(0.8)
    assert score("exact", "b", ()) == 0.0


def test_agreement_is_a_prefix() -> None:
    assert agreement(["a", "x", "c"], ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert agreement(["a"], ["a", "b"]) == 0.5
    assert agreement(["a", "b", "c"], ["a", "b"]) == 1.0


# -- data -------------------------------------------------------------------------------------------------------------


def write(folder: Path, *entries: Any) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "mine.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries))
    return path


def test_reads_both_forms(tmp_path: Path) -> None:
    one = {"id": "x", "image": "a.png", "question": "q?", "answers": ["1", 2], "metric": "anls", "max_tokens": 5}
    many = {
        "images": ["a.png", "a.png"],
        "metric": "relaxed",
        "questions": [{"question": "p?", "answers": ["1"]}, {"question": "q?", "answers": ["2"], "metric": "exact"}],
    }
    first, second = load_jsonl(write(tmp_path, one, "", many))
    assert (first.id, first.task) == ("x", "mine")
    (question,) = first.questions
    assert (question.text, question.answers, question.metric, question.max_tokens) == ("q?", ("1", "2"), "anls", 5)
    assert second.id == "mine-3"
    assert [asked.metric for asked in second.questions] == ["relaxed", "exact"]
    assert [image.size for image in second.open_images()] == [(8, 8), (8, 8)]
    assert len(load_jsonl(write(tmp_path, one, many), limit=1)) == 1


def test_texts_need_no_image(tmp_path: Path) -> None:
    """A document stands in front of each of its questions."""
    asked = [{"question": "p?", "answers": ["1", "one"]}, {"question": "q?", "answers": ["2"]}]
    plain, document = load_jsonl(
        write(tmp_path, {"question": "q?", "answers": ["1"]}, {"text": "Once.", "questions": asked})
    )
    assert (plain.text_only, plain.open_images()) == (True, [])
    assert [question.text for question in (*plain.questions, *document.questions)] == [
        "q?",
        "Once.\n\np?",
        "Once.\n\nq?",
    ]
    assert document.questions[0].answers == ("1", "one")
    (both,) = load_jsonl(write(tmp_path, {"image": "a.png", "text": "Once.", **asked[0]}))
    assert (both.text_only, both.questions[0].text) == (False, "Once.\n\np?")


GOOD = {"image": "a.png", "question": "q?", "answers": ["1"]}
BROKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "no json": (("{",), "line 1: not JSON"),
    "no object": (("[]",), "line 1: not an object"),
    "second line": ((GOOD, {**GOOD, "image": "b.png"}), "line 2: no such image"),
    "no image": (({**GOOD, "image": "mine.jsonl"},), "line 1: not an image: .*mine.jsonl"),
    "unknown key": (({**GOOD, "answer": "1"},), "unknown answer; known: answers"),
    "images a text": (({**GOOD, "images": "a.png"},), "`images`"),
    "text a list": (({"text": ["a"], "question": "q?", "answers": ["1"]},), "`text`"),
    "no answers": (({"image": "a.png", "question": "q?"},), "`answers`"),
    "answers a text": (({**GOOD, "answers": "1"},), "`answers`"),
    "unknown metric": (({**GOOD, "metric": "bleu"},), "choose one of: exact"),
    "no tokens": (({**GOOD, "max_tokens": 0},), "max_tokens"),
    "same id": (({**GOOD, "id": 1}, {**GOOD, "id": "1"}), "same id"),
    "empty": (("",), "no samples"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    entries, message = BROKEN[case]
    with pytest.raises(DataError, match=message):
        load_jsonl(write(tmp_path, *entries))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize("task", TASKS)
def test_bundled_tasks_are_the_same_everywhere(task: str) -> None:
    once, again, other = TASKS[task](0), TASKS[task](0), TASKS[task](1)
    assert once == again
    assert once.id != other.id
    assert [i.tobytes() for i in once.open_images()] == [i.tobytes() for i in again.open_images()]
    assert len({question.text for question in once.questions}) == len(once.questions)


def test_only_one_picture_answers(tmp_path: Path) -> None:
    sample = TASKS["images"](3)
    assert len(sample.open_images()) == 3
    assert len(sample.questions) == 1
