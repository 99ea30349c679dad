"""An internal request reads a prompt a second time: what it counts, what it publishes, who waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scheduler_world import World
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs, Req
from sglang.srt.runtime_context import get_context

from vlcache_sgl.api import Prompt, Span
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.job import CompressionJob, ReadingState
from vlcache_sgl.config import KVBudget
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.policy import resolve
from vlcache_sgl.policy.choice import Choice
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.scoring import Scoring
from vlcache_sgl.scoring.tensor_parallel import HeadGather
from vlcache_sgl.sglang_hooks.admission import retract_parked
from vlcache_sgl.sglang_hooks.jobs import job_of
from vlcache_sgl.sglang_hooks.second_reading import (
    MAX_TRIES,
    clients_of,
    is_reader,
    repeat_media,
    repeat_positions,
)

SYSTEM = (1, 2, 3)
PICTURE = tuple(range(100, 120))
SPAN = Span(3, 23)


@pytest.fixture(autouse=True, scope="module")
def sglang_settings() -> Iterator[None]:
    with get_context().override_server_args(device="cpu"):
        yield


# -- what is counted --------------------------------------------------------------------------------------------------

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
PREFIX, START, REPEATED = 40, 8, 30


def reference(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[K, owned]` float64: the largest probability that any row behind the prompt gives to each of its own tokens.

    Args:
        queries, keys: `[T, H, D]` and `[T, K, D]` of both readings.
    """
    shared = HEADS // KV_HEADS
    q, k = queries.double().transpose(0, 1), keys.double().transpose(0, 1).repeat_interleave(shared, 0)
    logits = q @ k.transpose(1, 2) * DIM**-0.5
    future = torch.ones(logits.shape[-2:]).triu(1).bool()
    probabilities = logits.masked_fill(future, -torch.inf).softmax(-1)
    return probabilities[:, PREFIX:, START:PREFIX].amax(1).view(KV_HEADS, shared, -1).amax(1)


