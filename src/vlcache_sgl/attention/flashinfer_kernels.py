"""FlashInfer's FA2 prefill kernels, one level below its wrappers: a wrapper plans on the host once per list of lengths.

These kernels serve prefill and decode alike.  A plan is a list of numbers that says where a schedule lies in a buffer,
and depends on how many sequences and query rows there are; the schedule itself depends on the lengths too, and is
written on the device (`vlcache_kernels.attention_schedule`), or by FlashInfer where no key is cut into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_kernels.attention_schedule import ScheduleLayout, write_schedules
from vlcache_sgl.memory.scales import Scales
from vlcache_sgl.streams import passed_event, to_device

WORKSPACE_BYTES = 128 << 20
"""For partial outputs of chunks of keys, shared by all plans.  FlashInfer says so when it is too small."""
PLAN_BYTES = 2 << 20
"""For the schedule of one plan of FlashInfer's: 12 bytes per tile of queries, 4 per query where keys are cut."""
BLOCKS_PER_CORE = 2
"""Blocks that FlashInfer wants per multiprocessor before it stops to cut keys."""
NON_CAUSAL, CAUSAL = 0, 1
"""FlashInfer's numbers for masks."""
NHD = 0
"""Its number for our order of dimensions."""


@dataclass(frozen=True)
class Plan:
    """What a launch reads besides keys, values and lists of cells."""

    numbers: Sequence[int]
    """FlashInfer's, see `ScheduleLayout.of`."""
    starts: torch.Tensor
    """`[Q + 1]` int32 on the device, query rows before each sequence."""
    last_pages: torch.Tensor
    """`[Q]` int32 on the device, all 1: the last page of a sequence has one token, as every page has."""
    layout: ScheduleLayout | None
    """Where the schedule is to be written for every list of lengths; None: FlashInfer has written one for all."""


