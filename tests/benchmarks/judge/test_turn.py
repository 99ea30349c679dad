"""A turn: that it changes no logit, that sketches are nearer after it, and its moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.judge.turn import Moments, TurnedSketch, balanced, basis, moments, spread
from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.recall.sketch import KeySketch

ROTARY = PlainRotary(theta=10000.0)


def states(count: int, dim: int, seed: int = 0, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[n, 2, D]` and queries `[n, 6, D]` of two KV heads, large in other rotary pairs, at their positions."""
    fixed = torch.Generator().manual_seed(7)
    pairs = torch.logspace(0, -1.5, dim // 2).repeat(2)
    sizes = (pairs, pairs.view(2, -1).flip(1).flatten())
    key_mix, query_mix = ((torch.randn(2, dim, dim, generator=fixed) + 8 * torch.eye(dim)) * size for size in sizes)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, count, dim, generator=generator) @ key_mix
    queries = torch.randn(2, 3, count, dim, generator=generator) @ query_mix[:, None]
    positions = torch.arange(begin, begin + count)
    keys, queries = ROTARY.rotate(keys, positions), ROTARY.rotate(queries, positions)
    return keys.transpose(0, 1), queries.flatten(0, 1).transpose(0, 1)


def turned(dim: int) -> KeySketch:
    return TurnedSketch(balanced(moments(*states(600, dim))))


def exact(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[H, n]`."""
    return torch.einsum("kgd,nkd->kgn", queries.view(keys.shape[1], -1, keys.shape[2]), keys).flatten(0, 1)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_estimates_are_nearer_than_without_a_turn(dim: int) -> None:
    """On other tokens than the turn was fitted to."""
    sketch, plain = turned(dim), KeySketch(dim, "cpu")
    keys, _ = states(500, dim, seed=1)
    queries = states(20, dim, seed=2, begin=500)[1].transpose(0, 1).reshape(-1, dim)  # [(K g n), D]
    true = exact(queries, keys)

    def found(estimate: torch.Tensor) -> float:
        best, mine = (values.topk(16).indices for values in (true, estimate))
        return float((best[..., None] == mine[..., None, :]).any(-1).float().mean())

    def error(one: KeySketch) -> float:
        return float((one.scores(queries, one.encode(keys)) - true).square().mean())

    ours, theirs = (found(one.scores(queries, one.encode(keys))) for one in (sketch, plain))
    assert ours > theirs + 0.05
    assert error(sketch) < 0.7 * error(plain)


def test_a_turn_changes_no_logit() -> None:
    keys, queries = states(300, 64)
    turn = balanced(moments(keys, queries))
    inverse = torch.einsum("kdm,kem->kde", turn.keys, turn.queries)
    torch.testing.assert_close(inverse, torch.eye(64).expand(2, 64, 64), rtol=1e-3, atol=1e-3)


def test_turned_keys_and_queries_have_the_same_moment() -> None:
    """Where no direction is so small that the ridge counts."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2000, 2, 64, generator=generator) * torch.linspace(1, 3, 64)
    queries = torch.randn(2000, 6, 64, generator=generator) * torch.linspace(3, 1, 64)
    turn = balanced(moments(keys, queries))
    mine = torch.einsum("nkd,kdm->nkm", keys, turn.keys)
    theirs = torch.einsum("nkgd,kdm->nkgm", queries.unflatten(1, (2, 3)), turn.queries)
    both = moments(mine, theirs.flatten(1, 2))
    largest = float(both.keys.max())
    torch.testing.assert_close(both.keys, both.queries, rtol=0, atol=0.03 * largest)
    diagonal = torch.diag_embed(both.keys.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(both.keys, diagonal, rtol=0, atol=0.01 * largest)


def test_coordinates_have_unit_variance_and_fall_in_importance() -> None:
    keys, queries = states(800, 64)
    found = basis(moments(keys, queries))
    mine = torch.einsum("nkd,kdm->nkm", keys, found.keys)[..., :20]
    torch.testing.assert_close(mine.square().mean(0), torch.ones(2, 20), rtol=1e-2, atol=1e-2)
    assert bool((found.variance.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("reach", [0, 1000])
def test_spread_moments_are_those_of_moved_states(reach: int) -> None:
    """Against the same states rotated further, offset by offset."""
    keys, queries = states(50, 16)
    seen = moments(keys, queries)
    found = spread(seen, ROTARY, reach)
    parts = []
    for offset in torch.linspace(0, reach, 64).round().to(torch.int64):
        moved = (ROTARY.rotate(part.transpose(0, 1), offset.expand(50)).transpose(0, 1) for part in (keys, queries))
        parts.append(moments(*moved))
    for mine, theirs in zip(found, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs).mean(0), rtol=1e-3, atol=1e-3)


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_code_depends_on_its_own_key_alone(seed: int, cut: int) -> None:
    """In whatever chunks keys are encoded; bfloat16 keys as their float32 values."""
    sketch = turned(64)
    keys = states(60, 64, seed=seed)[0].to(torch.bfloat16)
    whole = sketch.encode(keys)
    parts = torch.cat([sketch.encode(part) for part in keys.split([cut, 60 - cut]) if len(part)])
    # A product of matrices may round by its number of rows; a coordinate on an edge may then fall to either side.
    assert float((whole != parts).float().mean()) <= 0.002
    assert torch.equal(whole, sketch.encode(keys.float()))


def test_moments_of_nothing_but_zeros_give_a_finite_sketch() -> None:
    """A head that is never used."""
    sketch = TurnedSketch(balanced(Moments(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64))))
    keys = torch.randn(5, 1, 64)
    assert bool(sketch.scores(torch.randn(3, 64), sketch.encode(keys)).isfinite().all())
