"""Integer budgets are exact, within bounds, and follow the weights."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_sgl.api import Budget
from vlcache_sgl.api.budget import water_fill

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-12, 1e6), st.integers(0, 5).map(float)), min_size=1, max_size=48
)


@st.composite
def problems(draw):
    weights = draw(WEIGHTS)
    hi = draw(st.integers(0, 5000))
    lo = draw(st.integers(0, hi))
    total = draw(st.integers(len(weights) * lo, len(weights) * hi))
    return torch.tensor(weights, dtype=torch.float64), total, lo, hi


@settings(max_examples=300, deadline=None)
@given(problems())
def test_sum_is_exact_and_bounds_hold(problem):
    weights, total, lo, hi = problem
    tokens = water_fill(weights, total=total, lo=lo, hi=hi)
    assert tokens.dtype == torch.int64
    assert int(tokens.sum()) == total
    assert lo <= int(tokens.min()) <= int(tokens.max()) <= hi


@settings(max_examples=200, deadline=None)
@given(problems())
def test_more_weight_never_means_fewer_tokens(problem):
    weights, total, lo, hi = problem
    tokens = water_fill(weights, total=total, lo=lo, hi=hi).tolist()
    ranked = sorted(zip(weights.tolist(), tokens, strict=True))
    for (lighter, few), (heavier, many) in itertools.pairwise(ranked):
        # Weights that differ by less than a rounding error may share a fraction: the lower layer then gets it.
        slack = 1 if heavier <= lighter * (1 + 1e-9) or heavier <= 1e-9 * float(weights.max()) else 0
        assert many >= few - slack


@settings(max_examples=200, deadline=None)
@given(problems(), st.floats(1e-3, 1e3))
def test_only_proportions_count(problem, factor):
    weights, total, lo, hi = problem
    plain = water_fill(weights, total=total, lo=lo, hi=hi)
    scaled = water_fill(weights * factor, total=total, lo=lo, hi=hi)
    assert int((plain - scaled).abs().max()) <= 1


@settings(max_examples=100, deadline=None)
@given(problems())
def test_every_layer_is_a_clipped_share_of_one_scale(problem):
    """Against the definition: integers within 1 of ``clip(scale * weight)`` for the scale that bisection finds."""
    weights, total, lo, hi = problem
    share = weights / weights.max() if float(weights.max()) > 0 else torch.ones_like(weights)
    if bool((share < 1e-9).any()):
        return  # layers without weight are a separate test
    low, high = 0.0, max(hi, 1) / float(share.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((share * middle).clamp(lo, hi).sum()) < total else (low, middle)
    expected = (share * high).clamp(lo, hi)
    tokens = water_fill(weights, total=total, lo=lo, hi=hi)
    assert float((tokens - expected).abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("weights", "total", "lo", "hi", "expected"),
    [
        pytest.param([1, 1, 1], 10, 0, 100, [4, 3, 3], id="remainder-to-lower-layer"),
        pytest.param([9, 1], 100, 0, 60, [60, 40], id="full-layer-passes-on"),
        pytest.param([9, 1], 100, 30, 100, [70, 30], id="floor-is-paid-by-the-rich"),
        pytest.param([0, 0], 7, 0, 10, [4, 3], id="no-weight-at-all"),
        pytest.param([1, 0, 0], 20, 0, 10, [10, 5, 5], id="idle-layers-take-what-is-left"),
        pytest.param([1, 3], 0, 0, 10, [0, 0], id="nothing"),
        pytest.param([1, 3], 99, 2, 10, [10, 10], id="total-above-everything"),
        pytest.param([1, 3], 1, 2, 10, [2, 2], id="total-below-the-floors"),
        pytest.param([1, 2, 3], 0, 0, 0, [0, 0, 0], id="nothing-owned"),
    ],
)
def test_examples(weights, total, lo, hi, expected):
    assert water_fill(torch.tensor(weights), total=total, lo=lo, hi=hi).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_weights_are_named(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        water_fill(torch.tensor([1.0, bad]), total=3, lo=0, hi=3)


def test_bad_bounds_are_named():
    with pytest.raises(ValueError, match="lo=3, hi=2"):
        water_fill(torch.ones(2), total=3, lo=3, hi=2)


def test_budget_distributes():
    budget = Budget(total=60, num_layers=3, lo=5, hi=100)
    assert budget.distribute(torch.tensor([1.0, 0.0, 2.0])).tolist() == [18, 5, 37]
    assert budget.ratio == pytest.approx(0.2)
