"""The judge against transformers and against the plain way to compute what policies see; its records and its page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.judge import crosscheck, page
from benchmarks.judge import main as program
from benchmarks.judge.cases import CaseId, CaseMaker
from benchmarks.judge.conditions import BUDGETS, FULL, MEDIA, Condition, conditions, parse_condition, recipes
from benchmarks.judge.decisions import BudgetError, Decisions, Kept, Medium
from benchmarks.judge.network import Network, Past, States
from benchmarks.judge.records import Records, RecordsError
from benchmarks.judge.summary import ALL, summarise
from benchmarks.judge.verdicts import Judge, Verdict
from vlcache_sgl.api import LayerView, Prompt, Span
from vlcache_sgl.api.testing import Layer, view_layers
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.plan import EvictionPlan
from vlcache_sgl.policy.policy import Policy

TOKENS = tuple(torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(1)).tolist())
LINES = (Span(7, 30), Span(32, 50))
CASE = CaseId("needle", 60, 100)


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Network:
    return Network(checkpoint)


@pytest.fixture(scope="module")
def llama(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Judge:
    return Judge(checkpoint)


def cut(states: States, end: int) -> States:
    return States(*(part[:, :, :end] for part in states))


# -- the network -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reading_is_that_of_transformers(network: Network, llama: LlamaForCausalLM) -> None:
    hidden, states = network.read(TOKENS)
    given = llama(torch.tensor([TOKENS]), use_cache=True)
    torch.testing.assert_close(network.log_probabilities(hidden), given.logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
    for index, layer in enumerate(given.past_key_values.layers):
        torch.testing.assert_close(states.keys[index], layer.keys[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states.values[index], layer.values[0], rtol=1e-4, atol=1e-4)


def test_reading_goes_on_behind_a_past(network: Network) -> None:
    hidden, states = network.read(TOKENS)
    rest, later = network.read(TOKENS[40:], cut(states, 40))
    torch.testing.assert_close(rest, hidden[40:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(later.queries, states.queries[:, :, 40:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_see_what_their_condition_kept(network: Network, llama: LlamaForCausalLM) -> None:
    """The same set in all layers and heads can be said to transformers as a mask; another set per condition."""
    _, states = network.read(TOKENS)
    kept = torch.rand(3, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    kept[2] = False  # nothing is left
    past = Past(cut(states, 50), kept[None, :, None].expand(3, 3, 2, 50))
    ours = network.log_probabilities(network.follow(TOKENS[50:], past))
    for condition, mask in enumerate(kept):
        seen = torch.ones(60, 60, dtype=torch.bool).tril()
        seen[50:, :50] &= mask
        theirs = llama(torch.tensor([TOKENS]), attention_mask=seen[None, None]).logits[0, 50:].log_softmax(-1)
        torch.testing.assert_close(ours[condition], theirs, rtol=1e-4, atol=1e-4)


def test_layers_and_heads_may_keep_other_tokens(network: Network) -> None:
    """A cell that is masked in one head of one layer changes the answer exactly there and above."""
    _, states = network.read(TOKENS)
    keep = torch.ones(3, 2, 2, 50, dtype=torch.bool)
    keep[2, 1, 1, :49] = False
    all_kept, one_less = network.follow(TOKENS[50:], Past(cut(states, 50), keep))
    other = States(states.queries, states.keys, states.values.clone())
    other.values[2, 1, :49] += 1.0  # what is masked has no say
    unmasked, masked = network.follow(TOKENS[50:], Past(cut(other, 50), keep))
    assert torch.equal(masked, one_less)
    assert not torch.allclose(unmasked, all_kept)
    assert not torch.allclose(one_less, all_kept)


# -- decisions ---------------------------------------------------------------------------------------------------------


def decisions(network: Network, medium: Medium) -> Decisions:
    _, states = network.read(TOKENS)
    return Decisions(network, TOKENS, states, LINES, medium, TOKENS[:5])


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize(
    "text", [*(name for name in recipes() if name != "kvzip"), "vlcache:paper", "keydiff:heads=split"]
)
def test_decisions_are_those_of_the_policy(network: Network, medium: Medium, text: str) -> None:
    """Against views computed the plain way; what stands in front of the first image token stays."""
    made = decisions(network, medium)
    prompt, policy = made.prompt, resolve(text)
    assert prompt.start == (LINES[0].begin if medium == "image" else 0)
    _, states = network.read(TOKENS)
    layers = [Layer(*parts) for parts in zip(*states, strict=True)]
    views = [view_layers(layers, prompt, needs) for needs in policy.needs]
    for budget in (0.5, 0.2):
        total = round(budget * prompt.owned * prompt.num_layers)
        plan = policy.decide(*views, prompt, total)
        kept = made.keep(policy, budget)
        assert torch.equal(kept.cells[..., prompt.start :], plan.keep.expand(3, 2, -1))
        assert bool(kept.cells[..., : prompt.start].all())
        assert kept.share == pytest.approx(plan.total / (prompt.owned * prompt.num_layers))


@pytest.mark.parametrize(("medium", "start", "end"), [("text", 0, 59), ("image", 7, 50)])
def test_a_second_reading_is_of_the_prefix(network: Network, medium: Medium, start: int, end: int) -> None:
    """Against all tokens read at once, those of the second reading behind those of the first."""
    policy = resolve("kvzip:heads=split")
    again = (*TOKENS[:5], *TOKENS[start:end])
    _, states = network.read((*TOKENS[:end], *again))
    made = decisions(network, medium)
    prompt = replace(made.prompt, length=end, repeated=len(again))
    layers = [Layer(*parts) for parts in zip(*states, strict=True)]
    views = [view_layers(layers, prompt, needs) for needs in policy.needs]
    plan = policy.decide(*views, prompt, round(0.3 * (end - start) * 3))
    kept = made.keep(policy, 0.3)
    assert kept.end == end
    assert torch.equal(kept.cells[..., start:end], plan.keep)
    assert bool(kept.cells[..., :start].all())
    assert bool(kept.cells[..., end:].all())


def test_a_policy_that_keeps_less_than_its_budget_is_not_judged(network: Network) -> None:
    @dataclass(frozen=True)
    class Few(Policy):
        def plan(self, scores: torch.Tensor, layers: Sequence[LayerView], prompt: Prompt, total: int) -> EvictionPlan:
            return super().plan(scores, layers, prompt, total - 3)

    few = Few(**vars(resolve("keydiff")))
    with pytest.raises(BudgetError, match=r"keydiff kept 174 cells, 0.5 is 180"):
        decisions(network, "text").keep(few, 0.5)


def test_policies_with_the_same_needs_share_their_views(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    made = decisions(network, "text")
    asked = []
    views = made._observed
    monkeypatch.setattr(made, "_observed", lambda needs: asked.append(needs) or views(needs))
    for text in ("keydiff", "keydiff:heads=split", "snapkv", "pyramidkv"):
        for budget in BUDGETS:
            made.keep(resolve(text), budget)
    assert len(asked) == 2


# -- verdicts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_full_cache_answers_as_transformers_does(judge: Judge, checkpoint: Path, llama: LlamaForCausalLM) -> None:
    """Both questions; greedy decoding is compared where the answer is the model's own."""
    asked = [Condition("image", turn, FULL, 1.0) for turn in ("first", "later")]
    found = judge.verdicts(CASE, asked, {})
    case = CaseMaker(checkpoint).make(CASE)
    assert case.later is not None
    for condition, question in zip(asked, (case.first, case.later), strict=True):
        whole = torch.tensor([question.prompt + question.answer])
        log = llama(whole).logits[0, len(question.prompt) - 1 : -1].log_softmax(-1)
        verdict = found[condition.name]
        assert verdict is not None
        assert verdict.log_probability == pytest.approx(float(log[range(len(log)), question.answer].sum()), abs=1e-3)
        assert verdict.right == (log.argmax(-1).tolist() == list(question.answer)) is False  # of random weights
        assert verdict.kept == 1.0