@pytest.mark.parametrize("chunks", [[62], [20, 30, 12], [32, 30], [50, 1, 11]], ids=str)
def test_the_largest_attention_is_that_of_a_float64_reference(chunks: list[int]) -> None:
    """Chunks may end anywhere: in the prompt, at its end, in the second reading."""
    torch.manual_seed(0)
    total = PREFIX + REPEATED
    assert sum(chunks) == total - START
    queries, keys = torch.randn(LAYERS, total, HEADS, DIM) * 2, torch.randn(LAYERS, total, KV_HEADS, DIM)
    prompt = Prompt(PREFIX, START, (Span(10, 40),), LAYERS, HEADS, KV_HEADS, DIM, repeated=REPEATED)
    scoring = Scoring(prompt, resolve("kvzip").needs)
    begin = START
    for count in chunks:
        if scoring.rows_in(begin, begin + count):
            for layer in range(LAYERS):
                part = slice(begin, begin + count)
                own, prefix = keys[layer, START : begin + count], keys[layer, :START]
                scoring.observe(layer, begin, queries[layer, part], own, prefix, None, DIM**-0.5)
        begin += count
    views, _ = scoring.views(lambda layer: pytest.fail("keys were not asked for"))
    for layer, view in enumerate(views):
        assert view.column_max is not None
        assert view.column_max.shape == (KV_HEADS, PREFIX - START)
        expected = reference(queries[layer], keys[layer])
        torch.testing.assert_close(view.column_max.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_prompt_that_is_not_read_twice_is_left_alone() -> None:
    """A question over a compressed prefix, however long; and one whose prefix could not be read."""
    model = Prompt(0, 0, (), LAYERS, HEADS, KV_HEADS, DIM)
    counters = Counters()
    arena = Arena(
        num_cells=1,
        num_slots=1,
        num_layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        groups=1,
        dtype=torch.float32,
        device="cpu",
    )
    compressor = Compressor(model, HeadGather(None, 0, 1), counters, CellAccounting(arena, 1))
    choice = Choice(resolve("kvzip"), KVBudget(fraction=0.2))
    job = CompressionJob(Asked(choice, (), 200, 16), ReadingState())
    compressor.begin_chunk(job, 100, 200)
    assert job.progress.done
    assert job.progress.scoring is None
    assert job.report.fields["skipped"] == "second_reading"
    told = {"policy": "kvzip", "skipped": "second_reading", "second_reading": {"failed": "too long"}}
    job = CompressionJob(Asked(choice, (), 200, 16), ReadingState(report=told))
    compressor.begin_chunk(job, 0, 200)
    assert job.progress.done
    assert job.report.fields == told
    assert counters.requests_skipped == {"second_reading": 2}
    assert counters.policy_failures == 0


# -- what is fed ------------------------------------------------------------------------------------------------------


def image(begin: int, tokens: int) -> MultimodalDataItem:
    return MultimodalDataItem(
        modality=Modality.IMAGE, hash=7, offsets=[(begin, begin + tokens - 1)], feature=torch.ones(4)
    )


def test_positions_go_on_behind_the_first_reading() -> None:
    """Two words, an image of 2 x 3 tokens, a word: M-RoPE as Qwen2.5-VL counts."""
    positions = torch.tensor([[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]])
    both = repeat_positions(positions, Span(1, 8), between=2)
    assert both[:, :8].tolist() == positions[:, :8].tolist()
    assert both[:, 8:10].tolist() == [[5, 6]] * 3
    assert both[:, 10:].tolist() == [[7, 8, 8, 8, 8, 8, 8], [7, 8, 8, 8, 9, 9, 9], [7, 8, 9, 10, 8, 9, 10]]


def test_images_are_embedded_a_second_time_and_released_alone() -> None:
    first, second, behind = image(2, 6), image(9, 4), image(30, 4)
    media = MultimodalInputs(mm_items=[first, second, behind], mrope_positions=torch.arange(40).expand(3, -1))
    twice = repeat_media(media, Span(8, 13), between=5)
    assert [item.offsets for item in twice.mm_items] == [[(2, 7)], [(9, 12)], [(19, 22)]]
    assert [item.hash for item in twice.mm_items] == [7] * 3
    assert twice.mrope_positions.shape == (3, 13 + 5 + 5)
    assert int(twice.mrope_position_delta) == int(twice.mrope_positions.max()) + 1 - 23
    twice.release_features()
    assert all(item.feature is not None for item in media.mm_items)
    assert media.mrope_positions.shape == (3, 40)


# -- who waits for whom -----------------------------------------------------------------------------------------------


class Readers(World):
    """A world whose policy reads twice; everybody asks about one picture."""

    def ask(self, number: int, *, tokens: int = 1) -> Req:
        req = self.submit((*SYSTEM, *PICTURE, 10, number, 9), tokens=tokens, image=SPAN, twice=True)
        assert req is not None
        return req

    @property
    def reader(self) -> Any:
        (reader,) = {id(req): req for req in (*self.waiting, *self.owners()) if is_reader(req)}.values()
        return reader


def state(req: Req) -> ReadingState:
    job = job_of(req)
    assert job is not None
    assert job.reading is not None
    return job.reading


def test_many_questions_at_once_wait_for_one_reader() -> None:
    world = Readers(physical=144, chunk=144)
    asked = [world.ask(number, tokens=4) for number in range(6)]
    world.prefill()
    assert [req for req in asked if req.output_ids] == []
    assert world.served == 1, "the reader has ended, and nobody else has started"
    assert world.readings._made == 1
    assert world.arena.residency.used_cells == world.allocator.accounting.tree_cells, (
        "nothing of the second reading is left"
    )
    assert world.tree.evictable_size() == SPAN.end
    world.check()
    world.prefill()
    assert all(req.cached_tokens_seen == SPAN.end for req in asked)
    world.run_dry()
    late = world.ask(9)
    world.run_dry()
    assert world.readings._made == 1
    assert late.cached_tokens_seen >= SPAN.end
    world.check()
    world.flush()
    assert world.arena.residency.used_cells == 0


def test_a_prefix_that_the_tree_dropped_is_read_again() -> None:
    world = Readers(physical=144, chunk=64)
    world.ask(1)
    world.run_dry()
    world.flush()
    again = world.ask(2)
    world.run_dry()
    assert world.readings._made == 2
    assert again.cached_tokens_seen == SPAN.end


def test_a_reader_that_is_gone_leaves_its_questions_whole() -> None:
    world = Readers(physical=144, chunk=16)
    first, second = world.ask(1, tokens=3), world.ask(2, tokens=3)
    world.prefill()
    assert world.chunked_req is world.reader
    world.abort(world.reader)
    world.run_dry()
    world.check()
    for req in (first, second):
        assert len(req.output_ids) == 3
        assert state(req).report["second_reading"]["failed"] == "it was aborted"
    later = world.ask(3)
    world.run_dry()
    assert not state(later).given_up, "whole and compressed copies do not meet"
    assert world.readings._made == 2


def test_a_question_that_is_gone_costs_nobody_anything() -> None:
    world = Readers(physical=144, chunk=16)
    gone, other = world.ask(1), world.ask(2, tokens=3)
    world.prefill()
    world.abort(gone)
    world.run_dry()
    assert len(other.output_ids) == 3
    assert other.cached_tokens_seen == SPAN.end
    world.check()
    world.flush()
    assert world.arena.residency.used_cells == 0


def test_a_reader_starts_over_when_memory_runs_out() -> None:
    world = Readers(physical=144, chunk=16)
    req = world.ask(1)
    world.prefill()
    reader = world.reader
    retract_parked(world, reader, [])
    assert world.reader is reader
    world.check()
    world.run_dry()
    assert world.readings._made == 1
    assert req.cached_tokens_seen == SPAN.end


def test_a_reader_that_does_not_fit_is_not_started() -> None:
    world = Readers(physical=45, chunk=45)
    req = world.ask(1)
    world.run_dry()
    assert "more than fit" in state(req).report["second_reading"]["failed"]
    assert len(req.output_ids) == 1
    world.check()


def test_a_retracted_question_has_its_prefix_read_again_a_few_times_only() -> None:
    world = Readers(physical=144, chunk=64)
    req = world.ask(1, tokens=20)
    for _ in range(MAX_TRIES):
        while req not in world.batch.reqs:
            world.prefill()
        assert not state(req).given_up
        world.retract(req)
        world.flush()
    while req not in world.batch.reqs:
        world.prefill()
    assert world.readings._made == MAX_TRIES
    assert state(req).given_up
    world.check()


def test_nobody_hears_of_a_reader() -> None:
    world = Readers(physical=144, chunk=16)
    req = world.ask(1)
    world.prefill()
    assert clients_of([req, world.reader]) == [req]
