"""What must hold of a `scheduler_world.World` between two steps: slots, cells, host memory, and who reads what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens

from vlcache_sgl.memory.own_slots import OwnSlots
from vlcache_sgl.recall.areas import EMPTY, RecallArea
from vlcache_sgl.sglang_hooks.jobs import job_of

if TYPE_CHECKING:
    from scheduler_world import World


def marks(req: Req, begin: int, end: int, planes: int) -> torch.Tensor:
    """`[planes, tokens]` whole numbers that float32 holds exactly: token, its whole prefix, its key, the plane."""
    tokens = [*req.origin_input_ids, *req.output_ids]
    found = [
        [hash((req.extra_key, *tokens[: i + 1], plane)) % 2**24 for i in range(begin, end)] for plane in range(planes)
    ]
    return torch.tensor(found, dtype=torch.float32).view(planes, end - begin)


def attend(world: World, staged: Sequence[tuple[Req, torch.Tensor]]) -> None:
    """Layer after layer, every token of the prefixes `[tokens]` of requests is within reach, and is the right one."""
    if not staged:
        return
    assert world.host is not None
    memory, table = world.host.memory, world.arena.residency.table
    memory.stage([slots for _, slots in staged])
    for plane in range(len(table)):
        memory.staging.fill(slice(plane, plane + 1))
        for req, slots in staged:
            cells = table[plane, slots].long()
            assert (cells > 0).all(), "a token of the prefix is neither in the arena nor in host memory"
            written = marks(req, 0, len(slots), len(table))[plane]
            assert torch.equal(world.arena.cells[cells, 0, 0, 0], written), f"{req.rid} is shown others' tokens"
    memory.staging.end()


def check(world: World) -> None:
    """Raise AssertionError for the first thing that does not hold."""
    _check_slots(world)
    _check_cells(world)
    _check_host(world)
    _check_reads(world)


def _check_slots(world: World) -> None:
    allocator, tree = world.allocator, world.tree
    private = sum(kv_private_tokens(req.kv, 1) for req in world.owners())
    private += sum(len(own.private) for own in map(_own, world.owners()) if own is not None)
    free, owned = allocator.available_size(), tree.evictable_size() + tree.protected_size()
    assert free + owned + private == world.arena.residency.num_slots
    assert int(allocator.accounting._in_tree.sum()) == tree.evictable_size() + tree.protected_size()
    unlocked = int((allocator.accounting._in_tree & (allocator.accounting._locks == 0)).sum())
    assert unlocked == tree.evictable_size(), "locks are not counted as the tree counts them"
    assert int(allocator.accounting._locks.min()) >= 0
    assert not (allocator.accounting._in_tree[allocator.free_pages]).any()


def _check_cells(world: World) -> None:
    allocator, residency = world.allocator, world.arena.residency
    pending = [freed.numbers[: int(freed.count)] for _, freed in residency.free._pending]
    mapped = residency.table[:, 1:]
    everything = torch.cat([mapped[mapped >= 0], residency.free.numbers, *pending])
    once = torch.arange(1, residency.num_cells + 1, dtype=torch.int32)
    assert torch.equal(everything.sort().values, once), "a cell is lost or has two homes"
    assert (residency.table[:, allocator.free_pages] < 0).all(), "a free slot has cells"
    for event, cells in world.evictions:
        assert event.passed or not torch.isin(cells, mapped).any(), "cells were handed out under a running forward"
    in_tree = allocator.accounting._in_tree.nonzero().flatten()
    waiting = sum(len(cells) for cells in pending)
    assert int((residency.table[:, in_tree] >= 0).sum()) <= allocator.accounting.tree_cells
    assert allocator.accounting.tree_cells + allocator.accounting.request_cells == residency.used_cells
    assert residency.free_cells + int((mapped >= 0).sum()) + waiting == residency.num_cells
    if not pending:
        assert allocator.verify_byte_accounting() == []
    if allocator.accounting.host is not None:
        assert allocator.accounting.host.check_integrity() == []
        free = allocator.accounting.host.rows[allocator.free_pages]
        assert (free < 0).all(), "a free slot has a row of host memory"


def _own(req: Req) -> OwnSlots | None:
    job = job_of(req)
    return None if job is None or job.host is None else job.host.own


def _check_reads(world: World) -> None:
    table = world.arena.residency.table
    planes = len(table)
    for req in world.owners():
        end = req.kv.kv_allocated_len
        slots = world.rows.req_to_token[req.kv.req_pool_idx, :end].long()
        cells = table[:, slots].long()
        kept = cells >= 0
        job = job_of(req)
        read, written = (
            world.arena.cells[cells.clamp(min=0), 0, 0, 0],
            _with_recalled(cells, marks(req, 0, end, planes), None if job is None else job.recalls),
        )
        assert torch.equal(read[kept], written[kept]), f"{req.rid} reads others"
        if job is None or (not job.progress.done and job.host is None):
            own = kept[:, req.kv.cache_protected_len :]
            assert own.all(), "evicted before the decision"
        assert kept[:, len(req.origin_input_ids) :].all(), "an answer was evicted"


def _with_recalled(cells: torch.Tensor, written: torch.Tensor, area: RecallArea | None) -> torch.Tensor:
    """What the cells `[planes, tokens]` of a request must hold: `written`, but in its area what has come back."""
    if area is None:
        return written
    written = written.clone()
    for plane, (own, positions) in enumerate(zip(area.cells, area.positions, strict=True)):
        held = positions[positions != EMPTY]
        assert len(held.unique()) == len(held), "a token has come back twice"
        assert not area.fixed[plane, held].any(), "what was kept has come back"
        for cell, position in zip(own[own >= 0].tolist(), written[plane, held].tolist(), strict=True):
            written[plane, cells[plane] == cell] = position
    return written


def _check_host(world: World) -> None:
    """Everything of a prompt that is about to be published is in host memory, whatever its request keeps."""
    host = world.allocator.accounting.host
    for req in world.owners():
        job, own = job_of(req), _own(req)
        if host is None or own is None or job is None or job.host is None or job.host.unwritten:
            continue
        rows = host.rows[own.shared].long()
        assert (rows >= 0).all(), f"{req.rid} has lost a token"
        assert torch.equal(host.cells[:, rows, 0, 0, 0], marks(req, 0, len(rows), world.arena.residency.num_planes))
        assert (world.arena.residency.table[:, own.shared] < 0).all(), "what the tree shares is not in the arena"
