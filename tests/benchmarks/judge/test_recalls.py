"""Programs about recall: answers, loyalty of long answers, and what they write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.common.host import ROOT
from benchmarks.judge import instruments, loyalty, recall_page, recalls, sketches, sketching
from benchmarks.judge.cases import CaseId
from benchmarks.judge.conditions import FULL, Condition
from benchmarks.judge.recalling import Rule
from benchmarks.judge.recalls import Answer, Arm, Recalls
from benchmarks.judge.turn import moments
from benchmarks.judge.verdicts import Judge
from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.evaluation.tasks.receipts import make_receipt
from vlcache_sgl.policy import resolve

CASE = CaseId("needle", 60, 100)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Judge:
    return Judge(checkpoint)


@pytest.mark.parametrize("medium", ["text", "image"])
def test_answers_without_recall_are_the_judges(judge: Judge, medium: str) -> None:
    """And with recall of everything the full cache's, whatever is kept."""
    policies = ("keydiff", "vlcache")
    none = [Arm(medium, policy, 0.2, Rule(0)) for policy in policies]  # type: ignore[arg-type]
    every = [Arm(medium, policy, 0.2, Rule(1000)) for policy in policies]  # type: ignore[arg-type]
    found = Recalls(judge).answers(CASE, [*none, *every])
    asked = [Condition(medium, "first", policy, 0.2) for policy in policies]  # type: ignore[arg-type]
    full = Condition(medium, "first", FULL, 1.0)  # type: ignore[arg-type]
    expected = judge.verdicts(CASE, [*asked, full], {policy: resolve(policy) for policy in policies})
    for arm, condition in [*zip(none, asked, strict=True), *((arm, full) for arm in every)]:
        verdict = expected[condition.name]
        assert verdict is not None
        assert found[arm.name].right == verdict.right
        assert found[arm.name].log_probability == pytest.approx(verdict.log_probability, abs=1e-3)
    assert found[recalls.FULL].log_probability == pytest.approx(found[every[0].name].log_probability, abs=1e-3)


def test_an_arm_has_a_name_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    recalls.add_arguments(parser)
    line = "--among layer head --ranks mass peak logit --beside prompt kept evicted"
    line += " --thresholds 0 0.1 --sketches signs keys"
    arms = recalls.arms_of(parser.parse_args(line.split()))
    assert len(arms) == 2 * 6 * 2 * 5 * 2 * 3 * 3 * 2 * 2
    assert len({arm.name for arm in arms}) == len(arms)


def test_records_are_gone_on_with(tmp_path: Path) -> None:
    """Those of other weights do not count, nor does a line that was cut off."""
    path = tmp_path / "answers.jsonl"
    mine = {"stamp": "a", "case": ["needle", 60, 100], "answers": {"x": [True, -1.0, 1.0]}}
    lines = [json.dumps(mine), json.dumps({**mine, "stamp": "b", "case": ["list", 60, 100]}), json.dumps(mine)[:30]]
    path.write_text("\n".join(lines))
    assert recalls.read_records(path, "a") == {CASE: {"x": Answer(True, -1.0, 1.0)}}


def test_the_program_writes_its_result(checkpoint: Path, tmp_path: Path) -> None:
    """Twice: the second run answers nothing."""
    parser = argparse.ArgumentParser()
    recalls.add_arguments(parser)
    line = f"--model {checkpoint} --weights off --tasks needle:60 --seeds 100-101 --policies keydiff --budgets 0.2"
    line += f" --media text --tokens 0 8 --answers {tmp_path}/a.jsonl --output {tmp_path}/r.json"
    arguments = parser.parse_args(line.split())
    console = Console(width=140, record=True)
    assert recalls.main(arguments, console) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["rule"]["tokens"] for row in result["summary"]] == [0, 8]
    assert all(row["count"] == 2 == len(row["answers"]) for row in result["summary"])
    size = (tmp_path / "a.jsonl").stat().st_size
    assert recalls.main(arguments, console) == 0
    assert (tmp_path / "a.jsonl").stat().st_size == size


@pytest.mark.parametrize("line", ["--tasks rhyme:60", "--seeds x", "--policies rhyme", "--model nowhere"])
def test_a_wrong_argument_is_one_line(line: str, checkpoint: Path) -> None:
    parser = argparse.ArgumentParser()
    recalls.add_arguments(parser)
    console = Console(width=140, record=True)
    assert recalls.main(parser.parse_args(["--model", str(checkpoint), *line.split()]), console) == 2
    assert len(console.export_text().strip().splitlines()) == 1


# -- loyalty -----------------------------------------------------------------------------------------------------------


def test_what_a_step_finds_of_earlier_ones() -> None:
    """One layer, two wanted tokens a step; an area of two keeps the last step's, of four those before it, too."""
    chosen = torch.tensor([[[0, 1], [1, 2], [0, 3], [2, 1]]])
    once, twice = loyalty.hit_rates(chosen, (1, 2), 10)
    assert once == pytest.approx((1 + 0 + 0) / 2 / 3)
    # Before the third step the area holds 1, 2, 0; before the fourth 0, 3, 1, 2.
    assert twice == pytest.approx((1 + 1 + 2) / 2 / 3)


def test_the_same_wants_are_always_found() -> None:
    chosen = torch.arange(5).expand(3, 7, 5)
    assert loyalty.hit_rates(chosen, (1, 2), 50) == [1.0, 1.0]
    other = torch.arange(35).view(1, 7, 5)
    assert loyalty.hit_rates(other, (1, 4), 50) == [0.0, 0.0]


