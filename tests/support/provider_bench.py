"""What the provider tests share: libraries that run here, and a memory with requests in it.

Without a GPU SGLang's Triton kernels run in Triton's interpreter, and FlashInfer is a stand-in that keeps the contract
of its documentation: what is tested then is what our code plans and hands over.  Our own kernels are interpreted beside
SGLang's and in plain torch beside the stand-in.  On a GPU the same tests run compiled.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_reference import reference

from vlcache_sgl.attention import flashinfer_kernels, parts
from vlcache_sgl.attention.base import AttentionKernels, HeadShape, Provider
from vlcache_sgl.attention.factory import make_provider
from vlcache_sgl.memory.batches import DecodeBatch, Memory
from vlcache_sgl.memory.residency import Residency
from vlcache_sgl.memory.scales import Scales, as_bytes
from vlcache_sgl.sglang_hooks import triton_kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # FlashInfer has no float32
TOLERANCE = 3e-2 if CUDA else 2e-5
LAYERS, KV_HEADS = 3, 2
HEADS, DIM = (8, 64) if CUDA else (4, 32)  # the interpreter is slow
SCALE = 0.3 * DIM**-0.5
"""Not the default of any library."""
LENGTHS = {3: (90, 0.1), 5: (6, 1.0), 1: (130, 0.5)}
"""Rows of a batch: tokens, and the share of them that layers 0 and 1 keep."""


def _module(path: Path) -> Any:
    """Another test module: they are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- libraries ---------------------------------------------------------------------------------------------------------


def interpreted_kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """SGLang's attention kernels in Triton's interpreter, which is chosen when a kernel is decorated."""
    import triton

    ours = "sglang.kernels.ops.attention."
    if type(triton.language.sum).__name__ != "InterpretedFunction":
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            if not name.startswith("triton._C"):  # a C extension cannot be loaded twice
                del sys.modules[name]
    for name in [name for name in sys.modules if name.startswith(ours)]:
        del sys.modules[name]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.experimental.gluon")  # the interpreter imports it at the first launch
        extend = importlib.import_module(ours + "extend_attention").extend_attention_fwd
        decode = importlib.import_module(ours + "decode_attention").decode_attention_fwd
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return extend, decode


