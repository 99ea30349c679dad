"""Schedules written by a kernel are those of the reference, which are FlashInfer's (`test_flashinfer_schedule.py`)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from vlcache_kernels.attention_schedule import ScheduleLayout, write_schedules


def layout_for(counts: list[int], group: int, limit: int, tile: int) -> ScheduleLayout:
    """Parts one behind the other, as FlashInfer lays them out."""
    rows, sequences = sum(counts), len(counts)
    blocks = max(limit, -(-rows * group // tile) + sequences - 1)
    sizes = [4 * blocks] * 3 + [4 * (sequences + 1) + 4, 4, 4 * (rows + 1), blocks]
    places = [0]
    for size in sizes:
        places.append(-(-(places[-1] + size) // 16) * 16)
    request, qo_tile, kv_tile, outputs, total, merge, mask, _ = places
    chunk = outputs + 4 * (sequences + 1)
    return ScheduleLayout(
        blocks=blocks,
        rows=rows,
        tile=tile,
        group=group,
        limit=limit,
        total_rows=total,
        request=request,
        qo_tile=qo_tile,
        kv_tile=kv_tile,
        merge=merge,
        outputs=outputs,
        chunk=chunk,
        mask=mask,
    )


@pytest.mark.parametrize(
    ("counts", "group", "limit", "tile"),
    [([1] * 5, 7, 66, 16), ([1] * 300, 1, 33, 16), ([40, 1, 17], 4, 33, 64), ([200], 8, 20, 128)],
)
def test_the_kernel_writes_what_the_reference_does(
    counts: list[int], group: int, limit: int, tile: int, device: torch.device
) -> None:
    """Two lists of ragged lengths, over what another schedule has left there."""
    rng = torch.Generator().manual_seed(limit)
    lengths = torch.randint(0, 3000, (2, len(counts)), generator=rng)
    lengths[0, 0] = 0
    kv = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    layout = layout_for(counts, group, limit, tile)
    size = -(-layout.nbytes // 16) * 16 + 32
    want = torch.zeros(2, size, dtype=torch.uint8)
    write_schedules(kv, starts, layout, want, backend="naive")
    got = torch.full((2, size), 77, dtype=torch.uint8, device=device)
    write_schedules(kv.to(device), starts.to(device), layout, got, backend="triton")
    work = int(want[:, layout.mask : layout.mask + layout.blocks].sum(1).max())
    for row in range(2):
        mine, active = got[row].cpu(), int(want[row, layout.mask : layout.mask + layout.blocks].sum())
        parts = {
            **dict.fromkeys((layout.request, layout.qo_tile, layout.kv_tile), 4 * active),
            layout.merge: 4 * (layout.rows + 1),
            layout.outputs: 4 * (len(counts) + 1),
            layout.chunk: 4,
            layout.total_rows: 4,
            layout.mask: layout.blocks,
        }
        for begin, length in parts.items():
            assert torch.equal(mine[begin : begin + length], want[row, begin : begin + length])
        assert (mine[layout.nbytes :] == 77).all(), "nothing is written behind a schedule"
    assert work > len(counts) or limit < len(counts), "some keys are cut"


def test_what_is_no_plan_for_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match="not a plan"):
        ScheduleLayout.of([0] * 15, 1, 1)
    with pytest.raises(ValueError, match="not a plan"):
        ScheduleLayout.of([1] * 14, 1, 1)
