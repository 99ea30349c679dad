"""Arena write: every element is where it should be and nothing else has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from vlcache_kernels.arena_write import arena_write

BACKENDS = ("naive", "triton")


@dataclass(frozen=True)
class Case:
    tokens: int
    kv_heads: int = 2
    planes: int = 1
    head_dim: int = 16
    source: torch.dtype = torch.float32
    arena: torch.dtype = torch.float32

    def __str__(self) -> str:
        types = "-".join(str(x).removeprefix("torch.") for x in (self.source, self.arena))
        return f"T{self.tokens}-K{self.kv_heads}-G{self.planes}-D{self.head_dim}-{types}"


CASES = [
    Case(1),
    Case(7, kv_heads=3, head_dim=80, source=torch.bfloat16, arena=torch.bfloat16),
    Case(5, kv_heads=4, planes=2, head_dim=96, source=torch.float32, arena=torch.bfloat16),
    Case(9, kv_heads=4, planes=4, head_dim=64, source=torch.float16, arena=torch.float16),
    Case(3, kv_heads=8, head_dim=256, source=torch.bfloat16, arena=torch.bfloat16),
    Case(2, kv_heads=8, head_dim=128, source=torch.bfloat16, arena=torch.float32),
]
LARGE = [
    Case(4099, kv_heads=8, head_dim=128, source=torch.bfloat16, arena=torch.bfloat16),
    Case(513, kv_heads=4, planes=4, head_dim=128, source=torch.float16, arena=torch.float16),
]


def run(case: Case, backend: str, device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    num_slots, per_cell = case.tokens + 9, case.kv_heads // case.planes
    num_cells = num_slots * case.planes + 3
    # Keys and values are slices of one fused projection.
    fused = torch.randn(case.tokens, 2 * case.kv_heads + 1, case.head_dim, generator=rng).to(case.source)
    if device.type == "cpu":  # the interpreter cuts a float32 where hardware rounds it: take numbers that need neither
        fused = fused.to(case.arena).to(case.source)
    keys, values = fused[:, 1 : case.kv_heads + 1], fused[:, case.kv_heads + 1 :]
    slots = torch.randperm(num_slots - 1, generator=rng)[: case.tokens] + 1
    cells = torch.randperm(num_cells - 1, generator=rng)[: case.planes * num_slots] + 1
    residency = cells.view(case.planes, num_slots).to(torch.int32)
    residency[:, slots[case.tokens // 2]] = -1
    residency[-1, slots[0]] = -1
    arena = torch.full((num_cells, 2, per_cell, case.head_dim), -7.0).to(case.arena)

    expected = arena.clone()
    for t, slot in enumerate(slots.tolist()):
        for head in range(case.kv_heads):
            cell = int(residency[head // per_cell, slot])
            if cell >= 0:
                expected[cell, 0, head % per_cell] = keys[t, head].to(case.arena)
                expected[cell, 1, head % per_cell] = values[t, head].to(case.arena)

    found = arena.to(device)
    spread = torch.stack((slots, torch.full_like(slots, 10**6)), dim=1).to(device)[:, 0]
    arena_write(found, keys.to(device), values.to(device), spread, residency.to(device), backend=backend)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_writes_the_cells_of_the_slots(case: Case, backend: str, device: torch.device) -> None:
    run(case, backend, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, device: torch.device) -> None:
    run(case, "triton", device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_beyond_two_to_the_31_elements(
    backend: str, device: torch.device, vast: Callable[..., torch.Tensor]
) -> None:
    arena = vast(2**31 // (2 * 2 * 128) + 3, 2, 2, 128)
    last = arena.shape[0] - 1
    keys, values = torch.ones(2, 2, 2, 128, dtype=torch.bfloat16, device=device)
    residency = torch.tensor([[0, last, 5]], dtype=torch.int32, device=device)
    arena_write(arena, keys, values * 2, torch.tensor([1, 2], device=device), residency, backend=backend)
    for cell in (last, 5):
        assert arena[cell].unique().tolist() == [1.0, 2.0]
    assert not bool(arena[:5].any())
    assert not bool(arena[6:100].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_is_no_work(backend: str, device: torch.device) -> None:
    arena = torch.ones(3, 2, 2, 8, device=device)
    nothing = torch.zeros(0, 2, 8, device=device)
    residency = torch.zeros(1, 4, dtype=torch.int32, device=device)
    arena_write(arena, nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device), residency, backend=backend)
    assert bool((arena == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_8_bit_cells_hold_numbers_over_their_scales(backend: str, stored: torch.dtype, device: torch.device) -> None:
    numbers = (torch.arange(1, 33, device=device).view(4, 1, 8) / 16).to(stored).float()
    arena = torch.zeros(6, 2, 1, 8, dtype=stored, device=device)
    residency = torch.tensor([[0, 3, 5, 1, -1]], dtype=torch.int32, device=device)
    slots = torch.tensor([3, 1, 4, 2], device=device)
    for scales in ((1.0, 1.0), (0.5, 4.0)):
        keys, values = numbers * scales[0], -numbers * scales[1]
        options = {"key_scale": scales[0], "value_scale": scales[1], "backend": backend}
        arena_write(arena, keys.bfloat16(), values.bfloat16(), slots, residency, **options)
        found = arena.view(torch.uint8)[[1, 3, 5]].view(stored).float()
        assert torch.equal(found, torch.stack([numbers, -numbers], 1)[[0, 1, 3]])
        assert not bool(arena.view(torch.uint8)[[0, 2, 4]].any())


def test_refusals_name_the_argument(device: torch.device) -> None:
    arena = torch.zeros(4, 2, 2, 8, device=device)
    keys = torch.zeros(1, 2, 8, device=device)
    slots = torch.tensor([1], device=device)
    residency = torch.zeros(1, 4, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match=r"arena is torch\.int8, expected one of: float32, .*float8_e5m2"):
        arena_write(arena.to(torch.int8), keys, keys, slots, residency)
    with pytest.raises(TypeError, match=r"keys is torch\.float8_e4m3fn, expected float32"):
        arena_write(arena, keys.to(torch.float8_e4m3fn), keys, slots, residency)
    with pytest.raises(ValueError, match=r"values has shape \[1, 1, 8\], expected \[1, 2, 8\]"):
        arena_write(arena, keys, keys[:, :1], slots, residency)
    with pytest.raises(ValueError, match="arena must be contiguous"):
        arena_write(arena.transpose(2, 3), torch.zeros(1, 8, 2), torch.zeros(1, 8, 2), slots, residency)
    with pytest.raises(TypeError, match="slots is"):
        arena_write(arena, keys, keys, slots.float(), residency)
