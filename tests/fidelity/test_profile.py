"""The search for the layers that later questions read, on models whose needs are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_sgl.fidelity.profile import LEAST, LEVELS, ExhaustedError, Shares, blocks, mean_share, most_trials, search


class Model:
    """Answers as the full cache while every layer keeps at least what it needs; each that does not costs `loss`."""

    def __init__(self, needs: dict[int, float], layers: int, loss: float = 0.25) -> None:
        self.needs, self.layers, self.loss = needs, layers, loss
        self.asked: list[Shares] = []

    def __call__(self, shares: Shares) -> float:
        assert len(shares) == self.layers
        self.asked.append(shares)
        return max(0.0, 1.0 - self.loss * sum(shares[layer] < need for layer, need in self.needs.items()))


def test_three_layers_of_six():
    model = Model({0: 0.1, 1: 0.1, 2: 1.0}, 6)
    found = search(6, model, 0.98)
    assert found.shares == (0.1, 0.1, 1.0, 0.0, 0.0, 0.0)
    assert mean_share(found.shares) == pytest.approx(0.2)
    assert found.finished
    assert found.alone == {0: 0.75, 1: 0.75, 2: 0.75, 3: 1.0, 4: 1.0, 5: 1.0}


@given(
    st.integers(1, 80).flatmap(
        lambda layers: st.tuples(
            st.just(layers),
            st.dictionaries(st.integers(0, layers - 1), st.sampled_from((1.0, *LEVELS, LEAST)), min_size=1, max_size=5),
        )
    ),
    st.integers(1, 12),
)
def test_finds_exactly_what_is_needed_and_asks_no_more_than_it_says(model, groups):
    """Where layers do not depend on each other the greedy search is exact, in groups as alone."""
    layers, needs = model
    measure = Model(needs, layers)
    found = search(layers, measure, 0.98, groups)
    assert found.shares == tuple(needs.get(layer, 0.0) for layer in range(layers))
    assert len(measure.asked) == len(set(measure.asked)) <= most_trials(layers, groups)


def test_a_deep_model_with_few_needed_layers_takes_few_trials():
    measure = Model({5: 1.0, 40: 0.25}, 80)
    assert search(80, measure, 0.98).shares[5] == 1.0
    assert len(measure.asked) < 60


def test_what_costs_little_alone_may_cost_too_much_together():
    """Three layers hold the same thing: two may go, and it is the upper ones."""

    def measure(shares: Shares) -> float:
        return 1.0 if max(shares[:3]) >= 0.25 else 0.0

    assert search(4, measure, 1.0).shares == (0.25, 0.0, 0.0, 0.0)


def test_tolerance_is_for_all_layers_together():
    """Each layer is worth a point; two points may go."""
    found = search(6, Model(dict.fromkeys(range(6), 1.0), 6, loss=0.01), 0.98 - 1e-9)
    assert found.shares == (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)


def test_a_model_that_reads_nothing_keeps_one_layer():
    """Rather than a profile of zeros, which no allocator takes."""
    assert search(3, Model({}, 3), 1.0).shares == (0.1, 0.0, 0.0)


def test_it_keeps_the_best_setting_when_trials_run_out():
    asked: list[Shares] = []

    def measure(shares: Shares) -> float:
        if len(asked) == 8:
            raise ExhaustedError
        asked.append(shares)
        return 1.0

    found = search(6, measure, 0.98)
    assert not found.finished
    # Six layers alone, then two lowered.
    assert found.shares == (1.0, 1.0, 1.0, 1.0, LEAST, LEAST)


def test_a_layer_is_only_emptied_where_that_costs_nothing():
    """The last tenth of layer 0 is worth a point, which the tolerance would allow."""

    def measure(shares: Shares) -> float:
        return 0.99 if shares[0] == 0 else 1.0

    assert search(3, measure, 0.98).shares == (0.1, 0.0, 0.0)
    assert search(3, lambda shares: 1.0, 0.98).shares == (0.1, 0.0, 0.0)
    assert search(3, lambda shares: 0.99 if shares[2] == 0 else 1.0, 0.98).shares == (0.0, 0.0, 0.1)


def test_blocks_are_all_layers_once():
    for layers in (1, 6, 28, 80):
        for groups in (1, 3, 8, 100):
            found = blocks(layers, groups)
            assert [layer for block in found for layer in block] == list(range(layers))
            assert max(map(len, found)) - min(map(len, found)) <= 1
            assert len(found) == min(groups, layers)