def test_the_models_own_answer_is_right(judge: Judge, checkpoint: Path, llama: LlamaForCausalLM) -> None:
    case = CaseMaker(checkpoint).make(CASE)
    prompt = torch.tensor([case.first.prompt])
    own = llama.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    hidden, states = judge.network.read(case.first.prompt)
    everything = judge._decide(case, states, [Condition("text", "first", FULL, 1.0)], {})["text", FULL, 1.0]
    for answer, right in ((own, True), ([*own[:3], own[3] ^ 1], False), ([own[0] ^ 1, *own[1:]], False)):
        asked = type(case.first)(case.first.prompt, case.first.lines, tuple(answer))
        assert judge.first(asked, hidden[-1], states, [everything])[0].right is right


def test_a_later_question_finds_what_the_first_one_left(judge: Judge, checkpoint: Path) -> None:
    """Computed again by hand, for a policy that keeps other tokens in every layer."""
    policy = resolve("vlcache")
    condition = Condition("image", "later", "vlcache", 0.3)
    verdict = judge.verdicts(CASE, [condition], {"vlcache": policy})[condition.name]
    case = CaseMaker(checkpoint).make(CASE)
    first, later = case.first, case.later
    assert later is not None
    assert verdict is not None
    network = Network(checkpoint)
    _, states = network.read(first.prompt)
    kept = Decisions(network, first.prompt, states, first.lines, "image", ()).keep(policy, 0.3)
    shared = next(i for i, (a, b) in enumerate(zip(first.prompt, later.prompt, strict=False)) if a != b)
    assert shared > first.lines[-1].end
    rest = (*later.prompt[shared:], *later.answer)
    hidden = network.follow(rest, Past(cut(states, shared), kept.cells[:, None, :, :shared]))[0]
    log = network.log_probabilities(hidden)[-len(later.answer) - 1 : -1]
    assert verdict.log_probability == pytest.approx(float(log[range(len(log)), later.answer].sum()), abs=1e-3)
    whole = judge.verdicts(CASE, [Condition("image", "later", FULL, 1.0)], {})["image later full@1"]
    assert whole is not None
    assert abs(whole.log_probability - verdict.log_probability) > 0.01


