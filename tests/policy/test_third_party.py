"""Policies of other packages: found when they are sound, and named with their distribution when they are broken.

Distributions are faked as their metadata is on disk: a ``*.dist-info`` directory beside a module, on `sys.path`.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from vlcache_sgl.api import Needs
from vlcache_sgl.api.testing import PROPERTIES, check_policy, synthetic_prompt, synthetic_views
from vlcache_sgl.policy import PolicyError, resolve
from vlcache_sgl.policy.describe import describe
from vlcache_sgl.policy.manager import load_registry

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_policy"

HEAD = """
from dataclasses import dataclass
from vlcache_sgl.api import *
import torch

@dataclass(frozen=True)
class Mine:
    needs = Needs()
    query_aware = False
    def score(self, layer, prompt):
        return torch.zeros(prompt.num_kv_heads, prompt.owned)

@dataclass(frozen=True)
class Share:
    needs = Needs()
    def allocate(self, layers, prompt, budget):
        return budget.distribute(torch.ones(budget.num_layers))
"""

ONE_SCORER = (
    HEAD
    + """
@hookimpl
def vlcache_scorers():
    yield ScorerPlugin("acme", Mine)
"""
)


RECIPE = """
@hookimpl
def vlcache_scorers():
    yield ScorerPlugin("acme", Mine)

@hookimpl
def vlcache_recipes():
    yield RecipePlugin("acme_policy", {})
