"""How often the host waits for a GPU: on a pretended one, where every wait is logged with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_gpu import CUDA, DEFAULT, LOG, STREAMS, Tensor, pretend_gpu, values
from provider_bench import StandIn, use_flashinfer_stand_in

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.attention.base import AttentionKernels
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.exact import HostMemory
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.config import KVBudget
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.memory.residency import EVICTED
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.policy.manager import registry
from vlcache_sgl.policy.policy import resolve
from vlcache_sgl.recall.areas import RecallArea
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.scoring import wanted_statistics
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.sglang_hooks import triton_kernels
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.arena import KVArena
from vlcache_sgl.sglang_hooks.backend import ResidencyBackend

LAYERS, HEADS, KV_HEADS, DIM = 3, 8, 2, 16
PROVIDERS = ("triton", "flashinfer")


class Rotary:
    """Turns nothing: what matters here is where tensors are."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return x * 1


def use_attention_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of SGLang's Triton kernels: launches that compute nothing."""

    def kernel(*_: Any, lse_extend: torch.Tensor | None = None, **__: Any) -> None:
        LOG.operations["attention"] += 1
        if lse_extend is not None:
            lse_extend.zero_()

    monkeypatch.setattr(triton_kernels, "attention_kernels", lambda: AttentionKernels(kernel, kernel))


class QuietFlashInfer(StandIn):
    """FlashInfer that plans and computes nothing."""

    def plan(self, *arguments: Any) -> list[int]:
        LOG.operations["flashinfer plan"] += 1
        return super().plan(*arguments)

    def paged_run(self, *arguments: Any) -> None:
        LOG.operations["attention"] += 1
        assert not [value for value in arguments if type(value) is torch.Tensor], "a tensor of the host"
        if arguments[11] is not None:
            arguments[11].zero_()

    def ragged_run(self, *arguments: Any) -> None:
        LOG.operations["attention"] += 1
        if arguments[9] is not None:
            arguments[9].zero_()


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        use_attention_without_values(monkeypatch)
    else:
        use_flashinfer_stand_in(monkeypatch, QuietFlashInfer())
    return str(request.param)


@pytest.fixture
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


def give_up(message: str, *_: Any) -> None:
    pytest.fail(message)


class Room:
    """What gives way: nothing does."""

    def __init__(self, allocator: VirtualSlotAllocator) -> None:
        self._allocator = allocator

    def make_host_room(self, tokens: int) -> None:
        pass

    def make_cells(self, cells: int) -> None:
        pass

    def take_slots(self, count: int) -> torch.Tensor | None:
        return self._allocator.alloc_bare(count)

    def give_slots(self, slots: torch.Tensor) -> None:
        self._allocator.free(slots)


