"""The fitted sketch: its basis, its format, and that it beats signs where keys and queries share directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_sgl.api.testing import PlainRotary
from vlcache_sgl.recall.fitted import (
    Basis,
    FittedSketch,
    Moments,
    coordinates,
    fit,
    moments,
    spread,
)
from vlcache_sgl.recall.sketch import KeySketch

ROTARY = PlainRotary(theta=10000.0)


def states(count: int, dim: int, seed: int = 0, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[n, 2, D]` and queries `[n, 6, D]` of two KV heads, large in few rotary pairs, at their positions."""
    fixed = torch.Generator().manual_seed(7)
    pairs = torch.logspace(0, -1.5, dim // 2)[torch.randperm(dim // 2, generator=fixed)].repeat(2)
    key_mix, query_mix = ((torch.randn(2, dim, dim, generator=fixed) + 8 * torch.eye(dim)) * pairs for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, count, dim, generator=generator) @ key_mix
    queries = torch.randn(2, 3, count, dim, generator=generator) @ query_mix[:, None]
    positions = torch.arange(begin, begin + count)
    keys, queries = ROTARY.rotate(keys, positions), ROTARY.rotate(queries, positions)
    return keys.transpose(0, 1), queries.flatten(0, 1).transpose(0, 1)


def fitted(dim: int) -> FittedSketch:
    return FittedSketch(fit(spread(moments(*states(600, dim)), ROTARY)))


def exact(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[H, n]`."""
    return torch.einsum("kgd,nkd->kgn", queries.view(keys.shape[1], -1, keys.shape[2]), keys).flatten(0, 1)


@pytest.mark.parametrize(("dim", "size"), [(64, 10), (128, 20)])
def test_a_code_is_at_most_4_percent_of_keys_and_values(dim: int, size: int) -> None:
    sketch = fitted(dim)
    codes = sketch.encode(states(30, dim, seed=1)[0])
    assert codes.shape == (30, 2, size)
    assert codes.dtype == torch.uint8
    assert sketch.bytes == size <= 0.04 * 2 * 2 * dim


@given(st.integers(1, 32).map(lambda part: 8 * part))
def test_coordinates_fill_whole_bytes(dim: int) -> None:
    four, two = coordinates(dim)
    assert four % 2 == 0 == two % 4
    assert four + two <= dim
    assert dim < 16 or 4 * four + 2 * two <= 0.04 * 8 * 4 * dim + 1e-9


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_estimates_are_nearer_than_signs(dim: int) -> None:
    """On other tokens than the basis was fitted to, and at other positions, nearly twice the best tokens are found."""
    sketch, signs = fitted(dim), KeySketch(dim, "cpu")
    keys, _ = states(500, dim, seed=1, begin=900)
    queries = states(20, dim, seed=2, begin=1400)[1].transpose(0, 1).reshape(-1, dim)  # [(K g n), D]
    true = exact(queries, keys)

    def found(estimate: torch.Tensor) -> float:
        best, mine = (values.topk(16).indices for values in (true, estimate))
        return float((best[..., None] == mine[..., None, :]).any(-1).float().mean())

    ours, theirs = (found(one.scores(queries, one.encode(keys))) for one in (sketch, signs))
    assert ours > theirs + 0.15
    error = (sketch.scores(queries, sketch.encode(keys)) - true).square().mean() / true.square().mean()
    assert float(error) < 0.35


def test_without_quantising_all_coordinates_give_the_logit() -> None:
    """E and F of a whole basis are each other's inverse."""
    keys, queries = states(300, 64)
    found = fit(moments(keys, queries))
    inverse = torch.einsum("kdm,kdr->kmr", found.keys, found.queries)
    torch.testing.assert_close(inverse, torch.eye(32).expand(2, 32, 32), rtol=1e-3, atol=1e-3)


def test_coordinates_have_unit_variance_and_fall_in_importance() -> None:
    keys, queries = states(800, 64)
    found = fit(moments(keys, queries))
    mine = torch.einsum("nkd,kdm->nkm", keys, found.keys)
    torch.testing.assert_close(mine.square().mean(0), torch.ones(2, 32), rtol=1e-2, atol=1e-2)
    weights = torch.einsum("nkgd,kdm->nkgm", queries.unflatten(1, (2, 3)), found.queries).square().mean((0, 2))
    assert bool((weights.diff(dim=1) <= 1e-3 * weights[:, :1]).all())


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
    sketch = fitted(64)
    keys = states(60, 64, seed=seed)[0].to(torch.bfloat16)
    whole = sketch.encode(keys)
    parts = torch.cat([sketch.encode(part) for part in keys.split([cut, 60 - cut]) if len(part)])
    # A product of matrices may round by its number of rows; a coordinate on an edge may then fall to either side.
    assert float((whole != parts).float().mean()) <= 0.002
    assert torch.equal(whole, sketch.encode(keys.float()))


def test_codes_are_laid_out_as_documented() -> None:
    """Coordinates that are the key's dimensions: low bits first, the 4-bit ones before the 2-bit ones."""
    eye = torch.eye(64)[None, :, :32]
    sketch = FittedSketch(Basis(eye, eye))
    key = torch.full((1, 1, 64), -9.0)
    assert sketch.encode(key)[0, 0].tolist() == [0] * 10
    key[..., 1] = 9.0  # the high half of the first byte
    key[..., 8] = 9.0  # the first of the narrow ones
    key[..., 11] = 0.1  # level 2 of 0 to 3, the highest two bits
    assert sketch.encode(key)[0, 0].tolist() == [0xF0, 0, 0, 0, 0b10000011, 0, 0, 0, 0, 0]
    assert float(sketch.scores(torch.eye(64)[1:2], sketch.encode(key))[0, 0]) == pytest.approx(2.7326)
    assert float(sketch.scores(torch.eye(64)[11:12], sketch.encode(key))[0, 0]) == pytest.approx(0.4528)
    assert float(sketch.scores(torch.eye(64)[40:41], sketch.encode(key))[0, 0]) == 0.0


def test_moments_of_nothing_but_zeros_give_a_finite_sketch() -> None:
    """A head that is never used."""
    sketch = FittedSketch(fit(Moments(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64))))
    keys = torch.randn(5, 1, 64)
    assert bool(sketch.scores(torch.randn(3, 64), sketch.encode(keys)).isfinite().all())
