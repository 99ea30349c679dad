"""Which prompt starts when, who is pushed out, and what a pool holds: the real parts, in one situation each."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from scheduler_world import PLANES, SLOTS, World
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.runtime_context import get_context, get_parallel
from transformers import PretrainedConfig

from vlcache_sgl.capacity import KVShape, Pool, requests_in_flight
from vlcache_sgl.config import config_from
from vlcache_sgl.sglang_hooks.pools import Pools


@pytest.fixture(autouse=True, scope="module")
def sglang_settings() -> Iterator[None]:
    with get_context().override_server_args(device="cpu"):
        yield


def large(count: int, first: int = 1000) -> tuple[int, ...]:
    """A prompt of so many tokens that shares nothing."""
    return tuple(range(first, first + count))


def test_memory_that_compression_gives_back_admits_the_next_prompt() -> None:
    """SGLang would wait until a request leaves; nobody leaves here."""
    world = World(physical=64, chunk=64)
    for number in range(6):
        world.submit(large(36, 1000 * number), tokens=8)
    running = []
    for _ in range(6):
        world.prefill()
        running.append(len(world.batch.reqs))
    assert running[-1] >= 3, running
    world.check()
    world.run_dry()
    assert world.served == 6


def test_parked_prompt_gives_way_before_the_last_running_request() -> None:
    world = World(physical=64, chunk=32)
    old = world.submit(large(20), compress=False, tokens=40)
    assert world.prefill()
    world.new_token_ratio_tracker.current = world.new_token_ratio_tracker.min = 0.0
    late = world.submit(large(40, 2000), compress=False, tokens=2)
    assert world.prefill()
    assert world.chunked_req is late
    while len(world.batch.reqs[0].output_ids) < 30:  # decodes what nobody expected
        world.decode()
    parked = world.chunked_req
    while parked is not None:
        parked = world.chunked_req if not world.prefill() else parked
        if world.batch.reqs:
            world.decode()
        world.check()
        parked = world.chunked_req
    assert world.aborted_for_memory == 0
    world.run_dry()
    assert (world.served, late.retraction_count) == (2, 1)
    assert old is not None
    assert len(old.output_ids) == 40


def test_answers_need_no_host_memory() -> None:
    """What is being answered relies on its own selection: five prompts decode beside host memory for two."""
    world = World(physical=120, chunk=64, host=70)
    for number in range(5):
        world.submit(large(30, 1000 * number), tokens=8, exact=True)
    for _ in range(8):
        world.prefill()
        world.check()
    assert len(world.batch.reqs) == 5
    for _ in range(3):  # the prompts of some are no longer known, and nobody notices
        world.decode()
        world.check()
    again = world.submit((*large(28, 4000), 7), tokens=1, exact=True)
    world.retract(world.batch.reqs[0])
    world.run_dry()
    assert world.served == 6
    assert again is not None
    assert again.cached_tokens_seen >= 25
    world.flush()
    assert world.allocator.accounting.host is not None
    assert world.allocator.accounting.host.used_tokens == world.arena.residency.used_cells == 0


def test_shared_prefixes_outlive_unshared_ones() -> None:
    """However long ago they were used: the tree evicts what was asked about once first."""
    world = World(physical=96, chunk=64)
    shared = large(30)
    for tail in (1, 2):
        world.submit((*shared, tail), tokens=1)
        world.run_dry()
    for number in range(2, 12):
        world.submit(large(30, 1000 * number), tokens=1)
        world.run_dry()
    world.tree.evict(EvictParams(num_tokens=world.tree.evictable_size() - 40))
    again = world.submit((*shared, 3), tokens=1)
    world.run_dry()
    assert again is not None
    assert again.cached_tokens_seen >= 30


def test_waiting_hits_go_before_the_prefill_that_would_evict_them() -> None:
    world = World(physical=64, chunk=64)
    for number in range(4):
        world.submit(large(30, 1000 * number), tokens=1)
        world.run_dry()
    free = world.allocator.accounting.free_physical_tokens()
    big = world.submit(large(60, 9000), tokens=1)
    hits = [world.submit((*large(30, 1000 * number), 7), tokens=1) for number in range(4)]
    assert big is not None
    assert free < 60
    world.prefill()
    assert all(hit is not None and hit.cached_tokens_seen >= 30 for hit in hits)
    world.run_dry()
    assert world.served == 9


def test_waits_for_compressed_memory_before_it_evicts() -> None:
    world = World(physical=80, chunk=80)
    world.submit(large(20), compress=False, tokens=1)
    world.run_dry()
    world.late_share = 1.0
    world.submit(large(40, 2000), tokens=8)
    assert world.prefill()
    assert world.arena.residency.free_cells < 35 * PLANES  # what it gave back is not reclaimed yet
    world.submit(large(35, 3000), tokens=1)
    assert world.prefill()
    again = world.submit((*large(20), 7), compress=False, tokens=1)
    world.run_dry()
    assert again is not None
    assert again.cached_tokens_seen == 20


def test_ranks_decide_alike_whichever_device_is_ahead() -> None:
    """Of two ranks one asks before its device has finished, the other after."""
    free = []
    for ahead in (False, True):
        world = World(physical=64, chunk=64)
        world.late_share = 1.0
        world.submit(large(40), tokens=4)
        world.prefill()
        if ahead:
            world.catch_up()
        free.append(world.allocator.accounting.evictable_physical_tokens())
    assert free[0] == free[1] > 40


def test_nobody_is_overtaken_for_ever() -> None:
    """A prompt that needs nearly everything, behind hits that never end and need what it would evict."""
    world = World(physical=64, chunk=64)
    world.submit(large(30), compress=False, tokens=1)
    world.run_dry()
    big = world.submit(large(50, 9000), compress=False, tokens=4)
    for number in range(400):
        world.submit((*large(30), number), compress=False, tokens=8)
        world.step()
        if big not in world.waiting:
            break
    assert big not in world.waiting


def test_a_real_scheduler_admits_what_is_predicted() -> None:
    """Prompts of one size that share nothing; within one of the prediction."""
    prompt, new = 40, 4
    world = World(physical=96, chunk=64)
    for number in range(12):
        world.submit(large(prompt, 10_000 * (number + 1)), tokens=new)
    most = 0
    while world.waiting or world.chunked_req is not None:
        if not world.prefill():
            world.decode()
        most = max(most, len(world.batch.reqs))
    predicted = requests_in_flight(Pool(96, SLOTS), prompt, 0.15 * prompt, new)
    assert predicted >= 5
    assert abs(most - predicted) <= 1


@pytest.mark.parametrize("head_cells", [False, True], ids=["layers", "heads"])
@pytest.mark.parametrize("budget", ["1.0", "0.2", "0.05"])
def test_the_pool_fits_into_the_bytes_that_it_replaces(budget: str, head_cells: bool) -> None:
    """Arena, residency table and everything else that the parts hold on the device, and little less than that."""
    stock_tokens = 20_000
    config = config_from({"kv_policy": "vlcache", "kv_budget": budget, "kv_head_cells": head_cells})
    assert config is not None
    configurator = SimpleNamespace(
        use_mla_backend=False,
        is_hybrid_swa=False,
        device="cpu",
        kv_cache_dtype=torch.bfloat16,
        layer_info=SimpleNamespace(start_layer=0, end_layer=3),
        model_config=SimpleNamespace(
            num_attention_layers=4,
            head_dim=64,
            v_head_dim=64,
            get_num_kv_heads=lambda tp, dcp: 2,
            hf_config=PretrainedConfig(),
            hf_text_config=PretrainedConfig(),
            linear_attn_registry_result=None,
        ),
        server_args=SimpleNamespace(disable_radix_cache=False),
    )
    sizes = SimpleNamespace(max_total_num_tokens=stock_tokens)
    pools = Pools(config)
    with get_parallel().override(attn_tp_size=1, attn_dcp_size=1):
        pools.size(sizes, configurator)
        pool = pools.build_pool(lambda: None, configurator, max_total_num_tokens=sizes.max_total_num_tokens)
    allocator = pools.build_allocator(lambda: None, configurator, token_to_kv_pool=pool)
    arena, residency = pool.arena, pool.arena.residency
    tensors = [arena.cells, *(value for value in vars(residency).values() if isinstance(value, torch.Tensor))]
    tensors += [
        value
        for value in (*vars(allocator).values(), *vars(allocator.accounting).values())
        if isinstance(value, torch.Tensor)
    ]
    ours = sum(tensor.nbytes for tensor in tensors)
    shape = KVShape(layers=4, kv_heads=2, head_dim=64, element_bytes=2, groups=2 if head_cells else 1)
    assert arena.cell_bytes == shape.cell_bytes
    assert residency.num_cells == pools.physical_tokens * shape.planes
    stock = stock_tokens * (shape.token_bytes + 8)  # SGLang's own list of free slots
    assert 0.98 * stock < ours <= 1.0005 * stock
