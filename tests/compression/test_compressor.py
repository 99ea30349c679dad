"""From chunks of queries to freed cells, on real pools, without a server."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.attention.torch import Gather, prefix_keys_values
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.config import KVBudget
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.decode_index import collect
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.sglang_hooks.allocator import VirtualSlotAllocator
from vlcache_sgl.sglang_hooks.arena import KVArena

LAYERS, HEADS, KV_HEADS, DIM, LENGTH = 3, 4, 2, 16, 96
VISION = (Span(4, 80),)
FRONT = VISION[0].begin
"""Tokens in front of the image, which no request evicts."""
SCALE = DIM**-0.5


def kept_of(budget: float, own: int = LENGTH, front: int = FRONT) -> int:
    """Tokens that a request keeps of `own` new ones, over all layers: the front, and the budget's share of the rest."""
    return front * LAYERS + round(budget * (own - front) * LAYERS)


class Bench:
    """Pools of one model and the queries and keys of one prompt."""

    def __init__(self, groups: int = 1) -> None:
        pool = KVArena(
            num_cells=400 * LAYERS * groups,
            groups=groups,
            size=600,
            page_size=1,
            dtype=torch.float32,
            head_num=KV_HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
            enable_alt_stream=False,
        )
        self.arena = pool.arena
        self.allocator = VirtualSlotAllocator(pool, physical_tokens=400, need_sort=False)
        self.counters = Counters()
        model = Prompt(0, 0, (), LAYERS, HEADS, KV_HEADS, DIM)
        accounting = self.allocator.accounting
        self.compressor = Compressor(model, HeadGather(None, 0, 1), self.counters, accounting)
        torch.manual_seed(1)
        self.queries = torch.randn(LAYERS, LENGTH, HEADS, DIM) * 2
        self.keys, self.values = torch.randn(2, LAYERS, LENGTH, KV_HEADS, DIM)

    def job(self, policy: str, budget: float = 0.25, min_tokens: int = 8) -> CompressionJob:
        return CompressionJob(Asked(Choice(resolve(policy), KVBudget(fraction=budget)), VISION, LENGTH, min_tokens))

    def prefill(
        self, job: CompressionJob, chunks: list[int], row: torch.Tensor | None = None, *, finish: bool = True
    ) -> torch.Tensor:
        """Compute the prompt from where `row` ends, in chunks of these sizes; the request's row."""
        row = torch.zeros(0, dtype=torch.int64) if row is None else row
        for count in chunks:
            begin = row.numel()
            slots = self.allocator.alloc(count)
            assert slots is not None
            cells = self.arena.write_cells(slots)
            self.compressor.begin_chunk(job, begin, begin + count)
            for layer in range(LAYERS):
                part = slice(begin, begin + count)
                planes = self.arena.planes_of(layer)
                self.arena.write(cells[planes], self.keys[layer, part], self.values[layer, part])
                if job.progress.scoring is not None and job.progress.scoring.rows_in(begin, begin + count):
                    prefix, valid = self.prefix(layer, row) if begin else (None, None)
                    self.compressor.observe(
                        job, layer, begin, self.queries[layer, part], self.keys[layer, part], prefix, valid, SCALE
                    )
            row = torch.cat([row, slots])
        if row.numel() >= job.asked.length and finish:
            self.compressor.finish(job, row.int())
        return row

    def prefix(self, layer: int, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the provider for a CPU hands it over."""
        cells = collect(self.arena.residency, row)
        return prefix_keys_values(Gather(self.arena.cells, self.arena.cells.dtype), cells, self.arena.planes_of(layer))

    def resident(self, layer: int, row: torch.Tensor) -> torch.Tensor:
        cells = self.arena.residency.cells_of(self.arena.planes_of(layer), row)[0].long()
        return self.arena.cells[cells[cells >= 0]].clone()

    def kept(self, row: torch.Tensor) -> torch.Tensor:
        """`[planes, tokens]` bool."""
        return self.arena.residency.table[:, row] >= 0


@pytest.mark.parametrize(
    "policy", ["vlcache", "vlcache:paper", "scorer=vlcache,allocator=uniform", "h2o", "snapkv", "knorm"]
)
@pytest.mark.parametrize("chunks", [[50, 46], [30, 30, 30, 6], [95, 1]], ids=str)
def test_chunks_do_not_change_the_decision(policy: str, chunks: list[int]) -> None:
    whole, parts = Bench(), Bench()
    one = whole.kept(whole.prefill(whole.job(policy), [LENGTH]))
    many = parts.kept(parts.prefill(parts.job(policy), chunks))
    assert parts.counters.policy_failures == 0
    assert 0 < int(one.sum()) < one.numel()
    assert torch.equal(one, many)


def test_budget_is_exact_and_memory_comes_back() -> None:
    bench = Bench()
    job = bench.job("vlcache", budget=0.25)
    row = bench.prefill(job, [60, 36])
    target = kept_of(0.25)
    assert bench.arena.residency.used_cells == target == int(bench.kept(row).sum())
    assert job.report.fields["kept_tokens_per_layer"] == bench.kept(row).sum(1).tolist()
    assert bench.counters.cells_kept == target
    assert bench.counters.cells_seen == LENGTH * LAYERS
    assert bench.allocator.verify_byte_accounting() == []
    bench.allocator.free(row)
    assert bench.arena.residency.used_cells == 0
    assert bench.allocator.available_size() == 600


def test_what_survives_is_what_was_written() -> None:
    bench = Bench()
    row = bench.prefill(bench.job("vlcache"), [40, 56])
    for layer in range(LAYERS):
        kept = bench.kept(row)[layer]
        both = bench.resident(layer, row)
        assert torch.equal(both[:, 0], bench.keys[layer, kept])
        assert torch.equal(both[:, 1], bench.values[layer, kept])


def test_a_shared_prefix_is_not_touched() -> None:
    """The first 30 tokens belong to the tree; only the rest is scored and evicted, with them in the normaliser."""
    bench = Bench()
    prefix = bench.prefill(bench.job("vlcache", min_tokens=1000), [30])
    job = bench.job("vlcache")
    row = bench.prefill(job, [40, 26], row=prefix)
    kept = bench.kept(row)
    assert bool(kept[:, :30].all())
    assert int(kept[:, 30:].sum()) == round(0.25 * (LENGTH - 30) * LAYERS)
    assert job.report.fields["shared_tokens"] == 30


@pytest.mark.parametrize("chunks", [[46], [20, 26], [1, 40, 5]], ids=str)
def test_heads_may_have_kept_different_parts_of_a_shared_prefix(chunks: list[int]) -> None:
    """Every KV head normalises over what it kept itself, and the owned part begins where its own prefix ends."""
    bench = Bench(groups=KV_HEADS)
    shared = bench.prefill(bench.job("vlcache:heads=split"), [LENGTH])[:50]
    there = bench.kept(shared).view(LAYERS, KV_HEADS, 50)
    assert bool((there.sum(-1).amin(1) < there.sum(-1).amax(1)).any()), "ragged, or there is nothing to see"
    job = bench.job("vlcache:paper")
    bench.prefill(job, chunks, row=shared, finish=False)
    assert job.progress.scoring is not None
    views, _ = job.progress.scoring.views(lambda layer: torch.empty(0))
    for layer, view in enumerate(views):
        assert view.row_positions is not None
        q = bench.queries[layer, view.row_positions].double()
        k = bench.keys[layer].double().repeat_interleave(HEADS // KV_HEADS, 1)
        logits = torch.einsum("rhd,nhd->hrn", q, k) * SCALE
        visible = torch.arange(LENGTH) <= view.row_positions[:, None]
        visible = visible.expand(HEADS, -1, -1).clone()
        visible[..., :50] &= there[layer].repeat_interleave(HEADS // KV_HEADS, 0)[:, None]
        p = logits.masked_fill(~visible, -torch.inf).softmax(-1)[..., 50:]
        want = p.sum(1).view(KV_HEADS, -1, LENGTH - 50).mean(1)
        torch.testing.assert_close(view.column_sum, want.float(), atol=1e-5, rtol=1e-4)


def test_short_own_parts_are_left_alone() -> None:
    """And the report says what they were served."""
    bench = Bench()
    prefix = bench.prefill(bench.job("vlcache"), [LENGTH])[:90]
    there = bench.kept(prefix)
    job = bench.job("vlcache", min_tokens=8)
    assert bool(bench.kept(bench.prefill(job, [6], row=prefix))[:, 90:].all())
    bench.compressor.report_shared(job)
    assert job.report.fields == {
        "policy": "vlcache",
        "budget": "0.25",
        "skipped": "short",
        "prompt_tokens": LENGTH,
        "shared_tokens": 90,
        "shared_kept_per_layer": [round(share, 4) for share in there.float().mean(1).tolist()],
    }
    assert not job.holds_back(3)


@pytest.mark.parametrize("groups", [1, KV_HEADS])
@pytest.mark.parametrize("chunks", [[LENGTH], [2, 94], [4, 92], [30, 66]], ids=str)
@pytest.mark.parametrize("policy", ["vlcache", "h2o", "streaming", "compactor"])
def test_what_lies_in_front_of_the_first_image_stays(policy: str, chunks: list[int], groups: int) -> None:
    bench = Bench(groups)
    job = bench.job(policy, budget=0.1)
    kept = bench.kept(bench.prefill(job, chunks)).view(LAYERS, groups, LENGTH)
    assert bench.counters.policy_failures == (policy == "compactor")  # needs a rotary embedding: not here
    assert bool(kept[..., :FRONT].all())
    if policy != "compactor":
        assert int(kept.sum()) == kept_of(0.1) * groups == bench.counters.cells_kept
        assert job.report.fields["front_tokens"] == FRONT
        assert sum(job.report.fields["kept_tokens_per_layer"]) == kept_of(0.1)


def test_the_front_only_enters_the_normaliser() -> None:
    """Statistics of rows do not depend on whether the prefix cache or the request itself has brought the front."""
    own, hit = Bench(), Bench()
    one = own.job("h2o")
    own.prefill(one, [50, 46], finish=False)
    front = hit.prefill(hit.job("h2o", min_tokens=1000), [FRONT])
    other = hit.job("h2o")
    hit.prefill(other, [46, 46], row=front, finish=False)
    assert one.progress.scoring is not None
    assert other.progress.scoring is not None
    for mine, theirs in zip(
        *(s.views(lambda layer: torch.empty(0))[0] for s in (one.progress.scoring, other.progress.scoring)), strict=True
    ):
        torch.testing.assert_close(mine.column_sum, theirs.column_sum)


def test_a_retracted_request_reports_and_counts_what_was_done() -> None:
    """Retracted while it decodes, it finds its own prompt and computes no row of it."""
    bench = Bench()
    job = bench.job("vlcache")
    row = bench.prefill(job, [50, 46])
    done, counted = dict(job.report.fields), bench.counters.as_dict()
    for begin in (LENGTH - 1, LENGTH):
        job.restart()
        bench.compressor.begin_chunk(job, begin, LENGTH + 3)
        bench.compressor.finish(job, row.int())
        bench.compressor.report_shared(job)
        assert job.report.fields == done
    # Its prompt is gone from the tree: prefilled and compressed once more, counted once.
    bench.allocator.free(row)
    bench.prefill(job, [LENGTH])
    assert job.report.fields == done
    times = ("scoring_ms", "selection_ms", "prefill_ms")
    assert {k: v for k, v in bench.counters.as_dict().items() if k not in times} == {
        k: v for k, v in counted.items() if k not in times
    }


def test_retraction_starts_over() -> None:
    """Cut off in the middle, prefilled anew with another chunking: the same decision as without."""
    bench, calm = Bench(), Bench()
    job = bench.job("vlcache")
    cut = bench.prefill(job, [70])
    assert job.holds_back(70)
    bench.allocator.free(cut)
    again = bench.kept(bench.prefill(job, [50, 46]))
    assert torch.equal(again, calm.kept(calm.prefill(calm.job("vlcache"), [LENGTH])))
    # Once more after it was decided, as when a running request is retracted.
    bench.allocator.clear()
    assert torch.equal(bench.kept(bench.prefill(job, [LENGTH])), again)


@pytest.mark.parametrize("allocator", ["model", "vlcache"])
def test_heads_may_keep_different_tokens(allocator: str) -> None:
    """Equally many where the allocator divides between layers, each as many as it wins where it ranks heads."""
    bench = Bench(groups=KV_HEADS)
    policy = {"model": "vlcache:heads=split", "vlcache": "scorer=vlcache,allocator=vlcache,heads=split"}[allocator]
    job = bench.job(policy)
    kept = bench.kept(bench.prefill(job, [LENGTH])).view(LAYERS, KV_HEADS, LENGTH)
    counts = kept.sum(-1)
    assert torch.equal(counts[:, 0], counts[:, 1]) == (allocator == "vlcache")
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert int(counts.sum()) == kept_of(0.25) * KV_HEADS == bench.arena.residency.used_cells
    assert job.report.fields["kept_tokens_per_layer"] == counts.float().mean(1).tolist()
    assert bench.allocator.verify_byte_accounting() == []


@pytest.mark.parametrize("broken", ["raises", "nan", "shape", "needs"])
def test_a_broken_policy_costs_the_compression_only(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    job = bench.job("vlcache")

    class Broken:
        query_aware = False
        needs = job.asked.choice.policy.scorer.needs

        def score(self, layer: Any, prompt: Prompt) -> torch.Tensor:
            if broken == "raises":
                raise RuntimeError("no")
            wrong = torch.zeros(KV_HEADS, prompt.owned + (broken == "shape"))
            return wrong / 0 * 0 if broken == "nan" else wrong

    if broken == "needs":
        Broken.needs = property(lambda self: 1 / 0)  # type: ignore[assignment]
    policy = job.asked.choice.policy
    object.__setattr__(policy, "scorer", Broken())
    row = bench.prefill(job, [50, 46])
    assert bool(bench.kept(row).all())
    assert bench.counters.policy_failures == 1
    assert bench.counters.requests_compressed == 0
    assert "failed" in job.report.fields
    assert not job.holds_back(50)
    assert len([record for record in caplog.records if "full cache" in record.message]) == 1


class Ranks:
    """A collective of two threads, each with half of the KV heads."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor | None] = [None, None]
        self._meet = threading.Barrier(2, timeout=60)

    def of(self, rank: int) -> SimpleNamespace:
        def all_gather(part: torch.Tensor, dim: int) -> torch.Tensor:
            self._parts[rank] = part
            self._meet.wait()
            assert self._parts[0] is not None
            assert self._parts[1] is not None
            both = torch.cat([self._parts[0], self._parts[1]], dim=dim)
            self._meet.wait()
            return both

        return SimpleNamespace(all_gather=all_gather)

    def run(self, policy: str, broken: str | None) -> list[tuple[Bench, CompressionJob, torch.Tensor]]:
        """Both ranks prefill the same prompt; on rank 1 `broken` fails."""

        benches = [Bench(), Bench()]  # one after the other: both seed the same generator

        def rank(number: int) -> tuple[Bench, CompressionJob, torch.Tensor]:
            bench = benches[number]
            model = Prompt(0, 0, (), LAYERS, 2 * HEADS, 2 * KV_HEADS, DIM)
            heads = HeadGather(self.of(number), number, 2)
            accounting = bench.allocator.accounting
            bench.compressor = Compressor(model, heads, bench.counters, accounting)
            bench.queries, bench.keys = bench.queries * (1 + number), bench.keys.roll(number, 0)
            job = bench.job(policy)
            bench.compressor.begin_chunk(job, 0, 0)
            if number == 1 and broken is not None:
                assert job.progress.scoring is not None
                object.__setattr__(job.progress.scoring, broken, lambda *_: 1 / 0)
            return bench, job, bench.kept(bench.prefill(job, [50, 46]))

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))