"""


def scorer(body: str) -> str:
    """A module whose scorer `acme` is the class `Broken` of `body`."""
    return HEAD + body + "\n@hookimpl\ndef vlcache_scorers():\n    yield ScorerPlugin('acme', Broken)\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a module on `sys.path` as the distribution ``acme-kv 1.2``."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(source: str, name: str = "acme-kv", module: str = "acme_kv", points: str = "") -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[vlcache_sgl]\n{points or f'{module} = {module}'}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    yield put
    for name in ("acme_kv", "other_kv"):
        sys.modules.pop(name, None)


def test_a_sound_package_is_found_and_selected(install):
    install(ONE_SCORER)
    registry = load_registry()
    assert registry.problems == ()
    assert str(registry.scorer("acme").provider) == "acme-kv 1.2 (entry point acme_kv = acme_kv)"
    policy = resolve("scorer=acme,allocator=uniform", installed=registry)
    assert policy.providers[0] == "acme-kv 1.2"
    prompt = synthetic_prompt()
    assert policy.decide(*synthetic_views(prompt, policy.needs), prompt, 100).total == 100


def test_parts_without_needs_need_nothing(install):
    """The class attribute may be left out; the first server of a policy that did so would not start."""
    without = HEAD.replace("    needs = Needs()\n", "")
    assert "needs" not in without
    install(
        without
        + "@hookimpl\ndef vlcache_scorers():\n    yield ScorerPlugin('acme', Mine)\n"
        + "@hookimpl\ndef vlcache_allocators():\n    yield AllocatorPlugin('share', Share)\n"
    )
    registry = load_registry()
    assert registry.problems == ()
    policy = resolve("scorer=acme,allocator=share", installed=registry)
    assert policy.needs == (Needs(), Needs())
    check_policy(policy)
    needs = {item.name: item.needs for item in describe(registry) if item.name in ("acme", "share")}
    assert needs == {"acme": "nothing", "share": "nothing"}


def test_one_entry_point_may_carry_everything(install):
    install(
        ONE_SCORER
        + "@hookimpl\ndef vlcache_allocators():\n    return [AllocatorPlugin('share', Share)]\n"
        + "@hookimpl\ndef vlcache_recipes():\n    return (RecipePlugin('acme', scorer='acme', allocator='share'),)\n"
    )
    policy = resolve("acme:sink=4", installed=load_registry())
    assert (policy.scorer_name, policy.allocator_name, policy.selection.sink) == ("acme", "share", 4)


BROKEN = {
    "import-error": (
        "import a_module_that_does_not_exist",
        "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_does_not_exist'",
    ),
    "syntax-error": ("def", "cannot be imported: SyntaxError"),
    "raises-on-import": ("raise RuntimeError('no GPU')", "cannot be imported: RuntimeError: no GPU"),
    "misspelled-hook": (
        HEAD + "@hookimpl\ndef vlcache_scorer():\n    yield ScorerPlugin('acme', Mine)\n",
        r"does not fit the hooks vlcache_scorers, vlcache_allocators, vlcache_recipes: .*vlcache_scorer",
    ),
    "hook-with-arguments": (
        HEAD + "@hookimpl\ndef vlcache_scorers(config):\n    return []\n",
        r"does not fit the hooks .*config",
    ),
    "forgotten-decorator": (
        HEAD + "def vlcache_scorers():\n    yield ScorerPlugin('acme', Mine)\n",
        "vlcache_scorers lacks the @hookimpl decorator",
    ),
    "no-hook-at-all": ("x = 1", "offers none of the hooks vlcache_scorers"),
    "hook-raises": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    raise KeyError('weights')\n",
        r"vlcache_scorers\(\) raised KeyError: 'weights'",
    ),
    "hook-returns-nothing": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    pass\n",
        r"vlcache_scorers\(\) raised TypeError: 'NoneType' object is not iterable",
    ),
    "not-a-record": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    yield Mine\n",
        r"vlcache_scorers\(\): yielded <class .*Mine'>, expected a ScorerPlugin",
    ),
    "wrong-kind-of-record": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    yield AllocatorPlugin('acme', Share)\n",
        "expected a ScorerPlugin",
    ),
    "bad-name": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    yield ScorerPlugin('Acme KV', Mine)\n",
        "bad name 'Acme KV', expected small letters, digits, _ and -",
    ),
    "taken-by-a-built-in": (
        HEAD + "@hookimpl\ndef vlcache_scorers():\n    yield ScorerPlugin('snapkv', Mine)\n",
        r"the name 'snapkv' is already taken by vlcache-sgl \S+ \(entry point snapkv = vlcache_policies.snapkv\)",
    ),
    "not-a-dataclass": (
        scorer("class Broken: needs = Needs(); query_aware = False; score = Mine.score"),
        r"scorer 'acme': the factory <class 'acme_kv.Broken'> must be a dataclass",
    ),
    "a-function": (scorer("Broken = lambda: Mine()"), "must be a dataclass"),
    "not-frozen": (
        scorer("@dataclass\nclass Broken:\n    needs = Needs()\n    query_aware = False\n    score = Mine.score"),
        "Broken must be a frozen dataclass",
    ),
    "no-query-aware": (
        scorer("@dataclass(frozen=True)\nclass Broken:\n    needs = Needs()\n    score = Mine.score"),
        "Broken has no `query_aware`",
    ),
    "no-score": (
        scorer("@dataclass(frozen=True)\nclass Broken:\n    needs = Needs()\n    query_aware = False"),
        r"Broken has no method score\(self, layer, prompt\)",
    ),
    "score-not-overridden": (
        scorer("@dataclass(frozen=True)\nclass Broken(Scorer):\n    needs = Needs()\n    query_aware = False"),
        r"Broken has no method score\(self, layer, prompt\)",
    ),
    "wrong-signature": (
        scorer("@dataclass(frozen=True)\nclass Broken(Mine):\n    def score(self, keys): ..."),
        r"wrong signature score\(self, keys\), expected score\(self, layer, prompt\)",
    ),
    "field-nobody-can-set": (
        scorer("@dataclass(frozen=True)\nclass Broken(Mine):\n    table: dict = None"),
        r"field 'table' has type <class 'dict'>; a user can only set int, float, bool, str and Literal",
    ),
    "allocator-signature": (
        HEAD
        + "@dataclass(frozen=True)\nclass Broken(Share):\n    def allocate(self, layers): ...\n"
        + "@hookimpl\ndef vlcache_allocators():\n    yield AllocatorPlugin('acme', Broken)\n",
        r"allocator 'acme': wrong signature allocate\(self, layers\)",
    ),
    "unknown-need": (
        scorer("@dataclass(frozen=True)\nclass Broken(Mine):\n    needs = Needs(hidden_states=True)"),
        "cannot be imported: TypeError: .*hidden_states",
    ),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_named_and_nothing_else_is_lost(install, source, message):
    install(source)
    registry = load_registry()
    assert len(registry.problems) == 1, registry.problems
    assert registry.problems[0].startswith("acme-kv 1.2 (entry point acme_kv = acme_kv): ")
    assert "\n" not in registry.problems[0]
    assert re.search(message, registry.problems[0]), registry.problems[0]
    assert "snapkv" in registry.scorers
    assert "acme" not in registry.scorers
    with pytest.raises(PolicyError, match=r"broken policy plugins .*acme-kv 1.2"):
        resolve("snapkv", installed=registry)


def test_two_packages_with_one_name_are_both_named(install):
    install(ONE_SCORER)
    install(ONE_SCORER, name="other-kv", module="other_kv")
    (problem,) = load_registry().problems
    assert problem.startswith("other-kv 1.2 ")
    assert "the name 'acme' is already taken by acme-kv 1.2 " in problem


def test_the_same_name_twice_in_one_package(install):
    install(ONE_SCORER + "    yield ScorerPlugin('acme', Mine)\n")
    (problem,) = load_registry().problems
    assert "the name 'acme' is already taken by acme-kv 1.2" in problem


UNMET = {
    "no-rows": ("Needs(column_sum=True)", "needs attention or queries, but names no rows"),
    "everything": ("Needs(rows=Rows.all(), probabilities=True)", "the whole probability matrix of all rows"),
    "silent-on-prefix-hits": ("Needs(rows=Rows.all(), column_sum=True)", "has no `prefix_hit`"),
    "not-needs": ("'keys'", "`needs` is 'keys', expected a Needs"),
}


@pytest.mark.parametrize(("needs", "message"), UNMET.values(), ids=UNMET)
def test_needs_that_cannot_be_met_are_refused_when_the_policy_is_chosen(install, needs, message):
    install(scorer(f"@dataclass(frozen=True)\nclass Broken(Mine):\n    needs = {needs}"))
    registry = load_registry()
    assert registry.problems == ()
    with pytest.raises(PolicyError, match=message) as caught:
        resolve("scorer=acme,allocator=uniform", installed=registry)
    assert "acme-kv 1.2" in str(caught.value)
    assert resolve("snapkv", installed=registry)


def test_an_entry_point_without_its_module(install):
    install("", points="gone = acme_gone")
    (problem,) = load_registry().problems
    assert problem.startswith("acme-kv 1.2 (entry point gone = acme_gone): cannot be imported: ModuleNotFoundError")


def test_the_example_package_is_sound(install):
    install((EXAMPLE / "vlcache_edges.py").read_text())
    registry = load_registry()
    assert registry.problems == ()
    for text in ("edges", "scorer=edges,allocator=global,power=2", "center"):
        check_policy(resolve(text, installed=registry))
    assert resolve("edges", installed=registry).selection.protect == "text"
    assert 'edges = "vlcache_edges"' in (EXAMPLE / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ('scorer="acmee", allocator="uniform"', ("unknown scorer 'acmee'", "did you mean 'acme'?")),
        ('scorer="acme", allocator="nothing_like_it"', ("unknown allocator 'nothing_like_it'",)),
        ('scorer="acme", allocator="uniform", params={"windw": 3}', ("unknown parameter 'windw'",)),
        ('scorer="acme", allocator="uniform", variants={"fast": {"poool": 3}}', ("unknown parameter 'poool'",)),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_a_problem(install, fields, words):
    install(HEAD + RECIPE.replace("{}", fields))
    loaded = load_registry()
    assert "acme_policy" not in loaded.recipes
    (problem,) = loaded.problems
    assert problem.startswith("acme-kv 1.2 (entry point")
    assert "policy 'acme_policy'" in problem
    assert all(word in problem for word in words)


def test_a_sound_recipe_is_listed(install):
    install(HEAD + RECIPE.replace("{}", 'scorer="acme", allocator="uniform", params={"sink": 4}'))
    loaded = load_registry()
    assert not loaded.problems
    assert "acme_policy" in loaded.recipes


@pytest.fixture
def example(monkeypatch):
    """The example's own tests, as its author would run them; its policies are known as if it were installed."""
    monkeypatch.syspath_prepend(EXAMPLE)
    spec = importlib.util.spec_from_file_location("test_vlcache_edges", EXAMPLE / "test_vlcache_edges.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("vlcache_edges", None)


def test_the_tests_of_the_example_package_pass(example):
    for policy in example.POLICIES:
        for name in PROPERTIES:
            example.test_it_keeps_its_contract(policy, name)
