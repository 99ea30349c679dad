"""The sketch of evicted keys against the true attention mass, in float64."""

from __future__ import annotations

import pytest
import torch

from vlcache_sgl.compression.sharing.sketch import KeySketch, missing_share, sketch_limit


def low_rank_keys(heads: int, count: int, dim: int, rank: int, seed: int, noise: float = 0.0) -> torch.Tensor:
    """`[heads, count, dim]`, in an affine subspace of `rank` dimensions, but for `noise`."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(heads, rank, dim, generator=generator)
    keys = torch.randn(heads, count, rank, generator=generator) @ basis + torch.randn(
        heads, 1, dim, generator=generator
    )
    return keys + noise * torch.randn(heads, count, dim, generator=generator)


def true_log_mass(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """`[R, H]`, written out in float64."""
    heads = keys.shape[0]
    group = queries.shape[1] // heads
    logits = torch.einsum("rhd,hnd->rhn", queries.double(), keys.double().repeat_interleave(group, 0)) * scale
    return logits.logsumexp(-1).float()


@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 3, 32), (1, 1, 64), (4, 7, 128)])
def test_keys_of_few_dimensions_are_sketched_closely(heads: int, group: int, dim: int) -> None:
    keys = low_rank_keys(heads, 400, dim, rank=4, seed=dim)
    queries = torch.randn(9, heads * group, dim, generator=torch.Generator().manual_seed(1))
    sketch = KeySketch.of(keys, tokens=450)
    assert sketch is not None
    scale = dim**-0.5
    wrong = (sketch.log_mass(queries, scale) - true_log_mass(queries, keys, scale)).abs()
    spread = true_log_mass(queries, keys, scale).std()
    assert wrong.mean() < 0.25 * spread


def test_a_lone_key_that_is_looked_for_is_noticed() -> None:
    """What a mean hides: one key among hundreds that matches the query."""
    keys = 0.1 * low_rank_keys(1, 500, 32, rank=6, seed=3)
    wanted = 8 * torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(4)), dim=0)
    keys[0, 123] = wanted
    sketch = KeySketch.of(keys, tokens=500)
    assert sketch is not None
    ordinary = torch.tensor(500.0).log()  # what the kept tokens weigh: as much as 500 keys without a match
    for query, lowest in ((wanted[None, None] * 2, 0.95), (-wanted[None, None] * 2, 0.0)):
        estimated = missing_share(ordinary, sketch.log_mass(query, 0.2))
        true = missing_share(ordinary, true_log_mass(query, keys, 0.2))
        assert estimated >= lowest
        torch.testing.assert_close(estimated, true, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("evicted", "tokens"), [(518, 576), (900, 1000), (60, 576)])
def test_a_sketch_is_small(dtype: torch.dtype, evicted: int, tokens: int) -> None:
    keys = low_rank_keys(2, evicted, 64, rank=64, seed=5).to(dtype)
    sketch = KeySketch.of(keys, tokens)
    assert sketch is not None
    assert 0 < sketch.nbytes <= sketch_limit(tokens, 2, 64, keys.element_size())


def test_nothing_evicted_or_no_room_has_no_sketch() -> None:
    assert KeySketch.of(torch.empty(2, 0, 32), tokens=100) is None
    assert KeySketch.of(torch.randn(2, 3, 32), tokens=3) is None


def test_equal_keys_do_not_divide_by_zero() -> None:
    keys = torch.ones(1, 300, 32)
    sketch = KeySketch.of(keys, tokens=300)
    assert sketch is not None
    queries = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(sketch.log_mass(queries, 0.2), true_log_mass(queries, keys, 0.2), rtol=1e-3, atol=1e-3)
