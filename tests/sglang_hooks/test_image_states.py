"""States of a hybrid behind images: who finds them, what they have seen, and that none is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hybrid_world import STATES_PER_REQUEST, HybridWorld
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.runtime_context import get_context

from vlcache_sgl.api import Span
from vlcache_sgl.config import config_from
from vlcache_sgl.sglang_hooks import image_states
from vlcache_sgl.sglang_hooks.patch_points import runtime_points
from vlcache_sgl.sglang_hooks.patching import Patches
from vlcache_sgl.sglang_hooks.session import Session

GRID = 4
"""Tokens between two places of a chunk where a state can be kept; 64 in SGLang."""
SYSTEM = (1, 2, 3)
IMAGES = tuple(tuple(range(100 * k, 100 * k + 9 + 7 * k)) for k in range(1, 5))
QUESTIONS = ((10, 11, 12, 13, 14, 15, 9), (11, 10, 12, 12, 12, 12, 9), (12, 12, 9))


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    """The patches that concern states, as a server has them."""
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    hooks = (image_states.choose_branching_point, image_states.prepare_state, image_states.clean_up_state)
    patches = Patches([point for point in runtime_points(Session(config)) if point.hook in hooks])
    patches.install()
    yield
    patches.uninstall()


@contextmanager
def settings(*, buffer: bool) -> Iterator[None]:
    """SGLang's, of a server with one of its strategies."""
    flags = {
        "mamba_radix_cache_strategy": "extra_buffer" if buffer else "no_buffer",
        "disable_overlap_schedule": not buffer,
    }
    with get_context().override_server_args(device="cpu", _mamba_cache_chunk_size=GRID, **flags):
        yield


@pytest.fixture(params=[False, True], ids=["no_buffer", "extra_buffer"])
def buffer(request: pytest.FixtureRequest) -> Iterator[bool]:
    with settings(buffer=request.param):
        yield request.param


def ask(world: HybridWorld, image: tuple[int, ...], question: tuple[int, ...], **more: Any) -> int:
    """Serve a question about an image alone; returns the tokens that it found in the prefix cache."""
    span = Span(len(SYSTEM), len(SYSTEM) + len(image))
    req = world.submit((*SYSTEM, *image, *question), image=span, **more)
    assert req is not None
    while world.waiting or world.owners():
        world.step()
        world.check()
    return int(req.cached_tokens_seen)


@pytest.mark.parametrize("chunk", [16, 64], ids=["several chunks", "one chunk"])
@pytest.mark.parametrize("exact", [False, True], ids=["policy", "host memory"])
def test_a_second_question_finds_the_image(buffer: bool, exact: bool, chunk: int) -> None:
    world = HybridWorld(buffer=buffer, physical=144, chunk=chunk, host=400 if exact else 0)
    for image in IMAGES:
        end = len(SYSTEM) + len(image)
        assert ask(world, image, QUESTIONS[0], exact=exact) == 0
        for question in QUESTIONS[1:]:
            found = ask(world, image, question, exact=exact)
            assert found == end if not buffer else end - GRID < found <= end
    world.flush()
    assert world.rows.mamba_allocator.available_size() == world.states


def test_what_is_not_compressed_is_left_to_sglang(buffer: bool) -> None:
    world = HybridWorld(buffer=buffer, physical=144, chunk=64)
    assert ask(world, IMAGES[2], QUESTIONS[0], compress=False) == 0
    found = ask(world, IMAGES[2], QUESTIONS[1], compress=False)
    assert found == 0 if not buffer else found <= len(SYSTEM) + len(IMAGES[2])


@pytest.mark.parametrize("exact", [False, True], ids=["policy", "host memory"])
@pytest.mark.parametrize("states", [2 * STATES_PER_REQUEST, 12 * STATES_PER_REQUEST], ids=["few states", "many"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_random_lives(buffer: bool, exact: bool, states: int, seed: int) -> None:
    """Everything a scheduler does, in any order: every request goes on from the state of its own tokens, and there are
    no states but free ones, those of the tree and those that are held."""
    draw = random.Random(seed)
    world = HybridWorld(
        buffer=buffer, states=states, physical=draw.choice([96, 144]), chunk=draw.choice([8, 24, 64]), host=400 * exact
    )
    world.running = states // STATES_PER_REQUEST
    world.random = random.Random(seed)
    world.late_share = 0.5 if buffer else 0.0
    hits = 0
    for _ in range(150):
        action = draw.random()
        if action < 0.3 and len(world.waiting) < 8:
            image, question = draw.choice(IMAGES), draw.choice(QUESTIONS)
            span = Span(len(SYSTEM), len(SYSTEM) + len(image))
            world.submit(
                (*SYSTEM, *image, *question),
                key=draw.choice([None, "tenant"]),
                compress=draw.random() < 0.8,
                tokens=draw.choice([1, 3, 20]),
                image=span,
                exact=exact and draw.random() < 0.8,
            )
        elif action < 0.36 and world.batch.reqs:
            world.retract(draw.choice(world.batch.reqs))
        elif action < 0.42 and (alive := [*world.owners(), *world.waiting]):
            world.abort(draw.choice(alive))
        elif action < 0.45:
            world.tree.evict(EvictParams(num_tokens=draw.randint(1, 40), mamba_num=draw.randint(0, 2)))
        else:
            world.step()
        world.check()
        hits += sum(req.prefix_len > 0 for req in world.owners())
    world.run_dry()
    world.check()
    assert hits, "nobody found anything: the test tests nothing"
    world.flush()
    assert world.rows.mamba_allocator.available_size() == states
    assert world.arena.residency.used_cells == 0
