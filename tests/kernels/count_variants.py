"""Serve plausible traffic without a GPU and print, as JSON, how many variants Triton would compile of each kernel.

A script for `test_variants.py`, in its own process because the other kernel tests switch Triton to its interpreter.
Only the launch is replaced: what tells variants apart is asked of Triton's own binder, for compute capability 9.0.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vlcache_kernels.arena_write.triton import arena_write
from vlcache_kernels.attention_schedule import ScheduleLayout
from vlcache_kernels.attention_schedule.triton import write_schedules
from vlcache_kernels.attention_stats import RowBatch, StatsRequest
from vlcache_kernels.attention_stats.launch import batch_attention_stats
from vlcache_kernels.copy_cells.triton import copy_cells
from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_kernels.residency_index.triton import append_tokens, residency_index
from vlcache_kernels.select.triton import free_list, select

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
LAYERS, HEADS, KV_HEADS, DIM, SLOTS = 4, 28, 4, 128, 1000
found: dict[str, set[str]] = defaultdict(set)
binders: dict[int, Any] = {}


def count(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for `JITFunction.run`."""
    if id(self) not in binders:
        binders[id(self)] = create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialization, options = binders[id(self)](*args, **kwargs)
    found[self.__name__].add(repr((specialization, sorted(options.items()))))


def somewhere(rng: random.Random, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Zeros that begin anywhere in memory, as a row of a larger tensor does."""
    first = rng.randint(0, 3)
    size = torch.Size(shape).numel()
    return torch.zeros(size + first, dtype=dtype)[first:].view(shape)


def decode(rng: random.Random, table: torch.Tensor, rows: torch.Tensor) -> None:
    """One step of some requests: lists looked up or continued, schedules, keys and values written."""
    batch, longest = rng.randint(1, 64), rng.choice([1, 16, 900, 2100, 9000, 33000])
    numbers = somewhere(rng, batch, dtype=torch.int64)
    out = ResidencyIndex(somewhere(rng, LAYERS, batch + 1), somewhere(rng, LAYERS, rng.randint(2000, 4099)))
    lengths = somewhere(rng, batch, dtype=rng.choice([torch.int32, torch.int64]))
    residency_index(rows, numbers, lengths, table, range(LAYERS), 1, out, longest)
    old = ResidencyIndex(somewhere(rng, LAYERS, rng.randint(2, 65)), somewhere(rng, LAYERS, rng.randint(2000, 4099)))
    source = somewhere(rng, batch, dtype=torch.int64)
    append_tokens(old, numbers, source, table, range(LAYERS), 1, out, longest)
    layout = ScheduleLayout(rng.randint(66, 99), batch, 16, 7, 66, *[16 * rng.randint(0, 9) for _ in range(8)])
    write_schedules(out.indptr, somewhere(rng, batch + 1), layout, torch.zeros(LAYERS, 4096, dtype=torch.uint8))
    write(rng, batch)


def write(rng: random.Random, tokens: int) -> None:
    fused = torch.zeros(tokens, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)
    keys, values = fused[:, HEADS : HEADS + KV_HEADS], fused[:, HEADS + KV_HEADS :]
    arena = torch.zeros(2, 2, KV_HEADS, DIM, dtype=torch.bfloat16)
    slots = somewhere(rng, tokens, dtype=torch.int64)
    arena_write(arena, keys, values, slots, somewhere(rng, 1, tokens), 1.0, 1.0)


def prefill(rng: random.Random, table: torch.Tensor, rows: torch.Tensor) -> None:
    """A batch of prompts: statistics, selection, eviction, and rows of host memory that come and go."""
    requests = rng.randint(1, 3)
    lengths = [rng.randint(20, 6000) for _ in range(requests)]
    voting = [rng.randint(1, 120) for _ in range(requests)]
    total = sum(voting)
    index = ResidencyIndex(somewhere(rng, LAYERS, requests + 1), somewhere(rng, LAYERS, sum(lengths)))
    batch = RowBatch.build(voting, lengths, lengths, "cpu")
    want = StatsRequest(column_sum=True, density=0.01)
    arena = torch.zeros(2, 2, KV_HEADS, DIM, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        queries = torch.zeros(total, HEADS, DIM, dtype=torch.bfloat16)
        row_index = somewhere(rng, total, dtype=torch.int64)
        batch_attention_stats(queries, row_index, arena, index.at(layer), batch, 0.1, want=want)
    write(rng, sum(lengths))
    for length in lengths:
        select(torch.zeros(LAYERS, length), torch.zeros(LAYERS, dtype=torch.int64), torch.zeros(LAYERS, length).char())
        free_list(torch.zeros(LAYERS, length, dtype=torch.bool), somewhere(rng, LAYERS, length))
        free_list(torch.zeros(1, length, dtype=torch.bool), somewhere(rng, 1, length))
        numbers = somewhere(rng, LAYERS, length)
        host = torch.zeros(LAYERS, 3, 2, KV_HEADS, DIM, dtype=torch.bfloat16)
        copy_cells(arena.expand(LAYERS, *arena.shape), numbers, host, numbers[:1].expand(LAYERS, -1))
        copy_cells(host, numbers[:1].expand(LAYERS, -1), arena.expand(LAYERS, *arena.shape), numbers)


def main() -> None:
    JITFunction.run = count
    rng = random.Random(0)
    table, rows = torch.zeros(LAYERS, SLOTS + 1, dtype=torch.int32), torch.zeros(4, 131072, dtype=torch.int32)
    for step in range(int(sys.argv[1])):
        decode(rng, table, rows)
        if step % 20 == 0:
            prefill(rng, table, rows)
    print(json.dumps({name: len(variants) for name, variants in found.items()}))


if __name__ == "__main__":
    main()
