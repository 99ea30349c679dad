"""Rows of host memory, staging through borrowed cells, and selections that belong to one request."""

from __future__ import annotations

from http import HTTPStatus

import pytest
import torch

from vlcache_sgl.api import Prompt
from vlcache_sgl.compression.compressor import Compressor
from vlcache_sgl.compression.exact import HostMemory, OutOfMemory
from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.config import config_from
from vlcache_sgl.counters import Counters
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostFull, HostPool
from vlcache_sgl.memory.own_slots import HostShare
from vlcache_sgl.memory.residency import EVICTED, OutOfCells
from vlcache_sgl.policy.choice import Choices
from vlcache_sgl.scoring.asked import Asked
from vlcache_sgl.scoring.tensor_parallel import HeadGather

LAYERS, KV_HEADS, DIM, SLOTS = 3, 2, 4, 40
GROUPS = pytest.mark.parametrize("groups", [1, KV_HEADS], ids=["layer-cells", "head-cells"])


class World:
    """An arena for `physical` tokens with random contents, host memory for `host` tokens, and slots 1, 2, ..."""

    def __init__(self, groups: int, physical: int = 16, host: int = 20) -> None:
        self.arena = Arena(
            num_cells=physical * LAYERS * groups,
            num_slots=SLOTS,
            num_layers=LAYERS,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            groups=groups,
            dtype=torch.float32,
            device="cpu",
        )
        self.accounting = CellAccounting(self.arena, physical)
        self.host = self.accounting.host = HostPool(self.arena.num_planes, SLOTS, host, self.arena.cells)
        self.memory = HostMemory(self.accounting, self)
        self.next = 1

    def compute(self, tokens: int) -> torch.Tensor:
        """Slots of new tokens with keys and values."""
        slots = torch.arange(self.next, self.next + tokens)
        self.next += tokens
        self.arena.residency.attach(slots)
        cells = self.arena.residency.table[:, slots].long()
        self.arena.cells[cells] = torch.randn(*cells.shape, *self.arena.cells.shape[1:])
        return slots

    def contents(self, slots: torch.Tensor) -> torch.Tensor:
        """`[planes, tokens, 2, heads, dim]` of resident tokens, a copy."""
        return self.arena.cells[self.arena.residency.table[:, slots].long()].clone()

    def make_host_room(self, tokens: int) -> None:
        """Nothing gives way here."""

    def make_cells(self, cells: int) -> None:
        """Nor here."""

    def take_slots(self, count: int) -> torch.Tensor | None:
        if self.next + count > SLOTS:
            return None
        self.next += count
        return torch.arange(self.next - count, self.next)

    def give_slots(self, slots: torch.Tensor) -> None:
        self.accounting.release(slots)

    def assert_sound(self) -> None:
        self.accounting.settle()
        assert self.accounting.verify() == []


@GROUPS
def test_what_is_stored_comes_back(groups: int) -> None:
    world = World(groups)
    first, second = world.compute(5), world.compute(7)
    before = world.contents(torch.cat([first, second]))
    assert world.memory.write_back(first)
    assert world.memory.write_back(second)
    world.memory.release_chunk(torch.cat([first, second]))
    assert world.arena.residency.used_cells == 0
    again = world.host.load(slice(0, world.arena.num_planes), torch.cat([first, second]))
    assert torch.equal(again, before)
    assert world.host.written == world.host.read == 12 * world.host.token_bytes
    world.accounting.release(first)
    assert world.host.used_tokens == 7
    world.assert_sound()


def test_host_memory_that_is_full_changes_nothing() -> None:
    world = World(1, host=6)
    kept, slots = world.compute(4), world.compute(3)
    assert world.memory.write_back(kept)
    assert not world.memory.write_back(slots)
    with pytest.raises(HostFull, match="3 tokens do not fit the 2"):
        world.host.store(slots, world.arena.cells, world.arena.residency.table[:, slots])
    assert world.host.used_tokens == 4
    assert not world.host.has(slots).any()
    world.assert_sound()


@GROUPS
def test_staged_tokens_are_read_like_any_others(groups: int) -> None:
    """Layer after layer in the same cells; what is in the arena stays where it is, what repeats is staged once."""
    world = World(groups)
    slots, resident = world.compute(6), world.compute(2)
    before = world.contents(slots)
    assert world.memory.write_back(slots)
    world.memory.release_chunk(slots)
    free = world.arena.residency.free_cells
    world.memory.stage([slots, torch.cat([slots[:3], resident])])
    assert free - world.arena.residency.free_cells == 11 * groups, "how many repeat only the device knows"
    assert world.memory.staged_tokens == 6
    for layer in range(LAYERS):
        planes = world.arena.planes_of(layer)
        world.memory.staging.fill(planes)
        assert torch.equal(world.contents(slots)[planes], before[planes])
    world.memory.staging.end()
    assert world.arena.residency.free_cells == free
    assert (world.arena.residency.table[:, slots] == EVICTED).all()
    world.assert_sound()


