"""Cells of 8-bit floats: what is stored, and that attention and statistics read what is stored.

The reference is float64 over the numbers that cells hold, times their scales.  SGLang's Triton kernels also round
queries and probabilities to the type of the cells: queries are such that rounding keeps them, and the tolerance is that
of probabilities with so short a mantissa.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import provider_bench as bench
import pytest
import torch
from attention_reference import reference
from backend_parts import layer_of_model, make_backend, make_pool

from vlcache_kernels.attention_stats import StatsRequest
from vlcache_sgl.attention.base import Provider
from vlcache_sgl.memory.batches import ExtendBatch, ExtendRequest, Memory
from vlcache_sgl.memory.scales import Scales

provider, kernels = bench.provider, bench.kernels
LAYERS, HEADS, DIM, KV_HEADS = bench.LAYERS, bench.HEADS, bench.DIM, bench.KV_HEADS
DEVICE, DTYPE, SCALE = bench.DEVICE, bench.DTYPE, bench.SCALE
ALL = pytest.mark.parametrize("provider", ["torch_native", "triton", "flashinfer"], indirect=True)
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
STORED = pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
Make = Callable[[Memory], Provider]

SCALES = (Scales(0.25, 4.0), Scales(1.0, 1.0), Scales(2.0, 0.125))
"""Of the layers: an answer with another layer's scales, or with none, is wrong by factors."""


def tolerance(name: str, stored: torch.dtype, scales: Scales) -> float:
    """Largest difference from float64, in units of what values are."""
    if name != "triton":
        return bench.TOLERANCE * scales.value
    # Probabilities sum to 1, and each is off by one bit at most: Triton's interpreter cuts where hardware rounds.
    return 2.0 * scales.value * torch.finfo(stored).eps


def random_queries(tokens: int, stored: torch.dtype) -> torch.Tensor:
    """`[tokens, HEADS, DIM]`."""
    return torch.randn(tokens, HEADS, DIM, device=DEVICE).to(stored).to(DTYPE)


