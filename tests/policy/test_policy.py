"""Resolving a policy and letting it decide."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from vlcache_sgl.api import (
    AllocatorPlugin,
    LayerView,
    Needs,
    Prompt,
    RecipePlugin,
    Rows,
    ScorerPlugin,
    Selection,
    Span,
)
from vlcache_sgl.policy.errors import PolicyError
from vlcache_sgl.policy.manager import Provider, Registered, Registry
from vlcache_sgl.policy.plan import PolicyFault
from vlcache_sgl.policy.policy import Policy, budget_for, resolve

PROMPT = Prompt(100, 10, (Span(20, 80),), num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)


@dataclass(frozen=True)
class Positions:
    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = False
    step: int = 1

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step}")

    def score(self, layer, prompt):
        return torch.arange(prompt.owned).float().expand(2, -1)


@dataclass(frozen=True)
class Says:
    """Returns what it is given: for nonsense."""

    answer: Any = None
    needs: ClassVar[Needs] = Needs()
    query_aware: ClassVar[bool] = True

    def score(self, layer, prompt):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def allocate(self, layers, prompt, budget):
        assert all(layer.scores is not None for layer in layers)
        return self.score(None, prompt)


@dataclass(frozen=True)
class Equal:
    needs: ClassVar[Needs] = Needs()
    extra: int = 0
    budget_sum: str = "exact"

    def allocate(self, layers, prompt, budget):
        return budget.distribute(torch.ones(budget.num_layers)) + self.extra


@dataclass(frozen=True)
class NoRows:
    needs: ClassVar[Needs] = Needs(column_sum=True)
    query_aware: ClassVar[bool] = False

    def score(self, layer, prompt): ...


@dataclass(frozen=True)
class Everything(NoRows):
    needs: ClassVar[Needs] = Needs(rows=Rows.all(), probabilities=True)


@dataclass(frozen=True)
class Table:
    needs: ClassVar[Needs] = Needs()
    file: str = ""
    content: tuple = field(init=False, default=())

    def __post_init__(self):
        object.__setattr__(self, "content", tuple(Path(self.file).read_text()) if self.file else ())

    def allocate(self, layers, prompt, budget): ...


def registry(**changes) -> Registry:
    def of(*records):
        return {record.name: Registered(record, Provider("toy", "1", f"{record.name} = m")) for record in records}

    content = {
        "scorers": of(
            ScorerPlugin("positions", Positions), ScorerPlugin("no_rows", NoRows), ScorerPlugin("all", Everything)
        ),
        "allocators": of(AllocatorPlugin("equal", Equal), AllocatorPlugin("table", Table)),
        "recipes": of(
            RecipePlugin(
                "toy",
                scorer="positions",
                allocator="equal",
                selection=Selection(sink=2),
                params={"step": 2},
                variants={"wide": {"step": 8, "sink": 4}, "tall": {"floor": 0.5}},
            ),
            RecipePlugin("lost", scorer="gone", allocator="equal"),
        ),
    }
    return Registry(**{**content, **changes})


def toy(text: str, **options) -> Policy:
    return resolve(text, installed=registry(), **options)


def views() -> list[LayerView]:
    return [LayerView(index) for index in range(3)]


@pytest.mark.parametrize(
    ("text", "step", "sink", "floor"),
    [
        ("toy", 2, 2, 0.0),
        ("toy:wide", 8, 4, 0.0),
        ("toy:wide,tall,step=3", 3, 4, 0.5),
        ("toy:sink=0", 2, 0, 0.0),
        ("scorer=positions,allocator=equal", 1, 0, 0.0),
        ("scorer=positions,allocator=equal,scorer.step=5,selection.sink=1", 5, 1, 0.0),
    ],
)
def test_later_values_win(text, step, sink, floor):
    policy = toy(text)
    assert (policy.scorer.step, policy.selection.sink, policy.selection.floor) == (step, sink, floor)
    assert (policy.scorer_name, policy.allocator_name) == ("positions", "equal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toi", r"unknown policy 'toi'; choose from: toy, lost \(from toy\)"),
        ("toy:narrow", "no variant 'narrow'; variants: wide, tall"),
        ("lost", "unknown scorer 'gone'; choose from: positions, no_rows, all"),
        ("scorer=x,allocator=equal", "unknown scorer 'x'"),
        ("scorer=positions,allocator=x", "unknown allocator 'x'; choose from: equal, table"),
        ("toy:step=0", "scorer positions: step must be at least 1, got 0"),
        ("toy:floor=2", r"selection: floor must be in \[0, 1\]"),
        (
            "scorer=no_rows,allocator=equal",
            r"scorer no_rows of toy 1 \(entry point no_rows = m\): needs attention or queries, but names no rows",
        ),
        ("scorer=all,allocator=equal", "the whole probability matrix of all rows"),
        ("scorer=positions,allocator=table,file=/nowhere", "allocator table: .*No such file"),
    ],
)
def test_what_cannot_be_resolved(text, message):
    with pytest.raises(PolicyError, match=message):
        toy(text)


def test_nothing_resolves_beside_a_broken_plugin():
    with pytest.raises(PolicyError, match=r"broken policy plugins .*: acme 2 is broken"):
        resolve("toy", installed=registry(problems=("acme 2 is broken",)))


def test_fingerprints_tell_policies_apart(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("2")
    texts = ["toy", "toy:step=3", "toy:sink=3", "toy:extra=1", "scorer=positions,allocator=equal"]
    texts += [f"scorer=positions,allocator=table,file={path}" for path in (first, second)]
    prints = [toy(text).fingerprint for text in texts]
    assert len(set(prints)) == len(texts)
    assert all(len(text) < 60 and text.isprintable() for text in prints)
    before = toy(texts[-1]).fingerprint
    second.write_text("3")
    assert toy(texts[-1]).fingerprint != before, "the content of a file counts, not its name"


def test_equal_policies_have_equal_fingerprints():
    assert toy("toy").fingerprint == toy("toy:step=2").fingerprint
    assert toy("toy").fingerprint == toy("scorer=positions,allocator=equal,step=2,sink=2").fingerprint


def test_decide_keeps_the_budget_and_sets_the_scores():
    scorer_layers, allocator_layers = views(), views()
    plan = toy("toy").decide(scorer_layers, allocator_layers, PROMPT, 50)
    assert plan.tokens_per_layer == [17, 17, 16]
    assert plan.keep.shape == (3, 1, 90)
    assert all(view.scores.shape == (1, 90) for view in allocator_layers)
    assert plan.keep[2, 0].nonzero().flatten().tolist() == list(range(74, 90))


@pytest.mark.parametrize(("total", "kept"), [(0, 0), (1, 1), (270, 270), (9999, 270), (-5, 0)])
def test_decide_bounds_the_total(total, kept):
    assert toy("toy").decide(views(), views(), PROMPT, total).total == kept


def test_the_floor_is_a_share_of_the_average():
    budget = budget_for(50, PROMPT, Selection(floor=0.5))
    assert (budget.total, budget.num_layers, budget.lo, budget.hi) == (50, 3, 8, 90)


def decide(scorer: Any, allocator: Any, total: int = 50):
    return Policy("test", "s", scorer, "a", allocator, Selection()).decide(views(), views(), PROMPT, total)


@pytest.mark.parametrize(
    ("scorer", "allocator", "message"),
    [
        pytest.param(Says(torch.zeros(2, 3)), Equal(), "scores of layer 0 have shape", id="score-shape"),
        pytest.param(Says(torch.full((2, 90), torch.nan)), Equal(), "NaN", id="score-nan"),
        pytest.param(Says(None), Equal(), "NoneType", id="score-none"),
        pytest.param(Says(KeyError("k")), Equal(), "scorer s raised KeyError", id="score-raises"),
        pytest.param(Positions(), Says(ZeroDivisionError("d")), "allocator a raised ZeroDivisionError", id="raises"),
        pytest.param(Positions(), Says(torch.tensor([1, 2])), "counts have shape", id="counts-shape"),
        pytest.param(Positions(), Says(torch.tensor([1, 2, 91])), r"counts must be in \[0, 90\]", id="counts-range"),
        pytest.param(Positions(), Says(None), "counts are a NoneType", id="counts-none"),
        pytest.param(Says(SystemExit(3)), Equal(), "scorer s raised SystemExit: 3", id="score-exits"),
        pytest.param(Positions(), Says(GeneratorExit()), "allocator a raised GeneratorExit", id="exits"),
        pytest.param(Positions(), Equal(extra=1), "allocator a keeps 53 tokens, the budget is 50", id="over-budget"),
        pytest.param(Positions(), Equal(extra=-1), "allocator a keeps 47 tokens, the budget is 50", id="under-budget"),
        pytest.param(Positions(), Equal(1, "at_most"), "allocator a keeps 53 tokens", id="over-an-upper-bound"),
    ],
)
def test_nonsense_is_a_fault(scorer, allocator, message):
    with pytest.raises(PolicyFault, match=message):
        decide(scorer, allocator)


@pytest.mark.parametrize(("extra", "rule"), [(1, "free"), (-1, "free"), (-1, "at_most")])
def test_an_allocator_that_says_so_may_miss_the_budget(extra, rule):
    assert decide(Positions(), Equal(extra, rule)).total == 50 + 3 * extra


def test_a_keyboard_interrupt_is_not_a_policys():
    with pytest.raises(KeyboardInterrupt):
        decide(Says(KeyboardInterrupt()), Equal())


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RuntimeError("no"), ValueError("no")])
def test_a_part_that_cannot_be_built_is_refused(error):
    @dataclass(frozen=True)
    class Unbuildable(Equal):
        def __post_init__(self):
            raise error

    with pytest.raises(PolicyError, match="allocator broken"):
        resolve(
            "scorer=positions,allocator=broken",
            installed=registry(
                allocators={
                    "broken": Registered(AllocatorPlugin("broken", Unbuildable), Provider("toy", "1", "broken = m"))
                }
            ),
        )


def test_an_unknown_budget_sum_is_refused():
    with pytest.raises(PolicyError, match="budget_sum"):
        resolve("scorer=positions,allocator=equal,budget_sum=roughly", installed=registry())


def test_needs_and_query_awareness():
    policy = toy("toy")
    assert policy.needs == (Needs(), Needs())
    assert not policy.query_aware
