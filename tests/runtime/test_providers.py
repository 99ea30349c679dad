"""All kernel providers against the formula of `test_torch_provider`, on ragged lists that differ between layers.

Without a GPU SGLang's Triton kernels run in Triton's interpreter, and FlashInfer is a stand-in that keeps the contract
of its documentation: what is tested then is what our code plans and hands over.  On a GPU the same tests run compiled.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlcache_sgl.runtime.attention import flashinfer_provider, triton_provider
from vlcache_sgl.runtime.attention.provider import (
    DecodeBatch,
    ExtendBatch,
    ExtendRequest,
    HeadShape,
    Memory,
    Provider,
    make_provider,
)
from vlcache_sgl.runtime.residency import Residency

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # FlashInfer has no float32
TOLERANCE = 3e-2 if CUDA else 2e-5
LAYERS, KV_HEADS = 3, 2
HEADS, DIM = (8, 64) if CUDA else (4, 32)  # the interpreter is slow
SCALE = 0.3 * DIM**-0.5
"""Not the default of any library."""
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
PROVIDERS = pytest.mark.parametrize("provider", ["torch_native", "triton", "flashinfer"], indirect=True)
LENGTHS = {3: (90, 0.1), 5: (6, 1.0), 1: (130, 0.5)}
"""Rows of a batch: tokens, and the share of them that layers 0 and 1 keep."""
gpu_only = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def _module(path: Path) -> Any:
    """Another test module: they are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _module(Path(__file__).with_name("test_torch_provider.py")).reference


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


class StandIn:
    """One of FlashInfer's paged wrappers, in float64: the buffers it is given are read when it runs."""

    causal = False

    def __init__(self, workspace: torch.Tensor, layout: str, backend: str, **options: Any) -> None:
        assert layout == "NHD"
        self.recorded = options.get("use_cuda_graph", False)
        self.indptr = options.get("paged_kv_indptr_buffer")
        self.indices = options.get("paged_kv_indices_buffer")
        self.fixed = options.get("paged_kv_last_page_len_buffer")

    def reset_workspace_buffer(self, workspace: torch.Tensor, schedule: torch.Tensor) -> None:
        assert schedule.dtype == torch.uint8

    def _plan(self, qo: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor) -> None:
        assert indptr.device.type == "cpu"
        assert indptr.dtype == indices.dtype == torch.int32
        assert last.tolist() == [1] * (len(indptr) - 1)
        self.qo, self.planned = qo, indptr.clone()
        if self.recorded:
            assert len(last) == len(self.fixed)
            assert torch.equal(self.indptr.cpu(), indptr), "host and device disagree about lengths"
            self.indices[: len(indices)].copy_(indices)
        else:
            assert len(indices) == int(indptr[-1])
            self.indptr, self.indices = indptr, indices

    def run(
        self, q: torch.Tensor, pages: torch.Tensor, q_scale: float, out: torch.Tensor, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert pages.shape[1:3] == (2, 1)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for number, (begin, end) in enumerate(itertools.pairwise(self.indptr.tolist())):
            rows = slice(int(self.qo[number]), int(self.qo[number + 1]))
            both = pages[self.indices[begin:end].long(), :, 0]
            new, seen = rows.stop - rows.start, end - begin
            visible = torch.ones(new, seen, dtype=torch.bool)
            visible = visible.tril(seen - new) if self.causal else visible
            out[rows] = reference(q[rows], both[:, 0], both[:, 1], q_scale, visible).to(out.dtype)
            lse[rows] = log_sum(q[rows], both[:, 0], q_scale, visible).float()
        assert not options or options == {"return_lse": True, "lse_base": "ln"}
        return (out, lse) if options else out


class StandInPrefill(StandIn):
    def plan(self, *arguments: Any, causal: bool, sm_scale: float, **types: Any) -> None:
        qo, indptr, indices, last, *sizes = arguments
        assert (sm_scale, sizes[-1]) == (1.0, 1)
        self.causal = causal
        self._plan(qo, indptr, indices, last)


class StandInDecode(StandIn):
    def plan(self, *arguments: Any, sm_scale: float, **types: Any) -> None:
        indptr, indices, last, *sizes = arguments
        assert (sm_scale, sizes[-1]) == (1.0, 1)
        self._plan(torch.arange(len(indptr)), indptr, indices, last)


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
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Memory], Provider]]:
    """Makes the provider of this name for a memory."""
    name = request.param
    if name == "triton" and not CUDA:
        functions = request.getfixturevalue("kernels")
        monkeypatch.setattr(triton_provider, "_kernels", lambda: functions)
    monkeypatch.setattr(triton_provider, "MIN_PART", 32)  # so that short sequences are cut, too
    monkeypatch.setattr(triton_provider, "PROGRAMS_PER_CORE", 1000)
    if name == "flashinfer" and CUDA:
        pytest.importorskip("flashinfer")
    elif name == "flashinfer":
        library = SimpleNamespace(
            BatchPrefillWithPagedKVCacheWrapper=StandInPrefill, BatchDecodeWithPagedKVCacheWrapper=StandInDecode
        )
        monkeypatch.setattr(flashinfer_provider, "_library", lambda: library)
        monkeypatch.setattr(flashinfer_provider, "WORKSPACE_BYTES", 1024)
    return lambda memory: make_provider(name, memory, HeadShape(HEADS, DTYPE), kv_splits=3)