def use_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime launch our Triton kernels whatever the device: interpreted on a CPU."""
    if not CUDA:
        _module(Path(__file__).parents[1] / "kernels/conftest.py")  # imports them in interpreter mode
    places = {
        "vlcache_sgl.policy.plan": ["select"],
        "vlcache_sgl.memory.residency": ["free_list"],
        "vlcache_sgl.attention.flashinfer_kernels": ["write_schedules"],
        "vlcache_sgl.scoring.batch": ["batch_attention_stats"],
        "vlcache_sgl.sglang_hooks.backend": ["arena_write"],
        "vlcache_sgl.memory.device_index": ["residency_index", "append_tokens"],
        "vlcache_sgl.memory.window_index": ["residency_index"],
    }
    if importlib.util.find_spec("sglang.srt.layers") is None:  # a bundle has its Triton attention only
        del places["vlcache_sgl.sglang_hooks.backend"]
    for place, names in places.items():
        module = importlib.import_module(place)
        for name in names:
            monkeypatch.setattr(module, name, partial(getattr(module, name), backend="triton"))


class StandIn:
    """FlashInfer's module of FA2 prefill kernels, in float64: what its sources say that it plans and reads."""

    def __init__(self) -> None:
        self.plans = 0
        self.whole: tuple[list[int], list[int]] | None = None
        """Query rows and keys of the last plan that is not for graphs."""

    def plan(self, *arguments: Any) -> list[int]:
        """Where a schedule lies; the numbers are those of `PrefillPlan` in FlashInfer's `scheduler.cuh`."""
        _, scratch, pinned, starts, keys, lengths, rows, sequences, heads, kv_heads, page, graph, *rest = arguments
        dims, (causal, window, fixed, whole, beside, uniform) = rest[:2], rest[2:]
        assert dims[0] == dims[1]
        assert (page, causal, window, fixed, beside, uniform) == (1, False, -1, -1, 0, 0)
        assert scratch.dtype == pinned.dtype == torch.uint8
        assert starts.dtype == keys.dtype == lengths.dtype == torch.int32
        assert len(starts) == len(keys) == len(lengths) + 1 == sequences + 1
        assert rows == int(starts[-1])
        self.plans += 1
        group = heads // kv_heads
        packed = [group * count for count in starts.diff().tolist()]
        typical = group * (rows - sequences + 1) if graph else sum(packed) // sequences
        tile = 16 if typical <= 16 else 64 if typical <= 64 else 128
        tiles = sum(-(-count // tile) for count in packed)
        limit = flashinfer_kernels.BLOCKS_PER_CORE // kv_heads
        blocks = max(limit, -(-rows * group // tile) + sequences - 1) if graph else tiles
        places, end = [], 0
        sizes = [4 * blocks, 4 * blocks, 4 * blocks, 4 * (sequences + 1)]
        for size in sizes:
            places.append(end := -(-end // 16) * 16)
            end += size
        chunk = end
        total, merge, mask = 0, 0, 0
        if graph:
            assert not whole
            total = -(-(chunk + 4) // 16) * 16
            merge = total + 16
            mask = -(-(merge + 4 * (rows + 1)) // 16) * 16
        else:
            self.whole = (starts.tolist(), keys.tolist())
        request, qo_tile, kv_tile, outputs = places
        return [
            blocks, rows, total, tile, request, qo_tile, kv_tile, merge, outputs, chunk, 0, 0, mask, graph, graph
        ]  # fmt: skip

    def paged_run(self, *arguments: Any) -> None:
        _, schedule, numbers, q, keys, values, starts, indptr, cells, last, out, lse, mask, *rest = arguments
        layout, window, _, *unused = rest[:9]
        assert (layout, window, *unused) == (0, -1, *[None] * 6)
        assert last.tolist() == [1] * (len(indptr) - 1)
        if numbers[13]:
            self._check(schedule, numbers, starts, indptr, q.shape[1] // keys.shape[2])
        else:
            assert self.whole is not None
            assert self.whole[0] == starts.tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(indptr.tolist())):
            rows = slice(int(starts[number]), int(starts[number + 1]))
            picked = cells[begin:end].long()
            self._attend(q, keys[picked, 0].double(), values[picked, 0].double(), rows, rest[10], bool(mask), out, lse)

    def ragged_run(self, *arguments: Any) -> None:
        _, _, _, q, keys, values, starts, key_starts, out, lse, mask, layout, window, _, *rest = arguments
        assert (mask, layout, window, *rest[:6]) == (1, 0, -1, *[None] * 6)
        assert self.whole == (starts.tolist(), key_starts.tolist())
        for begin, end in itertools.pairwise(starts.tolist()):
            rows = slice(begin, end)
            self._attend(q, keys[rows], values[rows], rows, rest[7], True, out, lse)

    @staticmethod
    def _attend(
        q: Any, keys: Any, values: Any, rows: slice, scale: float, causal: bool, out: Any, lse: torch.Tensor | None
    ) -> None:
        new, seen = rows.stop - rows.start, len(keys)
        visible = torch.ones(new, seen, dtype=torch.bool)
        visible = visible.tril(seen - new) if causal else visible
        out[rows] = reference(q[rows], keys, values, scale, visible).to(out.dtype)
        if lse is not None:
            lse[rows] = (log_sum(q[rows], keys, scale, visible) / math.log(2)).float()

    @staticmethod
    def _check(schedule: torch.Tensor, numbers: list[int], starts: Any, indptr: Any, group: int) -> None:
        """Every tile of queries meets every chunk of its keys once, and outputs are merged where they belong."""

        def part(begin: int, count: int) -> list[int]:
            return schedule[begin : begin + 4 * count].view(torch.int32).tolist()

        blocks, rows, total, tile, request, qo_tile, kv_tile, merge, outputs, chunk, _, _, mask, _, _ = numbers
        active = schedule[mask : mask + blocks].bool().tolist()
        size, sequences = part(chunk, 1)[0], len(indptr) - 1
        work = [
            entry
            for entry, real in zip(
                zip(part(request, blocks), part(qo_tile, blocks), part(kv_tile, blocks), strict=True),
                active,
                strict=True,
            )
            if real
        ]
        chunks = [max(1, -(-int(count) // size)) for count in indptr.diff()]
        counts = starts.diff().tolist()
        wanted = [
            (number, tile_number, piece)
            for number in range(sequences)
            for tile_number in range(-(-counts[number] * group // tile))
            for piece in range(chunks[number])
        ]
        assert work == wanted
        assert active == [True] * len(work) + [False] * (blocks - len(work))
        steps = [chunks[number] for number in range(sequences) for _ in range(counts[number])]
        assert part(merge, rows + 1) == [0, *itertools.accumulate(steps)]
        assert part(outputs, sequences + 1) == [
            0,
            *itertools.accumulate(c * n for c, n in zip(chunks, counts, strict=True)),
        ]
        assert part(total, 1) == [rows]


def use_flashinfer_stand_in(monkeypatch: pytest.MonkeyPatch, module: StandIn | None = None) -> StandIn:
    """Let the provider of that name find a stand-in in FlashInfer's place."""
    found = module or StandIn()
    monkeypatch.setattr(flashinfer_kernels, "_library", lambda *_: (found, False))
    monkeypatch.setattr(flashinfer_kernels, "WORKSPACE_BYTES", 1024)
    # As FlashInfer's planner, which the stand-in is not, is compared with in `test_flashinfer_schedule.py`.
    monkeypatch.setattr(flashinfer_kernels.FlashInferKernels, "check_schedules", lambda self: None)
    return found


def log_sum(q: torch.Tensor, k: torch.Tensor, scale: float, visible: torch.Tensor) -> torch.Tensor:
    """`[t, H]` float64, natural logarithm of the sum of exponentials; arguments as for `reference`."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("thd,nhd->htn", q.double(), keys) * scale
    if visible.dim() == 3:
        visible = visible.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return logits.masked_fill(~visible, -torch.inf).logsumexp(-1).T


@pytest.fixture(scope="module")
def kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    return None if CUDA else interpreted_kernels()


@pytest.fixture
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Memory], Provider]:
    """Makes the provider of this name for a memory."""
    name = request.param
    if name == "triton" and not CUDA:
        functions = request.getfixturevalue("kernels")
        monkeypatch.setattr(triton_kernels, "attention_kernels", lambda: AttentionKernels(*functions))
        use_our_kernels(monkeypatch)
    monkeypatch.setattr(parts, "MIN_PART", 32)  # so that short sequences are cut, too
    monkeypatch.setattr(parts, "PROGRAMS_PER_CORE", 1000)
    monkeypatch.setattr(parts, "MAX_PARTS", 3)  # each is a program that the interpreter runs
    if name == "flashinfer" and CUDA:
        pytest.importorskip("flashinfer")
    elif name == "flashinfer":
        use_flashinfer_stand_in(monkeypatch)
        monkeypatch.setattr(flashinfer_kernels, "BLOCKS_PER_CORE", 40)  # so that keys are cut, and some are not
    return lambda memory: make_provider(
        name, memory, HeadShape(HEADS, DTYPE), triton_kernels.attention_kernels, kv_splits=3
    )


# -- a memory with requests in it --------------------------------------------------------------------------------------


class Requests:
    """Request rows with slots, of which layers 0 and 1 keep equally many and layer 2 others."""

    def __init__(
        self,
        groups: int,
        tokens: int = 800,
        context: int = 300,
        stored: torch.dtype = DTYPE,
        scales: Sequence[Scales] = (),
    ) -> None:
        torch.manual_seed(7)
        self.residency = Residency(LAYERS * groups, tokens, LAYERS * groups * tokens, DEVICE)
        shape = (self.residency.num_cells + 1, 2, KV_HEADS // groups, DIM)
        table = torch.zeros(8, context, dtype=torch.int32, device=DEVICE)
        self.memory = Memory(torch.zeros(shape, dtype=stored, device=DEVICE), self.residency, table, groups, scales)
        self.lengths: dict[int, int] = {}
        self._slots = itertools.count(1)

    def planes(self, layer: int) -> slice:
        return slice(layer * self.memory.groups, (layer + 1) * self.memory.groups)

    def append(self, row: int, tokens: int) -> torch.Tensor:
        """New tokens with random keys and values; their slots."""
        slots = torch.tensor([next(self._slots) for _ in range(tokens)], device=DEVICE)
        self.residency.attach(slots)
        cells = self.residency.table[:, slots].long()
        values = torch.randn(*cells.shape, *self.memory.arena.shape[1:], device=DEVICE)
        as_bytes(self.memory.arena)[cells] = as_bytes(values.to(self.memory.arena.dtype))
        begin = self.lengths.get(row, 0)
        self.memory.req_to_token[row, begin : begin + tokens] = slots.int()
        self.lengths[row] = begin + tokens
        return slots

    def evict(self, row: int, share: float) -> None:
        """Layers 0 and 1 keep `share` of the tokens in every plane, layer 2 half of that in its last plane."""
        slots = self.memory.req_to_token[row, : self.lengths[row]].long()
        keep = torch.zeros(self.residency.num_planes, len(slots), dtype=torch.bool, device=DEVICE)
        for plane in range(self.residency.num_planes):
            count = max(1, int(share * len(slots) / (1 + (plane == self.residency.num_planes - 1))))
            keep[plane, torch.randperm(len(slots), device=DEVICE)[:count]] = True
        eviction = self.residency.evict(slots, keep)
        if CUDA:
            torch.cuda.synchronize()
        self.residency.reclaim(eviction)

    def empty(self, row: int, planes: list[int]) -> None:
        """Let these planes keep nothing of a request, all others everything that they have."""
        slots = self.memory.req_to_token[row, : self.lengths[row]].long()
        keep = torch.ones(self.residency.num_planes, len(slots), dtype=torch.bool, device=DEVICE)
        keep[planes] = False
        eviction = self.residency.evict(slots, keep)
        if CUDA:
            torch.cuda.synchronize()
        self.residency.reclaim(eviction)

    def dense(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values `[n, K, D]` of all tokens, and which are there, `[K, n]`."""
        slots = self.memory.req_to_token[row, : self.lengths[row]].long()
        cells = self.residency.table[self.planes(layer)][:, slots].long()
        both = as_bytes(self.memory.arena)[cells.clamp(min=0)].view(self.memory.arena.dtype)
        both = both.permute(1, 2, 0, 3, 4).flatten(2, 3)
        if self.memory.scales:
            scales = self.memory.scales[layer]
            both = both.double() * torch.tensor([scales.key, scales.value], device=DEVICE)[:, None, None]
        return both[:, 0], both[:, 1], (cells >= 0).repeat_interleave(KV_HEADS // self.memory.groups, 0)

    def step(self, rows: list[int], *, padding: int = 0, recorded: bool = False) -> DecodeBatch:
        """One more token for each of `rows`."""
        slots = torch.cat([self.append(row, 1) for row in rows])
        cells = torch.full((self.residency.num_planes, len(rows) + padding), -1, dtype=torch.int32, device=DEVICE)
        cells[:, : len(rows)] = self.residency.table[:, slots]
        lengths = [self.lengths[row] for row in rows]
        return DecodeBatch(
            rows=rows,
            lengths=lengths,
            row_tensor=torch.tensor(rows + [0] * padding, device=DEVICE),
            length_tensor=torch.tensor(lengths + [1] * padding, device=DEVICE),
            new_cells=cells,
            padding=padding,
            recorded=recorded,
        )

    def check(
        self, got: torch.Tensor, q: torch.Tensor, layer: int, rows: list[int], tolerance: float = TOLERANCE
    ) -> None:
        """Decode outputs `[B, H, D]` against the formula."""
        for number, row in enumerate(rows):
            k, v, there = self.dense(layer, row)
            want = reference(q[number : number + 1], k, v, SCALE, there[:, None])
            assert (got[number : number + 1].double() - want).abs().max() < tolerance


def capture_only(count: int, planes: int) -> DecodeBatch:
    """What a graph is captured with: padding."""
    return DecodeBatch(
        rows=[],
        lengths=[],
        row_tensor=torch.zeros(count, dtype=torch.int64, device=DEVICE),
        length_tensor=torch.ones(count, dtype=torch.int64, device=DEVICE),
        new_cells=torch.full((planes, count), -1, dtype=torch.int32, device=DEVICE),
        padding=count,
        recorded=True,
    )
