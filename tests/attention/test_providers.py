"""All kernel providers against the formula of `test_torch_provider`, on ragged lists that differ between layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import provider_bench as bench
import pytest
import torch

from vlcache_sgl.attention import triton as triton_provider
from vlcache_sgl.attention.base import Provider
from vlcache_sgl.memory.batches import ExtendBatch, ExtendRequest, Memory

provider, kernels = bench.provider, bench.kernels
LAYERS, HEADS, DIM, KV_HEADS = bench.LAYERS, bench.HEADS, bench.DIM, bench.KV_HEADS
DEVICE, DTYPE, SCALE, TOLERANCE = bench.DEVICE, bench.DTYPE, bench.SCALE, bench.TOLERANCE
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
ALL = pytest.mark.parametrize("provider", ["torch_native", "triton", "flashinfer"], indirect=True)
ON_DEVICE = pytest.mark.parametrize("provider", ["triton", "flashinfer"], indirect=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
GPU_ONLY = pytest.mark.skipif(not bench.CUDA, reason="needs a CUDA device")
Make = Callable[[Memory], Provider]


@ALL
@GROUPS
@pytest.mark.parametrize(
    ("want_lse", "emptied"), [(False, False), (True, False), (True, True)], ids=["", "lse", "lse-emptied"]
)
def test_extend(provider: Make, groups: int, want_lse: bool, emptied: bool) -> None:
    """No prefix, a prefix that was compressed, a prefix of one token; the last two have query rows.

    Emptied: of one prefix a plane of layer 0 and all of layer 1 keep nothing, of the other no plane does.
    """
    world = bench.Requests(groups)
    backend = provider(world.memory)
    plan = {3: (0, 9), 1: (70, 5), 6: (1, 17)}
    for row, (begin, _) in plan.items():
        if begin:
            world.append(row, begin)
            world.evict(row, 0.4)
        if begin and emptied:
            world.empty(row, [0, *range(groups, 2 * groups)] if begin > 1 else list(range(LAYERS * groups)))
    begins = torch.tensor([begin for begin, _ in plan.values()], device=DEVICE)
    requests, first = [], 0
    for row, (begin, count) in plan.items():
        world.append(row, count)
        requests.append(ExtendRequest(row, slice(first, first + count), begin, observed=begin > 0))
        first += count
    ends = torch.tensor([world.lengths[row] for row in plan], device=DEVICE)
    rows = torch.tensor(list(plan), device=DEVICE)
    backend.plan_extend(ExtendBatch(tuple(requests), rows, begins, ends, want_lse))
    for layer in range(LAYERS):
        q = torch.randn(first, HEADS, DIM, device=DEVICE).to(DTYPE)
        new = [world.dense(layer, row)[:2] for row in plan]
        k, v = (torch.cat([both[n][-r.count :] for both, r in zip(new, requests, strict=True)]) for n in range(2))
        seen: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

        def observe(
            number: int,
            prefix: torch.Tensor | None,
            valid: torch.Tensor | None,
            seen: dict[int, Any] = seen,
        ) -> None:
            assert prefix is not None
            seen[number] = prefix.clone(), valid

        got, lse = backend.extend(world.planes(layer), q, k, v, SCALE, observe)
        assert list(seen) == ([] if backend.on_device else [1, 2])
        assert (lse is not None) == want_lse
        for number, (row, request) in enumerate(zip(plan, requests, strict=True)):
            keys, values, there = world.dense(layer, row)
            own = torch.ones(request.count, request.count, dtype=torch.bool, device=DEVICE).tril()
            earlier = there[:, None, : request.begin].expand(-1, request.count, -1)
            visible = torch.cat([earlier, own.expand(KV_HEADS, -1, -1)], -1)
            part = q[request.tokens]
            want = bench.reference(part, keys, values, SCALE, visible)
            assert (got[request.tokens].double() - want).abs().max() < TOLERANCE
            if lse is not None:
                log_sum = bench.log_sum(part, keys, SCALE, visible)
                assert (lse[request.tokens].double() - log_sum).abs().max() < TOLERANCE
            if number in seen:
                prefix, valid = seen[number]
                counts = there[:, : request.begin].sum(1)
                assert prefix.shape[0] == int(counts.max())
                assert (valid is None) == (int(counts.min()) == int(counts.max()))
                assert valid is None or torch.equal(valid, counts)


@ALL
@pytest.mark.parametrize(("groups", "emptied"), [(1, False), (KV_HEADS, False), (KV_HEADS, True)])
def test_decode_over_a_changing_batch(provider: Make, groups: int, emptied: bool) -> None:
    """Three requests; one leaves, one comes back with other slots, one has its slots exchanged."""
    world = bench.Requests(groups)
    backend = provider(world.memory)
    for row, (tokens, share) in bench.LENGTHS.items():
        world.append(row, tokens)
        world.evict(row, share)
        if emptied:
            world.empty(row, [0, *range(groups, 2 * groups)] if row == 3 else list(range(LAYERS * groups)))
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


@ON_DEVICE
@GROUPS
def test_recorded_steps_read_what_the_capture_read(provider: Make, groups: int) -> None:
    """Without a graph: every step runs with the very objects that were there when it was captured."""
    world = bench.Requests(groups)
    backend: Any = provider(world.memory)
    backend.init_graphs(4)
    captured = {}
    for size in (4, 2):
        backend.plan_decode(bench.capture_only(size, world.residency.num_planes))
        captured[size] = backend._decode
    for row, (tokens, share) in bench.LENGTHS.items():
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


@ON_DEVICE
@GROUPS
def test_what_does_not_fit_a_graph_is_known_before(provider: Make, groups: int) -> None:
    world = bench.Requests(groups, tokens=600, context=1000)
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


@pytest.mark.gpu
@GPU_ONLY
@ON_DEVICE
@GROUPS
def test_a_replayed_graph_equals_eager(provider: Make, groups: int) -> None:
    """Capture one decode graph, replay it over several steps and batches, compare with the same kernels without it."""
    world = bench.Requests(groups)
    graphed, eager = provider(world.memory), provider(world.memory)
    graphed.init_graphs(4)
    q = torch.zeros(LAYERS, 4, HEADS, DIM, device=DEVICE, dtype=DTYPE)

    def layers(kernels: Provider, queries: torch.Tensor) -> list[torch.Tensor]:
        return [kernels.decode(world.planes(layer), queries[layer], SCALE) for layer in range(LAYERS)]

    graphed.plan_decode(bench.capture_only(4, world.residency.num_planes))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers(graphed, q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layers(graphed, q)
    for row, (tokens, share) in bench.LENGTHS.items():
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
@GPU_ONLY
@ON_DEVICE
def test_a_continued_step_does_not_wait_for_the_device(provider: Make) -> None:
    world = bench.Requests(1)
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
