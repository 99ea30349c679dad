"""Layers that see the last tokens only: how they divide cells, what they keep, and attention over it.

The reference is attention in float64 over all tokens that were written, with the window as a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import provider_bench as bench
import pytest
import torch
from attention_reference import reference

from vlcache_kernels.arena_write import arena_write
from vlcache_sgl.attention.base import Provider
from vlcache_sgl.capacity import KVShape, WindowShape
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, ExtendRequest, Memory
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.memory.staging import Staging

provider, kernels = bench.provider, bench.kernels
Make = Callable[[Memory], Provider]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
SCALE = 1.0
TOKENS = 12
"""Before its own that a token sees."""
COUNTED, SLIDING = (1, 4), (0, 2, 3)
HEADS, DEVICE, DTYPE, TOLERANCE = bench.HEADS, bench.DEVICE, bench.DTYPE, bench.TOLERANCE
SHAPES = {
    # KV heads and head size of layers that see everything, then of the others.
    "alike": ((2, 32), (2, 32)),
    "two cells": ((1, 64), (4, 32)),
    "three layers in one cell": ((2, 64), (1, 32)),
    "a third of a cell is empty": ((2, 48), (2, 32)),
    "a cell per head": ((2, 32), (4, 32)),
}
STORED = pytest.mark.parametrize("stored", [DTYPE, torch.float8_e4m3fn], ids=["wide", "e4m3"])


@dataclass
class World:
    """Requests in an arena, and all that was written for them."""

    arena: Arena
    table: torch.Tensor
    provider: Provider
    written: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """By request row and layer."""
    lengths: dict[int, int] = field(default_factory=dict)
    slots: int = 0
    checked: tuple[int, ...] = (*SLIDING, *COUNTED)

    @classmethod
    def make(cls, name: str, make: Make, stored: torch.dtype = DTYPE) -> World:
        torch.manual_seed(3)
        (kv_heads, dim), (own_heads, own_dim) = SHAPES[name]
        sliding = WindowShape(len(SLIDING), own_heads, own_dim, TOKENS)
        groups = kv_heads if name == "a cell per head" else 1
        shape = KVShape(len(COUNTED), kv_heads, dim, stored.itemsize, groups, window=sliding)
        window = Window(
            *(SLIDING, own_heads, own_dim, TOKENS),
            heads_per_cell=sliding.heads_per_cell(shape.width),
            layers_per_cell=sliding.layers_per_cell(shape.width),
        )
        arena = Arena(
            num_cells=400 * shape.planes,
            num_slots=400,
            num_layers=len(COUNTED),
            groups=groups,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=stored,
            device=DEVICE,
            layer_ids=COUNTED,
            window=window,
        )
        assert arena.num_planes == shape.planes
        assert arena.cell_bytes == shape.cell_bytes
        table = torch.zeros(4, 300, dtype=torch.int32)
        memory = Memory(arena.cells, arena.residency, table, groups, arena.scales, window)
        return cls(arena, table, make(memory))

    def random(self, *shape: int) -> torch.Tensor:
        """Numbers that cells hold exactly: Triton's interpreter cuts where hardware rounds."""
        return (2 * torch.rand(shape) - 1).to(self.arena.cells.dtype).to(DTYPE)

    @property
    def tolerance(self) -> float:
        """SGLang's kernels turn probabilities into 8-bit floats, too, where values are."""
        narrow = self.provider.on_device and self.arena.cells.dtype.itemsize == 1
        return 2 * torch.finfo(self.arena.cells.dtype).eps if narrow else TOLERANCE

    def append(self, row: int, count: int) -> torch.Tensor:
        """New tokens in all layers; their slots."""
        slots, begin = torch.arange(self.slots + 1, self.slots + count + 1), self.lengths.get(row, 0)
        self.slots += count
        self.arena.residency.attach(slots)
        self.lengths[row] = begin + count
        self.table[row, begin : begin + count] = slots.int()
        for layer_id in (*COUNTED, *SLIDING):
            layer = self.arena.layer(layer_id)
            heads = layer.heads * (layer.planes.stop - layer.planes.start)
            both = self.random(count, 2, heads, layer.head_dim)
            cells = self.arena.residency.table[layer.planes][:, slots]
            if self.provider.on_device:
                numbers, view = torch.arange(count), layer.view(self.arena.cells)
                arena_write(view, both[:, 0], both[:, 1], numbers, cells, backend="triton")
            else:
                self.arena.write(cells.long(), both[:, 0], both[:, 1], layer)
            stored = self.arena.read(layer, cells.long(), DTYPE)
            assert torch.equal(stored, both)
            before = self.written.get((row, layer_id), stored[:0])
            self.written[row, layer_id] = torch.cat([before, stored])
        return slots

    def expected(self, row: int, layer_id: int, q: torch.Tensor) -> torch.Tensor:
        """Attention of the last tokens, whose queries these are."""
        both, at = self.written[row, layer_id], torch.arange(self.lengths[row])
        own = at[-q.shape[0] :, None]
        visible = at <= own
        if layer_id in SLIDING:
            visible &= at >= own - TOKENS
        return reference(q, both[:, 0], both[:, 1], SCALE, visible)

    def extend(self, counts: dict[int, int]) -> None:
        """A chunk of each row, checked in all layers."""
        begins = [self.lengths.get(row, 0) for row in counts]
        requests, first = [], 0
        for (row, count), begin in zip(counts.items(), begins, strict=True):
            self.append(row, count)
            requests.append(ExtendRequest(row, slice(first, first + count), begin))
            first += count
        ends = [self.lengths[row] for row in counts]
        numbers = [torch.tensor(known) for known in (list(counts), begins, ends)]
        self.provider.plan_extend(ExtendBatch(tuple(requests), *numbers))
        for layer_id in self.checked:
            layer = self.arena.layer(layer_id)
            q = self.random(first, HEADS, layer.head_dim)
            new = [self.written[row, layer_id][-count:] for row, count in counts.items()]
            keys, values = torch.cat(new).unbind(1)
            if layer.window is None:
                got = self.provider.extend(layer.planes, q, keys, values, SCALE, ignore)[0]
            else:
                got = self.provider.extend_in_window(layer, q, keys, values, SCALE)
            for request in requests:
                expected = self.expected(request.row, layer_id, q[request.tokens])
                assert (got[request.tokens].double() - expected).abs().max() < self.tolerance

    def decode(self, rows: Sequence[int], *, padding: int = 0, recorded: bool = False) -> None:
        """A step, checked the same way."""
        slots = torch.cat([self.append(row, 1) for row in rows])
        lengths = [self.lengths[row] for row in rows]
        cells = torch.full((self.arena.num_planes, len(rows) + padding), -1, dtype=torch.int32)
        cells[:, : len(rows)] = self.arena.residency.table[:, slots]
        numbers = [torch.tensor(known) for known in ([*rows, *[0] * padding], [*lengths, *[1] * padding])]
        self.provider.plan_decode(DecodeBatch(list(rows), lengths, *numbers, cells, padding, recorded))
        for layer_id in self.checked:
            layer = self.arena.layer(layer_id)
            q = self.random(len(rows) + padding, HEADS, layer.head_dim)
            if layer.window is None:
                got = self.provider.decode(layer.planes, q, SCALE)
            else:
                got = self.provider.decode_in_window(layer, q, SCALE)
            for number, row in enumerate(rows):
                part = slice(number, number + 1)
                assert (got[part].double() - self.expected(row, layer_id, q[part])).abs().max() < self.tolerance


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        yield


