"""`vlcache eval`, `compare`, `inspect` and `top` against a running server, as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlcache_sgl.cli import compare, inspect, top
from vlcache_sgl.cli import eval as evaluation


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
    assert rows["single", "vlcache@0.1"]["ratio"] == pytest.approx(0.1, abs=1e-3)
    shared = rows["requery", "vlcache@0.1"]
    assert shared["cached"] > 0.8  # seven of eight questions found the picture
    assert shared["questions"] == 16
    assert shared["score"] < 0.5 < rows["requery", "full"]["score"]
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
    assert all(question["ratio"] == pytest.approx(0.1, abs=1e-3) for question in private["questions"])
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
        (("--budget", "2"), "--budget 2"),
        (("--data", "none.jsonl"), "none.jsonl"),
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
    assert "10.0% of 6 layers" in page
    (shares,) = re.findall(r"what is kept, by layer: ([\d %,]+)", " ".join(printed.split()))
    assert shares.count("%") == 6
    assert f"what is kept has, by layer: {shares.strip()}" in page


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