class FlashInferKernels:
    """Plans and launches for one shape of attention.

    Args:
        heads: query heads of a sequence.
        kv_heads, dim: of its keys and values.
        dtype: of queries, outputs, and keys and values that are not in the arena.
        arena: `[cells + 1, 2, kv_heads, dim]`.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, arena: torch.Tensor) -> None:
        self._heads, self._kv_heads, self._dim = heads, kv_heads, dim
        self._device = arena.device
        pages = arena.unsqueeze(2)
        self._keys, self._values = pages[:, 0], pages[:, 1]
        self._paged, self._pdl = _library(dtype, arena.dtype, dim, self._device)
        self._ragged, _ = _library(dtype, dtype, dim, self._device)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._scratch = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=self._device)
        self._staging: list[tuple[torch.Tensor, Any | None]] = []
        cores = torch.cuda.get_device_properties(self._device).multi_processor_count if self._on_gpu else 1
        self.limit = BLOCKS_PER_CORE * cores // kv_heads
        """Blocks per KV head that run at the same time."""

    @property
    def _on_gpu(self) -> bool:
        return bool(self._device.type == "cuda")

    # -- plans ------------------------------------------------------------------------------------------------------

    def plan_cut(self, counts: Sequence[int]) -> Plan:
        """A plan for sequences of so many query rows, whose keys are cut into chunks by `write`."""
        starts = _starts(counts)
        numbers = self._plan(self._paged, starts, torch.zeros_like(starts), graph=True, cut=True)
        layout = ScheduleLayout.of(numbers, self._heads // self._kv_heads, self.limit)
        return self._made(numbers, starts, layout)

    def plan_whole(self, counts: Sequence[int]) -> Plan:
        """A plan whose schedule does not depend on the number of keys: none are cut into chunks."""
        starts = _starts(counts)
        numbers = self._plan(self._paged, starts, starts, graph=False, cut=False)
        return self._made(numbers, starts, None)

    def plan_own(self, counts: Sequence[int]) -> Plan:
        """A plan for sequences that attend to their own keys only, as many as their rows; see `run_own`."""
        starts = _starts(counts)
        numbers = self._plan(self._ragged, starts, starts, graph=False, cut=True)
        return self._made(numbers, starts, None)

    def _made(self, numbers: list[int], starts: torch.Tensor, layout: ScheduleLayout | None) -> Plan:
        ones = torch.ones(starts.numel() - 1, dtype=torch.int32, device=self._device)
        return Plan(numbers, to_device(starts, self._device), ones, layout)

    def fills_the_gpu(self, plan: Plan) -> bool:
        """Whether there are enough tiles of queries that nothing is gained by cutting keys."""
        return bool(plan.numbers[0] >= self.limit)

    def write(self, plan: Plan, indptr: torch.Tensor, schedules: torch.Tensor) -> None:
        """Write the schedules `[lists, bytes]` uint8 of a plan for the lists of lengths `indptr` `[lists, Q + 1]`."""
        assert plan.layout is not None
        write_schedules(indptr, plan.starts, plan.layout, schedules)

    def _plan(self, module: Any, starts: torch.Tensor, keys: torch.Tensor, *, graph: bool, cut: bool) -> list[int]:
        sequences = starts.numel() - 1
        pinned = self._free_staging()
        numbers = module.plan(
            self._workspace,
            self._scratch,
            pinned,
            starts,
            keys,
            keys.diff(),
            int(starts[-1]),
            sequences,
            self._heads,
            self._kv_heads,
            1,  # tokens per page
            graph,
            self._dim,
            self._dim,
            False,  # causal: not read by the planner of FA2
            -1,  # no window
            -1,  # no fixed chunk
            not cut,
            0,  # blocks beside ours
            0,  # rows of every sequence: they may differ
        )
        self._staging.append((pinned, passed_event(self._device)))
        return [int(number) for number in numbers]

    def _free_staging(self) -> torch.Tensor:
        """Pinned memory through which a schedule goes to the device; used again when the device has fetched it."""
        for number, (buffer, fetched) in enumerate(self._staging):
            if fetched is None or fetched.query():
                del self._staging[number]
                return buffer
        return torch.zeros(PLAN_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu)

    # -- launches ---------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: Plan,
        schedule: torch.Tensor | None,
        queries: torch.Tensor,
        indptr: torch.Tensor,
        cells: torch.Tensor,
        scale: float,
        scales: Scales,
        *,
        causal: bool,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of `queries` `[R, heads, dim]` over cells; returns the same shape.

        Args:
            schedule: `[bytes]` uint8, what `write` has written; None for a plan without.
            indptr: `[Q + 1]` int32, cells of each sequence.
            cells: `[*]` int32.
            scale: factor of the logits.
            scales: what stored keys and values are multiplied by.
            causal: the last query row of a sequence sees all keys, each earlier one a key less.
            lse: out, `[R, heads]` float32, base 2: `natural` makes it natural.
        """
        out = torch.empty_like(queries)
        self._paged.paged_run(
            self._workspace,
            self._scratch if schedule is None else schedule,
            plan.numbers,
            queries,
            self._keys,
            self._values,
            plan.starts,
            indptr,
            cells,
            plan.last_pages,
            out,
            lse,
            CAUSAL if causal else NON_CAUSAL,
            NHD,
            -1,
            self._pdl,
            *_UNUSED,
            0.0,  # no soft cap
            scale * scales.key,
            None,
            None,
            None,
            *_ROTARY,
            0,
            WORKSPACE_BYTES,
        )
        return out if scales.value == 1.0 else out.mul_(scales.value)

    def run_own(
        self,
        plan: Plan,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        *,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of `queries` `[R, heads, dim]` over `keys` and `values` `[R, kv_heads, dim]`; as `run`."""
        out = torch.empty_like(queries)
        self._ragged.ragged_run(
            self._workspace,
            self._scratch,
            plan.numbers,
            queries,
            keys,
            values,
            plan.starts,
            plan.starts,
            out,
            lse,
            CAUSAL,
            NHD,
            -1,
            self._pdl,
            *_UNUSED,
            0.0,
            scale,
            *_ROTARY,
            0,
        )
        return out

    def check_schedules(self) -> None:
        """Compare one schedule of ours with FlashInfer's, before anything relies on it; waits for the device.

        Raises:
            RuntimeError: they differ.
        """
        counts, keys = [1, 3, 1], torch.tensor([0, 4000, 4001, 4500], dtype=torch.int32)
        plan = self.plan_cut(counts)
        assert plan.layout is not None
        size = -(-plan.layout.nbytes // 16) * 16
        ours = torch.zeros(1, size, dtype=torch.uint8, device=self._device)
        self._scratch.zero_()
        for buffer, _ in self._staging:
            buffer.zero_()
        numbers = self._plan(self._paged, _starts(counts), keys, graph=True, cut=True)
        self.write(plan, to_device(keys, self._device)[None], ours)
        if list(numbers) != list(plan.numbers) or not torch.equal(self._scratch[:size].cpu(), ours[0].cpu()):
            raise RuntimeError(
                "this version of FlashInfer schedules attention in another way than 0.7: use --attention-backend triton"
            )


def natural(lse: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp of base 2 in natural units; in place."""
    return lse.mul_(math.log(2))


def _starts(counts: Sequence[int]) -> torch.Tensor:
    """`[Q + 1]` int32 on the host: the sum of `counts` before each sequence."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


_UNUSED = (None,) * 6
"""Custom mask, its lengths, slopes of ALiBi, and three of multi-item scoring."""
_ROTARY = (1.0, 1e4)
"""Scale and base of a rotary embedding that is not applied here."""


def _library(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, device: torch.device) -> tuple[Any, bool]:
    """FlashInfer's module for these types, and whether kernels may start before the one before has ended."""
    from flashinfer.prefill import get_batch_prefill_module
    from flashinfer.utils import device_support_pdl

    plain = (0, False, False, False)  # no position encoding, window, soft cap or reduced precision
    module = get_batch_prefill_module("fa2", dtype, kv_dtype, dtype, torch.int32, dim, dim, *plain)
    return module, bool(device_support_pdl(device))
