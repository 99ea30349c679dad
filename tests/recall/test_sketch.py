"""The sketch of keys: its format, its error bound, and that its estimates are right on average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_sgl.recall.sketch import KeySketch

DIMS = st.sampled_from((8, 24, 64, 80, 96, 128, 256))


def drawn(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Gaussian, some dimensions a hundred times larger than others as in real keys."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-spread, spread, shape[-1])[torch.randperm(shape[-1], generator=generator)]
    return torch.randn(*shape, generator=generator) * sizes


def exact(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[H, n]`."""
    groups = queries.view(keys.shape[1], -1, keys.shape[2])
    return torch.einsum("kgd,nkd->kgn", groups, keys).flatten(0, 1)


@given(DIMS, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_no_estimate_is_off_by_more_than_the_bound(dim: int, heads: int, group: int, seed: int, spread: float) -> None:
    sketch = KeySketch(dim, "cpu")
    keys = drawn(40, heads, dim, seed=seed, spread=spread)
    queries = drawn(heads * group, dim, seed=seed + 1, spread=spread)
    codes = sketch.encode(keys)
    assert codes.shape == (40, heads, sketch.bytes)
    assert codes.dtype == torch.uint8
    true = exact(queries, keys)
    found = sketch.scores(queries, codes)
    norm = keys.norm(dim=-1)
    tangent = (dim * norm**2 / (keys @ sketch.rotation).abs().sum(-1) ** 2 - 1).clamp(min=0).sqrt()  # [n, K]
    per_head = (norm * tangent).T.repeat_interleave(group, 0), norm.T.repeat_interleave(group, 0)
    across = (queries.norm(dim=-1)[:, None] ** 2 - (true / per_head[1]) ** 2).clamp(min=0).sqrt()
    # float16's step is 2^-11; the estimate itself may be as large as |q| |k| / c.
    slack = 2e-3 * queries.norm(dim=-1)[:, None] * per_head[1] * math.sqrt(dim)
    assert bool(((found - true).abs() <= per_head[0] * across + slack).all())


@pytest.mark.parametrize("dim", [64, 128])
def test_estimates_are_right_on_average_over_rotations(dim: int) -> None:
    """Mean and spread over rotations are those of the docstring; keys and queries with outlier dimensions."""
    keys, queries = drawn(6, 1, dim, seed=3), drawn(4, dim, seed=4)
    sketches = [KeySketch(dim, "cpu", seed) for seed in range(400)]
    errors = torch.stack([s.scores(queries, s.encode(keys)) for s in sketches]) - exact(queries, keys)
    norm = keys.norm(dim=-1).T
    across = (queries.norm(dim=-1)[:, None] ** 2 - (exact(queries, keys) / norm) ** 2).sqrt()
    unit = norm * across / math.sqrt(dim - 1)
    assert float((errors.mean(0) / unit).abs().max()) < 4 * 0.76 / math.sqrt(400)
    assert (errors / unit).square().mean().sqrt() == pytest.approx(0.76, abs=0.03)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_query_along_a_key_is_exact(dim: int) -> None:
    sketch = KeySketch(dim, "cpu")
    keys = drawn(20, 1, dim)
    codes = sketch.encode(keys)
    for row in range(20):
        found = sketch.scores(keys[row], codes)[0, row]
        torch.testing.assert_close(found, keys[row, 0].square().sum(), rtol=2e-3, atol=0)


def test_a_code_depends_on_its_own_key_alone() -> None:
    """In whatever chunks keys are encoded and in whatever order; the same in another process's sketch."""
    keys = drawn(50, 2, 64)
    whole = KeySketch(64, "cpu").encode(keys)
    chunks = torch.cat([KeySketch(64, "cpu").encode(part) for part in keys.split([1, 17, 32])])
    assert torch.equal(whole, chunks)
    assert torch.equal(KeySketch(64, "cpu").encode(keys.flip(0)), whole.flip(0))


def test_bfloat16_keys_are_encoded_as_their_float32_values() -> None:
    sketch = KeySketch(64, "cpu")
    keys = drawn(30, 2, 64).to(torch.bfloat16)
    assert torch.equal(sketch.encode(keys), sketch.encode(keys.float()))
    queries = drawn(4, 64).to(torch.bfloat16)
    codes = sketch.encode(keys)
    assert torch.equal(sketch.scores(queries, codes), sketch.scores(queries.float(), codes))


def test_zero_and_huge_keys_give_finite_scores() -> None:
    sketch = KeySketch(64, "cpu")
    keys = torch.stack([torch.zeros(1, 64), torch.full((1, 64), 1e6), torch.full((1, 64), 1e-8)])
    scores = sketch.scores(torch.ones(1, 64), sketch.encode(keys))
    assert bool(scores.isfinite().all())
    assert float(scores[0, 0]) == 0.0
    assert int(scores[0].argmax()) == 1


@pytest.mark.parametrize(("dim", "size"), [(64, 10), (128, 18)])
def test_a_sketch_is_at_most_4_percent_of_keys_and_values(dim: int, size: int) -> None:
    assert KeySketch(dim, "cpu").bytes == size <= 0.04 * 2 * 2 * dim


@pytest.mark.parametrize("dim", [0, 4, 60])
def test_other_head_sizes_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8, got {dim}"):
        KeySketch(dim, "cpu")
