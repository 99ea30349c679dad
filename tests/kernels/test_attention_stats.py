"""Attention statistics: the reference against the formula, the kernels against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from vlcache_kernels.attention_stats import (
    AttentionStats,
    ResidencyIndex,
    RowBatch,
    StatsRequest,
    attention_stats,
    batch_attention_stats,
)
from vlcache_kernels.attention_stats import naive as reference

EVERYTHING = StatsRequest(True, True, True, 0.01, True, True)
FIELDS = ("column_sum", "column_square_sum", "column_max", "entropy_sum", "probabilities")

# Relative to the largest reference value of a field.  Inputs are the same rounded numbers on both sides, so this is
# float32 accumulation; 16-bit types add the rounding of products only where a matrix instruction accumulates shorter.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# Share of visible entries that may fall on the other side of the density threshold.
COUNT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """One batch: per request rows, owned keys and prefix cells (by plane where there are several)."""

    rows: tuple[int, ...]
    owned: tuple[int, ...]
    prefix: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    planes: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    blocks: tuple[int, int] = (16, 16)
    splits: int | None = None

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = "-".join(f"{r}x{p}+{o}" for r, o, p in zip(self.rows, self.owned, self.prefix, strict=True))
        return f"{sizes}-H{self.heads}:{self.kv_heads}-G{self.planes}-D{self.head_dim}-{kind}-S{self.splits}"


@dataclass(frozen=True)
class Inputs:
    queries: torch.Tensor
    row_index: torch.Tensor
    arena: torch.Tensor
    index: ResidencyIndex
    batch: RowBatch
    scale: float

    def run(self, want: StatsRequest = EVERYTHING, **options: object):
        return batch_attention_stats(
            self.queries, self.row_index, self.arena, self.index, self.batch, self.scale, want=want, **options
        )

    def expected(self, want: StatsRequest = EVERYTHING):
        wide = replace(self, queries=self.queries.double(), arena=self.arena.double())
        return wide.run(want, backend="naive")


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(case.dtype).to(device)

    row_index = [
        torch.sort(torch.randperm(owned, generator=rng)[:rows]).values
        for rows, owned in zip(case.rows, case.owned, strict=True)
    ]
    # Planes may have kept different numbers of prefix cells: plane g has g fewer.
    lengths = [max(0, p - g) + o for g in range(case.planes) for p, o in zip(case.prefix, case.owned, strict=True)]
    num_cells = sum(lengths) + 7
    cells = torch.randperm(num_cells, generator=rng)[: sum(lengths)].to(torch.int32)
    indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    visible = [p + o for p, o in zip(case.prefix, case.owned, strict=True)]
    return Inputs(
        queries=normal(sum(case.rows), case.heads, case.head_dim) * 2,
        row_index=torch.cat(row_index).to(device),
        arena=normal(num_cells, 2, case.kv_heads // case.planes, case.head_dim),
        index=ResidencyIndex(indptr.to(device), cells.to(device)),
        batch=RowBatch.build(case.rows, case.owned, visible, device),
        scale=case.head_dim**-0.5,
    )


def run_tiled(inputs: Inputs, case: Case, want: StatsRequest = EVERYTHING, lse: torch.Tensor | None = None):
    """The launcher with small blocks, so that small sizes cross block borders."""
    from vlcache_kernels.attention_stats import launch

    tile = launch.Tile(*case.blocks, warps=4, stages=2)
    return launch.batch_attention_stats(
        inputs.queries,
        inputs.row_index,
        inputs.arena,
        inputs.index,
        inputs.batch,
        inputs.scale,
        want=want,
        lse=lse,
        tiles=(tile, tile),
        splits=case.splits,
    )


def compare(found: AttentionStats, expected: AttentionStats, dtype: torch.dtype) -> None:
    assert found.rows == expected.rows
    for name in FIELDS:
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if theirs is None or theirs.numel() == 0:
            continue
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape, name
        error = (mine.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCES[dtype], f"{name}: {error:.2e}"  # NaN fails
    if expected.kept is not None:
        assert found.visible.tolist() == expected.visible.tolist()
        off = (found.kept - expected.kept).abs() / expected.visible.clamp(min=1)
        # One entry may sit on the threshold whatever the size.
        assert bool(((off <= COUNT_TOLERANCE) | ((found.kept - expected.kept).abs() <= 1)).all()), off


def compare_batch(found, expected, case: Case) -> None:
    for b in range(len(case.rows)):
        compare(found.request(b), expected.request(b), case.dtype)


SMALL = [
    Case(rows=(1,), owned=(1,), prefix=(0,)),
    Case(rows=(3,), owned=(17,), prefix=(0,)),
    Case(rows=(5,), owned=(37,), prefix=(13,), splits=3),
    Case(rows=(7, 0, 1), owned=(9, 5, 33), prefix=(0, 3, 2), splits=2),
    Case(rows=(2, 9), owned=(20, 11), prefix=(19, 1), heads=6, kv_heads=2, planes=2, splits=2),
    Case(rows=(4,), owned=(21,), prefix=(5,), heads=16, kv_heads=1),
    Case(rows=(50,), owned=(51,), prefix=(0,), heads=2, kv_heads=2, splits=4),
    Case(rows=(129,), owned=(131,), prefix=(5,), heads=1, kv_heads=1),
    Case(rows=(3,), owned=(19,), prefix=(4,), heads=7, kv_heads=1, head_dim=80, dtype=torch.bfloat16),
    Case(rows=(3,), owned=(35,), prefix=(4,), heads=4, kv_heads=2, head_dim=64, dtype=torch.float16, splits=2),
    Case(rows=(3,), owned=(19,), prefix=(0,), heads=3, kv_heads=3, planes=3, head_dim=96, dtype=torch.bfloat16),
    Case(rows=(3,), owned=(35,), prefix=(4,), heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16),
    Case(rows=(2,), owned=(19,), prefix=(1,), heads=2, kv_heads=1, head_dim=256, dtype=torch.float16),
    Case(rows=(2,), owned=(19,), prefix=(1,), heads=2, kv_heads=1, head_dim=512, dtype=torch.bfloat16),
]
HEAD_DIMS = (64, 80, 96, 128, 256)
# Every group size; head dims and types take turns, so that 15 sizes see all their pairs.
GROUPS = [
    Case((3, 1), (19, 7), (2, 0), group, 1, 1, HEAD_DIMS[group % 5], list(TOLERANCES)[group % 3], splits=2)
    for group in range(1, 17)
]
MATRIX = [
    Case((rows,), (rows + extra,), (prefix,), group * 2, 2, planes, head_dim, dtype, (16, 16), None)
    for rows, extra, prefix in ((1, 0, 0), (33, 95, 0), (50, 450, 131), (512, 1, 0))
    for group, planes in ((1, 1), (3, 2), (4, 1), (7, 1), (16, 2))
    for head_dim in HEAD_DIMS
    for dtype in TOLERANCES
    # In the interpreter 512 rows take minutes for the widest cases and show nothing that the narrow ones do not.
    if rows < 512 or (group <= 4 and head_dim <= 80)
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*SMALL, *GROUPS], ids=str)
def test_kernels_match_the_reference(case: Case, device: torch.device) -> None:
    inputs = make(case, device)
    compare_batch(run_tiled(inputs, case), inputs.expected(), case)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_kernels_match_the_reference_in_full(case: Case, device: torch.device) -> None:
    """Default block sizes, as in production."""
    inputs = make(case, device)
    compare_batch(inputs.run(backend="triton"), inputs.expected(), case)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("owned", [2049, 32768, 131072])
@pytest.mark.parametrize("planes", [1, 4])
def test_long_prompts(owned: int, planes: int, device: torch.device) -> None:
    """Default block sizes and splits; the interpreter would take hours."""
    want = replace(EVERYTHING, probabilities=False)
    case = Case((50, 3), (owned, 77), (100, 5), 16, 4, planes, 128, torch.bfloat16)
    inputs = make(case, device)
    compare_batch(inputs.run(want, backend="triton"), inputs.expected(want), case)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("given_lse", [False, True], ids=["", "lse"])
def test_128k_keys_beside_one(given_lse: bool, device: torch.device) -> None:
    """The longest prompt and the shortest in one batch, default block sizes and splits; few rows and one head."""
    case = Case((3, 1), (131072, 1), (77, 0), 1, 1, 1, 64, torch.bfloat16)
    inputs = make(case, device)
    want = StatsRequest(column_sum=True) if given_lse else replace(EVERYTHING, probabilities=False)
    lse = log_sum_exp(inputs, case) if given_lse else None
    compare_batch(inputs.run(want, backend="triton", lse=lse), inputs.expected(want), case)


def test_cells_beyond_two_to_the_31_elements(device: torch.device, vast: Callable[..., torch.Tensor]) -> None:
    """Offsets into a real arena do not fit 32 bits."""
    case = Case((5,), (20,), (30,), 4, 2, 1, 128, torch.bfloat16)
    inputs = make(case, device)
    arena = vast(2**31 // (2 * 2 * 128) + 400, 2, 2, 128)
    shift = arena.shape[0] - inputs.arena.shape[0]
    arena[shift:] = inputs.arena
    far = replace(inputs, arena=arena, index=inputs.index._replace(indices=inputs.index.indices + shift))
    compare_batch(far.run(backend="triton"), inputs.expected(), case)


def test_owned_keys_without_a_cell_read_nothing_foreign(device: torch.device) -> None:
    """Slots may be freed while a forward of theirs is in flight: figures do not matter then, memory does."""
    case = Case(rows=(3, 2), owned=(21, 18), prefix=(0, 0))
    inputs = make(case, device)
    # The first request has 5 cells for 21 owned keys.  What lies before the list must not be taken for cells.
    cells = torch.full((64 + 23,), 7, dtype=torch.int32, device=device)
    cells[:64] = inputs.arena.shape[0]
    cells[64:] = inputs.index.indices[16:]
    poison = torch.cat([inputs.arena, torch.full_like(inputs.arena[:1], torch.nan)])
    indptr = torch.tensor([0, 5, 23], dtype=torch.int32, device=device)
    found = run_tiled(
        replace(inputs, arena=poison, index=ResidencyIndex(indptr, cells[64:])), case, StatsRequest(column_sum=True)
    )
    # The 16 owned keys without a cell have no figure: what was in that memory before is still there.
    assert bool(found.column_sum[:, 16:].isfinite().all())
    want = StatsRequest(column_sum=True)
    compare(found.request(1), inputs.expected(want).request(1), case.dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "want",
    [
        StatsRequest(column_sum=True),
        StatsRequest(column_square_sum=True, column_max=True),
        StatsRequest(density=0.01),
        StatsRequest(density=1.0),
        StatsRequest(entropy=True),
        StatsRequest(probabilities=True),
        StatsRequest(column_sum=True, density=0.05),
    ],
    ids=lambda want: "+".join(name for name, value in vars(want).items() if value),
)
@pytest.mark.parametrize("given_lse", [False, True], ids=["", "lse"])
def test_only_what_is_wanted(want: StatsRequest, given_lse: bool, device: torch.device) -> None:
    case = Case(rows=(5, 2), owned=(23, 18), prefix=(9, 0), planes=2, splits=2)
    inputs = make(case, device)
    lse = log_sum_exp(inputs, case) if given_lse else None
    found = run_tiled(inputs, case, want, lse)
    compare_batch(found, inputs.expected(want), case)
    compare_batch(inputs.run(want, backend="naive", lse=lse), inputs.expected(want), case)


def log_sum_exp(inputs: Inputs, case: Case) -> torch.Tensor:
    """`[H, T]` float32, what an attention kernel would have returned."""
    parts = []
    row = 0
    for b, (rows, owned) in enumerate(zip(case.rows, case.owned, strict=True)):
        for h in range(case.heads):
            kv_head = h // (case.heads // case.kv_heads)
            per_cell = case.kv_heads // case.planes
            segment = kv_head // per_cell * len(case.rows) + b
            begin, end = inputs.index.indptr[segment : segment + 2].tolist()
            keys = inputs.arena[inputs.index.indices[begin:end].long(), 0, kv_head % per_cell].double()
            logits = inputs.queries[row : row + rows, h].double() @ keys.T * inputs.scale
            limit = inputs.row_index[row : row + rows] + (end - begin - owned)
            future = torch.arange(end - begin, device=keys.device) > limit[:, None]
            parts.append(logits.masked_fill(future, -torch.inf).logsumexp(-1))
        row += rows
    by_request = [torch.stack(parts[b * case.heads : (b + 1) * case.heads]) for b in range(len(case.rows))]
    return torch.cat(by_request, dim=1).float()


def test_the_same_in_every_run(device: torch.device, compiled: bool) -> None:
    """No race: repeated launches on fresh outputs agree in every bit."""
    case = Case(rows=(9, 4), owned=(45, 70), prefix=(20, 0), heads=8, kv_heads=2, splits=3)
    inputs = make(case, device)
    first = run_tiled(inputs, case)
    for _ in range(50 if compiled else 2):
        again = run_tiled(inputs, case)
        for name in ("column_sum", "column_square_sum", "column_max", "kept", "visible", "entropy_sum"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_indexes_may_be_views(device: torch.device) -> None:
    case = Case(rows=(5, 2), owned=(23, 9), prefix=(3, 1))
    inputs = make(case, device)

    def spread(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((len(x), 3), 10**6, dtype=x.dtype, device=device)
        wide[:, 1] = x
        return wide[:, 1]

    index = ResidencyIndex(spread(inputs.index.indptr), spread(inputs.index.indices))
    strided = replace(inputs, row_index=spread(inputs.row_index), index=index)
    compare_batch(run_tiled(strided, case), inputs.expected(), case)


@pytest.mark.parametrize(
    ("want", "given_lse", "read"),
    [
        (StatsRequest(column_sum=True), False, "all and owned"),
        (StatsRequest(column_sum=True, density=0.01), False, "all twice"),
        (StatsRequest(column_sum=True), True, "owned"),
        (StatsRequest(entropy=True), False, "all"),
        (StatsRequest(), False, "nothing"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bytes_of_keys_read(
    want, given_lse: bool, read: str, device: torch.device, compiled: bool, monkeypatch
) -> None:
    """One read of K per pass, and the columns' without the prefix: every element that a program loads is counted."""
    if compiled:
        pytest.skip("counted in the interpreter")
    from vlcache_kernels.attention_stats.triton import column_kernel

    # Of the kernels' own copy of Triton: other test modules may have imported it once more.
    builder = type(column_kernel).__init__.__globals__["interpreter_builder"]
    case = Case(rows=(5, 2), owned=(40, 18), prefix=(23, 0), heads=6, kv_heads=2, planes=2, head_dim=80, splits=2)
    inputs = make(case, device)
    inputs.row_index[[4, 6]] = torch.tensor([39, 17])  # the last row sees everything
    lse = log_sum_exp(inputs, case) if given_lse else None
    begin = inputs.arena.data_ptr()
    end = begin + inputs.arena.nbytes
    elements = 0
    load = builder.create_masked_load

    def count(pointers, mask, *others):
        nonlocal elements
        elements += int((mask.data & (pointers.data >= begin) & (pointers.data < end)).sum())
        return load(pointers, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", count)
    tile = (16, 16) if want == StatsRequest() else (64, 16)  # all rows in one block
    run_tiled(inputs, replace(case, blocks=tile), want, lse)
    owned = sum(case.owned) * case.kv_heads
    visible = inputs.index.indices.numel()
    expected = {
        "all and owned": visible + owned,
        "all twice": 2 * visible,
        "owned": owned,
        "all": visible,
        "nothing": 0,
    }
    assert elements == expected[read] * case.head_dim


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    case = Case(rows=(5,), owned=(40,), prefix=(3,), splits=3)
    inputs = make(case, device)
    inputs = replace(inputs, queries=inputs.queries * 300)
    found = run_tiled(inputs, case)
    assert bool(torch.isfinite(found.column_sum).all())
    torch.testing.assert_close(found.column_sum, inputs.expected().column_sum, atol=2e-3, rtol=0)


def test_queries_may_be_a_view(device: torch.device) -> None:
    """SGLang's queries are a slice of one fused projection."""
    case = Case(rows=(5,), owned=(23,), prefix=(3,))
    inputs = make(case, device)
    fused = torch.full((5, 3 * 4, 16), torch.nan, device=device)
    fused[:, :4] = inputs.queries
    compare_batch(run_tiled(replace(inputs, queries=fused[:, :4]), case), inputs.expected(), case)


# --- the reference ---------------------------------------------------------------------------------------------------


def by_formula(queries, keys, row_index, scale, prefix_keys, prefix_valid) -> dict[str, torch.Tensor]:
    """The definitions, entry by entry over a stored `[H, R, P + m]` matrix in float64."""
    (rows, heads, _), (owned, kv_heads, _) = queries.shape, keys.shape
    group, prefix = heads // kv_heads, prefix_keys.shape[0]
    both = torch.cat([prefix_keys, keys]).double().repeat_interleave(group, dim=1)
    logits = torch.einsum("rhd,nhd->hrn", queries.double(), both) * scale
    j = torch.arange(prefix + owned)
    visible = (j <= prefix + row_index[:, None])[None].expand(heads, rows, prefix + owned)
    visible = visible & ((j >= prefix) | (j < prefix_valid.repeat_interleave(group)[:, None]))[:, None]
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    passes = (p >= 0.01 * p.amax(-1, keepdim=True)) & visible

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x.view(kv_heads, group, *x.shape[1:])

    columns = p[:, :, prefix:]
    return {
        "column_sum": grouped(columns).sum(2).mean(1),
        "column_square_sum": grouped(columns.square()).sum(2).mean(1),
        "column_max": grouped(columns).amax((1, 2)),
        "entropy_sum": grouped(torch.special.entr(p)).sum((2, 3)).mean(1),
        "probabilities": columns,
        "kept": grouped(passes).sum((1, 2, 3)),
        "visible": grouped(visible).sum((1, 2, 3)),
    }


@pytest.mark.parametrize("tile_elements", [1 << 20, 200], ids=["one-tile", "many-tiles"])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "owned", "prefix_valid"),
    [
        (1, 1, 1, 1, (0,)),
        (5, 4, 2, 37, (0, 0)),
        (9, 6, 2, 50, (13, 13)),
        (9, 6, 2, 50, (3, 13)),
        (9, 6, 2, 50, (0, 13)),
        (40, 2, 1, 40, (7,)),
    ],
)
def test_reference_is_the_formula(tile_elements, rows, heads, kv_heads, owned, prefix_valid, monkeypatch) -> None:
    monkeypatch.setattr(reference, "TILE_ELEMENTS", tile_elements)
    rng = torch.Generator().manual_seed(1)
    queries = torch.randn(rows, heads, 8, generator=rng) * 3
    keys = torch.randn(owned, kv_heads, 8, generator=rng)
    prefix_keys = torch.randn(max(prefix_valid), kv_heads, 8, generator=rng)
    valid = torch.tensor(prefix_valid)
    row_index = torch.sort(torch.randperm(owned, generator=rng)[:rows]).values
    expected = by_formula(queries, keys, row_index, 0.35, prefix_keys, valid)

    def check(found: AttentionStats) -> None:
        for name, value in expected.items():
            torch.testing.assert_close(getattr(found, name).double(), value.double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            found.density.double(), expected["kept"].double() / expected["visible"], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(found.entropy.double(), expected["entropy_sum"] / rows, atol=1e-5, rtol=0)

    options = {"want": EVERYTHING, "prefix_keys": prefix_keys, "prefix_valid": valid}
    check(attention_stats(queries, keys, row_index, 0.35, **options))
    # The same rows in two chunks: the first chunk's keys end where its last row does.
    half = (rows + 1) // 2
    width = int(row_index[half - 1]) + 1
    first = attention_stats(queries[:half], keys[:width], row_index[:half], 0.35, **options)
    rest = attention_stats(queries[half:], keys, row_index[half:], 0.35, **options)
    check(first.accumulate(rest, owned))


def test_accumulate_refuses_what_does_not_fit() -> None:
    sums = AttentionStats(rows=1, column_sum=torch.ones(1, 4))
    with pytest.raises(ValueError, match="only one of the two has column_sum"):
        sums.accumulate(AttentionStats(rows=1), 4)
    with pytest.raises(ValueError, match="width 3 is less than the 4"):
        sums.accumulate(sums, 3)


# --- cells of 8-bit floats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_eight_bit_cells(backend: str, stored: torch.dtype, device: torch.device) -> None:
    """As if the same numbers were stored in the queries' type."""
    inputs = make(Case(rows=(3, 5), owned=(20, 9), prefix=(5, 0)), device)
    narrow = replace(inputs, arena=inputs.arena.to(stored), scale=0.5 * inputs.scale)
    wide = replace(narrow, arena=narrow.arena.float())
    expected, found = wide.expected(), narrow.run(backend=backend)
    for request in range(2):
        compare(found.request(request), expected.request(request), torch.float32)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_eight_bit_floats_are_cells_only(device: torch.device) -> None:
    """Dense keys are numbers: whoever has read them has multiplied by their scale."""
    keys = torch.zeros(3, 1, 4).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"keys is torch\.float8_e4m3fn, expected float32"):
        attention_stats(torch.zeros(1, 2, 4), keys, torch.tensor([0]), 1.0, want=EVERYTHING)


def test_refusals_name_the_argument(device: torch.device) -> None:
    inputs = make(Case(rows=(1,), owned=(3,), prefix=(0,)), device)
    with pytest.raises(TypeError, match="float64"):
        replace(inputs, queries=inputs.queries.double(), arena=inputs.arena.double()).run(backend="triton")
    with pytest.raises(TypeError, match="expected the same"):
        replace(inputs, queries=inputs.queries.bfloat16()).run()
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention_stats(torch.zeros(1, 4, 4), torch.zeros(3, 3, 4), torch.tensor([0]), 1.0, want=EVERYTHING)
    with pytest.raises(ValueError, match=r"row_index spans \[3, 3\]"):
        attention_stats(torch.zeros(1, 3, 4), torch.zeros(3, 3, 4), torch.tensor([3]), 1.0, want=EVERYTHING)
    with pytest.raises(ValueError, match="threshold"):
        StatsRequest(density=0.0)
    with pytest.raises(ValueError, match="backend 'cuda'"):
        inputs.run(backend="cuda")
    assert math.isfinite(inputs.scale)
