"""The memory of a server on a GPU, where a wait of the host is an error: `torch.cuda.set_sync_debug_mode("error")`.

Cells are handed out, evicted, freed and handed out again; prompts are written to pinned memory, staged layer by layer
on a stream of their own, and brought back.  In between the device is kept busy, so that it is behind.  At the end the
books are counted and every copied key compared.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

from vlcache_sgl.compression.exact import HostMemory
from vlcache_sgl.memory.accounting import CellAccounting
from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.host_pool import HostPool

LAYERS, KV_HEADS, DIM, TOKENS = 4, 4, 128, 2048


class Slots:
    """What gives way, and who has slots: 1, 2, 3, ..."""

    def __init__(self, device: torch.device) -> None:
        self._next = torch.arange(1, 8 * TOKENS, device=device)
        self._used = 0

    def take_slots(self, count: int) -> torch.Tensor:
        self._used += count
        return self._next[self._used - count : self._used]

    def give_slots(self, slots: torch.Tensor) -> None:
        """None are used twice."""

    def make_host_room(self, tokens: int) -> None:
        """There is enough."""

    def make_cells(self, cells: int) -> None:
        """There are enough."""


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """On a GPU whatever waits raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def busy(device: torch.device) -> None:
    """Some milliseconds of work in front of what follows."""
    if device.type == "cuda":
        square = torch.ones(4096, 4096, device=device)
        for _ in range(8):
            square = square @ square * 1e-4


def run(device: torch.device, groups: int, rounds: int) -> None:
    """Several prompts through host memory; raises where something is wrong."""
    arena = Arena(
        num_cells=4 * TOKENS * LAYERS * groups,
        num_slots=8 * TOKENS,
        num_layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        groups=groups,
        dtype=torch.bfloat16,
        device=device,
    )
    accounting = CellAccounting(arena, 4 * TOKENS)
    accounting.host = HostPool(arena.num_planes, arena.residency.num_slots, 4 * TOKENS, arena.raw)
    slots = Slots(device)
    memory = HostMemory(accounting, slots)
    tokens = TOKENS // 4
    for _ in range(rounds):
        prompt = slots.take_slots(tokens)
        with no_waits(device):
            arena.residency.attach(prompt)
            cells = arena.residency.table[:, prompt].long()
            written = torch.randn(*cells.shape, *arena.cells.shape[1:], device=device).to(arena.cells.dtype)
            arena.cells[cells] = written
            keep = torch.zeros(arena.num_planes, tokens, dtype=torch.bool, device=device)
            keep[:, ::3] = True
            busy(device)
            assert memory.write_back(prompt)
            memory.release_chunk(prompt)
            memory.stage([prompt])
            seen = []
            for layer in range(LAYERS):
                planes = slice(layer * groups, (layer + 1) * groups)
                memory.staging.fill(planes)
                busy(device)
                seen.append(arena.cells[arena.residency.table[planes][:, prompt].long()])
            memory.staging.end()
            kept = arena.num_planes * len(range(0, tokens, 3))
            own = memory.settle(prompt, keep, kept)
        assert torch.equal(torch.cat(seen), written), "what was staged is not what was written"
        found = arena.cells[arena.residency.table[:, own.private].long().clamp(min=0)]
        assert torch.equal(found[keep], written[keep]), "what was brought back is not what was written"
        with no_waits(device):
            accounting.release(own.private)
            accounting.release(prompt)
    problems = accounting.verify()
    assert problems == [], problems
    assert arena.residency.used_cells == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, where nothing waits")
    device = torch.device("cpu" if parser.parse_args().dry_run else "cuda")
    for groups in (1, KV_HEADS):
        run(device, groups, rounds=1)  # compiles
        run(device, groups, rounds=8 if device.type == "cuda" else 1)
        print(f"{groups} cells per token and layer: nothing waits, nothing is lost", flush=True)


if __name__ == "__main__":
    main()