def test_staging_that_does_not_fit_changes_nothing() -> None:
    world = World(1, physical=2, host=20)
    slots = []
    for _ in range(5):
        slots.append(world.compute(2))
        assert world.memory.write_back(slots[-1])
        world.memory.release_chunk(slots[-1])
    with pytest.raises(OutOfCells):
        world.memory.stage(slots)
    assert not world.memory.staging.active
    world.assert_sound()


@GROUPS
def test_a_selection_belongs_to_its_request(groups: int) -> None:
    """Of a prefix in host memory and a chunk in the arena, kept tokens move to private slots; all stay on the host."""
    world = World(groups)
    prefix, chunk = world.compute(6), world.compute(5)
    slots = torch.cat([prefix, chunk])
    before = world.contents(slots)
    for part in (prefix, chunk):
        assert world.memory.write_back(part)
    world.memory.release_chunk(prefix)
    keep = torch.rand(world.arena.num_planes, 11) < 0.4
    one, two = (world.memory.settle(slots, kept, int(kept.sum())) for kept in (keep, ~keep))
    for own, kept in ((one, keep), (two, ~keep)):
        cells = world.arena.residency.table[:, own.private].long()
        assert torch.equal(cells >= 0, kept)
        assert torch.equal(world.arena.cells[cells[kept]], before[kept])
    assert (world.arena.residency.table[:, slots] == EVICTED).all()
    assert torch.equal(world.host.load(slice(0, world.arena.num_planes), slots), before)
    world.give_slots(one.private)
    assert world.arena.residency.used_cells == int((~keep).sum())
    world.assert_sound()


@GROUPS
def test_a_policy_reads_keys_wherever_they_are(groups: int) -> None:
    """Host memory was full when the last chunk came: the first is there only, the last in the arena only."""
    world = World(groups, host=6)
    prefix, chunk = world.compute(6), world.compute(5)
    slots = torch.cat([prefix, chunk])
    before = world.contents(slots)
    assert world.memory.write_back(prefix)
    assert not world.memory.write_back(chunk)
    world.memory.release_chunk(prefix)
    model = Prompt(0, 0, (), LAYERS, KV_HEADS, KV_HEADS, DIM)
    compressor = Compressor(model, HeadGather(None, 0, 1), Counters(), world.accounting)
    read = compressor._keys_values(slots, world.memory)
    for layer in range(LAYERS):
        expected = before[world.arena.planes_of(layer)].permute(1, 2, 0, 3, 4).flatten(2, 3)
        assert torch.equal(read(layer), expected)


@pytest.mark.parametrize("lacking", ["cells", "slots"])
def test_a_selection_that_does_not_fit_gives_everything_back(lacking: str) -> None:
    world = World(1, physical=4, host=20)
    prefixes = []
    for _ in range(3):
        prefixes.append(world.compute(4))
        assert world.memory.write_back(prefixes[-1])
        world.memory.release_chunk(prefixes[-1])
    slots = torch.cat(prefixes)
    if lacking == "slots":
        world.next = SLOTS - 2
    keep = torch.ones(world.arena.num_planes, len(slots), dtype=torch.bool)
    with pytest.raises(OutOfMemory):
        world.memory.settle(slots, keep, keep.numel())
    assert world.arena.residency.used_cells == 0
    world.assert_sound()


@pytest.mark.parametrize(
    ("physical", "others", "status", "why"),
    [
        pytest.param(10, 0, HTTPStatus.BAD_REQUEST, "it holds 10 uncompressed", id="never"),
        pytest.param(20, 12, HTTPStatus.SERVICE_UNAVAILABLE, "others use it now", id="now"),
    ],
)
def test_a_failed_policy_says_why_its_prompt_is_lost(physical: int, others: int, status: HTTPStatus, why: str) -> None:
    """A prompt of 12 tokens in host memory, which was admitted for what the policy was to keep."""
    world = World(1, physical=physical, host=20)
    parts = []
    for _ in range(3):
        parts.append(world.compute(4))
        assert world.memory.write_back(parts[-1])
        world.memory.release_chunk(parts[-1])
    if others:
        world.compute(others)
    config = config_from({"kv_policy": "vlcache"})
    assert config is not None
    job = CompressionJob(Asked(Choices(config).default, (), 12, 1))
    said: list[tuple[str, HTTPStatus]] = []
    job.host = HostShare(first_row=11, ratio=0.1, abort=lambda *words: said.append(words))
    model = Prompt(0, 0, (), LAYERS, KV_HEADS, KV_HEADS, DIM)
    compressor = Compressor(model, HeadGather(None, 0, 1), Counters(), world.accounting)
    compressor.host = world.memory
    compressor.fail(job, ValueError("too hot"))
    compressor.finish(job, torch.cat(parts).to(torch.int32))
    ((message, given),) = said
    assert given == status
    assert "the policy vlcache failed (ValueError: too hot), and the prompt of 12 tokens does not fit" in message
    assert why in message
    assert job.host.ratio == 1.0, "when it comes back it is admitted for all of it"
    assert world.arena.residency.used_cells == others * LAYERS
    world.assert_sound()


def test_memory_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no")

    cells = torch.zeros(3, 2, 1, 4)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"GiB of memory cannot be had: no"):
        HostPool(2, 4, 4, cells)