@pytest.mark.parametrize("policy", ["vlcache", "snapkv", "scorer=vlcache,allocator=cake"])
def test_two_ranks_keep_the_same_tokens(policy: str) -> None:
    (one, _, kept), (other, _, same) = Ranks().run(policy, None)
    assert one.counters.requests_compressed == other.counters.requests_compressed == 1
    assert torch.equal(kept, same)
    assert not bool(kept.all())


@pytest.mark.parametrize("broken", ["observe", "views"])
@pytest.mark.parametrize("policy", ["vlcache", "snapkv", "scorer=vlcache,allocator=cake", "zipvl"])
def test_a_failure_on_one_rank_costs_both_the_compression(policy: str, broken: str) -> None:
    """And neither waits for the other for ever."""
    for bench, job, kept in Ranks().run(policy, broken):
        assert bool(kept.all())
        assert bench.counters.policy_failures == 1
        assert "failed" in job.report.fields


@pytest.mark.parametrize("groups", [1, KV_HEADS])
def test_modalities_are_counted_per_layer(groups: int) -> None:
    """Against the residency table; cells, so per KV head where heads have their own."""
    bench = Bench(groups)
    policy = "vlcache:heads=split" if groups > 1 else "vlcache"
    kept = sum(bench.kept(bench.prefill(bench.job(policy), [LENGTH]))[:, 4:80].sum(1) for _ in range(2))
    counters = bench.counters
    assert counters.vision_seen_by_layer == [2 * 76 * groups] * LAYERS
    assert counters.vision_kept_by_layer == torch.as_tensor(kept).view(LAYERS, groups).sum(1).tolist()
    assert list(counters.ratios) == [kept_of(0.25) / (LENGTH * LAYERS)] * 2
    assert bench.compressor.all_counted


def test_a_prefix_hit_is_one_that_reaches_a_picture() -> None:
    bench = Bench()
    text = bench.prefill(bench.job("vlcache", min_tokens=1000), [4])
    assert bench.counters.prefix_hits == 0
    row = bench.prefill(bench.job("vlcache"), [60, 32], row=text)  # only the template: no hit
    assert bench.counters.prefix_hits == 0
    bench.prefill(bench.job("vlcache"), [6], row=row[:90])
    assert (bench.counters.prefix_hits, bench.counters.prefix_hit_tokens) == (1, 90)


def test_reported_positions_are_what_resides() -> None:
    bench = Bench()
    job = bench.job("vlcache")
    row = bench.prefill(job, [50, 46])
    bench.compressor.report_positions(job, row.int())
    positions = job.report.fields["kept_positions"]
    assert positions == [layer.nonzero().flatten().tolist() for layer in bench.kept(row)]
    assert [len(layer) for layer in positions] == job.report.fields["kept_tokens_per_layer"]
