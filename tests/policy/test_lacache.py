"""The ladder against the reference procedure, written down with lists."""

import math

import pytest

from vlcache_sgl.api import LayerView
from vlcache_sgl.api.testing import synthetic_prompt
from vlcache_sgl.policy import resolve


def ladder_survivors(length: int, layer: int, layers: int, span: int, first: int, cuts: int) -> list[int]:
    """Tokens left after `cuts` groups were cut, list by list."""
    group = 1 + max(0, math.ceil((layers - span) / span))
    alive = list(range(first, length))
    while cuts and len(alive) >= group > 1:
        done: list[int] = []
        while cuts and len(alive) >= group:
            done.append(alive[layer % group])
            alive = alive[group:]
            cuts -= 1
        alive = done + alive
    return [*range(first), *alive]


@pytest.mark.parametrize(("layers", "span"), [(4, 2), (6, 2), (28, 0), (3, 1)])
def test_lacache(layers, span):
    prompt = synthetic_prompt(60, num_layers=layers)
    policy = resolve(f"lacache:rung={span}")
    scores = policy.score([LayerView(index) for index in range(layers)], prompt)
    for layer in range(layers):
        for cuts in range(0, 30, 3):
            left = ladder_survivors(60, layer, layers, span or layers // 2, 4, cuts)
            best = scores[layer, 0].sort(descending=True, stable=True).indices[: len(left)]
            assert sorted(best.tolist()) == left


def test_lacache_layers_cover_what_one_layer_drops():
    prompt = synthetic_prompt(60, num_layers=4)
    policy = resolve("lacache:rung=2")
    views = [LayerView(index) for index in range(4)]
    plan = policy.decide(views, views, prompt, total=4 * 32)
    assert bool(plan.keep.any(0).all()), "every token is still somewhere at 53 %"
    assert not bool(plan.keep.all(0).all())