def ignore(*_: Any) -> None:
    """Of an observer that nobody asked for."""


@pytest.mark.parametrize(
    ("provider", "name", "stored"),
    [
        *(("torch_native", name, stored) for name in SHAPES for stored in (DTYPE, torch.float8_e4m3fn)),
        ("triton", "two cells", DTYPE),
        ("triton", "three layers in one cell", DTYPE),
        ("triton", "a cell per head", DTYPE),
        ("triton", "two cells", torch.float8_e4m3fn),
    ],
    indirect=["provider"],
    ids=str,
)
def test_attention_in_a_window(name: str, stored: torch.dtype, provider: Make) -> None:
    """Prompts shorter and longer than the window, chunks on both sides of its edge, steps beyond it, side by side."""
    world = World.make(name, provider, stored)
    for counts in ({1: 5, 2: 30}, {1: 9}, {2: 3, 3: 1, 1: 30}):
        world.extend(counts)
    for rows in ((1, 2, 3), (1, 2, 3), (3, 1), (2, 3)):
        world.decode(rows)


@pytest.mark.parametrize("name", ["alike"])
@pytest.mark.parametrize("provider", ["triton"], indirect=True)
def test_recorded_steps_read_what_the_capture_read(name: str, provider: Make) -> None:
    """Without a graph: every step runs with the very objects that were there when it was captured."""
    world = World.make(name, provider)
    backend: Any = world.provider
    backend.init_graphs(4)
    nothing = torch.full((world.arena.num_planes, 4), -1, dtype=torch.int32)
    rows, lengths = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    backend.plan_decode(DecodeBatch([], [], rows, lengths, nothing, 4, recorded=True))
    captured = backend._decode_window
    world.extend({1: 20, 2: 5})
    plan = backend.plan_decode

    def as_captured(batch: DecodeBatch) -> None:
        plan(batch)
        assert backend._decode_window.parts.data_ptr() == captured.parts.data_ptr()
        backend._decode_window = captured

    backend.plan_decode = as_captured
    for asked in ((1, 2), (2,), (2, 1)):
        world.decode(asked, padding=4 - len(asked), recorded=True)


