"""`vlcache calibrate`: what it refuses before a server is started, what it asks, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlcache_sgl.api.testing import synthetic_prompt
from vlcache_sgl.cli import calibrate
from vlcache_sgl.policy import resolve
from vlcache_sgl.runtime.requests import LONGEST_SPEC


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scorer", "vlcache"), "--scorer vlcache looks at the first question"),
        (("--scorer", "nope"), "unknown scorer 'nope'"),
        (("--questions", "1"), "--questions: at least 2"),
        (("--pictures", "0"), "must be at least 1"),
        (("--tolerance", "1"), "--tolerance 1"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--base-url", "http://127.0.0.1:9"), "no SGLang server answers"),
        (("--model", "none", "--base-url", "http://127.0.0.1:9"), "--model is for a server that is started here"),
        (("--model", "/none"), "--model /none: no such folder"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: Any, arguments: tuple[str, ...], message: str) -> None:
    assert calibrate.main(["--output", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr().out
    assert message in printed
    assert "Traceback" not in printed


def parsed(*arguments: str) -> Any:
    return calibrate._parser().parse_args(arguments)


def test_bundled_pictures_are_those_of_the_seed() -> None:
    samples = calibrate.samples_of(parsed("--pictures", "2", "--questions", "3"))
    assert [sample.id for sample in samples] == ["receipt-50000 x3", "receipt-50001 x3"]
    assert all(len(sample.questions) == 3 for sample in samples)
    (other,) = calibrate.samples_of(parsed("--pictures", "1", "--questions", "3", "--seed", "50001"))
    assert other == samples[1]


def test_pictures_of_a_file_are_drawn_by_seed_and_need_two_questions(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    asked = [{"question": f"{number}?", "answers": ["x"]} for number in range(5)]
    lines = [{"id": str(number), "image": "a.png", "questions": asked[: 1 + number % 3]} for number in range(30)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first, again, other = (
        calibrate.samples_of(parsed("--data", str(path), "--pictures", "6", "--questions", "2", "--seed", seed))
        for seed in ("1", "1", "2")
    )
    assert first == again != other
    assert len({sample.id for sample in first}) == 6
    assert all(len(sample.questions) == 2 for sample in (*first, *other))
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match="no picture has two questions"):
        calibrate.samples_of(parsed("--data", str(path)))


def test_a_trial_is_a_policy_that_a_request_may_ask_for() -> None:
    """Also for a model of 80 layers."""
    shares = (1.0, 0.25, 0.1, 0.0) * 20
    text = calibrate.policy_text("keydiff", shares)
    assert len(text) <= LONGEST_SPEC
    resolve(text, from_request=True).require(synthetic_prompt(num_layers=80))
