"""One launch per layer for a whole prefill batch counts what request after request counts on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import provider_bench as bench
import pytest
import torch
from backend_parts import layer_of_model, make_backend, make_pool

from vlcache_kernels.attention_stats import StatsRequest
from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.attention.base import Provider
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.config import KVBudget
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.batches import Memory
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.scoring import batch as batch_scoring
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator

provider, kernels = bench.provider, bench.kernels
LAYERS, HEADS, DIM, KV_HEADS = bench.LAYERS, bench.HEADS, bench.DIM, bench.KV_HEADS
DEVICE, DTYPE = bench.DEVICE, bench.DTYPE
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
ON_DEVICE = pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
Make = Callable[[Memory], Provider]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LENGTH = 96
VISION = (Span(4, 80),)


class World:
    """Pools, a compressor and one backend; every row has queries, keys and values of its own, the same in each world.

    Args:
        name: of the provider.
        groups: cells per layer and token.
    """

    def __init__(self, name: str, groups: int) -> None:
        self.groups = groups
        pool = make_pool(groups, tokens=700)
        self.arena = pool.arena
        self.allocator = VirtualSlotAllocator(pool, physical_tokens=700, need_sort=False)
        self.table = torch.zeros(8, 128, dtype=torch.int32, device=DEVICE)
        self.counters = Counters()
        model = Prompt(0, 0, (), LAYERS, HEADS, KV_HEADS, DIM, device=DEVICE)
        accounting = self.allocator.accounting
        self.compressor = Compressor(model, HeadGather(None, 0, 1), self.counters, accounting)
        self.backend = make_backend(name, pool, self.table, self.compressor)
        self.lengths = dict.fromkeys(range(8), 0)
        self.jobs: dict[int, CompressionJob] = {}
        self.scorings: dict[int, Any] = {}

    def job(self, row: int, policy: str) -> None:
        choice = Choice(resolve(policy), KVBudget(fraction=0.3))
        self.jobs[row] = CompressionJob(Asked(choice, VISION, LENGTH, min_tokens=8))

    def job_read_twice(self, row: int, policy: str) -> None:
        choice = Choice(resolve(policy), KVBudget(fraction=0.3))
        self.jobs[row] = CompressionJob(Asked(choice, (Span(4, 60),), 60, min_tokens=8, repeated=LENGTH - 60))

    def share(self, source: int, row: int, tokens: int) -> None:
        """A prefix hit."""
        self.table[row, :tokens] = self.table[source, :tokens]
        self.lengths[row] = tokens

    def prefill(self, counts: dict[int, int]) -> None:
        """One forward: so many more tokens for each of these rows."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        rows, begins = list(counts), [self.lengths[row] for row in counts]
        slots = self.allocator.alloc(sum(counts.values()))
        assert slots is not None
        new: list[list[torch.Tensor]] = []
        for row, begin, part in zip(rows, begins, torch.split(slots, list(counts.values())), strict=True):
            end = begin + len(part)
            self.table[row, begin:end] = part.int()
            self.lengths[row] = end
            rng = torch.Generator().manual_seed(row)
            tensors = [
                torch.randn(LAYERS, 128, heads, DIM, generator=rng)[:, begin:end].to(DTYPE).to(DEVICE)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            ]
            new.append([tensors[0] * 2, *tensors[1:]])
            if row in self.jobs:
                self.compressor.begin_chunk(self.jobs[row], begin, end)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows, device=DEVICE),
            out_cache_loc=slots,
            seq_lens=torch.tensor([self.lengths[row] for row in rows], device=DEVICE),
            extend_prefix_lens=torch.tensor(begins, device=DEVICE),
            extend_prefix_lens_cpu=begins,
            extend_seq_lens_cpu=list(counts.values()),
        )
        self.backend.rows = rows
        jobs = [self.jobs.get(row) for row in rows]
        self.backend.jobs = [job if job is not None and not job.progress.done else None for job in jobs]
        self.backend.init_forward_metadata(batch)
        for layer in range(LAYERS):
            q, k, v = (torch.cat([tensors[n][layer] for tensors in new]) for n in range(3))
            self.backend.forward_extend(q.flatten(1), k, v, layer_of_model(layer), batch)
        for row, job in zip(rows, jobs, strict=True):
            if job is not None and job.progress.scoring is not None and (job.progress.reached or 0) >= job.asked.end:
                self.scorings[row] = job.progress.scoring
                self.compressor.finish(job, self.table[row])

    def kept(self, row: int) -> torch.Tensor:
        return self.arena.residency.table[:, self.table[row, : self.lengths[row]].long()] >= 0