# -- a memory with requests in it --------------------------------------------------------------------------------------


class Requests:
    """Request rows with slots, of which layers 0 and 1 keep equally many and layer 2 others."""

    def __init__(self, groups: int, tokens: int = 800, context: int = 300) -> None:
        torch.manual_seed(7)
        self.residency = Residency(LAYERS * groups, tokens, LAYERS * groups * tokens, DEVICE)
        shape = (self.residency.num_cells + 1, 2, KV_HEADS // groups, DIM)
        table = torch.zeros(8, context, dtype=torch.int32, device=DEVICE)
        self.memory = Memory(torch.zeros(shape, dtype=DTYPE, device=DEVICE), self.residency, table, groups)
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
        self.memory.arena[cells] = values.to(DTYPE)
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
        self.residency.reclaim(self.residency.evict(slots, keep))

    def dense(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values `[n, K, D]` of all tokens, and which are there, `[K, n]`."""
        slots = self.memory.req_to_token[row, : self.lengths[row]].long()
        cells = self.residency.table[self.planes(layer)][:, slots].long()
        both = self.memory.arena[cells.clamp(min=0)].permute(1, 2, 0, 3, 4).flatten(2, 3)
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

    def check(self, got: torch.Tensor, q: torch.Tensor, layer: int, rows: list[int]) -> None:
        """Decode outputs `[B, H, D]` against the formula."""
        for number, row in enumerate(rows):
            k, v, there = self.dense(layer, row)
            want = reference(q[number : number + 1], k, v, SCALE, there[:, None])
            assert (got[number : number + 1].double() - want).abs().max() < TOLERANCE


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


# -- tests -------------------------------------------------------------------------------------------------------------


@PROVIDERS
@GROUPS
@pytest.mark.parametrize("want_lse", [False, True], ids=["", "lse"])
def test_extend(provider: Callable[[Memory], Provider], groups: int, want_lse: bool) -> None:
    """No prefix, a prefix that was compressed, a prefix of one token; the last two vote."""
    world = Requests(groups)
    backend = provider(world.memory)
    plan = {3: (0, 9), 1: (70, 5), 6: (1, 17)}
    for row, (begin, _) in plan.items():
        if begin:
            world.append(row, begin)
            world.evict(row, 0.4)
    begins = torch.tensor([begin for begin, _ in plan.values()], device=DEVICE)
    requests, first = [], 0
    for row, (begin, count) in plan.items():
        world.append(row, count)
        requests.append(ExtendRequest(row, slice(first, first + count), begin, votes=begin > 0))
        first += count
    ends = torch.tensor([world.lengths[row] for row in plan], device=DEVICE)
    rows = torch.tensor(list(plan), device=DEVICE)
    backend.plan_extend(ExtendBatch(tuple(requests), rows, begins, ends, want_lse))
    for layer in range(LAYERS):
        q = torch.randn(first, HEADS, DIM, device=DEVICE).to(DTYPE)
        new = [world.dense(layer, row)[:2] for row in plan]
        k, v = (torch.cat([both[n][-r.count :] for both, r in zip(new, requests, strict=True)]) for n in range(2))
        seen: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

        def observe(
            number: int,
            prefix: torch.Tensor | None,
            lse: torch.Tensor | None,
            seen: dict[int, Any] = seen,
        ) -> None:
            assert prefix is not None
            seen[number] = prefix.clone(), None if lse is None else lse.clone()

        got = backend.extend(world.planes(layer), q, k, v, SCALE, observe)
        assert list(seen) == [1, 2]
        for number, (row, request) in enumerate(zip(plan, requests, strict=True)):
            keys, values, there = world.dense(layer, row)
            own = torch.ones(request.count, request.count, dtype=torch.bool, device=DEVICE).tril()
            earlier = there[:, None, : request.begin].expand(-1, request.count, -1)
            visible = torch.cat([earlier, own.expand(KV_HEADS, -1, -1)], -1)
            part = q[request.tokens]
            want = reference(part, keys, values, SCALE, visible)
            assert (got[request.tokens].double() - want).abs().max() < TOLERANCE
            if number in seen:
                prefix, lse = seen[number]
                assert prefix is not None
                assert prefix.shape[0] == int(there[:, : request.begin].sum(1).max())
                assert (lse is not None) == want_lse
                if lse is not None:
                    assert (lse.double() - log_sum(part, keys, SCALE, visible)).abs().max() < TOLERANCE


@PROVIDERS
@GROUPS
def test_decode_over_a_changing_batch(provider: Callable[[Memory], Provider], groups: int) -> None:
    """Three requests; one leaves, one comes back with other slots, one has its slots exchanged."""
    world = Requests(groups)
    backend = provider(world.memory)
    for row, (tokens, share) in LENGTHS.items():
        world.append(row, tokens)
        world.evict(row, share)
        backend.invalidate(row)
    for number, rows in enumerate([[3, 5, 1], [3, 5, 1], [3, 1], [5, 3, 1], [5, 3, 1], [1]]):
        if number == 3:  # row 5 is another request now
            del world.lengths[5]
            world.append(5, 40)
            world.evict(5, 0.3)
            backend.invalidate(5)
        if number == 4:  # and row 3 was published: it names other slots
            length = world.lengths.pop(3)
            world.append(3, length)
            world.evict(3, 0.2)
            backend.invalidate(3)
        if number == 5:  # longer by two since the last step
            world.append(1, 1)
        backend.plan_decode(world.step(rows))
        for layer in range(LAYERS):
            q = torch.randn(len(rows), HEADS, DIM, device=DEVICE).to(DTYPE)
            world.check(backend.decode(world.planes(layer), q, SCALE), q, layer, rows)


@pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
@GROUPS
def test_recorded_steps_read_what_the_capture_read(provider: Callable[[Memory], Provider], groups: int) -> None:
    """Without a graph: every step runs with the very objects that were there when it was captured."""
    world = Requests(groups)
    backend: Any = provider(world.memory)
    backend.init_graphs(4)
    captured = {}
    for size in (4, 2):
        backend.plan_decode(capture_only(size, world.residency.num_planes))
        captured[size] = backend._decode
    for row, (tokens, share) in LENGTHS.items():
        world.append(row, tokens)
        world.evict(row, share)
        backend.invalidate(row)
    # Padded, once more, one request has left, without padding, a step without a graph, and with one, one is back.
    for rows, size in (
        ([3, 5, 1], 4),
        ([3, 5, 1], 4),
        ([3, 1], 4),
        ([3, 1], 2),
        ([3, 1], 0),
        ([3, 1], 2),
        ([5, 3, 1], 4),
    ):
        assert backend.fits_graph(rows, [world.lengths[row] + 1 for row in rows])
        backend.plan_decode(world.step(rows, padding=max(0, size - len(rows)), recorded=size > 0))
        if size:
            if isinstance(backend, triton_provider.TritonProvider):  # right with stale parts, too, only slow
                assert backend._decode.parts.data_ptr() == captured[size].parts.data_ptr()
            backend._decode = captured[size]
        for layer in range(LAYERS):
            q = torch.randn(max(size, len(rows)), HEADS, DIM, device=DEVICE).to(DTYPE)
            world.check(backend.decode(world.planes(layer), q, SCALE), q, layer, rows)


@pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
@GROUPS
def test_what_does_not_fit_a_graph_is_known_before(provider: Callable[[Memory], Provider], groups: int) -> None:
    world = Requests(groups, tokens=600, context=1000)
    backend: Any = provider(world.memory)
    assert not backend.fits_graph([1], [1])
    backend.init_graphs(4)
    world.append(1, 500)
    world.evict(1, 0.1)
    # Room for 1200 tokens: three requests that share a prefix of 500 by their lengths, four by what is kept of it.
    for row in (2, 3, 4):
        world.memory.req_to_token[row] = world.memory.req_to_token[1]
    assert backend.fits_graph([1, 2], [500, 500])
    assert backend.fits_graph([1, 2, 3, 4], [500] * 4) == (groups == 1)
    assert not backend.fits_graph([1], [3000])


@PROVIDERS
@GROUPS
def test_backend_writes_and_reads(
    provider: Callable[[Memory], Provider], groups: int, request: pytest.FixtureRequest
) -> None:
    """`ResidencyBackend` with SGLang's batches: a prefill, a step without and two with recorded buffers."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from vlcache_sgl.runtime.arena import KVArena
    from vlcache_sgl.runtime.attention.backend import ResidencyBackend

    arena = KVArena(
        num_cells=200 * LAYERS * groups,
        groups=groups,
        size=200,
        page_size=1,
        dtype=DTYPE,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device=str(DEVICE),
        enable_memory_saver=False,
        enable_alt_stream=False,
    )
    table = torch.zeros(5, 64, dtype=torch.int32, device=DEVICE)
    runner = SimpleNamespace(
        token_to_kv_pool=arena,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        dtype=DTYPE,
        server_args=SimpleNamespace(triton_attention_num_kv_splits=3),
    )
    name = request.node.callspec.params["provider"]
    backend = ResidencyBackend(runner, SimpleNamespace(observe=None), name, HEADS)
    world = Requests(groups)
    world.memory, world.residency = backend_memory(backend, table), arena.residency
    rows, lengths, slot = [2, 4], [0, 0], itertools.count(1)

    def forward(counts: list[int], mode: Any, size: int = 0) -> None:
        nonlocal lengths
        begins, lengths = lengths, [a + b for a, b in zip(lengths, counts, strict=True)]
        slots = torch.tensor([next(slot) for _ in range(sum(counts))], device=DEVICE)
        arena.residency.attach(slots)
        for row, begin, part in zip(rows, begins, torch.split(slots, counts), strict=True):
            table[row, begin : begin + len(part)] = part.int()
        world.lengths = dict(zip(rows, lengths, strict=True))
        padding = max(0, size - len(rows))
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(rows) + padding,
            num_padding=padding,
            req_pool_indices=torch.tensor(rows + [0] * padding, device=DEVICE),
            out_cache_loc=slots,
            seq_lens=torch.tensor(lengths + [1] * padding, device=DEVICE),
            seq_lens_cpu=torch.tensor(lengths + [1] * padding),
            extend_prefix_lens=torch.tensor(begins, device=DEVICE),
            extend_prefix_lens_cpu=begins,
            extend_seq_lens_cpu=counts,
        )
        backend.rows = rows
        (backend.init_forward_metadata_out_graph if size else backend.init_forward_metadata)(batch)
        for number in range(LAYERS):
            layer = SimpleNamespace(
                layer_id=number,
                tp_q_head_num=HEADS,
                tp_k_head_num=KV_HEADS,
                tp_v_head_num=KV_HEADS,
                head_dim=DIM,
                scaling=SCALE,
            )
            tokens = sum(counts) + padding
            q = torch.randn(tokens, HEADS * DIM, device=DEVICE).to(DTYPE)
            k, v = (torch.randn(tokens, KV_HEADS, DIM, device=DEVICE).to(DTYPE) for _ in range(2))
            run = backend.forward_decode if mode.is_decode() else backend.forward_extend
            got = run(q, k, v, layer, batch).view(tokens, HEADS, DIM)
            assert torch.equal(world.dense(number, rows[0])[0][begins[0] :], k[: counts[0]])
            if mode.is_decode():
                world.check(got, q.view(tokens, HEADS, DIM), number, rows)
            assert not bool(arena.arena[0].any()), "the padding cell must stay zero"

    forward([5, 3], ForwardMode.EXTEND)
    forward([2, 6], ForwardMode.EXTEND)
    forward([1, 1], ForwardMode.DECODE)
    if name != "torch_native":
        backend.init_cuda_graph_state(4, 4)
        assert backend.get_cuda_graph_seq_len_fill_value() == 1
        forward([1, 1], ForwardMode.DECODE, size=4)
        forward([1, 1], ForwardMode.DECODE, size=4)
    with pytest.raises(NotImplementedError, match="sinks"):
        backend.forward_decode(None, None, None, None, None, sinks=torch.zeros(1))


def backend_memory(backend: Any, table: torch.Tensor) -> Memory:
    return Memory(backend.arena.arena, backend.arena.residency, table, backend.arena.groups)


def test_evicted_cells_come_back_when_their_event_has_passed() -> None:
    """Rule 5, with an event that this test lets pass."""
    from vlcache_sgl.runtime.allocator import VirtualSlotAllocator, passed_event
    from vlcache_sgl.runtime.arena import KVArena

    arena = KVArena(
        num_cells=20,
        groups=1,
        size=20,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=8,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
        enable_alt_stream=False,
    )
    allocator = VirtualSlotAllocator(arena, physical_tokens=10, need_sort=False)
    slots = allocator.alloc(8)
    assert slots is not None
    event = SimpleNamespace(
        passed=False, query=lambda: event.passed, synchronize=lambda: setattr(event, "passed", True)
    )
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[:, :2] = True
    allocator.retire(arena.residency.evict(slots, keep), event)
    assert allocator.alloc(4) is None
    event.passed = True
    assert allocator.alloc(4) is not None
    assert allocator.verify_byte_accounting() == []
    assert passed_event(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("given", "installed", "dim", "dtype", "chosen"),
    [
        (None, True, 128, "auto", "flashinfer"),
        (None, True, 80, "auto", "triton"),
        (None, True, 128, "float32", "triton"),
        (None, False, 128, "auto", "triton"),
        ("triton", True, 128, "auto", "triton"),
    ],
)
def test_default_on_a_cuda_machine(
    given: str | None, installed: bool, dim: int, dtype: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlcache_sgl.runtime import compat

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object() if installed else None)
    arguments = SimpleNamespace(attention_backend=given, device=None, dtype=dtype, disable_prefill_cuda_graph=False)
    compat.choose_defaults(arguments, {"text_config": {"hidden_size": 4 * dim, "num_attention_heads": 4}})
    assert arguments.attention_backend == chosen
    assert arguments.disable_prefill_cuda_graph
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    untouched = SimpleNamespace(attention_backend=None, device=None)
    compat.choose_defaults(untouched, {})
    assert untouched.attention_backend is None
    problems = list(compat.unsupported_arguments(SimpleNamespace(attention_backend="triton")))
    assert len(problems) == 1
    assert "torch_native" in problems[0]


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
@GROUPS
def test_a_replayed_graph_equals_eager(provider: Callable[[Memory], Provider], groups: int) -> None:
    """Capture one decode graph, replay it over several steps and batches, compare with the same kernels without it."""
    world = Requests(groups)
    graphed, eager = provider(world.memory), provider(world.memory)
    graphed.init_graphs(4)
    q = torch.zeros(LAYERS, 4, HEADS, DIM, device=DEVICE, dtype=DTYPE)

    def layers(kernels: Provider, queries: torch.Tensor) -> list[torch.Tensor]:
        return [kernels.decode(world.planes(layer), queries[layer], SCALE) for layer in range(LAYERS)]

    graphed.plan_decode(capture_only(4, world.residency.num_planes))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers(graphed, q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layers(graphed, q)
    for row, (tokens, share) in LENGTHS.items():
        world.append(row, tokens)
        world.evict(row, share)
    for rows in ([3, 5, 1], [3, 5, 1], [3, 1], [3, 1]):
        batch, real = world.step(rows, padding=4 - len(rows), recorded=True), len(rows)
        graphed.plan_decode(batch)
        plain = replace(
            batch,
            row_tensor=batch.row_tensor[:real],
            length_tensor=batch.length_tensor[:real],
            new_cells=batch.new_cells[:, :real],
            padding=0,
            recorded=False,
        )
        eager.plan_decode(plain)
        q.normal_()
        graph.replay()
        for layer, want in enumerate(layers(eager, q[:, :real])):
            assert (recorded[layer][:real].float() - want.float()).abs().max() < TOLERANCE
            world.check(recorded[layer], q[layer], layer, rows)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
def test_a_continued_step_does_not_wait_for_the_device(provider: Callable[[Memory], Provider]) -> None:
    world = Requests(1)
    backend = provider(world.memory)
    for row in (1, 2, 3):
        world.append(row, 50)
        world.evict(row, 0.5)
    q = torch.randn(3, HEADS, DIM, device=DEVICE).to(DTYPE)
    for waits, rows in ((True, [1, 2, 3]), (True, [1, 2, 3]), (False, [1, 2, 3]), (False, [1, 3])):
        batch = world.step(rows)
        torch.cuda.set_sync_debug_mode("default" if waits else "error")
        try:
            backend.plan_decode(batch)
            for layer in range(LAYERS):
                backend.decode(world.planes(layer), q[: len(rows)], SCALE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
