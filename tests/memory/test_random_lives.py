"""Random sequences of everything a scheduler does, checked after every step against what must hold."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_world import SLOTS, World
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.runtime_context import get_context

from vlcache_sgl.api import Span
from vlcache_sgl.sglang_hooks.jobs import job_of

SYSTEM = (1, 2, 3)
IMAGES = tuple(tuple(range(100 * k, 100 * k + 6 + 7 * k)) for k in range(1, 6))


@pytest.fixture(autouse=True, scope="module")
def sglang_settings() -> Iterator[None]:
    with get_context().override_server_args(device="cpu"):
        yield


class CapacityMachine(RuleBasedStateMachine):
    """Random lives; the columns of tokens that the tree owns never change while it owns them."""

    @initialize(
        seed=st.integers(0, 2**16),
        physical=st.sampled_from([64, 96, 144]),
        chunk=st.sampled_from([8, 24, 64]),
        eviction_policy=st.sampled_from(["slru", "lru"]),
        expected=st.sampled_from([0.0, 0.3, 1.0]),
        host=st.sampled_from([(0, 0), (60, 0), (400, 0), (60, 3), (400, 8)]),
    )
    def begin(
        self, seed: int, physical: int, chunk: int, eviction_policy: str, expected: float, host: tuple[int, int]
    ) -> None:
        """`expected`: share of an answer's limit that admission reckons with; `host`: tokens of host memory, and how
        many of what is evicted come back in a decode step."""
        self.world = World(physical, chunk, eviction_policy, *host)
        self.world.new_token_ratio_tracker = NewTokenRatioTracker(init=expected, min=0.0, decay=0.01, current=expected)
        self.world.random = random.Random(seed)
        self.world.late_share = 0.5
        self.columns: dict[int, list[int]] = {}
        self.freed: set[int] = set()
        free = self.world.allocator.free

        def spy(slots: torch.Tensor) -> None:
            self.freed.update(slots.tolist())
            free(slots)

        self.world.allocator.free = spy  # type: ignore[method-assign,assignment]
        self.read: dict[tuple[str, int], torch.Tensor] = {}

    @rule(
        image=st.sampled_from(IMAGES),
        tail=st.lists(st.integers(10, 13), max_size=6),
        key=st.sampled_from([None, "tenant"]),
        compress=st.booleans(),
        tokens=st.integers(1, 40),
    )
    def submit(self, image: tuple[int, ...], tail: list[int], key: str | None, compress: bool, tokens: int) -> None:
        self.world.submit((*SYSTEM, *image, *tail, 9), key=key, compress=compress, tokens=tokens)

    @rule(
        image=st.sampled_from(IMAGES),
        tails=st.lists(st.lists(st.integers(10, 13), min_size=1, max_size=6), min_size=1, max_size=4),
        tokens=st.integers(1, 20),
    )
    def ask_about_an_image_that_is_read_twice(
        self, image: tuple[int, ...], tails: list[list[int]], tokens: int
    ) -> None:
        """An internal request goes before them, and may be retracted or aborted like any other."""
        span = Span(len(SYSTEM), len(SYSTEM) + len(image))
        for tail in tails:
            self.world.submit((*SYSTEM, *image, *tail, 9), tokens=tokens, image=span, twice=True)

    @precondition(lambda self: self.world.host is not None)
    @rule(
        images=st.lists(st.sampled_from(IMAGES), min_size=1, max_size=5),
        tails=st.lists(st.lists(st.integers(10, 13), min_size=1, max_size=6), min_size=1, max_size=4),
        key=st.sampled_from([None, "tenant"]),
        tokens=st.integers(1, 20),
    )
    def ask_about_images_in_host_memory(
        self, images: list[tuple[int, ...]], tails: list[list[int]], key: str | None, tokens: int
    ) -> None:
        """Prompts up to twice the arena, each with a selection of its own."""
        for tail in tails:
            ids = (*SYSTEM, *(token for image in images for token in image), *tail, 9)
            self.world.submit(ids, key=key, tokens=tokens, exact=True)

    @rule(number=st.integers(0, 2**16), count=st.integers(3, 8))
    def submit_burst(self, number: int, count: int) -> None:
        """Long answers: they outgrow what admission expects of them."""
        draw = random.Random(number)
        for _ in range(count if len(self.world.waiting) < 40 else 0):
            tail = draw.choices(range(10, 14), k=3)
            self.world.submit((*SYSTEM, *draw.choice(IMAGES), *tail, 9), tokens=draw.choice([1, 10, 40]))

    @rule(images=st.lists(st.sampled_from(IMAGES), min_size=2, max_size=4))
    def submit_large(self, images: list[tuple[int, ...]]) -> None:
        """Several chunks; now and then more than the arena holds."""
        ids = (*SYSTEM, *(token for image in images for token in image), 9)
        req = self.world.submit(ids, tokens=8)
        assert (req is None) == (len(ids) + 2 > self.world.allocator.accounting.physical_tokens)

    @rule()
    def prefill(self) -> None:
        self.world.prefill()

    @rule(steps=st.integers(1, 8))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            if self.world.batch.reqs:
                self.world.decode()

    @rule(images=st.lists(st.sampled_from(IMAGES), min_size=1, max_size=2), steps=st.integers(4, 30))
    def decode_between_chunks(self, images: list[tuple[int, ...]], steps: int) -> None:
        """Others decode, for longer than expected, while a prompt waits for its next chunk."""
        world = self.world
        world.submit((*SYSTEM, *(token for image in images for token in image), 9), tokens=2)
        for _ in range(4):
            if world.chunked_req is None:
                world.prefill()
        for _ in range(steps):
            if world.batch.reqs:
                world.decode()
        world.prefill()

    @rule(steps=st.integers(1, 12))
    def serve(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.evictions)
    @rule()
    def device_catches_up(self) -> None:
        self.world.catch_up()

    @precondition(lambda self: self.world.batch.reqs)
    @rule(number=st.integers(0, 20))
    def finish(self, number: int) -> None:
        """A stop token."""
        self.world.finish(self.world.batch.reqs[number % len(self.world.batch.reqs)])

    @precondition(lambda self: self.world.batch.reqs)
    @rule(number=st.integers(0, 20))
    def retract(self, number: int) -> None:
        self.world.retract(self.world.batch.reqs[number % len(self.world.batch.reqs)])

    @precondition(lambda self: self.world.owners() or self.world.waiting)
    @rule(number=st.integers(0, 40))
    def abort(self, number: int) -> None:
        alive = [*self.world.owners(), *self.world.waiting]
        self.world.abort(alive[number % len(alive)])

    @rule(tokens=st.integers(1, 40))
    def evict(self, tokens: int) -> None:
        self.world.tree.evict(EvictParams(num_tokens=tokens))

    @precondition(lambda self: not self.world.owners() and not self.world.waiting and len(self.columns) > 40)
    @rule()
    def flush(self) -> None:
        self.world.flush()
        self.world.evictions.clear()
        self.columns.clear()
        assert self.world.arena.residency.used_cells == 0

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.check()
        assert world.aborted_for_memory == 0, "the last running request was aborted for want of memory"
        table = world.arena.residency.table
        owned = set(world.allocator.accounting._in_tree.nonzero().flatten().tolist())
        for slot, column in self.columns.items():
            if slot in owned and slot not in self.freed:
                assert table[:, slot].tolist() == column, "a shared token changed"
        self.freed.clear()
        self._readers_lose_nothing()
        self.columns = {slot: table[:, slot].tolist() for slot in owned}

    def _readers_lose_nothing(self) -> None:
        """What a request has found in the prefix tree it keeps to its end, whatever replaces it meanwhile."""
        world = self.world
        before, self.read = self.read, {}
        for req in world.owners():
            job = job_of(req)
            if job is not None and job.host is not None and not job.host.settled:
                continue  # its row names what the tree shares
            row = world.rows.req_to_token[req.kv.req_pool_idx, : req.kv.cache_protected_len].long()
            resident = world.arena.residency.table[:, row] >= 0
            known = before.get((req.rid, req.retraction_count))
            if known is not None:
                assert torch.equal(resident[:, : known.shape[1]], known), "a reader's copy changed"
            self.read[req.rid, req.retraction_count] = resident

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run_dry()
        self.world.check()
        self.world.flush()
        assert self.world.arena.residency.used_cells == 0
        assert self.world.allocator.available_size() == SLOTS
        host = self.world.allocator.accounting.host
        assert host is None or host.used_tokens == 0


SLOW_TO_SET_UP = [HealthCheck.too_slow, HealthCheck.filter_too_much]
CapacityMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=50, deadline=None, suppress_health_check=SLOW_TO_SET_UP
)
TestCapacity = CapacityMachine.TestCase


class ManyLives(CapacityMachine):
    """The same, for longer."""


ManyLives.TestCase.settings = settings(
    max_examples=600, stateful_step_count=80, deadline=None, suppress_health_check=SLOW_TO_SET_UP
)
TestManyLives = pytest.mark.slow(pytest.mark.timeout(1800)(ManyLives.TestCase))