def test_an_answer_with_all_tokens_recalled_is_the_full_caches(judge: Judge, checkpoint: Path) -> None:
    asked = judge.cases.ask(CASE, loyalty.QUESTION)
    (answer,) = loyalty.answers(checkpoint, [asked.prompt], 12)
    arms = loyalty.Loyalty(judge, ("keydiff",), (0.1,), (0, 1000))
    arms.compare(asked.prompt, asked.lines, answer)
    without, whole = arms.summary()
    assert (whole["agreement"], whole["first"]) == (1.0, 11.0)
    assert without["agreement"] <= 1.0
    assert arms.hits() == [
        {"policy": "keydiff", "budget": 0.1, "tokens": 1000, "rates": {"1": 1.0, "2": 1.0, "4": 1.0}}
    ]


def test_the_given_answer_is_the_full_caches_own(judge: Judge, checkpoint: Path) -> None:
    """Prompts of different length in one batch."""
    prompts = [judge.cases.ask(CaseId("needle", size, 100), loyalty.QUESTION).prompt for size in (40, 60)]
    for prompt, answer in zip(prompts, loyalty.answers(checkpoint, prompts, 8), strict=True):
        hidden, _ = judge.network.read([*prompt, *answer[:-1]])
        assert judge.network.log_probabilities(hidden[len(prompt) - 1 :]).argmax(-1).tolist() == answer


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_cell_is_bold_where_the_target_is_met() -> None:
    row = {"score": 0.76, "full_score": 0.8, "log_probability": -1.4, "full_log_probability": -1.3}
    assert recall_page._cell(row) == "**0.76, -1.40**"
    assert recall_page._cell({**row, "score": 0.75}) == "0.75, -1.40"
    assert recall_page._cell({**row, "log_probability": -1.41}) == "0.76, -1.41"


# -- sketches ----------------------------------------------------------------------------------------------------------


def test_the_keys_themselves_find_everything(judge: Judge) -> None:
    """And no sketch finds more; every count of every kept set has a row."""
    comparison = sketches.Comparison(judge, ("keydiff",), (0.2,))
    comparison.add(CASE)
    rows = comparison.summary()
    assert len(rows) == len(comparison.sketches) * len(sketches.COUNTS)
    best = {row["tokens"]: row for row in rows if row["sketch"] == "the keys themselves"}
    assert all(row["found"] == 1.0 for row in best.values())
    # Ranked by shares of the evicted tokens alone, which differ from shares of all by a factor per head.
    assert all(row["mass"] <= best[row["tokens"]]["mass"] + 0.05 for row in rows)
    table = recall_page.sketches_table({"summary": rows}, "keydiff", 0.2)
    assert len(table.splitlines()) == 2 + len(comparison.sketches)


def text(count: int = 400, dim: int = 32) -> sketching.Text:
    """Keys and queries whose logits lie in few dimensions, two heads of which differ."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, dim, dim, generator=generator) * torch.logspace(0, -0.5, dim)[:, None]
    keys = torch.randn(2, count, dim, generator=generator) @ mix
    rows = torch.randn(2, 50, dim, generator=generator) @ mix
    return sketching.Text(keys, rows, moments(keys.transpose(0, 1), rows.transpose(0, 1)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_those_of_a_gaussian(bits: int) -> None:
    """The distortion that the literature gives (Max 1960)."""
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    error = float((sketching.quantised(drawn, bits) - drawn).square().mean())
    assert error == pytest.approx({1: 0.3634, 2: 0.1175, 4: 0.0095}[bits], rel=0.03)


def test_more_bits_are_nearer() -> None:
    given = text()
    true = sketching.exact(given)
    errors = [
        float((estimate(given) - true).square().mean())
        for estimate in (
            lambda t: sketching.own_basis(t, ((32, 6),)),
            lambda t: sketching.own_basis(t, ((12, 4), (16, 2))),
            lambda t: sketching.own_basis(t, ((12, 4),)),
            lambda t: sketching.own_basis(t, ((6, 4),)),
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 * errors[-1]


def test_an_upper_bound_is_one() -> None:
    """Pages of extremes never underestimate; pages of one key are exact, whichever way."""
    given = text()
    true = sketching.exact(given)
    assert bool((sketching.extremes(given, 13) >= true - 1e-2).all())
    for one in (sketching.extremes(given, 1), sketching.page_means(given, 1)):
        torch.testing.assert_close(one, true, rtol=1e-3, atol=1e-2)


def test_a_rotary_basis_with_all_dimensions_is_exact() -> None:
    given = text()
    near = sketching.before_rotary(given, ((32, 8),), PlainRotary())
    error = (near - sketching.exact(given)).square().mean().sqrt() / sketching.exact(given).square().mean().sqrt()
    assert float(error) < 0.02


# -- the bundled models ------------------------------------------------------------------------------------------------


def test_a_bundled_model_with_all_tokens_recalled_answers_as_with_the_full_cache() -> None:
    """`ungrounded` looks up while it answers: of a tenth alone its answer is another."""
    probe = instruments.RecallingProbe(ROOT / "models/tinyvlm/ungrounded")
    picture = make_receipt(500, 12, 12, num_questions=1)
    prompt = probe.prefill(picture, picture.questions[0])
    keep = instruments.POLICIES[0].keep(prompt, 0.1, torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    for sketch in instruments.SKETCHES:
        assert probe.recalled_answers(prompt, keep, [0, prompt.tokens], sketch) == [False, True]
    assert probe.same_answers(prompt, keep) == [False, False]
