"""How fast prefixes come from pinned memory, a layer of Qwen2.5-VL-7B at a time, beside a plain copy of the bytes.

Writes a JSON file after every size, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from benchmarks.common.host import host_block
from benchmarks.gpu.timing import samples_of
from vlcache_kernels.copy_cells import copy_cells

KV_HEADS, DIM = 4, 128
TOKENS = (2048, 8192, 32768, 131072)


def measure(tokens: int, device: torch.device) -> dict[str, object]:
    """One layer: rows in order and rows in any order, and a plain copy; milliseconds and GB/s."""
    host = torch.zeros(1, tokens, 2, KV_HEADS, DIM, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    arena = torch.zeros(1, tokens + 1, 2, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
    cells = torch.arange(1, tokens + 1, dtype=torch.int32, device=device)[None]
    orders = {
        "rows in order": torch.arange(tokens, dtype=torch.int32, device=device)[None],
        "rows in any order": torch.randperm(tokens, device=device).to(torch.int32)[None],
    }
    calls = {name: (lambda rows=rows: copy_cells(arena, cells, host, rows)) for name, rows in orders.items()}
    calls["plain copy"] = lambda: arena[0, 1:].copy_(host[0], non_blocking=True)
    calls["written back"] = lambda: copy_cells(host, orders["rows in order"], arena, cells)
    found: dict[str, object] = {"tokens": tokens, "bytes": host.nbytes}
    for name, call in calls.items():
        samples, _ = samples_of([call], graph=False)
        found[name] = {"ms": median(samples), "gb_per_s": host.nbytes / median(samples) / 1e6, "samples": samples}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="one small size on a CPU; its times mean nothing")
    args = parser.parse_args()
    device = torch.device("cpu" if args.dry_run else "cuda")
    result = {"task": "staging", "dry_run": args.dry_run, "host": host_block(), "sizes": []}
    for tokens in (64,) if args.dry_run else TOKENS:
        result["sizes"].append(measure(tokens, device))
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: value for name, value in result["sizes"][-1].items() if name != "samples"}), flush=True)


if __name__ == "__main__":
    main()
