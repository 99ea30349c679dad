"""Sketch scores: the reference against signs unpacked one by one, the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from vlcache_kernels.sketch_scores import FACTOR_BYTES, sketch_scores

SHAPES = ((1, 4, 2, 64, 70), (3, 6, 2, 128, 33), (2, 2, 2, 80, 65), (2, 7, 1, 16, 5))


def case(batch: int, heads: int, kv_heads: int, dim: int, count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(dim + count)
    signs = torch.randint(0, 256, (4 * count, kv_heads, dim // 8), generator=generator, dtype=torch.uint8)
    factors = torch.rand(4 * count, kv_heads, FACTOR_BYTES // 2, generator=generator).to(torch.float16)
    codes = torch.cat([signs, factors.view(torch.uint8)], dim=-1)
    rows = torch.randint(0, 4 * count, (batch, count), generator=generator)
    return torch.randn(batch, heads, dim, generator=generator), codes, rows


def unpacked(queries: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    heads, dim = queries.shape[1:]
    own = codes[rows]  # [B, n, K, bytes]
    bits = torch.stack([(own[..., d // 8] >> (d % 8)) & 1 for d in range(dim)], dim=-1).double() * 2 - 1
    factor = own[..., dim // 8 :].contiguous().view(torch.float16).double()
    signs = (bits * factor).repeat_interleave(heads // codes.shape[1], 2)
    return torch.einsum("bhd,bnhd->bhn", queries.double(), signs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_sums_signs(shape: tuple[int, ...]) -> None:
    found = sketch_scores(*case(*shape), backend="naive")
    torch.testing.assert_close(found.double(), unpacked(*case(*shape)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_agrees(shape: tuple[int, ...], device: torch.device) -> None:
    queries, codes, rows = (part.to(device) for part in case(*shape))
    for dtype in (torch.int64, torch.int32):
        found = sketch_scores(queries, codes, rows.to(dtype), backend="triton")
        torch.testing.assert_close(found, sketch_scores(queries, codes, rows, backend="naive"), rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    queries, codes, rows = case(1, 4, 2, 64, 8)
    with pytest.raises(ValueError, match="codes has shape"):
        sketch_scores(queries[..., :32], codes, rows)
    with pytest.raises(ValueError, match="do not fit codes"):
        sketch_scores(queries[:, :3], codes, rows)
    with pytest.raises(TypeError, match="rows is"):
        sketch_scores(queries, codes, rows.float())
