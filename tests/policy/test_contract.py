"""Every scorer with every allocator keeps its promises.  A new policy is covered by being registered."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlcache_sgl.api import Prompt, Selection
from vlcache_sgl.api.testing import Layer, check_policy, synthetic_layers, synthetic_prompt, view_layers
from vlcache_sgl.policy import Policy, PolicyError, registry, resolve
from vlcache_sgl.policy.checks import needs_of
from vlcache_sgl.policy.plan import PolicyFault
from vlcache_sgl.policy.policy import budget_for

PROMPTS = {
    "one-image": synthetic_prompt(300, [(10, 260)]),
    "two-images": synthetic_prompt(300, [(10, 100), (120, 260)]),
    "image-last": synthetic_prompt(90, [(10, 90)]),
    "text-only": synthetic_prompt(70, []),
    "tiny": synthetic_prompt(3, [(1, 2)]),
    "prefix-in-image": synthetic_prompt(300, [(10, 260)], start=50),
    "prefix-after-image": synthetic_prompt(300, [(10, 260)], start=280),
}
PROMPTS = {name: replace(prompt, repeated=24) for name, prompt in PROMPTS.items()}
SELECTIONS = {
    "shared": Selection(sink=4, recent=0.1, protect="text", floor=0.2),
    "split": Selection(heads="split", recent=3, span=5, floor=0.1),
}

SCORERS = sorted(registry().scorers)
ALLOCATORS = sorted(registry().allocators)

INCOMPARABLE = {"knorm", "expected_attention", "infinipot_v"}
"""Scorers whose scores cannot be ranked across layers."""

PERMUTES = {"vlcache", "knorm", "keydiff", "tova", "aircache", "infinipot_v"}
"""Scorers that look at the content of a vision token, not at its place or its neighbours."""


@functools.cache
def weights_file() -> str:
    path = Path(tempfile.mkdtemp()) / "weights.json"
    path.write_text(json.dumps({"weights": [4, 1, 0, 2.5]}))
    return str(path)


def compose(scorer: str, allocator: str, selection: Selection | None = None) -> Policy:
    text = f"scorer={scorer},allocator={allocator}"
    if allocator == "table":
        text += f",file={weights_file()}"
    policy = resolve(text)
    return policy if selection is None else Policy(**{**vars(policy), "selection": selection})


@functools.cache
def layers(name: str) -> list[Layer]:
    return synthetic_layers(PROMPTS[name])


@functools.cache
def scores_of(scorer: str, name: str) -> torch.Tensor:
    policy = compose(scorer, "uniform")
    return policy.score(view_layers(layers(name), PROMPTS[name], policy.needs[0]), PROMPTS[name])


@functools.cache
def views_of(allocator: str, name: str) -> list:
    return view_layers(layers(name), PROMPTS[name], compose("random", allocator).needs[1])


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_keeps_its_contract(scorer):
    check_policy(compose(scorer, "uniform"))


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_allocator_keeps_its_contract(allocator):
    """With scores that may be ranked across layers."""
    check_policy(compose("random", allocator))


@pytest.mark.parametrize("basis", ["budget", "vision"])
def test_a_table_declares_when_it_keeps_less(basis):
    policy = resolve(f"scorer=random,allocator=table,weights=0.1/0/0.3/0.05,basis={basis}")
    assert policy.allocator.budget_sum == ("at_most" if basis == "vision" else "exact")
    check_policy(policy, "budget")


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_pair_keeps_its_budget_and_what_is_protected(scorer, allocator):
    if allocator == "global" and scorer in INCOMPARABLE:
        with pytest.raises(PolicyError, match=f"scorer {scorer} and allocator global: .* only comparable within"):
            compose(scorer, allocator)
        return
    for name in ("one-image", "prefix-in-image"):  # others are the business of either alone
        prompt = PROMPTS[name]
        for selection in SELECTIONS.values():
            policy = compose(scorer, allocator, selection)
            for budget in (0.01, 0.5):
                total = max(prompt.num_layers, round(budget * prompt.owned * prompt.num_layers))
                plan = policy.plan(scores_of(scorer, name), views_of(allocator, name), prompt, total)
                check_plan(
                    plan, prompt, selection, total, exact=getattr(policy.allocator, "budget_sum", "exact") == "exact"
                )
            again = policy.plan(scores_of(scorer, name), views_of(allocator, name), prompt, total)
            assert torch.equal(plan.keep, again.keep), name


def check_plan(plan, prompt: Prompt, selection: Selection, total: int, exact: bool) -> None:
    groups = 1 if selection.heads == "shared" else prompt.num_kv_heads
    assert plan.keep.shape == (prompt.num_layers, groups, prompt.owned)
    assert torch.equal(plan.keep.sum(-1), plan.counts)
    kept = int(plan.counts.sum())  # of all heads, which an allocator may give different numbers
    assert kept == total * groups if exact else kept <= total * groups
    assert int(plan.counts.min()) >= budget_for(total, prompt, selection).lo
    text = ~prompt.is_vision()
    for sets, counts in zip(plan.keep, plan.counts.tolist(), strict=True):
        for keep, count in zip(sets, counts, strict=True):
            sinks = min(max(0, selection.sink - prompt.start), count)
            assert bool(keep[:sinks].all())
            recent = int(selection.recent) if selection.recent >= 1 else int(selection.recent * count + 1e-9)
            recent = min(max(recent, 1), count - sinks)
            assert bool(keep[prompt.owned - recent :].all())
            if selection.protect == "text" and bool((keep & ~text)[sinks : prompt.owned - recent].any()):
                assert bool(keep[text].all()), "a vision token was kept before text"


@pytest.mark.parametrize("recipe", sorted(registry().recipes))
def test_recipes_and_their_variants_decide(recipe):
    prompt = PROMPTS["one-image"]
    variants = registry().recipe(recipe).record.variants
    for text in (recipe, *(f"{recipe}:{variant}" for variant in variants)):
        policy = resolve(text)
        policy.require(prompt)
        views = (view_layers(layers("one-image"), prompt, needs) for needs in policy.needs)
        plan = policy.decide(*views, prompt, 120)
        assert 0 < plan.total <= 120 or text == "vlcache:paper"


@pytest.mark.parametrize("scorer", sorted(PERMUTES))
def test_permuting_vision_tokens_permutes_their_scores(scorer):
    prompt = PROMPTS["one-image"]
    begin, end = prompt.vision[0]
    order = torch.arange(prompt.length)
    order[begin:end] = begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(1))
    shuffled = [
        Layer(layer.queries[:, order], layer.keys[:, order], layer.values[:, order]) for layer in layers("one-image")
    ]
    policy = compose(scorer, "uniform")
    scores = policy.score(view_layers(shuffled, prompt, policy.needs[0]), prompt)
    torch.testing.assert_close(scores, scores_of(scorer, "one-image")[..., order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scorer", ["vlcache", "aircache", "snapkv", "cake", "tova"])
def test_only_the_query_rows_matter(scorer):
    """Other rows may say what they like: here those of the image."""
    prompt = PROMPTS["one-image"]
    changed = [Layer(layer.queries.clone(), layer.keys, layer.values) for layer in layers("one-image")]
    for layer in changed:
        layer.queries[:, 10:260] = 7.0
    policy = compose(scorer, "uniform")
    scores = policy.score(view_layers(changed, prompt, policy.needs[0]), prompt)
    assert torch.equal(scores, scores_of(scorer, "one-image"))


@pytest.mark.parametrize("scorer", ["random", "streaming", "lacache"])
def test_a_prefix_hit_does_not_change_a_positions_score(scorer):
    whole, owned = scores_of(scorer, "one-image"), scores_of(scorer, "prefix-in-image")
    assert torch.equal(whole[..., 50:], owned)


def test_everything_that_lets_all_rows_vote_says_what_a_prefix_hit_does():
    parts = [compose(name, "uniform").scorer for name in SCORERS]
    parts += [compose("random", name).allocator for name in ALLOCATORS]
    everyone = [part for part in parts if needs_of(part).rows.kind == "all"]
    assert everyone
    for part in everyone:
        assert "own new rows" in part.prefix_hit


def test_a_table_for_another_model_is_refused_at_start():
    policy = compose("snapkv", "table")
    policy.require(PROMPTS["tiny"])
    with pytest.raises(PolicyError, match="4 weights, the model has 7 layers"):
        policy.require(synthetic_prompt(num_layers=7))


@pytest.mark.parametrize("scorer", ["expected_attention", "compactor", "leverage"])
def test_a_model_without_known_rotary_is_refused_at_start(scorer):
    model = Prompt(**{**vars(PROMPTS["tiny"]), "rotary": None})
    with pytest.raises(PolicyError, match=f"scorer {scorer} needs the model's rotary embedding"):
        compose(scorer, "uniform").require(model)


def test_a_policy_that_did_not_get_what_it_declared_says_so():
    prompt = PROMPTS["one-image"]
    views = view_layers(layers("one-image"), prompt, compose("random", "uniform").needs[0])
    with pytest.raises(PolicyFault, match=r"scorer snapkv raised LookupError: this field .* not declared"):
        compose("snapkv", "uniform").score(views, prompt)
