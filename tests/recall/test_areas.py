"""What recall brings back, against a plain account of the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vlcache_sgl.compression.exact import HostMemory
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool
from vlcache_sgl.recall.areas import EMPTY, RecallArea

LAYERS, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 16, 40


class Slots:
    """`Room` of a memory that nobody else uses."""

    def __init__(self, accounting: CellAccounting) -> None:
        self._accounting = accounting
        self._next = LENGTH + 1

    def make_host_room(self, tokens: int) -> None: ...

    def make_cells(self, cells: int) -> None: ...

    def take_slots(self, count: int) -> torch.Tensor:
        self._next += count
        return torch.arange(self._next - count, self._next)

    def give_slots(self, slots: torch.Tensor) -> None:
        self._accounting.release(slots)


@dataclass
class World:
    """A prompt whose prefill has ended."""

    arena: Arena
    memory: HostMemory
    accounting: CellAccounting
    keys_values: torch.Tensor
    """`[L, n, 2, K, D]`, of the prompt."""
    keep: torch.Tensor
    """`[planes, n]` bool."""
    area: RecallArea

    def there(self, plane: int) -> torch.Tensor:
        """Positions that attention reads from a plane's area, in order."""
        held = self.area.positions[plane]
        return held[held != EMPTY].sort().values

    def cells_of(self, plane: int) -> torch.Tensor:
        """`[tokens, 2, K/G, D]`, what attention reads of the prompt in a plane, ordered by its first number."""
        slots = self.area.own.private
        cells = self.arena.residency.table[plane, slots]
        read = self.arena.cells[cells[cells > 0].to(torch.int64)]
        return read[read.flatten(1)[:, 0].argsort()]

    def expected(self, plane: int, positions: torch.Tensor) -> torch.Tensor:
        """The same from the prompt itself, of kept tokens and of `positions`."""
        groups = self.arena.groups
        heads = KV_HEADS // groups
        shown = self.keep[plane].clone()
        shown[positions] = True
        first = (plane % groups) * heads
        read = self.keys_values[plane // groups, shown, :, first : first + heads]
        return read[read.flatten(1)[:, 0].argsort()]

    def step(self, queries: torch.Tensor) -> None:
        """`queries` `[L, H, D]`."""
        recall = self.memory.recall
        assert recall is not None
        recall.step([self.area])
        for layer in range(LAYERS):
            recall.refresh(self.arena.planes_of(layer), queries[layer][None])


def world(tokens: int, groups: int = 1, seed: int = 0, kept: float = 0.2, dtype: torch.dtype = torch.float32) -> World:
    generator = torch.Generator().manual_seed(seed)
    arena = Arena(
        num_cells=12 * LENGTH * LAYERS * groups,
        num_slots=12 * LENGTH,
        num_layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        groups=groups,
        dtype=dtype,
        device="cpu",
    )
    accounting = CellAccounting(arena, 12 * LENGTH)
    accounting.host = HostPool(arena.num_planes, 12 * LENGTH, LENGTH, arena.raw)
    memory = HostMemory(accounting, Slots(accounting), recall=True)
    keys_values = torch.randn(LAYERS, LENGTH, 2, KV_HEADS, DIM, generator=generator).to(dtype)
    slots = torch.arange(1, LENGTH + 1)
    arena.residency.attach(slots)
    for layer in range(LAYERS):
        planes = arena.planes_of(layer)
        cells = arena.residency.table[planes, slots].to(torch.int64)
        arena.write(cells, keys_values[layer, :, 0], keys_values[layer, :, 1])
    assert memory.write_back(slots)
    keep = torch.rand(arena.num_planes, LENGTH, generator=generator) < kept
    _, area = memory.settle_with_area(slots, keep, int(keep.sum()), tokens)
    return World(arena, memory, accounting, keys_values, keep, area)


def queries(seed: int) -> torch.Tensor:
    return torch.randn(LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_attention_reads_the_best_of_the_evicted(groups: int, tokens: int) -> None:
    """At every step: the kept tokens, and of the others those whose sketches rank highest, with their own contents."""
    w = world(tokens, groups)
    recall = w.memory.recall
    assert recall is not None
    for seed in range(6):
        asked = queries(seed)
        w.step(asked)
        for plane in range(w.arena.num_planes):
            layer, group = divmod(plane, groups)
            own = asked[layer].view(groups, -1, DIM)[group]
            codes = recall.codes[plane][w.memory.host.rows[w.area.own.shared].to(torch.int64)]
            best = (
                recall._sketch.scores(own, codes)
                .amax(0)
                .masked_fill(w.keep[plane], -torch.inf)
                .topk(tokens)
                .indices.sort()
                .values
            )
            assert torch.equal(w.there(plane), best)
            assert torch.equal(w.cells_of(plane), w.expected(plane, best))
    assert w.accounting.residency.check_integrity() == []


def test_steps_before_leave_no_trace() -> None:
    """The same step reads the same, whatever was read before: retraction and company change nothing."""
    fresh, used = world(6), world(6)
    for seed in range(5):
        used.step(queries(seed))
    fresh.step(queries(9))
    used.step(queries(9))
    for plane in range(fresh.arena.num_planes):
        assert torch.equal(fresh.there(plane), used.there(plane))
        assert torch.equal(fresh.cells_of(plane), used.cells_of(plane))


def test_requests_side_by_side() -> None:
    """A batch of prompts of several lengths and areas, whose members come and go, reads what each reads alone."""
    w = world(5)
    recall, slots = w.memory.recall, w.area.own.shared
    assert recall is not None
    areas: list[RecallArea] = []
    alone: list[RecallArea] = []
    for length, tokens, seed in ((LENGTH, 5, 1), (25, 9, 2), (12, 3, 3), (30, 40, 4)):
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(LAYERS, length, generator=generator) < 0.3
        for found in (areas, alone):
            found.append(w.memory.settle_with_area(slots[:length], keep, int(keep.sum()), tokens)[1])
    generator = torch.Generator().manual_seed(9)
    for members in ([0, 1, 2, 3], [0, 1, 2, 3], [3, 1], [2], [0, 2, 1]):
        asked = torch.randn(LAYERS, len(members), HEADS, DIM, generator=generator)
        recall.step([areas[member] for member in members])
        for layer in range(LAYERS):
            recall.refresh(w.arena.planes_of(layer), asked[layer])
        for place, member in enumerate(members):
            recall.step([alone[member]])
            for layer in range(LAYERS):
                recall.refresh(w.arena.planes_of(layer), asked[layer, place][None])
            ours, theirs = areas[member], alone[member]
            assert torch.equal(ours.positions.sort(1).values, theirs.positions.sort(1).values)
            assert ours.report() == theirs.report()
            for plane in range(LAYERS):
                held = ours.positions[plane] != EMPTY
                read = w.arena.cells[ours.cells[plane, held]]
                assert torch.equal(read, w.keys_values[plane, ours.positions[plane, held]])
    assert w.accounting.residency.check_integrity() == []


def test_all_of_it_comes_back() -> None:
    """An area that holds all that was evicted is never copied to again."""
    w = world(LENGTH)
    w.step(queries(1))
    for plane in range(w.arena.num_planes):
        assert w.cells_of(plane).shape[0] == LENGTH
    assert int(w.area.fetched) == 0
    assert w.memory.recall.recalled == int((~w.keep).sum())  # type: ignore[union-attr]


def test_a_step_that_asks_the_same_copies_nothing() -> None:
    w = world(5)
    w.step(queries(3))
    fetched, read = int(w.area.fetched), w.memory.host.read
    w.step(queries(3))
    assert (int(w.area.fetched), w.memory.host.read) == (fetched, read)
    assert w.area.report() == {"steps": 2, "tokens": 5.0, "from_host": round(fetched / 20, 4)}


def test_what_host_memory_does_not_have_stays_away() -> None:
    """A prompt of which host memory had room for a part only."""
    w = world(5)
    lost = torch.arange(10)
    w.memory.host.drop(w.area.own.shared[lost])
    candidates = w.memory.recall.candidates(w.area.own.shared, w.keep)  # type: ignore[union-attr]
    assert not candidates[:, lost].any()
    assert torch.equal(candidates[:, 10:], ~w.keep[:, 10:])


def test_a_prompt_of_which_nothing_was_evicted() -> None:
    w = world(5, kept=1.1)
    w.step(queries(0))
    assert int(w.area.fetched) == w.memory.recall.recalled == 0  # type: ignore[union-attr]
    assert w.area.report() == {"steps": 1, "tokens": 0.0, "from_host": 0.0}


def test_eight_bit_cells_are_sketched_as_they_are_read() -> None:
    """Codes of 8-bit keys are those of the numbers that attention sees."""
    w = world(5, dtype=torch.float8_e4m3fn)
    recall = w.memory.recall
    assert recall is not None
    stored = w.keys_values[0, :, 0].float()
    rows = w.memory.host.rows[w.area.own.shared].to(torch.int64)
    assert torch.equal(recall.codes[0][rows], recall._sketch.encode(stored))
    w.step(queries(2))
    assert w.accounting.residency.check_integrity() == []


def test_the_cells_go_back_with_the_private_slots() -> None:
    w = world(7)
    w.step(queries(0))
    w.accounting.release(w.area.own.private)
    assert w.accounting.residency.free_cells == w.accounting.residency.num_cells
    assert w.accounting.residency.check_integrity() == []