@pytest.mark.parametrize(
    ("provider", "name", "length", "published"),
    [
        *(("torch_native", name, *case) for name in SHAPES for case in ((40, False), (40, True), (7, False))),
        ("triton", "two cells", 40, False),
    ],
    indirect=["provider"],
    ids=str,
)
def test_what_has_left_the_window_is_given_back(name: str, length: int, published: bool, provider: Make) -> None:
    """At the end of a prefill, and steps read on; where others may find the prompt, all of it stays."""
    world = World.make(name, provider)
    world.extend({1: length})
    arena = world.arena
    compressor = SimpleNamespace(_arena=arena)
    keep = torch.rand(arena.counted_planes, length) < 0.3
    job = SimpleNamespace(publishes_cells=published)
    whole, kept = Compressor._with_window(compressor, keep, int(keep.sum()), job)  # type: ignore[arg-type]
    assert kept == int(whole.sum())
    assert torch.equal(whole[: arena.counted_planes], keep)
    slots = world.table[1, :length].long()
    evicted = arena.residency.evict(slots, whole)
    if bench.CUDA:
        torch.cuda.synchronize()
    arena.residency.reclaim(evicted)
    assert arena.window is not None
    seen = length if published else min(length, TOKENS)
    assert arena.residency.used_cells == int(keep.sum()) + arena.window.planes * seen
    world.provider.invalidate(1)
    world.checked = SLIDING
    for _ in range(TOKENS + 3):
        world.decode((1,))
    assert arena.residency.check_integrity() == []


@pytest.mark.parametrize("name", SHAPES)
@STORED
@pytest.mark.parametrize("provider", ["torch_native"], indirect=True)
def test_staged_tokens_are_those_of_the_layer(name: str, stored: torch.dtype, provider: Make) -> None:
    """Layers take turns in the borrowed cells, those that share cells and those with several planes, too."""
    world = World.make(name, provider, stored)
    slots, arena = world.append(1, 20), world.arena
    host = HostPool(arena.num_planes, 400, 50, arena.raw)
    host.store(slots, arena.raw, arena.residency.table[:, slots])
    arena.residency.reclaim(arena.residency.detach(slots))
    staging = Staging(arena, host)
    assert arena.residency.used_cells == 0
    staging.begin(slots)
    assert arena.residency.used_cells == arena.planes_per_layer * 20
    for layer_id in (0, 1, 2, 3, 4, 1):
        layer = arena.layer(layer_id)
        staging.fill(layer.planes)
        cells = arena.residency.table[layer.planes][:, slots].long()
        assert torch.equal(arena.read(layer, cells, DTYPE), world.written[1, layer_id])
    staging.end()
    assert arena.residency.used_cells == 0
