"""`vlcache eval`, `compare`, `inspect` and `top` against a running server, as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from vlcache_sgl.cli import compare, inspect, top
from vlcache_sgl.cli import eval as evaluation

TENTH_AND_FRONT = (4 + 0.1 * 592) / 596
"""Kept share of a prompt of the bundled task at budget 0.1: the four tokens in front of its image stay whole."""


def run_eval(server: Any, folder: Path, *arguments: str) -> int:
    return evaluation.main(["--base-url", server.url, "--output", str(folder), *arguments])


@pytest.mark.timeout(300)
def test_an_evaluation_that_is_interrupted_goes_on(ours_tenth: Any, tmp_path: Path, capsys: Any) -> None:
    """A time limit of nothing asks nothing; the next run asks everything, a third one nothing again."""
    tasks = ("--task", "single", "requery", "--samples", "2", "--policy", "vlcache", "random")
    assert run_eval(ours_tenth, tmp_path, *tasks, "--time-limit", "1e-6") == 3
    assert run_eval(ours_tenth, tmp_path, *tasks) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["records"]) == 2 * 2 * 3
    rows = {(row["task"], row["condition"]): row for row in result["summary"]}
    assert rows["single", "full"]["score"] == rows["single", "vlcache@0.1"]["score"] == 1.0
    assert rows["single", "random@0.1"]["score"] == 0.0
    assert rows["single", "vlcache@0.1"]["ratio"] == pytest.approx(TENTH_AND_FRONT, abs=1e-3)
    shared = rows["requery", "vlcache@0.1"]
    assert shared["cached"] > 0.8  # seven of eight questions found the image
    assert shared["questions"] == 16
    assert min(shared["score"], rows["requery", "full"]["score"]) > 0.9  # and were answered as if alone
    assert all(row["failed"] == 0 for row in result["summary"])
    before = (tmp_path / "answers.jsonl").read_text()
    assert run_eval(ours_tenth, tmp_path, *tasks) == 0
    assert (tmp_path / "answers.jsonl").read_text() == before
    assert "everything has been asked already" in capsys.readouterr().out
    assert compare.main([str(tmp_path), "random@0.1", "--task", "requery"]) == 1
    assert "right ones became wrong" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_private_questions_compress_for_themselves(ours_tenth: Any, tmp_path: Path) -> None:
    task = ("--task", "requery", "--samples", "1", "--sharing", "both", "--no-full")
    assert run_eval(ours_tenth, tmp_path, *task) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    shared, private = sorted(result["records"], key=lambda record: record["condition"])
    assert (shared["condition"], private["condition"]) == ("vlcache@0.1", "vlcache@0.1 private")
    assert [question["cached_tokens"] > 500 for question in shared["questions"]] == [False] + [True] * 7
    assert not any(question["cached_tokens"] for question in private["questions"])
    assert all(question["ratio"] == pytest.approx(TENTH_AND_FRONT, abs=1e-3) for question in private["questions"])
    assert sum(question["score"] for question in private["questions"]) >= 7


def test_a_dataset_of_ones_own(ours_tenth: Any, picture: Any, tmp_path: Path) -> None:
    drawn = picture(7900, 20, 20)
    drawn.image.save(tmp_path / "a.png")
    question = drawn.questions[0]
    line = {
        "image": "a.png",
        "question": question.text,
        "answers": [question.answer],
        "metric": "anls",
        "max_tokens": 8,
    }
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    assert run_eval(ours_tenth, tmp_path / "out", "--data", str(tmp_path / "mine.jsonl")) == 0
    rows = json.loads((tmp_path / "out/result.json").read_text())["summary"]
    assert [(row["task"], row["score"]) for row in rows] == [("mine", 1.0), ("mine", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--budget", "2"), "--budget must be a fraction in (0, 1], got '2'"),
        (("--budget", "abc"), "--budget must be a fraction in (0, 1], got 'abc'"),
        (
            ("--auto", "--samples", "20"),
            "cannot show a loss of at most 0.02, even if no answer changes: give at least 189",
        ),
        (("--auto", "--loss", "2"), "--loss must be a fraction in (0, 1), got '2'"),
        (("--auto", "--policy", "a", "b"), "--auto takes one --policy"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--model", "models/tinyvlm/grounded"), "--model is for a server that is started here"),
    ],
)
def test_a_wrong_request_is_one_line(
    ours_tenth: Any, tmp_path: Path, capsys: Any, arguments: tuple[str, ...], message: str
) -> None:
    assert run_eval(ours_tenth, tmp_path, "--samples", "1", *arguments) == 2
    printed = capsys.readouterr().out
    assert message in printed
    assert "Traceback" not in printed
    ours_tenth.assert_alive()


def test_an_inspection(ours_tenth: Any, picture: Any, tmp_path: Path, capsys: Any) -> None:
    drawn = picture(7910, 20, 24)
    drawn.image.save(tmp_path / "a.png")
    question = drawn.questions[0]
    command = ["--image", str(tmp_path / "a.png"), "--question", question.text, "--output", str(tmp_path / "seen")]
    assert inspect.main([*command, "--base-url", ours_tenth.url]) == 0
    printed = capsys.readouterr().out
    assert printed.count(question.answer) == 2  # at the full and at the compressed cache
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    page = (tmp_path / "seen.html").read_text()
    assert f"<td>{question.answer}</td>" in page
    assert "10.7% of 6 layers" in page  # a tenth of 496 tokens and the four in front of the image, of 500
    (shares,) = re.findall(r"what is kept, by layer: ([\d %,]+)", " ".join(printed.split()))
    assert shares.count("%") == 6
    assert f"what is kept has, by layer: {shares.strip()}" in page


def test_right_answers_are_forced(ours_tenth: Any, tmp_path: Path, capsys: Any) -> None:
    """What answers right is sure of it; the two that keep noise give the right answer less than e^-3."""
    task = ("--task", "single", "--samples", "2", "--policy", "vlcache", "random", "--logprob")
    assert run_eval(ours_tenth, tmp_path, *task) == 0
    rows = {row["condition"]: row for row in json.loads((tmp_path / "result.json").read_text())["summary"]}
    assert all(row["answers_forced"] == 2 for row in rows.values())
    assert rows["full"]["answer_logprob"] > -0.1
    assert rows["vlcache@0.1"]["answer_logprob"] > -0.5
    assert rows["random@0.1"]["answer_logprob"] < -3.0
    assert "log-probability of the right answer" in (tmp_path / "table.md").read_text()


def test_the_smallest_budget_is_found(ours_tenth: Any, tmp_path: Path, capsys: Any) -> None:
    """From the largest down; the first that is not shown to be within ends it."""
    task = ("--auto", "--task", "single", "--samples", "6", "--loss", "0.45", "--budget", "0.1", "0.015", "0.2", "0.01")
    assert run_eval(ours_tenth, tmp_path, *task) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "--kv-policy vlcache --kv-budget 0.1"
    asked = {record["condition"] for record in json.loads((tmp_path / "result.json").read_text())["records"]}
    assert asked == {"full", "vlcache@0.2", "vlcache@0.1", "vlcache@0.015"}
    assert run_eval(ours_tenth, tmp_path, *task[:-4], "0.015") == 1
    assert "no budget tried is shown to lose at most 0.45 of 6 questions" in capsys.readouterr().out


def test_prompts_that_the_server_does_not_compress_are_not_measured(
    ours_tenth: Any, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": "Long ago.", "question": "q?", "answers": ["1"]}))
    assert run_eval(ours_tenth, tmp_path, "--data", str(tmp_path / "mine.jsonl")) == 2
    assert "mine-1 has no image" in (printed := capsys.readouterr().out)
    assert "--kv-scope all" in printed


def test_texts_are_asked_of_a_server_that_compresses_them(limited: Any, tmp_path: Path) -> None:
    document = " ".join(f"line {number}: the code is {number * 7919 % 9973}" for number in range(60))
    line = {"text": document, "questions": [{"question": "which?", "answers": ["1"]}] * 2, "max_tokens": 2}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    limits = ("--policy", "snapkv", "--budget", "0.3", "--no-full", "--logprob")
    assert run_eval(limited, tmp_path / "out", "--data", str(tmp_path / "mine.jsonl"), *limits) == 0
    (record,) = json.loads((tmp_path / "out/result.json").read_text())["records"]
    first, second = record["questions"]
    assert first["ratio"] == pytest.approx(0.3, abs=0.01)
    assert second["cached_tokens"] > 100  # the document, as the first question has left it
    assert all(question["answer_tokens"] == 1 for question in record["questions"])


def test_a_file_that_is_no_image_is_one_line(ours_tenth: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_text("not an image")
    (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "a.png", "question": "q?", "answers": ["1"]}))
    assert run_eval(ours_tenth, tmp_path, "--data", str(tmp_path / "mine.jsonl")) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "mine.jsonl, line 1: not an image: " in line


def test_health_polls_are_nobodys_prompts(ours_tenth: Any) -> None:
    before = ours_tenth.settled()["requests_skipped"]
    for _ in range(3):
        assert httpx.get(f"{ours_tenth.url}/health_generate", timeout=60).status_code == 200
    assert ours_tenth.settled()["requests_skipped"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "nope"), "unknown policy"),
        (("--budget", "1.0"), "nothing was compressed"),
        (("--image", "none.png"), "none.png"),
    ],
)
def test_an_inspection_that_cannot_be(ours_tenth: Any, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    assert inspect.main(["--base-url", ours_tenth.url, *arguments]) == 2
    assert message in capsys.readouterr().out


def test_top_shows_a_running_server(ours_tenth: Any, picture: Any, capsys: Any) -> None:
    ours_tenth.flush()
    drawn = picture(7920, 20, 20)
    for question in drawn.questions[:2]:
        ours_tenth.ask(question.text, drawn.image)
    state = ours_tenth.settled()
    assert top.main(["--once", "--base-url", ours_tenth.url]) == 0
    shown = capsys.readouterr().out
    assert "vlcache, budget 0.1" in shown
    assert f"{state['cells_tree'] / state['cells_total']:.1%}" in shown
    assert str(state["prefix_hit_tokens"]) in shown


def test_a_server_without_a_policy_says_so(stock: Any, tmp_path: Path, capsys: Any) -> None:
    assert top.main(["--once", "--base-url", stock.url]) == 1
    assert run_eval(stock, tmp_path) == 2
    assert capsys.readouterr().out.count("runs without --kv-policy") == 2
