"""FlashInfer's schedule in plain Python: the reference."""

from __future__ import annotations

from itertools import pairwise

import torch

from vlcache_kernels.attention_schedule.records import ScheduleLayout

MIN_CHUNK = 128
"""Keys of the smallest chunk."""


def keys_per_chunk(kv: list[int], tiles: list[int], limit: int) -> int:
    """The least size at which all chunks of all tiles are at most `limit`; the longest sequence where none is.

    Args:
        kv: keys of each sequence, at least 1.
        tiles: tiles of query rows of each.
    """
    low, high = MIN_CHUNK, max(kv, default=1)
    while low < high:
        middle = (low + high) // 2
        if sum(tile * -(-keys // middle) for keys, tile in zip(kv, tiles, strict=True)) > limit:
            low = middle + 1
        else:
            high = middle
    return low


def write_schedules(
    kv_indptr: torch.Tensor, qo_indptr: torch.Tensor, layout: ScheduleLayout, out: torch.Tensor
) -> None:
    """See `vlcache_kernels.attention_schedule.write_schedules`; reads lengths on the host."""
    rows = [end - begin for begin, end in pairwise(qo_indptr.tolist())]
    tiles = [-(-count * layout.group // layout.tile) for count in rows]
    for indptr, schedule in zip(kv_indptr.tolist(), out, strict=True):
        kv = [max(1, end - begin) for begin, end in pairwise(indptr)]
        size = keys_per_chunk(kv, tiles, layout.limit)
        chunks = [-(-keys // size) for keys in kv]
        work = [
            (number, tile, chunk)
            for number, (count, parts) in enumerate(zip(tiles, chunks, strict=True))
            for tile in range(count)
            for chunk in range(parts)
        ]
        merge, outputs = [0], [0]
        for count, parts in zip(rows, chunks, strict=True):
            merge += [merge[-1] + parts * (row + 1) for row in range(count)]
            outputs.append(outputs[-1] + parts * count)
        parts_of = {
            layout.request: [request for request, _, _ in work],
            layout.qo_tile: [tile for _, tile, _ in work],
            layout.kv_tile: [chunk for _, _, chunk in work],
            layout.merge: merge,
            layout.outputs: outputs,
            layout.chunk: [size],
            layout.total_rows: [sum(rows)],
        }
        for begin, numbers in parts_of.items():
            place = schedule[begin : begin + 4 * len(numbers)]
            place.copy_(torch.tensor(numbers, dtype=torch.int32).view(torch.uint8))
        schedule[layout.mask : layout.mask + layout.blocks] = 0
        schedule[layout.mask : layout.mask + len(work)] = 1
