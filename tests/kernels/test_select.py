"""Selection: exact against a sort in Python, ties and special values included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vlcache_kernels.select import FreeList, Selection, free_list, select

BACKENDS = ("naive", "triton")


@dataclass(frozen=True)
class Case:
    planes: int
    owned: int
    scores: str = "normal"
    tiers: str = "none"

    def __str__(self) -> str:
        return f"P{self.planes}-m{self.owned}-{self.scores}-tiers_{self.tiers}"


CASES = [
    Case(1, 1),
    Case(3, 17),
    Case(4, 63, "few_values"),
    Case(4, 63, "few_values", "shared"),
    Case(2, 100, "normal", "by_plane"),
    Case(3, 33, "all_equal"),
    Case(3, 40, "special", "shared"),
]
LARGE = [Case(28, 4097, "few_values", "shared"), Case(32, 20001), Case(2, 131072, "few_values", "by_plane")]


def make(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Scores, tiers, cells."""
    rng = torch.Generator().manual_seed(0)
    shape = (case.planes, case.owned)
    scores = torch.randn(*shape, generator=rng)
    if case.scores == "few_values":
        scores = torch.randint(-2, 3, shape, generator=rng).float()
    elif case.scores == "all_equal":
        scores = torch.full(shape, 0.25)
    elif case.scores == "special":
        values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38])
        scores = values[torch.randint(0, 8, shape, generator=rng)]
    tiers = None
    if case.tiers != "none":
        tier_shape = shape if case.tiers == "by_plane" else shape[1:]
        tiers = torch.randint(0, 4, tier_shape, generator=rng).to(torch.int8)
        tiers[..., 0] = 15
    cells = torch.randperm(case.planes * case.owned, generator=rng).view(shape).to(torch.int32) + 1
    cells[torch.rand(shape, generator=rng) < 0.2] = -1
    return scores.to(device), None if tiers is None else tiers.to(device), cells.to(device)


def budgets(case: Case, device: torch.device, turn: int) -> torch.Tensor:
    """Different in every plane; nothing, everything and too much included."""
    choices = [0, 1, case.owned // 3, case.owned - 1, case.owned, case.owned + 5]
    return torch.tensor([choices[(turn + p) % len(choices)] for p in range(case.planes)], device=device)


def check(found: Selection, scores, tiers, k) -> None:
    planes, owned = scores.shape
    for p in range(planes):
        tier = [0] * owned if tiers is None else (tiers if tiers.dim() == 1 else tiers[p]).tolist()
        score = scores[p].tolist()
        best = sorted(range(owned), key=lambda j: (-tier[j], -score[j], j))
        count = min(owned, int(k[p]))
        kept = sorted(best[:count])
        assert found.counts[p] == count
        assert found.positions[p].tolist() == kept + [-1] * (owned - count)
        assert found.keep[p].nonzero()[:, 0].tolist() == kept


def check_free(found: FreeList, keep: torch.Tensor, cells: torch.Tensor) -> None:
    pairs = zip(keep.flatten().tolist(), cells.flatten().tolist(), strict=True)
    freed = [cell for stays, cell in pairs if cell >= 0 and not stays]
    assert found.length.dtype == found.cells.dtype == torch.int32
    assert found.length.tolist() == [len(freed)]
    assert found.cells[: len(freed)].tolist() == freed


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_the_first_of_tier_score_position(case: Case, backend: str, turn: int, device: torch.device) -> None:
    scores, tiers, cells = make(case, device)
    k = budgets(case, device, turn)
    found = select(scores, k, tiers=tiers, backend=backend)
    check(found, scores, tiers, k)
    check_free(free_list(found.keep, cells, backend=backend), found.keep, cells)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, device: torch.device) -> None:
    scores, tiers, cells = make(case, device)
    k = budgets(case, device, 2)
    found = select(scores, k, tiers=tiers, backend="triton")
    check(found, scores, tiers, k)
    check_free(free_list(found.keep, cells, backend="triton"), found.keep, cells)


def test_blocks_do_not_show(device: torch.device) -> None:
    from vlcache_kernels.select import triton

    case = Case(3, 77, "few_values", "shared")
    scores, tiers, cells = make(case, device)
    k = torch.tensor([5, 40, 76], device=device)
    found = triton.select(scores, k, tiers, block=16)
    check(found, scores, tiers, k)
    check_free(triton.free_list(found.keep, cells, block=16), found.keep, cells)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing_to_select_from(backend: str, shape: tuple[int, int], device: torch.device) -> None:
    found = select(torch.zeros(shape, device=device), torch.full(shape[:1], 2, device=device), backend=backend)
    assert found.keep.shape == found.positions.shape == shape
    assert found.counts.tolist() == [0] * shape[0]
    cells = torch.zeros(shape, dtype=torch.int32, device=device)
    assert free_list(found.keep, cells, backend=backend).length.tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_zeros_tie(backend: str, device: torch.device) -> None:
    scores = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]], device=device)
    found = select(scores, torch.tensor([3], device=device), backend=backend)
    assert found.positions.tolist() == [[1, 2, 3, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_views(backend: str, device: torch.device) -> None:
    case = Case(3, 20, "few_values")
    scores, _, cells = make(case, device)
    wide_scores = torch.full((3, 29), 9.0, device=device)
    wide_scores[:, 4:24] = scores
    wide_cells = torch.full((20, 3), 9, dtype=torch.int32, device=device)
    wide_cells[:] = cells.T
    k = torch.tensor([3, 7, 19], device=device)
    wide_k = torch.tensor([3, -9, 7, -9, 19, -9], device=device)
    found = select(wide_scores[:, 4:24], wide_k[::2], backend=backend)
    check(found, scores, None, k)
    wide_keep = torch.zeros(3, 29, dtype=torch.bool, device=device)
    wide_keep[:, 4:24] = found.keep
    check_free(free_list(wide_keep[:, 4:24], wide_cells.T, backend=backend), found.keep, cells)


def test_the_same_in_every_run(device: torch.device, compiled: bool) -> None:
    scores, tiers, cells = make(Case(4, 63, "few_values", "shared"), device)
    k = torch.tensor([5, 30, 62, 1], device=device)
    for _ in range(50 if compiled else 2):
        found = select(scores, k, tiers=tiers, backend="triton")
        check(found, scores, tiers, k)
        check_free(free_list(found.keep, cells, backend="triton"), found.keep, cells)


def test_refusals_name_the_argument(device: torch.device) -> None:
    scores, k = torch.zeros(2, 3, device=device), torch.tensor([1, 1], device=device)
    with pytest.raises(TypeError, match="scores is"):
        select(scores.double(), k)
    with pytest.raises(TypeError, match="tiers is"):
        select(scores, k, tiers=torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"k has shape \[3\], expected \[2\]"):
        select(scores, torch.tensor([1, 1, 1], device=device))
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"tiers span \[0, 16\]"):
            select(scores, k, tiers=torch.tensor([0, 1, 16], dtype=torch.int8))
    keep = torch.ones(2, 3, dtype=torch.bool, device=device)
    with pytest.raises(TypeError, match=r"keep is torch\.int8"):
        free_list(keep.to(torch.int8), torch.zeros(2, 3, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"cells has shape \[2, 2\], expected \[2, 3\]"):
        free_list(keep, torch.zeros(2, 2, dtype=torch.int32, device=device))
