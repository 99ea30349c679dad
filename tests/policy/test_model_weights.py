"""Budgets from the model's weights, the fallback without them, and what the flagship makes of both."""

from dataclasses import replace

import pytest
import torch

from vlcache_sgl.api import LayerView
from vlcache_sgl.api.testing import synthetic_prompt, synthetic_views
from vlcache_sgl.policy import PolicyError, resolve

PROMPT = synthetic_prompt(200, [(10, 170)], num_layers=3, num_kv_heads=2)
LAYERS = (0.1, 0.6, 0.2)
HEADS = ((0.1, 0.1), (1.0, 0.2), (0.0, 0.4))


def decided(text, prompt, total):
    policy = resolve(text)
    return policy.decide(*synthetic_views(prompt, policy.needs), prompt, total)


def test_layers_share_in_proportion_to_their_weights():
    plan = decided("scorer=keydiff,allocator=model", replace(PROMPT, layer_weights=LAYERS), 180)
    assert plan.tokens_per_layer == [20, 120, 40]


def test_heads_share_where_they_have_sets_of_their_own():
    known = replace(PROMPT, layer_weights=LAYERS, head_weights=HEADS)
    plan = decided("scorer=keydiff,allocator=model,heads=split", known, 180)
    assert plan.counts.tolist() == [[20, 20], [200, 40], [0, 80]]
    assert plan.total == 180
    assert decided("scorer=keydiff,allocator=model", known, 180).tokens_per_layer == [20, 120, 40]


def test_the_floor_holds_for_layers_and_for_heads():
    known = replace(PROMPT, layer_weights=(0.0, 1.0, 0.0), head_weights=((0, 0), (1, 1), (0, 0)))
    for heads in ("shared", "split"):
        plan = decided(f"scorer=keydiff,allocator=model,floor=0.5,heads={heads}", known, 180)
        assert plan.tokens_per_layer == [30, 120, 30]


def test_without_weights_layers_are_alike_or_ranked():
    assert decided("scorer=keydiff,allocator=model", PROMPT, 180).tokens_per_layer == [60, 60, 60]
    ranked = decided("scorer=keydiff,allocator=model,unknown=rank", PROMPT, 180)
    assert torch.equal(ranked.keep, decided("scorer=keydiff,allocator=global", PROMPT, 180).keep)
    with pytest.raises(PolicyError, match="ranks scores across layers"):
        resolve("scorer=knorm,allocator=model,unknown=rank")


def test_weights_of_another_model_are_refused():
    with pytest.raises(PolicyError, match="--kv-weights has 2 layers, the model has 3"):
        resolve("vlcache").require(replace(PROMPT, layer_weights=(1.0, 0.5)))


def test_one_ranking_over_all_heads():
    """The best tokens of the whole model, whichever layer and head they are in."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 2, PROMPT.owned, generator=generator)
    policy = resolve("scorer=random,allocator=global,heads=split")
    plan = policy.plan(scores, [LayerView(index) for index in range(3)], PROMPT, 90)
    least = scores.flatten().sort(descending=True).values[2 * 90 - 1]
    assert torch.equal(plan.keep, scores >= least)
    assert plan.total == 90
    equal = resolve("scorer=random,allocator=global,heads=split,among=layers")
    assert not equal.plan(scores, [LayerView(index) for index in range(3)], PROMPT, 90).differs_by_head


def test_auto_is_what_the_server_can_do():
    assert resolve("vlcache").selection.heads == "shared"
    assert resolve("vlcache", head_cells=True).selection.heads == "split"
    assert resolve("vlcache:heads=shared", head_cells=True).selection.heads == "shared"
    assert resolve("kvzip").fingerprint != resolve("kvzip", head_cells=True).fingerprint


def test_the_flagship_keeps_the_neighbours_of_what_the_question_looks_at():
    """One row of one head looks at one token: the sum over rows forgets it, the maximum keeps it and its run."""
    views = [LayerView(index) for index in range(3)]
    for view in views:
        view.column_sum = torch.full((2, PROMPT.owned), 0.5)
        view.column_max = torch.full((2, PROMPT.owned), 0.01)
        view.column_sum[0, 100] = 0.9
        view.column_max[0, 100] = 0.9
        view.density = torch.full((2,), 0.5)
    plan = resolve("vlcache").decide(views, views, replace(PROMPT, layer_weights=LAYERS), 3 * 30)
    assert plan.total == 90
    for layer, least in zip(plan.keep[:, 0], (3, 17, 7), strict=True):
        kept = layer.nonzero().flatten().tolist()
        assert kept[:4] == [0, 1, 2, 3]
        assert sum(92 <= token <= 108 for token in kept) >= least


def test_the_letter_of_the_paper_is_what_it_was():
    paper = resolve("vlcache:paper")
    same = resolve("scorer=vlcache,allocator=vlcache,paper=true,recent=0.1")
    assert (paper.scorer, paper.allocator, paper.selection) == (same.scorer, same.allocator, same.selection)


def test_a_part_of_a_recipe_can_be_replaced():
    policy = resolve("vlcache:allocator=uniform,smooth=5")
    assert (policy.allocator_name, policy.scorer.smooth, policy.selection.floor) == ("uniform", 5, 0.3)
    with pytest.raises(PolicyError, match="unknown parameter 'unknown'"):
        resolve("vlcache:allocator=uniform,unknown=rank")
