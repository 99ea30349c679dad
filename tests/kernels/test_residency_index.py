"""Residency index: exact against a loop over every token, all variants alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from vlcache_kernels.residency_index import ResidencyIndex, append_tokens, residency_index

BACKENDS = ("naive", "triton")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    planes: int = 3
    group: int = 1
    kept: float = 0.5
    first_plane: int = 0
    wide: bool = False
    """int64 slots instead of int32."""

    def __str__(self) -> str:
        return f"n{'-'.join(map(str, self.lengths))}-P{self.planes}-G{self.group}-kept{self.kept}-{self.first_plane}"


CASES = [
    Case((1,), planes=1),
    Case((17,), planes=1, kept=0.0),
    Case((33, 0, 5)),
    Case((33, 7, 64), planes=4, group=2, first_plane=2, wide=True),
    Case((0, 0)),
    Case((50, 19, 3), planes=6, group=3, kept=1.0),
]
LARGE = [
    Case((4097, 1, 9000), planes=4),
    Case(tuple(range(1, 65)), planes=8, group=4, kept=0.1),
    Case((20000,), planes=28, kept=0.1),
]


@dataclass
class Inputs:
    req_to_token: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    residency: torch.Tensor
    planes: range

    def lists(self, group: int) -> list[list[list[int]]]:
        """By list and segment, token by token."""
        found = []
        for first in range(self.planes.start, self.planes.stop, group):
            segments = []
            for plane in range(first, first + group):
                table = self.residency[plane].tolist()
                for row, length in zip(self.rows.tolist(), self.lengths.tolist(), strict=True):
                    cells = [table[slot] for slot in self.req_to_token[row, :length].tolist()]
                    segments.append([cell for cell in cells if cell >= 0])
            found.append(segments)
        return found


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    batch, longest = len(case.lengths), max(case.lengths)
    max_len, slots = longest + 3, batch * (longest + 3) + 1
    num_planes = case.first_plane + case.planes + 1
    req_to_token = torch.zeros(batch + 2, max_len, dtype=torch.int64 if case.wide else torch.int32)
    rows = torch.randperm(batch + 2, generator=rng)[:batch]
    req_to_token[rows] = (
        (torch.randperm(slots - 1, generator=rng)[: batch * max_len] + 1).view(batch, max_len).to(req_to_token.dtype)
    )
    residency = torch.randint(1, 10**6, (num_planes, slots), generator=rng, dtype=torch.int32)
    residency[torch.rand(num_planes, slots, generator=rng) >= case.kept] = -1
    residency[:, 0] = 0
    return Inputs(
        req_to_token.to(device),
        rows.to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        residency.to(device),
        range(case.first_plane, case.first_plane + case.planes),
    )


def as_lists(index: ResidencyIndex) -> list[list[list[int]]]:
    pointers, indices = index.indptr.tolist(), index.indices.tolist()
    return [[cells[begin:end] for begin, end in pairwise(row)] for row, cells in zip(pointers, indices, strict=True)]


def build(inputs: Inputs, group: int, backend: str, **options: object) -> ResidencyIndex:
    return residency_index(
        inputs.req_to_token,
        inputs.rows,
        inputs.lengths,
        inputs.residency,
        inputs.planes,
        group=group,
        backend=backend,
        **options,
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_are_the_kept_cells_in_order(case: Case, backend: str, device: torch.device) -> None:
    inputs = make(case, device)
    index = build(inputs, case.group, backend)
    assert index.indptr.dtype == index.indices.dtype == torch.int32
    assert as_lists(index) == inputs.lists(case.group)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_lists(case: Case, device: torch.device) -> None:
    inputs = make(case, device)
    assert as_lists(build(inputs, case.group, "triton")) == inputs.lists(case.group)


@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_chunks_do_not_show(case: Case, device: torch.device) -> None:
    """Segments that span several programs."""
    from vlcache_kernels.residency_index import triton

    inputs = make(case, device)
    segments = case.group * len(case.lengths)
    out = ResidencyIndex.allocate(case.planes // case.group, segments, case.group * sum(case.lengths), device)
    triton.residency_index(
        inputs.req_to_token,
        inputs.rows,
        inputs.lengths,
        inputs.residency,
        inputs.planes,
        case.group,
        out,
        max(case.lengths),
        chunk=16,
    )
    assert as_lists(out) == inputs.lists(case.group)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_may_be_views(backend: str, device: torch.device) -> None:
    inputs = make(Case((33, 7, 20)), device)

    def spread(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((len(x), 2), 10**6, dtype=x.dtype, device=device)
        wide[:, 0] = x
        return wide[:, 0]

    inputs.rows, inputs.lengths = spread(inputs.rows), spread(inputs.lengths)
    index = build(inputs, 1, backend)
    assert as_lists(index) == inputs.lists(1)
    slots = spread(inputs.req_to_token[inputs.rows, inputs.lengths.long()])
    inputs.lengths += 1
    source = spread(torch.arange(3, device=device))
    grown = append_tokens(index, slots, inputs.residency, inputs.planes, source=source, backend=backend)
    assert as_lists(grown) == inputs.lists(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_may_be_wide(backend: str, device: torch.device) -> None:
    """SGLang's Triton attention multiplies indices by strides in their own type, so its lists are int64."""
    inputs = make(Case((33, 7, 64), planes=4, group=2), device)
    out, grown = (ResidencyIndex.allocate(2, 6, 300, device, torch.int64) for _ in range(2))
    assert build(inputs, 2, backend, out=out, max_length=64) is out
    assert as_lists(out) == inputs.lists(2)
    slots = inputs.req_to_token[inputs.rows, inputs.lengths.long()]
    inputs.lengths += 1
    append_tokens(out, slots, inputs.residency, inputs.planes, group=2, out=grown, backend=backend)
    assert grown.indices.dtype == torch.int64
    assert as_lists(grown) == inputs.lists(2)
    fresh = append_tokens(out, slots, inputs.residency, inputs.planes, group=2, backend=backend)
    assert fresh.indices.dtype == torch.int64
    assert as_lists(fresh) == inputs.lists(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_buffers_serve_changing_lengths(backend: str, device: torch.device) -> None:
    """What a CUDA graph replays: same buffers and grid, other lengths; stale content does not show."""
    case = Case((40, 40, 40))
    inputs = make(case, device)
    out = ResidencyIndex.allocate(case.planes, 3, 120, device)
    for lengths in ((40, 39, 40), (1, 0, 7), (0, 0, 0), (5, 40, 2)):
        inputs.lengths.copy_(torch.tensor(lengths))
        same = build(inputs, 1, backend, out=out, max_length=40)
        assert same is out
        assert as_lists(out) == inputs.lists(1)


def test_capacity_is_never_exceeded(device: torch.device) -> None:
    inputs = make(Case((30, 30), planes=2, kept=1.0), device)
    out = ResidencyIndex.allocate(2, 2, 40, device)
    build(inputs, 1, "triton", out=out)
    assert out.indptr.tolist() == [[0, 30, 60]] * 2
    expected = inputs.lists(1)
    for number in range(2):
        assert out.indices[number].tolist() == (expected[number][0] + expected[number][1])[:40]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_appending_equals_building_anew(case: Case, backend: str, device: torch.device) -> None:
    inputs = make(case, device)
    index = build(inputs, case.group, backend)
    for _ in range(2):  # req_to_token holds three more slots per request
        slots = inputs.req_to_token[inputs.rows, inputs.lengths.long()]
        inputs.lengths += 1
        index = append_tokens(index, slots, inputs.residency, inputs.planes, group=case.group, backend=backend)
        assert as_lists(index) == inputs.lists(case.group)


@pytest.mark.parametrize("backend", BACKENDS)
def test_appending_to_what_is_left_of_the_batch(backend: str, device: torch.device) -> None:
    case = Case((33, 7, 20, 5), planes=4, group=2)
    inputs = make(case, device)
    before = build(inputs, 2, backend)
    left = torch.tensor([3, 0], device=device)
    inputs.rows, inputs.lengths = inputs.rows[left], inputs.lengths[left] + 1
    slots = inputs.req_to_token[inputs.rows, inputs.lengths.long() - 1]
    out = ResidencyIndex.allocate(2, 4, 200, device)
    append_tokens(before, slots, inputs.residency, group=2, source=left, planes=inputs.planes, out=out, backend=backend)
    assert as_lists(out) == inputs.lists(2)


def test_appended_chunks_do_not_show(device: torch.device) -> None:
    from vlcache_kernels.residency_index import triton

    inputs = make(Case((48, 31, 16), kept=1.0), device)  # the new cell opens a chunk, or ends one
    before = build(inputs, 1, "naive")
    slots = inputs.req_to_token[inputs.rows, inputs.lengths.long()]
    inputs.lengths += 1
    out = ResidencyIndex.allocate(3, 3, 98, device)
    source = torch.arange(3, device=device)
    triton.append_tokens(before, slots, source, inputs.residency, inputs.planes, 1, out, 49, chunk=16)
    assert as_lists(out) == inputs.lists(1)


def test_the_same_in_every_run(device: torch.device, compiled: bool) -> None:
    case = Case((40, 3, 90), planes=6, group=2)
    inputs = make(case, device)
    first = as_lists(build(inputs, 2, "triton"))
    assert all(as_lists(build(inputs, 2, "triton")) == first for _ in range(50 if compiled else 2))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(device: torch.device) -> None:
    """The fixed-buffer build and the append replay in a graph while lengths and residency change."""
    inputs = make(Case((40, 40, 40)), device)
    built, grown = (ResidencyIndex.allocate(3, 3, 123, device) for _ in range(2))
    slots = torch.zeros(3, dtype=torch.int64, device=device)

    def step() -> None:
        build(inputs, 1, "triton", out=built, max_length=40)
        append_tokens(built, slots, inputs.residency, inputs.planes, out=grown, max_length=41)

    step()  # compile before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ((40, 39, 1), (1, 0, 7), (5, 40, 2)):
        inputs.lengths.copy_(torch.tensor(lengths))
        inputs.residency[:, 1::7] *= -1
        inputs.residency.clamp_(min=-1)
        slots.copy_(inputs.req_to_token[inputs.rows, inputs.lengths.long()])
        graph.replay()
        torch.cuda.synchronize()
        assert as_lists(built) == inputs.lists(1)
        inputs.lengths += 1
        assert as_lists(grown) == inputs.lists(1)


def test_refusals_name_the_argument(device: torch.device) -> None:
    inputs = make(Case((4,)), device)
    with pytest.raises(ValueError, match="cannot be joined in groups of 2"):
        build(inputs, 2, "naive")
    with pytest.raises(ValueError, match="not a run of consecutive planes"):
        residency_index(inputs.req_to_token, inputs.rows, inputs.lengths, inputs.residency, range(9))
    with pytest.raises(TypeError, match="residency is"):
        residency_index(inputs.req_to_token, inputs.rows, inputs.lengths, inputs.residency.long())
    index = build(inputs, 1, "naive")
    slots = torch.tensor([1], device=device)
    with pytest.raises(ValueError, match="must not share memory"):
        append_tokens(index, slots, inputs.residency, inputs.planes, out=index)
    with pytest.raises(ValueError, match="2 slots do not continue 1 requests"):
        append_tokens(index, torch.tensor([1, 2], device=device), inputs.residency, inputs.planes)
    narrow = ResidencyIndex(torch.zeros(3, 2, dtype=torch.int32, device=device), torch.zeros(3, 8, device=device))
    with pytest.raises(TypeError, match=r"out\.indices is torch\.float32"):
        build(inputs, 1, "naive", out=narrow)
    turned = inputs.residency.T.contiguous().T
    with pytest.raises(ValueError, match="residency must be contiguous along its last dimension"):
        residency_index(inputs.req_to_token, inputs.rows, inputs.lengths, turned, inputs.planes, backend="triton")
    sliced = ResidencyIndex(index.indptr, torch.zeros(3, 8, dtype=torch.int32, device=device)[:, :4])
    with pytest.raises(ValueError, match="previous must be contiguous"):
        append_tokens(sliced, slots, inputs.residency, inputs.planes, backend="triton")