@pytest.mark.parametrize("turn", ["first", "later"])
def test_what_follows_a_prefix_that_was_read_twice_sees_what_was_kept(
    judge: Judge, checkpoint: Path, turn: str
) -> None:
    """The question too: the server computes it when the prefix is compressed."""
    policy = resolve("kvzip:heads=split")
    condition = parse_condition(f"image {turn} kvzip:heads=split@0.3")
    verdict = judge.verdicts(CASE, [condition], {policy.spec: policy})[condition.name]
    case = CaseMaker(checkpoint).make(CASE)
    asked = case.first if turn == "first" else case.later
    assert asked is not None
    assert verdict is not None
    _, states = judge.network.read(case.first.prompt)
    first, end = case.first, case.first.lines[-1].end
    made = Decisions(judge.network, first.prompt, states, first.lines, "image", judge.cases.instruction)
    cells = made.keep(policy, 0.3).cells[:, None, :, :end]
    rest = (*asked.prompt[end:], *asked.answer)
    log = judge.network.log_probabilities(judge.network.follow(rest, Past(cut(states, end), cells))[0])
    gained = log[range(-len(asked.answer) - 1, -1), asked.answer].sum()
    assert verdict.log_probability == pytest.approx(float(gained), abs=1e-3)


def test_a_text_with_one_question_has_no_later_one(judge: Judge) -> None:
    asked = conditions([], [], ["text"], [])
    found = judge.verdicts(CaseId("both", 60, 100), asked, {})
    assert found["text later full@1"] is None
    assert found["text first full@1"] is not None


def test_prompts_are_those_of_text_images(checkpoint: Path) -> None:
    """What is said to transformers' tokenizer as one text; the lines are the text's, newlines around each."""
    case = CaseMaker(checkpoint).make(CaseId("needle", 120, 100))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    whole = tokenizer.decode(case.first.prompt)
    lines = [tokenizer.decode(case.first.prompt[begin:end]) for begin, end in case.first.lines]
    assert whole.startswith("[" + "\n" + "\n\n".join(lines) + "\n\n")
    assert len(lines) > 1
    assert tokenizer.encode(whole, add_special_tokens=False) == list(case.first.prompt)


