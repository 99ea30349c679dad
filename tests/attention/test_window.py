"""Layers that see the last tokens only: how they divide cells, what they keep, and attention over it.

The reference is attention in float64 over all tokens that were written, with the window as a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from attention_reference import reference

from vlcache_sgl.attention.torch import TorchProvider
from vlcache_sgl.capacity import KVShape, WindowShape
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, ExtendRequest, Memory
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.memory.staging import Staging

SCALE = 0.2
TOKENS = 12
"""Before its own that a token sees."""
COUNTED, SLIDING = (1, 4), (0, 2, 3)
HEADS = 8
SHAPES = {
    # KV heads and head size of layers that see everything, then of the others.
    "alike": ((2, 32), (2, 32)),
    "two cells": ((2, 64), (8, 32)),
    "three layers in one cell": ((2, 64), (1, 32)),
    "a third of a cell is empty": ((3, 32), (2, 32)),
}
STORED = pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn], ids=["float32", "e4m3"])


@dataclass
class World:
    """One request in an arena, and all that was written for it."""

    arena: Arena
    table: torch.Tensor
    provider: TorchProvider
    written: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0

    @classmethod
    def make(cls, name: str, stored: torch.dtype = torch.float32) -> World:
        torch.manual_seed(3)
        (kv_heads, dim), (own_heads, own_dim) = SHAPES[name]
        sliding = WindowShape(len(SLIDING), own_heads, own_dim, TOKENS)
        shape = KVShape(len(COUNTED), kv_heads, dim, stored.itemsize, window=sliding)
        window = Window(
            *(SLIDING, own_heads, own_dim, TOKENS),
            heads_per_cell=sliding.heads_per_cell(shape.width),
            layers_per_cell=sliding.layers_per_cell(shape.width),
        )
        arena = Arena(
            num_cells=400 * shape.planes,
            num_slots=400,
            num_layers=len(COUNTED),
            groups=1,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=stored,
            device="cpu",
            layer_ids=COUNTED,
            window=window,
        )
        assert arena.num_planes == shape.planes
        assert arena.cell_bytes == shape.cell_bytes
        table = torch.zeros(3, 300, dtype=torch.int32)
        memory = Memory(arena.cells, arena.residency, table, 1, arena.scales)
        return cls(arena, table, TorchProvider(memory, torch.float32))

    def append(self, count: int) -> torch.Tensor:
        """New tokens in all layers; their slots."""
        slots = torch.arange(self.length + 1, self.length + count + 1)
        self.arena.residency.attach(slots)
        self.table[1, self.length : self.length + count] = slots.int()
        self.length += count
        for layer_id in (*COUNTED, *SLIDING):
            layer = self.arena.layer(layer_id)
            heads = layer.heads * (layer.planes.stop - layer.planes.start)
            both = torch.randn(count, 2, heads, layer.head_dim)
            cells = self.arena.residency.table[layer.planes][:, slots].long()
            self.arena.write(cells, both[:, 0], both[:, 1], layer)
            stored = both.to(self.arena.cells.dtype).float()
            assert torch.equal(self.arena.read(layer, cells, torch.float32), stored)
            before = self.written.get(layer_id, stored[:0])
            self.written[layer_id] = torch.cat([before, stored])
        return slots

    def expected(self, layer_id: int, q: torch.Tensor) -> torch.Tensor:
        """Attention of the last tokens, whose queries these are."""
        both, own = self.written[layer_id], torch.arange(self.length)[-q.shape[0] :, None]
        at = torch.arange(self.length)
        return reference(q, both[:, 0], both[:, 1], SCALE, (at <= own) & (at >= own - TOKENS))

    def extend(self, count: int) -> None:
        """A chunk, checked in all layers with a window."""
        begin = self.length
        self.append(count)
        numbers = [torch.tensor([n]) for n in (1, begin, self.length)]
        self.provider.plan_extend(ExtendBatch((ExtendRequest(1, slice(0, count), begin),), *numbers))
        for layer_id in SLIDING:
            layer = self.arena.layer(layer_id)
            q = torch.randn(count, HEADS, layer.head_dim)
            own = self.written[layer_id][begin:]
            got = self.provider.extend_in_window(layer, q, own[:, 0], own[:, 1], SCALE)
            assert (got.double() - self.expected(layer_id, q)).abs().max() < 2e-5

    def decode(self) -> None:
        """A step, checked the same way."""
        slots = self.append(1)
        rows, lengths, cells = torch.tensor([1]), torch.tensor([self.length]), self.arena.residency.table[:, slots]
        self.provider.plan_decode(DecodeBatch([1], [self.length], rows, lengths, cells))
        for layer_id in SLIDING:
            layer = self.arena.layer(layer_id)
            q = torch.randn(1, HEADS, layer.head_dim)
            got = self.provider.decode_in_window(layer, q, SCALE)
            assert (got.double() - self.expected(layer_id, q)).abs().max() < 2e-5


@pytest.mark.parametrize("name", SHAPES)
@STORED
def test_attention_in_a_window(name: str, stored: torch.dtype) -> None:
    """Prompts shorter and longer than the window, chunks on both sides of its edge, steps beyond it."""
    world = World.make(name, stored)
    for count in (5, 9, 30, 3):
        world.extend(count)
        world.provider.invalidate(1)
    for _ in range(4):
        world.decode()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("length", "published"), [(40, False), (40, True), (7, False)], ids=str)
def test_what_has_left_the_window_is_given_back(name: str, length: int, published: bool) -> None:
    """At the end of a prefill, and steps read on; where others may find the prompt, all of it stays."""
    world = World.make(name)
    world.extend(length)
    arena = world.arena
    compressor = SimpleNamespace(_arena=arena)
    keep = torch.rand(arena.counted_planes, length) < 0.3
    job = SimpleNamespace(publishes_cells=published)
    whole, kept = Compressor._with_window(compressor, keep, int(keep.sum()), job)  # type: ignore[arg-type]
    assert kept == int(whole.sum())
    assert torch.equal(whole[: arena.counted_planes], keep)
    slots = world.table[1, :length].long()
    arena.residency.reclaim(arena.residency.evict(slots, whole))
    assert arena.window is not None
    seen = length if published else min(length, TOKENS)
    assert arena.residency.used_cells == int(keep.sum()) + arena.window.planes * seen
    world.provider.invalidate(1)
    for _ in range(TOKENS + 3):
        world.decode()
    assert arena.residency.check_integrity() == []


@pytest.mark.parametrize("name", SHAPES)
@STORED
def test_staged_tokens_are_those_of_the_layer(name: str, stored: torch.dtype) -> None:
    """Layers take turns in the borrowed cells, those that share cells and those with several planes, too."""
    world = World.make(name, stored)
    slots, arena = world.append(20), world.arena
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
        assert torch.equal(arena.read(layer, cells, torch.float32), world.written[layer_id])
    staging.end()
    assert arena.residency.used_cells == 0
