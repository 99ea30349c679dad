"""The small pieces that policies are made of."""

import pytest
import torch

from vlcache_sgl.api import (
    LayerView,
    Needs,
    Prompt,
    Rows,
    Span,
    declared,
    keep_first,
    keep_last,
    minmax,
    pool,
    zscore,
)
from vlcache_sgl.api.testing import PlainRotary, synthetic_layers, synthetic_prompt, view_layers
from vlcache_sgl.policy.checks import needs_problem, pair_problem


class Part:
    """A scorer or allocator with attributes as given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize("make", [lambda: Rows("first"), lambda: Rows.last(0), lambda: Rows.post_vision(-1)])  # type: ignore[arg-type]
def test_rows_check_themselves(make):
    with pytest.raises(ValueError, match="rows"):
        make()


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_density_is_a_threshold(threshold):
    with pytest.raises(ValueError, match="density"):
        Needs(rows=Rows.all(), density=threshold)


def test_needs_that_can_be_met():
    assert needs_problem(Part(needs=Needs())) is None
    assert needs_problem(Part(needs=Needs(rows=Rows.last(8), probabilities=True))) is None
    assert needs_problem(Part(needs=Needs(rows=Rows.all(), column_sum=True), prefix_hit="new rows count")) is None


def test_pairs_that_contradict_each_other():
    dense = [Part(needs=Needs(rows=Rows.last(8), density=threshold)) for threshold in (0.01, 0.1)]
    assert "different density thresholds" in str(pair_problem(*dense))
    assert pair_problem(dense[0], dense[0]) is None
    other_rows = Part(needs=Needs(rows=Rows.last(9), density=0.1))
    assert pair_problem(dense[0], other_rows) is None
    ranking = Part(needs=Needs(), compares_layers=True)
    assert "only comparable within a layer" in str(pair_problem(Part(needs=Needs()), ranking))
    assert pair_problem(Part(needs=Needs(), comparable=True), ranking) is None


def test_declared():
    assert declared(torch.ones(1)) == 1
    with pytest.raises(LookupError, match="not declared in `needs`"):
        declared(LayerView(0).column_sum)


def test_pool():
    row = torch.tensor([[0.0, 3.0, 0.0, 6.0]])
    assert pool(row, 3).tolist() == [[1.0, 1.0, 3.0, 2.0]]
    assert pool(row, 3, "max").tolist() == [[3.0, 3.0, 6.0, 6.0]]
    assert pool(row, 1) is row
    assert pool(row[:, :0], 3).shape == (1, 0)


def test_keep_last_and_first():
    row = torch.tensor([[5.0, 1.0, 9.0, 0.0], [-5.0, -1.0, -9.0, 0.0]])
    last = keep_last(row, 2)
    assert last[:, :2].equal(row[:, :2])
    assert last.argsort(-1, descending=True).tolist() == [[3, 2, 0, 1], [3, 2, 1, 0]]
    assert keep_first(row, 2).argsort(-1, descending=True).tolist() == [[0, 1, 2, 3], [0, 1, 3, 2]]
    assert keep_last(row, 0) is row
    assert keep_last(row, 9).argsort(-1, descending=True)[0].tolist() == [3, 2, 1, 0]


def test_scales():
    row = torch.tensor([[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]])
    assert minmax(row).tolist() == [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]
    assert float(zscore(row).mean()) == pytest.approx(0, abs=1e-6)
    assert float(zscore(row).std()) == pytest.approx(1)
    assert zscore(torch.ones(1, 1)).tolist() == [[0.0]]


@pytest.mark.parametrize(("start", "owned", "vision"), [(0, 10, 5), (2, 8, 4), (7, 3, 1), (8, 2, 0), (10, 0, 0)])
def test_prompt_counts_what_it_owns(start, owned, vision):
    prompt = Prompt(10, start, (Span(1, 3), Span(5, 8)), num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
    assert prompt.owned == owned
    assert prompt.owned_vision == vision == int(prompt.is_vision().sum())


@pytest.mark.parametrize("shape", [(7,), (3, 7)], ids=["text", "m-rope"])
def test_plain_rotary_can_be_undone_and_keeps_relative_angles(shape):
    rotary = PlainRotary(sections=(2, 3, 3))
    positions = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(2, 4, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotary.rotate(x, positions)
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(rotary.rotate(turned, positions, inverse=True), x)
    later = (rotary.rotate(x, positions + 5) * rotary.rotate(y, positions + 9)).sum(-1)
    torch.testing.assert_close(later, (turned * rotary.rotate(y, positions + 4)).sum(-1))


def test_views_hold_what_is_declared_and_nothing_else():
    prompt = synthetic_prompt(50, [(5, 30)], start=10)
    needs = Needs(rows=Rows.last(8), column_sum=True, probabilities=True, density=0.5, keys=True)
    view = view_layers(synthetic_layers(prompt), prompt, needs)[1]
    filled = {name for name, value in vars(view).items() if value is not None}
    assert filled == {"index", "row_positions", "column_sum", "probabilities", "density", "keys"}
    assert view.num_rows == 8
    assert view.probabilities.shape == (4, 8, 40)
    assert view.column_sum.shape == (2, 40)
    grouped = view.probabilities.reshape(2, 2, 8, 40)
    torch.testing.assert_close(view.column_sum, grouped.sum(2).mean(1))
    assert float(view.probabilities.sum(-1).max()) < 1, "a part of the attention stays with the prefix"
