"""FlashInfer's schedule, written where the lengths are: on the device, for all layers in one launch.

FlashInfer cuts keys into chunks and lists which block computes which tile of queries against which chunk.  Its own
planner does that on the host, from lengths on the host, once per list of lengths; with layers that keep different
numbers of cells that is once per layer and step.  These functions write the same bytes.
"""

from __future__ import annotations

import torch

from vlcache_kernels.attention_schedule import naive
from vlcache_kernels.attention_schedule.records import PLAN_NUMBERS, ScheduleLayout
from vlcache_kernels.checks import Backend, check_device, check_shape, use_triton

__all__ = ["PLAN_NUMBERS", "ScheduleLayout", "write_schedules"]


def write_schedules(
    kv_indptr: torch.Tensor,
    qo_indptr: torch.Tensor,
    layout: ScheduleLayout,
    out: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """Write one schedule per list of lengths.  With Triton no host synchronisation.

    Args:
        kv_indptr: `[lists, Q + 1]` int32, keys of each sequence; a sequence without keys counts as one of one key.
        qo_indptr: `[Q + 1]` int32, query rows of each sequence, the same in all lists.
        layout: where what lies, as FlashInfer has planned it for `Q` sequences and so many rows.
        out: `[lists, bytes]` uint8, contiguous, `bytes` a multiple of 16 and at least `layout.nbytes`.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.
    """
    lists, sequences = kv_indptr.shape[0], kv_indptr.shape[1] - 1
    check_shape("qo_indptr", qo_indptr, (sequences + 1,))
    check_shape("out", out, (lists, None))
    for name, tensor in (("kv_indptr", kv_indptr), ("qo_indptr", qo_indptr)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} is {tensor.dtype}, expected int32")
    if out.dtype != torch.uint8 or not out.is_contiguous() or out.shape[1] % 16 or out.shape[1] < layout.nbytes:
        raise ValueError(f"out must be contiguous uint8 of at least {layout.nbytes} bytes per list, a multiple of 16")
    check_device(kv_indptr.device, qo_indptr=qo_indptr, out=out)
    if use_triton(backend, kv_indptr.device):
        from vlcache_kernels.attention_schedule import triton

        triton.write_schedules(kv_indptr, qo_indptr, layout, out)
    else:
        naive.write_schedules(kv_indptr, qo_indptr, layout, out)
