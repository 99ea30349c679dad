"""Compile every kernel for a Hopper GPU without having one, and print one JSON line per kernel.

A script for `test_compiles.py`, in its own process because the other kernel tests switch Triton to its interpreter.
The launchers run as usual on CPU tensors; only the launch itself is replaced by a compilation for compute capability
9.0.  What this shows: the kernels are valid, fit the shared memory and do not spill.  Not: that they are right or fast.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vlcache_kernels.arena_write.triton import arena_write
from vlcache_kernels.attention_schedule import ScheduleLayout
from vlcache_kernels.attention_schedule.triton import write_schedules
from vlcache_kernels.attention_stats import RowBatch, StatsRequest
from vlcache_kernels.attention_stats.launch import batch_attention_stats
from vlcache_kernels.copy_cells.triton import copy_cells
from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_kernels.residency_index.triton import append_tokens, residency_index
from vlcache_kernels.select.triton import free_list, select
from vlcache_kernels.sketch_scores.triton import sketch_scores

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages")
done: set[str] = set()


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for `JITFunction.run`: the types that a launch with these arguments would have."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        name, value = parameter.name, bound[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = repr((self.__name__, signature, constants, attributes, options))
    if key in done:
        return
    done.add(key)
    kernel = triton.compile(ASTSource(self, signature, constants, attributes), target=TARGET, options=options)
    line = {"kernel": self.__name__, "shared": kernel.metadata.shared, **options, **resources(kernel.asm["cubin"])}
    line["constants"] = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
    print(json.dumps(line), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack, if Triton's package carries the disassembler."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    return {} if found is None else {"registers": int(found[1]), "stack": int(found[2])}


def statistics(
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    want: StatsRequest,
    stored: torch.dtype | None = None,
) -> None:
    batch = RowBatch.build((rows,), (4096,), (4096,), "cpu")
    index = ResidencyIndex(torch.zeros(2, dtype=torch.int32), torch.zeros(16, dtype=torch.int32))
    queries = torch.zeros(rows, heads, head_dim, dtype=dtype)
    arena = torch.zeros(2, 2, kv_heads, head_dim, dtype=stored or dtype)
    batch_attention_stats(queries, torch.zeros(rows, dtype=torch.int64), arena, index, batch, 0.1, want=want)
    if want == StatsRequest(column_sum=True):
        lse = torch.zeros(heads, rows)
        batch_attention_stats(queries, torch.zeros(rows).long(), arena, index, batch, 0.1, want=want, lse=lse)


def indexes() -> None:
    index = ResidencyIndex.allocate(2, 6, 100, "cpu")
    rows, lengths = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    residency = torch.zeros(4, 100, dtype=torch.int32)
    residency_index(torch.zeros(3, 40, dtype=torch.int32), rows, lengths, residency, range(4), 2, index, 40_000)
    append_tokens(index, rows, rows, residency, range(4), 2, index, 40_000)
    wide = ResidencyIndex.allocate(2, 6, 100, "cpu", torch.int64)  # as SGLang's Triton attention reads them
    residency_index(torch.zeros(3, 40, dtype=torch.int32), rows, lengths, residency, range(4), 2, wide, 40_000)
    append_tokens(wide, rows, rows, residency, range(4), 2, wide, 40_000)


def selections(owned: int) -> None:
    scores, k = torch.zeros(3, owned), torch.zeros(3, dtype=torch.int64)
    select(scores, k, torch.zeros(owned, dtype=torch.int8))
    select(scores, k, torch.zeros(3, owned, dtype=torch.int8))
    select(scores, k, None)
    free_list(torch.zeros(3, owned, dtype=torch.bool), torch.zeros(3, owned, dtype=torch.int32))


def writes(head_dim: int, dtype: torch.dtype, stored: torch.dtype | None = None) -> None:
    keys = torch.zeros(64, 8, head_dim, dtype=dtype)
    slots = torch.zeros(64, dtype=torch.int64)
    residency = torch.zeros(1, 9, dtype=torch.int32)
    arena = torch.zeros(4, 2, 8, head_dim, dtype=stored or dtype)
    for scale in (1.0,) if stored is None else (1.0, 0.5):
        arena_write(arena, keys, keys, slots, residency, scale, scale)


def copies(head_dim: int, dtype: torch.dtype) -> None:
    cells, numbers = torch.zeros(2, 4, 2, 8, head_dim, dtype=dtype), torch.zeros(2, 64, dtype=torch.int32)
    copy_cells(cells, numbers, cells, numbers)


def sketches(head_dim: int) -> None:
    codes = torch.zeros(9, 4, head_dim // 8 + 2, dtype=torch.uint8)
    sketch_scores(torch.zeros(2, 28, head_dim), codes, torch.zeros(2, 64, dtype=torch.int64))


def schedules() -> None:
    layout = ScheduleLayout(
        blocks=66,
        rows=3,
        tile=16,
        group=7,
        limit=66,
        total_rows=0,
        request=0,
        qo_tile=0,
        kv_tile=0,
        merge=0,
        outputs=0,
        chunk=0,
        mask=0,
    )
    indptr = torch.zeros(2, 4, dtype=torch.int32)
    write_schedules(indptr, indptr[0], layout, torch.zeros(2, 256, dtype=torch.uint8))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="all head dims, types, row counts and statistics")
    full = parser.parse_args().full
    JITFunction.run = compile_only
    vl_cache, everything = StatsRequest(column_sum=True, density=0.01), StatsRequest(True, True, True, 0.01, True, True)
    statistics(50, 32, 8, 128, torch.bfloat16, vl_cache)
    statistics(50, 28, 4, 128, torch.bfloat16, StatsRequest(column_sum=True))
    statistics(512, 32, 2, 80, torch.float16, everything)
    statistics(50, 32, 8, 128, torch.float32, vl_cache)
    statistics(50, 32, 4, 512, torch.bfloat16, vl_cache)  # Gemma 4
    indexes()
    selections(5000)
    writes(128, torch.bfloat16)
    for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
        statistics(50, 28, 4, 128, torch.bfloat16, StatsRequest(column_sum=True), stored)
        writes(128, torch.bfloat16, stored)
    copies(128, torch.bfloat16)
    copies(128, torch.uint8)
    sketches(128)
    schedules()
    if full:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for head_dim in (64, 80, 96, 128, 256, 512):
                for rows, heads, kv_heads in ((1, 1, 1), (50, 32, 8), (512, 32, 2)):
                    statistics(rows, heads, kv_heads, head_dim, dtype, everything)
                writes(head_dim, dtype)
                copies(head_dim, dtype)
        for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
            for dtype in (torch.bfloat16, torch.float16):
                for head_dim in (64, 80, 128, 256, 512):
                    statistics(50, 32, 8, head_dim, dtype, everything, stored)
                    writes(head_dim, dtype, stored)
        selections(100)


if __name__ == "__main__":
    main()