class Server:
    """Attention backend, allocator and compressor of one scheduler, on the pretended GPU."""

    def __init__(
        self,
        provider: str,
        *,
        head_cells: bool = False,
        host: bool = False,
        recall: bool = False,
        window: Window | None = None,
    ) -> None:
        tokens, groups = 3000, KV_HEADS if head_cells else 1
        self.window = window
        arena = KVArena(
            num_cells=tokens * (LAYERS * groups + (0 if window is None else window.planes)),
            groups=groups,
            window=window,
            size=2 * tokens,
            page_size=1,
            dtype=torch.bfloat16,
            head_num=KV_HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cuda",
            enable_memory_saver=False,
            enable_alt_stream=False,
        )
        self.head_cells, self.arena = head_cells, arena.arena
        self.allocator = VirtualSlotAllocator(arena, physical_tokens=tokens, need_sort=False)
        self.table = torch.zeros(16, 1024, dtype=torch.int32, device="cuda")
        weights = tuple(tuple(0.5 for _ in range(KV_HEADS)) for _ in range(LAYERS))
        model = Prompt(
            0,
            0,
            (),
            LAYERS,
            HEADS,
            KV_HEADS,
            DIM,
            device=CUDA,
            rotary=Rotary(),
            layer_weights=(0.5,) * LAYERS,
            head_weights=weights,
        )
        self.model, accounting = model, self.allocator.accounting
        self.compressor = Compressor(model, HeadGather(None, 0, 1), Counters(), accounting)
        if host:
            residency = accounting.residency
            accounting.host = HostPool(residency.num_planes, residency.num_slots, tokens, arena.arena.cells)
            self.compressor.host = HostMemory(accounting, Room(self.allocator), recall=recall)
        runner = SimpleNamespace(
            token_to_kv_pool=arena,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            dtype=torch.bfloat16,
            server_args=SimpleNamespace(triton_attention_num_kv_splits=8),
        )
        self.backend = ResidencyBackend(runner, self.compressor, provider, HEADS)
        self.lengths: dict[int, int] = {}

    def job(self, policy: str, length: int, *, host: bool = False, recall: int = 0) -> CompressionJob:
        choice = Choice(resolve(policy, head_cells=self.head_cells), KVBudget(fraction=0.2), recall=recall)
        repeated = 40 if choice.policy.reads_twice else 0
        job = CompressionJob(Asked(choice, (Span(4, length - 30),), length, 8, repeated=repeated))
        if host:
            job.host = HostShare(first_row=length - 30, ratio=1.0, abort=give_up)
        return job

    def _batch(self, mode: ForwardMode, rows: list[int], counts: list[int], padding: int) -> SimpleNamespace:
        """Allocate and write rows, as SGLang's scheduler does."""
        slots = self.allocator.alloc(sum(counts))
        begins = [self.lengths.get(row, 0) for row in rows]
        for row, begin, part in zip(rows, begins, torch.split(slots, counts), strict=True):
            self.table[row, begin : begin + len(part)] = part.to(torch.int32)
            self.lengths[row] = begin + len(part)
        lengths = [begin + count for begin, count in zip(begins, counts, strict=True)]

        def here(numbers: list[int]) -> Tensor:
            return Tensor(torch.tensor(numbers))

        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(rows) + padding,
            num_padding=padding,
            req_pool_indices=here(rows + [0] * padding),
            out_cache_loc=slots,
            seq_lens=here(lengths + [1] * padding),
            seq_lens_cpu=torch.tensor(lengths + [1] * padding),
            extend_prefix_lens=here(begins),
            extend_prefix_lens_cpu=begins,
            extend_seq_lens_cpu=counts,
        )

    def _layers(self, run: Any, batch: Any, tokens: int) -> None:
        def random(*shape: int) -> Tensor:
            return Tensor(torch.randn(*shape).to(torch.bfloat16))

        window = self.window
        kinds = [(number, KV_HEADS, DIM) for number in range(LAYERS)]
        if window is not None:
            kinds += [(number, window.kv_heads, window.head_dim) for number in window.layer_ids]
        for number, heads, dim in kinds:
            layer = SimpleNamespace(
                layer_id=number, tp_q_head_num=HEADS, tp_k_head_num=heads, tp_v_head_num=heads, head_dim=dim
            )
            layer.scaling, layer.k_scale, layer.v_scale = dim**-0.5, None, None
            layer.k_scale_float = layer.v_scale_float = None
            run(random(tokens, HEADS * dim), random(tokens, heads, dim), random(tokens, heads, dim), layer, batch)

    def prefill(self, rows: list[int], counts: list[int], jobs: list[CompressionJob]) -> None:
        """One chunk of each of `rows`; who is complete is compressed."""
        batch = self._batch(ForwardMode.EXTEND, rows, counts, 0)
        self.backend.rows, self.backend.jobs = rows, list(jobs)
        for row, job, count in zip(rows, jobs, counts, strict=True):
            end = self.lengths[row]
            self.compressor.begin_chunk(job, end - count, end)
            if job.progress.scoring is not None:
                if job.host is not None and end - count == job.progress.shared > 0:
                    job.progress.scoring.add_positions(Tensor(torch.arange(end - count)))
                job.progress.scoring.add_positions(Tensor(torch.arange(end - count, end)))
        staged = [self.table[row, : job.progress.chunk.begin] for row, job in zip(rows, jobs, strict=True) if job.host]
        self.compressor.stage(staged)
        self.backend.init_forward_metadata(batch)
        self._layers(self.backend.forward_extend, batch, sum(counts))
        self.compressor.end_staging()
        for row, job in zip(rows, jobs, strict=True):
            self.compressor.end_chunk(job, self.table[row])
            if (job.progress.reached or 0) >= job.asked.end:
                self.compressor.finish(job, self.table[row])

    def decode(self, rows: list[int], *, graph: int = 0, areas: Sequence[RecallArea | None] = ()) -> None:
        batch = self._batch(ForwardMode.DECODE, rows, [1] * len(rows), max(0, graph - len(rows)))
        self.backend.rows, self.backend.jobs = rows, None
        self.backend.areas = [(number, area) for number, area in enumerate(areas) if area is not None]
        prepare = self.backend.init_forward_metadata_out_graph if graph else self.backend.init_forward_metadata
        prepare(batch)
        self._layers(self.backend.forward_decode, batch, batch.batch_size)

    def capture(self, sizes: list[int]) -> None:
        """Record graphs, before anything is served."""
        self.backend.init_cuda_graph_state(max(sizes), max(sizes))
        for size in sizes:
            batch = self._batch(ForwardMode.DECODE, [], [], size)
            self.backend.rows = []
            self.backend.init_forward_metadata_out_graph(batch, in_capture=True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("head_cells", [False, True], ids=["layer-cells", "head-cells"])
@pytest.mark.parametrize("graph", [0, 4], ids=["eager", "graph"])
def test_no_decode_step_waits(provider: str, head_cells: bool, graph: int) -> None:
    """Continuing, with a request that joins, with one that leaves and is freed, and with one that is compressed."""
    server = Server(provider, head_cells=head_cells)
    server.capture([4])
    jobs = [server.job("vlcache", 300), server.job("vlcache", 200)]
    server.prefill([1, 2], [300, 200], jobs)
    assert all(job.progress.compressed for job in jobs)
    LOG.clear()
    server.decode([1, 2], graph=graph)
    assert not LOG.waits, f"first step\n{LOG}"
    LOG.clear()
    for _ in range(2):
        server.decode([1, 2], graph=graph)
    assert not LOG.waits, f"continuing\n{LOG}"
    assert not LOG.copies, "host and device exchange nothing"
    assert not LOG.operations["flashinfer plan"], "a batch size is planned once"
    server.prefill([3], [150], [server.job("vlcache", 150)])
    LOG.clear()
    server.decode([1, 2, 3], graph=graph)
    server.decode([1, 2, 3], graph=graph)
    assert not LOG.waits, f"joining\n{LOG}"
    server.allocator.free(server.table[2, : server.lengths[2]].to(torch.int64))
    server.decode([1, 3], graph=graph)
    assert not LOG.waits, f"leaving\n{LOG}"
    assert server.allocator.accounting.verify() == []


WINDOWS = {
    "one cell": Window((3, 4), KV_HEADS, DIM, 40, heads_per_cell=2, layers_per_cell=1),
    "two cells": Window((3, 4), 4, DIM, 40, heads_per_cell=2, layers_per_cell=1),
    "two layers in one cell": Window((3, 4), 1, DIM, 40, heads_per_cell=1, layers_per_cell=2),
}
"""Layers with a window of 40 tokens."""


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("host", [False, True], ids=["arena", "host"])
@pytest.mark.parametrize("graph", [0, 4], ids=["eager", "graph"])
def test_no_step_with_windows_waits(window: Window, host: bool, graph: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts longer and shorter than the window, in chunks, and with what is compressed in host memory."""
    use_attention_without_values(monkeypatch)
    server = Server("triton", host=host, window=window)
    server.capture([4])
    jobs = [server.job("vlcache", length, host=host) for length in (200, 150)]
    server.prefill([1, 2], [120, 150], jobs)
    server.prefill([1], [jobs[0].asked.end - 120], jobs[:1])
    assert all(job.progress.compressed for job in jobs)
    server.prefill([3], [20], [server.job("vlcache", 20)])  # kept whole
    server.decode([1, 2, 3], graph=graph)
    LOG.clear()
    for rows in ([1, 2, 3], [1, 3], [1, 3]):
        server.decode(rows, graph=graph)
    assert not LOG.waits, str(LOG)
    assert server.allocator.accounting.verify() == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("policy", sorted(registry().recipes))
def test_a_prompt_is_compressed_with_two_waits_at_most(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its admission, which asks what eviction could give back, to its own eviction."""
    use_attention_without_values(monkeypatch)
    server = Server("triton", head_cells=policy in ("adakv", "kvzip"))
    first, job = server.job(policy, 120), server.job(policy, 200)
    server.prefill([1], [first.asked.end], [first])  # copies to the device what a process copies once
    server.allocator.free(server.table[1, :2].to(torch.int64))
    LOG.clear()
    server.allocator.accounting.evictable_physical_tokens()
    server.prefill([2], [120], [job])
    server.prefill([2], [job.asked.end - 120], [job])
    assert job.progress.compressed, job.report.fields
    assert len(LOG.waits) <= 2, str(LOG)
    assert server.allocator.accounting.verify() == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("policy", ["vlcache", "keydiff"])
@pytest.mark.parametrize("head_cells", [False, True], ids=["layer-cells", "head-cells"])
def test_a_question_on_host_memory_waits_no_oftener(provider: str, policy: str, head_cells: bool) -> None:
    """Written back chunk by chunk, staged, decided on, brought back: rows of host memory are found on the device."""
    server = Server(provider, head_cells=head_cells, host=True)
    job = server.job(policy, 200, host=True)
    LOG.clear()
    for chunk in (80, 70, 50):
        server.prefill([1], [chunk], [job])
    assert job.host is not None
    assert job.host.own is not None
    assert len(LOG.waits) <= 2, str(LOG)
    LOG.clear()
    for _ in range(2):
        server.decode([1])
    assert not LOG.waits, str(LOG)
    server.allocator.free(job.host.own.private)
    server.allocator.free(job.host.own.shared)
    assert not LOG.waits, str(LOG)
    assert server.allocator.accounting.verify() == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("head_cells", [False, True], ids=["layer-cells", "head-cells"])
def test_recall_does_not_wait(provider: str, head_cells: bool) -> None:
    """Ranked, compared and fetched on the device, also when a request joins or leaves."""
    server = Server(provider, head_cells=head_cells, host=True, recall=True)
    jobs = [server.job("vlcache", length, host=True, recall=8) for length in (200, 120)]
    server.prefill([1], [200], [jobs[0]])
    LOG.clear()
    for _ in range(2):
        server.decode([1], areas=[jobs[0].recalls])
    server.prefill([2], [120], [jobs[1]])
    assert len(LOG.waits) <= 2, str(LOG)
    LOG.clear()
    for _ in range(2):
        server.decode([1, 2], areas=[job.recalls for job in jobs])
    server.decode([2], areas=[jobs[1].recalls])
    assert not LOG.waits, str(LOG)
    assert LOG.operations["kernel sketch_scores"] == 3 * LAYERS * (KV_HEADS if head_cells else 1)
    assert all(job.area is not None and job.area.report()["from_host"] > 0 for job in jobs)


def runs_behind(later: int, earlier: int) -> bool:
    """Whether the device runs entry `later` of `STREAMS` behind entry `earlier`, directly ordered."""
    stream, before = STREAMS[later][1], STREAMS[earlier][1]
    if stream is before:
        return earlier < later
    recorded = {id(event) for what, on, event in STREAMS[earlier:later] if what == "record" and on is before}
    return any(
        on is stream and ((what == "wait event" and id(of) in recorded) or (what == "wait stream" and of is before))
        for what, on, of in STREAMS[earlier:later]
    )


@pytest.mark.usefixtures("gpu")
def test_the_next_layer_is_staged_while_one_is_computed() -> None:
    """Two sets of cells: a layer attends behind its copy, a set is overwritten behind the attention that read it."""
    server = Server("triton", host=True)
    slots = server.allocator.alloc(5)
    host = server.compressor.host
    assert host is not None
    assert host.write_back(slots)
    host.release_chunk(slots)
    residency, planes = server.arena.residency, server.arena.planes_of
    STREAMS.clear()
    host.stage([slots])
    first, second = (values(residency.table[layer, slots]).clone() for layer in (0, 1))
    assert not torch.isin(first, second).any()
    assert torch.equal(values(residency.table[2, slots]), first)
    for layer in range(LAYERS):
        host.staging.fill(planes(layer))
        STREAMS.append(("attention", DEFAULT, None))
    host.staging.end()
    copies = [at for at, (what, _, _) in enumerate(STREAMS) if what == "copy_cells"]
    reads = [at for at, (what, _, _) in enumerate(STREAMS) if what == "attention"]
    assert len(copies) == len(reads) == LAYERS
    assert copies[1] < reads[0], "the next layer's copy is queued before this layer computes"
    for layer in range(LAYERS):
        assert runs_behind(reads[layer], copies[layer])
        assert not runs_behind(reads[0], copies[1]), "a layer need not wait for the next one's copy"
        if layer >= 2:
            assert runs_behind(copies[layer], reads[layer - 2]), "cells are overwritten under the attention"
    assert values(residency.table[:, slots] == EVICTED).all()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["layer-cells", "head-cells", "windows"])
def test_kernels_are_compiled_when_a_server_starts(provider: str, kind: str) -> None:
    """All that serving launches later has been launched before, and nothing has changed by it."""
    if kind == "windows" and provider != "triton":
        pytest.skip("FlashInfer does not serve windows")
    window = WINDOWS["two cells"] if kind == "windows" else None
    server = Server(provider, head_cells=kind == "head-cells", host=True, recall=True, window=window)
    before = values(server.arena.raw).clone()
    LOG.clear()
    job = server.job("vlcache", 200)
    server.backend.compile_kernels(lambda: wanted_statistics(job.asked.choice.policy.needs, server.model))
    started = {name for name in LOG.operations if name.startswith("kernel")}
    assert torch.equal(values(server.arena.raw), before)
    LOG.clear()
    server.prefill([1], [200], [job])
    recalls = server.job("vlcache", 90, host=True, recall=4)
    server.prefill([2], [90], [recalls])
    server.decode([1, 2], areas=[None, recalls.recalls])
    server.decode([1, 2], areas=[None, recalls.recalls])
    served = {name for name in LOG.operations if name.startswith("kernel")}
    # FlashInfer's schedules are compared with its own when the provider is made.
    assert served - {"kernel write_schedules"} == started


@pytest.mark.usefixtures("gpu")
def test_the_pretended_device_notices_waits_and_mixed_devices() -> None:
    """A log that never says anything proves nothing."""
    numbers, table = torch.arange(4, device="cuda"), torch.zeros(8, device="cuda")
    for kind, wait in {
        "a number of the host, assigned through an index": lambda: table.__setitem__(numbers, 5.0),
        "index by a mask": lambda: table[table > 1],
        "aten::nonzero": lambda: table.nonzero(),
        "aten::_local_scalar_dense": lambda: int(table.sum()),
        "copy to memory that is not pinned": lambda: table.cpu(),
        "copy from memory that is not pinned": lambda: torch.zeros(3).to("cuda"),
        "tolist": lambda: table.tolist(),
    }.items():
        LOG.clear()
        wait()
        assert [entry.kind for entry in LOG.waits] == [kind]
    LOG.clear()
    table.index_fill_(0, numbers, 5.0)
    table[2:4] = 1
    table[numbers] = table[numbers] + 1
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert not LOG.waits
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        table + torch.ones(8)