# -- records, summary, page --------------------------------------------------------------------------------------------


def test_names_of_conditions_can_be_read() -> None:
    for condition in conditions(["keydiff", "scorer=snapkv,allocator=uniform,sink=4"], BUDGETS, MEDIA, ["keydiff"]):
        assert parse_condition(condition.name) == condition


def test_records_go_on_where_a_run_stopped(tmp_path: Path) -> None:
    path, asked = tmp_path / "verdicts.jsonl", conditions(["keydiff", "knorm"], [0.5], ["text"], ["keydiff"])
    policies = {text: resolve(text).fingerprint for text in ("keydiff", "knorm")}
    records = Records(path, "weights", policies)
    assert records.missing(CASE, asked) == asked
    found = {condition.name: Verdict(True, -0.5, 0.5) for condition in asked} | {"text later full@1": None}
    records.add(CASE, asked, found)
    other = CaseId("list", 60, 100)
    records.add(other, asked[:1], {asked[0].name: found[asked[0].name]})
    path.write_text(path.read_text() + '{"case": ["list", 60, 10')  # killed while it wrote

    again = Records(path, "weights", policies)
    assert again.found[CASE] == found
    assert again.missing(CASE, asked) == []
    assert again.missing(other, asked) == asked[1:]
    assert Records(path, "weights", policies).found == again.found

    changed = {**policies, "keydiff": resolve("keydiff:sink=4").fingerprint}
    gone = Records(path, "weights", changed).missing(CASE, asked)
    assert {condition.policy for condition in gone} == {"keydiff"}
    with pytest.raises(RecordsError, match="another model"):
        Records(path, "other weights", policies)


def result() -> dict[str, object]:
    asked = conditions(["vlcache", "keydiff", "random"], [0.5, 0.1], MEDIA, ["keydiff"])
    found = {}
    for seed in range(10):
        share = {"vlcache": 0.2, "keydiff": 0.6, "random": 0.0, FULL: 1.0}
        found[CaseId("needle", 400, seed)] = {
            c.name: Verdict(seed / 10 < share[c.policy], -seed / 10, c.budget) for c in asked
        }
    found[CaseId("both", 400, 0)] = {c.name: Verdict(True, 0.0, c.budget) if c.turn == "first" else None for c in asked}
    host = {"date": "2026-01-02T03:04:05", "cores": 2}
    return {"command": "x", "model": "m", "host": host, "seeds": "0-9", "summary": summarise(found, asked)}


def test_a_summary_counts_tasks_and_all_of_them() -> None:
    rows = {(row["task"], row["condition"]): row for row in result()["summary"]}  # type: ignore[attr-defined]
    needle = rows["needle:400", "image first keydiff@0.5"]
    assert (needle["count"], needle["score"], needle["log_probability"]) == (10, 0.6, -0.45)
    assert needle["answers"] == "1111110000"
    low, high = needle["interval"]
    assert 0.3 < low < 0.6 < high < 0.85
    both = rows[ALL, "image first keydiff@0.5"]
    assert (both["count"], both["score"]) == (11, round(7 / 11, 4))
    assert ("both:400", "image later keydiff@0.5") not in rows
    assert rows[ALL, "image later keydiff@0.5"]["count"] == 10


def test_a_policy_stands_beside_the_full_cache_on_its_own_questions(tmp_path: Path) -> None:
    """Not every policy is judged on all seeds, and some seeds are harder."""
    asked = conditions(["keydiff", "knorm"], [0.5], ["image"], [])
    found = {
        CaseId("needle", 400, seed): {
            c.name: Verdict(seed >= 5, -1.0, c.budget) for c in asked if c.policy != "knorm" or seed < 6
        }
        for seed in range(10)
    }
    rows = {row["condition"]: row for row in summarise(found, asked) if row["task"] == ALL}
    assert (rows["image first keydiff@0.5"]["count"], rows["image first keydiff@0.5"]["full_score"]) == (10, 0.5)
    assert (rows["image first knorm@0.5"]["count"], rows["image first knorm@0.5"]["full_score"]) == (6, 0.1667)
    table = page.policies_table("image", "first")({"summary": list(rows.values())}).splitlines()
    assert table[0].startswith("| policy | questions | full there | 0.5 |")
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        ["| full cache", "10", "0.50"],
        ["| `keydiff`", "10", "0.50"],
        ["| `knorm`", "6", "0.17"],
    ]


