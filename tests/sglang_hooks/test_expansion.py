"""A question trips, the picture is computed anew, the copy is replaced: the real tree, allocator and admission."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scheduler_world import World
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_context

from vlcache_sgl.api import Span
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.compression.sharing.images import SharedImage
from vlcache_sgl.sglang_hooks.jobs import job_of

SYSTEM = (1, 2, 3)
PICTURE = tuple(range(100, 120))
SPAN = Span(3, 23)


@pytest.fixture(autouse=True, scope="module")
def sglang_settings() -> Iterator[None]:
    with get_context().override_server_args(device="cpu"):
        yield


class Album(World):
    """A world in which everybody asks about one picture."""

    def ask(self, number: int, *, trips: bool = False, trips_late: bool = False, tokens: int = 1) -> Req:
        """Queue question `number` and let one batch start."""
        self.trip_share, self.late_trip_share = float(trips), float(trips_late)
        req = self.submit((*SYSTEM, *PICTURE, 10, number, 9), tokens=tokens, picture=SPAN)
        assert req is not None
        self.prefill()
        self.trip_share = self.late_trip_share = 0.0
        self.check()
        return req

    @property
    def image(self) -> SharedImage:
        (image,) = self.images
        return image

    def visible(self, req: Req) -> torch.Tensor:
        """`[planes, picture]` bool: what a running request has of the picture."""
        row = self.rows.req_to_token[req.kv.req_pool_idx, SPAN.begin : SPAN.end].long()
        return self.arena.residency.table[:, row] >= 0


def job(req: Req) -> CompressionJob:
    found = job_of(req)
    assert found is not None
    return found


def test_a_copy_is_replaced_while_it_is_read() -> None:
    world = Album(physical=144, chunk=64)
    world.ask(1)
    reader = world.ask(2, tokens=30)
    before = world.visible(reader)
    assert reader.cached_tokens_seen >= SPAN.end
    assert 0 < int(before.sum()) < before.numel()
    tripper = world.ask(3, trips=True, tokens=30)
    assert tripper.retraction_count == 1
    assert not tripper.output_ids, "nothing of the deficient answer is published"
    world.prefill()
    assert world.image.generation == 1
    assert (job(tripper).sharing.generation, job(reader).sharing.generation) == (1, 0)
    assert torch.equal(world.visible(reader), before), "a reader keeps its copy to the end"
    assert world.visible(tripper).data_ptr() != before.data_ptr()
    late = world.ask(4, tokens=2)
    assert job(late).sharing.generation == 1
    assert late.cached_tokens_seen >= SPAN.end, "the new copy serves those who come later"
    assert len(world.image.stale) == 1
    world.finish(reader)
    world.prefill()
    world.check()
    assert world.image.stale == [], "the old copy's cells are free once nobody reads it"
    world.run_dry()
    held = world.arena.residency.used_cells
    world.flush()
    assert held > 0
    assert world.arena.residency.used_cells == 0


def test_many_questions_at_once_cause_one_recompute() -> None:
    world = Album(physical=200, chunk=200)
    world.ask(1)
    world.trip_share = 1.0
    storm = [world.submit((*SYSTEM, *PICTURE, 10, n, 9), tokens=4, picture=SPAN) for n in range(2, 8)]
    world.prefill()
    world.trip_share = 0.0
    assert all(req is not None and req.retraction_count == 1 for req in storm)
    world.prefill()
    started = [req for req in storm if req is not None and req.output_ids]
    assert started == [world.batch.reqs[0]], "one makes the copy, the others wait for it"
    world.run_dry()
    world.check()
    assert world.expansions._counters.expansions == 1
    assert world.image.generation == 1
    assert world.image.settled, "six different questions missed something: the picture is kept whole"
    assert all(req is not None and job(req).sharing.generation == 1 for req in storm)


def test_others_wait_no_longer_when_the_maker_of_the_copy_is_gone() -> None:
    world = Album(physical=144, chunk=64)
    world.ask(1)
    world.trip_share = 1.0
    first, second = (world.submit((*SYSTEM, *PICTURE, 10, n, 9), tokens=2, picture=SPAN) for n in (2, 3))
    world.prefill()
    world.trip_share = 0.0
    assert first is not None
    assert second is not None
    world.expansions.before_next_batch(world.batch, None)
    assert world.image.leader is first
    assert world.expansions.held() == [second]
    world.abort(first)
    world.run_dry()
    assert world.image.leader is None
    assert len(second.output_ids) == 2
    assert world.image.generation == 0, "the second question made do with what there is"


def test_a_picture_that_trips_again_and_again_settles() -> None:
    world = Album(physical=144, chunk=64)
    world.ask(1)
    for number in range(2, 8):
        world.ask(number, trips=True)
        world.run_dry()
        world.check()
    assert world.image.settled
    assert world.image.generation >= 3
    world.prefill()
    assert world.image.stale == []


@pytest.mark.parametrize("heard", [False, True])
def test_an_answer_that_misses_much_goes_on_with_the_whole_picture(heard: bool) -> None:
    world = Album(physical=144, chunk=64)
    world.ask(1)
    req = world.ask(2, trips_late=True, tokens=8)
    req.send_token_offset = int(heard)
    for answered in (2, 3):
        assert not world.prefill()
        assert req.retraction_count == 0, "not both steps have been read"
        world.decode()
        assert len(req.output_ids) == answered
    world.prefill()
    assert req.retraction_count == 1
    assert len(req.output_ids) == (3 if heard else 0), "what was said stays if somebody heard it"
    assert world.batch.reqs == []
    world.prefill()
    assert world.image.settled, "what it looks up just in time no copy could have kept for it"
    assert (job(req).sharing.generation, job(req).sharing.missed_in) == (1, "decode")
    assert len(req.output_ids) == (4 if heard else 1)
    world.run_dry()
    world.check()
    assert len(req.output_ids) == 8
    assert world.expansions._counters.guard_trips_in_decode == 1


def test_a_retracted_reader_looks_for_the_present_copy() -> None:
    world = Album(physical=144, chunk=64)
    world.ask(1)
    reader = world.ask(2, tokens=30)
    world.ask(3, trips=True, tokens=2)
    world.prefill()
    world.retract(reader)
    assert job(reader).sharing.generation == 1
    world.prefill()
    assert job(reader).report.fields["start"] >= SPAN.end
    world.run_dry()
    world.check()


def test_a_flush_forgets_pictures() -> None:
    world = Album()
    world.ask(1)
    world.run_dry()
    assert len(world.images) == 1
    world.flush()
    assert len(world.images) == 0