def run(world: World) -> None:
    """Prefixes that heads have kept differently, chunks that differ between requests, requests without query rows."""
    world.job(1, "vlcache:heads=split" if world.groups > 1 else "vlcache")
    world.prefill({1: LENGTH})
    world.share(1, 2, 40)
    for row, policy in {2: "vlcache:paper", 3: "snapkv", 4: "h2o", 5: "vlcache"}.items():
        world.job(row, policy)
    world.job_read_twice(7, "kvzip")
    world.prefill({2: 30, 3: 60, 6: 20, 4: 50})
    world.prefill({4: 46, 5: LENGTH, 6: 3, 3: 36, 2: 20})
    world.prefill({2: 6, 7: 70})
    world.prefill({7: LENGTH - 70})


@pytest.fixture
def launches(provider: Make, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the statistics kernel: (statistics, whether the log-sum-exp is known, rows by request)."""
    asked: list[Any] = []
    real = batch_scoring.batch_attention_stats

    def call(*arguments: Any, **options: Any) -> Any:
        asked.append((options["want"], options["lse"] is not None, arguments[4].rows))
        return real(*arguments, **options)

    monkeypatch.setattr(batch_scoring, "batch_attention_stats", call)
    return asked


@pytest.fixture(params=GROUPS.args[1], ids=GROUPS.kwargs["ids"])
def one_by_one(request: pytest.FixtureRequest) -> World:
    """Requests scored one after the other in plain torch, before any kernel is put in its place."""
    world = World("torch_native", request.param)
    run(world)
    return world


@ON_DEVICE
def test_a_batch_is_scored_as_its_requests_are(one_by_one: World, launches: list[Any], request) -> None:
    together = World(request.node.callspec.params["provider"], one_by_one.groups)
    run(together)
    assert launches
    assert together.counters.policy_failures == one_by_one.counters.policy_failures == 0
    assert sorted(together.scorings) == sorted(one_by_one.scorings) == [1, 2, 3, 4, 5, 7]
    for row, scoring in one_by_one.scorings.items():
        assert len(together.scorings[row].groups) == len(scoring.groups) > 0
        for mine, theirs in zip(together.scorings[row].groups, scoring.groups, strict=True):
            assert mine.positions.tolist() == theirs.positions.tolist()
            assert sorted(mine.stats) == sorted(theirs.stats) == list(range(LAYERS))
            for layer in range(LAYERS):
                for field in fields(theirs.stats[layer]):
                    a, b = getattr(mine.stats[layer], field.name), getattr(theirs.stats[layer], field.name)
                    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=lambda m, f=field: f"{f.name}: {m}")  # type: ignore[misc]
        assert torch.equal(together.kept(row), one_by_one.kept(row)), row
        assert together.jobs[row].report.fields == one_by_one.jobs[row].report.fields
    assert bool(together.kept(6).all())
    assert together.allocator.verify_byte_accounting() == []


@pytest.mark.parametrize("provider", ["flashinfer"], indirect=True)
def test_one_launch_per_layer_and_kind_of_statistics(launches: list[Any]) -> None:
    world = World("flashinfer", 1)
    for row, policy in {1: "vlcache:paper", 2: "vlcache:paper", 3: "snapkv", 4: "knorm", 5: "vlcache"}.items():
        world.job(row, policy)
    world.prefill({1: LENGTH, 6: 9, 2: LENGTH, 3: LENGTH, 4: LENGTH, 5: LENGTH})
    assert len(launches) == 3 * LAYERS
    assert {want: (lse, rows) for want, lse, rows in launches} == {
        # The density needs the row maximum, a known sum saves nothing.
        StatsRequest(column_sum=True, density=0.01): (False, (16, 16)),
        # Sums and maxima of columns alone need one pass when attention leaves its log-sum-exp.
        StatsRequest(column_sum=True): (True, (32,)),
        StatsRequest(column_max=True): (True, (16,)),
    }
    assert [row for row in (1, 2, 3, 4, 5, 6) if bool(world.kept(row).all())] == [6]


@pytest.mark.parametrize("provider", ["flashinfer"], indirect=True)
def test_a_failing_launch_costs_the_compression_only(provider: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    world = World("flashinfer", 1)
    for row in (1, 2):
        world.job(row, "vlcache")
    monkeypatch.setattr(batch_scoring, "batch_attention_stats", fail)
    world.prefill({1: LENGTH, 2: 50})
    world.prefill({2: 46})
    assert world.counters.policy_failures == 2
    assert bool(world.kept(1).all())
    assert bool(world.kept(2).all())
    assert "out of memory" in world.jobs[2].report.fields["failed"]


@pytest.mark.parametrize("provider", ["flashinfer"], indirect=True)
def test_a_retracted_request_does_not_count_what_it_generated(provider: Make) -> None:
    """It is prefilled again with its generated tokens, and decides as it did."""
    calm, retracted = World("flashinfer", 1), World("flashinfer", 1)
    for world in (calm, retracted):
        world.job(3, "h2o")
    calm.prefill({3: LENGTH})
    retracted.prefill({3: LENGTH + 7})
    assert torch.equal(retracted.kept(3)[:, :LENGTH], calm.kept(3))
    assert bool(retracted.kept(3)[:, LENGTH:].all())