@ALL
@GROUPS
@STORED
def test_decode(provider: Make, groups: int, stored: torch.dtype, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["provider"]
    world = bench.Requests(groups, stored=stored, scales=SCALES)
    backend = provider(world.memory)
    for row, (tokens, share) in bench.LENGTHS.items():
        world.append(row, tokens)
        world.evict(row, share)
        backend.invalidate(row)
    rows = [3, 5, 1]
    for _ in range(2):
        backend.plan_decode(world.step(rows))
        for layer in range(LAYERS):
            q = random_queries(len(rows), stored)
            got = backend.decode(world.planes(layer), q, SCALE)
            world.check(got, q, layer, rows, tolerance(name, stored, SCALES[layer]))


@ALL
@GROUPS
@STORED
def test_extend(provider: Make, groups: int, stored: torch.dtype, request: pytest.FixtureRequest) -> None:
    """A compressed prefix and new tokens, whose stored keys and values are handed over as numbers."""
    name = request.node.callspec.params["provider"]
    world = bench.Requests(groups, stored=stored, scales=SCALES)
    backend = provider(world.memory)
    begin, count, row = 60, 9, 3
    world.append(row, begin)
    world.evict(row, 0.4)
    world.append(row, count)
    span = ExtendRequest(row, slice(0, count), begin, observed=True)
    on_device = [torch.tensor([n], device=DEVICE) for n in (row, begin, begin + count)]
    backend.plan_extend(ExtendBatch((span,), *on_device, want_lse=True))
    seen: list[torch.Tensor] = []
    for layer in range(LAYERS):
        q = random_queries(count, stored)
        keys, values, there = world.dense(layer, row)
        new = [x[begin:].to(DTYPE) for x in (keys, values)]
        got, lse = backend.extend(
            world.planes(layer), q, *new, SCALE, lambda number, prefix, valid: seen.append(prefix.clone())
        )
        own = torch.ones(count, count, dtype=torch.bool, device=DEVICE).tril().expand(KV_HEADS, -1, -1)
        visible = torch.cat([there[:, None, :begin].expand(-1, count, -1), own], -1)
        most = tolerance(name, stored, SCALES[layer])
        assert (got.double() - reference(q, keys, values, SCALE, visible)).abs().max() < most
        assert lse is not None
        largest = (lse.double() - bench.log_sum(q, keys, SCALE, visible)).abs().max()
        assert largest < (bench.TOLERANCE if bench.CUDA else 1e-4)
        if seen:  # what rows that vote are shown of the prefix
            shown = seen.pop()
            assert shown.dtype == DTYPE
            if groups == 1:
                kept = there[0, :begin]
                assert torch.equal(shown[:, 0].double(), keys[:begin][kept].double())


@ALL
@GROUPS
@STORED
def test_backend_stores_and_attends_to_what_it_has_stored(
    provider: Make, groups: int, stored: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """A prefill in two chunks and a step: cells hold numbers over the layer's scales, rounded once; all keys, those of
    the chunk itself too, are attended to as they are stored: an answer does not depend on where a chunk ends."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    torch.manual_seed(11)
    name = request.node.callspec.params["provider"]
    pool = make_pool(groups, stored=stored)
    arena = pool.arena
    assert arena.cell_bytes == 2 * KV_HEADS // groups * DIM
    table = torch.zeros(3, 64, dtype=torch.int32, device=DEVICE)
    backend = make_backend(name, pool, table, SimpleNamespace(observe=None, host=None))
    computed = [torch.empty(0, 2, KV_HEADS, DIM, device=DEVICE, dtype=DTYPE) for _ in range(LAYERS)]
    length = 0
    for count, mode in ((7, ForwardMode.EXTEND), (5, ForwardMode.EXTEND), (1, ForwardMode.DECODE)):
        slots = torch.arange(length + 1, length + count + 1, device=DEVICE)
        arena.residency.attach(slots)
        table[1, length : length + count] = slots.int()
        begin, length = length, length + count
        lengths = torch.tensor([length], device=DEVICE)
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=1,
            num_padding=0,
            req_pool_indices=torch.tensor([1], device=DEVICE),
            out_cache_loc=slots,
            seq_lens=lengths,
            seq_lens_cpu=lengths.cpu(),
            extend_prefix_lens=torch.tensor([begin], device=DEVICE),
            extend_prefix_lens_cpu=[begin],
            extend_seq_lens_cpu=[count],
        )
        backend.rows = [1]
        backend.init_forward_metadata(batch)
        for number, scales in enumerate(SCALES):
            layer = layer_of_model(number, None if scales == Scales() else (scales.key, scales.value))
            q = random_queries(count, stored)
            factors = torch.tensor([scales.key, scales.value], device=DEVICE)[:, None, None]
            both = torch.randn(count, 2, KV_HEADS, DIM, device=DEVICE).to(DTYPE)
            if name == "triton" and not bench.CUDA:  # the interpreter cuts where hardware rounds
                both = both.to(stored).to(DTYPE) * factors
            run = backend.forward_decode if mode.is_decode() else backend.forward_extend
            got = run(q.flatten(1), both[:, 0], both[:, 1], layer, batch).view(count, HEADS, DIM)
            computed[number] = torch.cat([computed[number], both])
            want = (computed[number] / factors.to(DTYPE)).to(stored).double() * factors
            cells = arena.residency.table[arena.planes_of(number)][:, table[1, :length].long()].long()
            assert torch.equal(arena.read(arena.layer(number), cells, torch.float64), want)
            visible = torch.ones(count, length, dtype=torch.bool, device=DEVICE).tril(length - count)
            out = reference(q, want[:, 0], want[:, 1], SCALE, visible)
            assert (got.double() - out).abs().max() < tolerance(name, stored, scales)
    assert not bool(arena.raw[0].any()), "the padding cell must stay zero"


@STORED
@pytest.mark.parametrize("provider", ["triton"], indirect=True)
def test_statistics_read_what_is_stored(provider: Make, stored: torch.dtype) -> None:
    """The kernel that counts for a whole batch, over cells and their scale."""
    from vlcache_sgl.memory.device_index import look_up
    from vlcache_sgl.scoring import batch as scoring

    world = bench.Requests(1, stored=stored, scales=SCALES)
    provider(world.memory)  # lets our kernels be launched on this device
    length, rows = 40, 6
    world.append(2, length)
    numbers = [torch.tensor([n], device=DEVICE) for n in (2, length)]
    index = look_up(world.memory, torch.int32, [2], [length], *numbers)
    sizes = scoring.RowBatch.build([rows], [length], [length], DEVICE)
    last = torch.arange(length - rows, length, device=DEVICE)
    for layer, scales in enumerate(SCALES):
        q = torch.randn(rows, HEADS, DIM, device=DEVICE).to(DTYPE)
        found = scoring.batch_attention_stats(
            q, last, world.memory.arena, index.at(layer), sizes, SCALE * scales.key, want=StatsRequest(column_sum=True)
        ).request(0)
        keys = world.dense(layer, 2)[0].double().repeat_interleave(HEADS // KV_HEADS, 1)
        logits = torch.einsum("thd,nhd->htn", q.double(), keys) * SCALE
        logits = logits.masked_fill(torch.arange(length, device=DEVICE) > last[:, None], -torch.inf)
        want = logits.softmax(-1).sum(1).view(KV_HEADS, -1, length).mean(1)
        assert found.column_sum is not None
        assert torch.allclose(found.column_sum.double(), want, atol=1e-4)