def test_the_page_says_what_the_result_says(tmp_path: Path) -> None:
    given = result()
    text = page.rendered(page.PAGE.read_text(), given)
    table = text.partition("<!-- begin judge-image -->")[2].partition("<!-- end")[0]
    lines = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ")]
    assert lines == ["policy", "full cache", "`keydiff`", "`vlcache`", "`random`"]
    assert "| 0.64 (" in table
    page.draw(given, tmp_path / "judge.png")
    assert (tmp_path / "judge.png").stat().st_size > 10_000


def test_the_page_is_current() -> None:
    """After a new result: `python -m benchmarks.judge --page`."""
    text = page.PAGE.read_text()
    assert text == page.rendered(text, page.committed())


def test_the_cross_check_on_the_page_is_current() -> None:
    """After a new result the command writes it itself."""
    text = page.PAGE.read_text()
    assert text == crosscheck.rendered(text, crosscheck.committed())


def test_a_twin_may_lose_the_template(checkpoint: Path) -> None:
    """All that stands in front of the first line but the sinks, and nothing else."""
    asked = CaseMaker(checkpoint).make(CASE).first
    begin, length = asked.lines[0].begin, len(asked.prompt)
    kept = Kept(torch.rand(3, 2, length, generator=torch.Generator().manual_seed(0)) < 0.5, 0.5, length)
    bare = crosscheck.without_template(kept, asked, 1)
    assert bool(kept.cells[..., 1:begin].any())
    assert not bool(bare.cells[..., 1:begin].any())
    assert torch.equal(bare.cells[..., :1], kept.cells[..., :1])
    assert torch.equal(bare.cells[..., begin:], kept.cells[..., begin:])


# -- the command -------------------------------------------------------------------------------------------------------


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    return program.main(parser.parse_args(argv), Console(width=200))


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_command_judges_and_goes_on(
    checkpoint: Path, tmp_path: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, output = tmp_path / "verdicts.jsonl", tmp_path / "judge.json"
    given = [
        "--model",
        str(checkpoint),
        "--weights",
        "off",
        "--answers",
        str(answers),
        "--output",
        str(output),
        "--jobs",
        jobs,
    ]
    given += ["--tasks", "needle:60", "--seeds", "100-101", "--budgets", "0.5", "--media", "text"]
    assert run(*given, "--policies", "keydiff") == 0
    first = answers.read_text()
    rows = json.loads(output.read_text())["summary"]
    assert {row["condition"] for row in rows if row["task"] == ALL} == {
        "text first full@1",
        "text first keydiff@0.5",
        "text later full@1",
        "text later keydiff@0.5",
    }
    assert all(row["count"] == 2 for row in rows)
    assert run(*given, "--policies", "keydiff") == 0
    assert answers.read_text() == first
    assert run(*given, "--policies", "keydiff", "knorm") == 0
    assert set(json.loads(answers.read_text().removeprefix(first).splitlines()[0])["verdicts"]) == {"knorm"}
    assert "`knorm`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "make real-model"),
        (["--seeds", "100"], "weights.json has 30 layers, the model has 3"),
        (["--tasks", "needle"], "--tasks takes TASK:TOKENS"),
        (["--tasks", "noodle:400"], "tasks: needle, list"),
        (["--seeds", "9-1"], "--seeds takes FIRST-LAST"),
        (["--policies", "nothing"], "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    checkpoint: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", str(checkpoint), *argv) == 2
    out = capsys.readouterr().out
    assert message in out
    assert len(out.strip().splitlines()) == 1
