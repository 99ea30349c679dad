"""Copying cells: what is wanted arrives, nothing else changes, and a kernel is given no memory that it cannot reach."""

from __future__ import annotations

import pytest
import torch

from vlcache_kernels.copy_cells import copy_cells

SHAPES = [
    (1, 5, (2, 2, 16), torch.float32),
    (3, 40, (2, 1, 80), torch.bfloat16),
    (2, 9, (2, 8, 256), torch.float16),
    (2, 7, (2, 2, 32), torch.uint8),  # 8-bit floats
]


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize(("planes", "tokens", "cell", "dtype"), SHAPES)
def test_cells_arrive(
    planes: int, tokens: int, cell: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Into an arena that all planes share, from rows that are the same for all planes, some of them missing."""
    rng = torch.Generator().manual_seed(tokens)
    source = torch.randint(8, 100, (planes, 2 * tokens, *cell), generator=rng).to(dtype)
    rows = torch.randperm(2 * tokens, generator=rng)[:tokens].to(torch.int32)
    rows[tokens // 2] = -1
    to = (torch.randperm(planes * tokens, generator=rng) + 1).view(planes, tokens)
    to[-1, 0] = -1
    arena = torch.full((planes * tokens + 1, *cell), 7).to(dtype)
    expected = arena.clone()
    for plane in range(planes):
        for token in range(tokens):
            if rows[token] >= 0 and to[plane, token] >= 0:
                expected[to[plane, token]] = source[plane, rows[token]]
    arena, source = arena.to(device), source.to(device)
    copy_cells(
        arena.expand(planes, *arena.shape),
        to.to(device),
        source,
        rows.to(device).expand(planes, -1),
        backend=backend,  # type: ignore[arg-type]
    )
    assert torch.equal(arena.cpu(), expected)


@pytest.mark.gpu
def test_pinned_memory_is_reached(device: torch.device) -> None:
    host = torch.randn(2, 6, 2, 1, 64).pin_memory()
    back = torch.zeros_like(host).pin_memory()
    arena, cells = torch.zeros(13, 2, 1, 64, device=device), torch.arange(1, 13, device=device).view(2, 6)
    rows = torch.arange(6, device=device).expand(2, -1)
    copy_cells(arena.expand(2, *arena.shape), cells, host, rows)
    copy_cells(back, rows, arena.expand(2, *arena.shape), cells)
    torch.cuda.synchronize()
    assert torch.equal(back, host)


def test_what_does_not_fit_is_refused() -> None:
    cells, rows = torch.zeros(2, 3, 2, 1, 4), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="numbers has shape"):
        copy_cells(cells, rows, cells, rows[:1])
    with pytest.raises(TypeError, match="expected the same"):
        copy_cells(cells, rows, cells.half(), rows)
    with pytest.raises(ValueError, match="contiguous within a plane"):
        copy_cells(cells[..., ::2], rows, cells[..., :2], rows)
    with pytest.raises(TypeError, match="expected int32 or int64"):
        copy_cells(cells, rows.float(), cells, rows)
