"""Attention over cells with SGLang's own Triton kernels: its extend and decode attention, our lists of cells.

Both kernels take ragged lists of rows of a key and a value buffer; here the rows are cells, K and V two strided views
of the arena, and every layer has lists of its own.  With a cell per KV head, every (plane, request) is a sequence of
its own with the query heads of that KV head: queries are regrouped from `[T, H, D]` to `[G * T, H / G, D]`.

The host never waits for the device, and after a change of rows only as `device_index` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_kernels.residency_index import ResidencyIndex
from vlcache_sgl.attention.base import AttentionKernels, HeadShape, NoWindows, Observe
from vlcache_sgl.attention.grouping import join_groups, join_lse, split_groups, with_rows
from vlcache_sgl.memory.batches import DecodeBatch, ExtendBatch, Memory
from vlcache_sgl.memory.device_index import DeviceIndex, look_up

PROGRAMS_PER_CORE = 2
"""Decode programs per multiprocessor to aim at when keys are cut into parts: the kernel runs 4 warps, two hide each
other's waiting."""
MAX_PARTS = 64
"""Most parts that a sequence is cut into where a batch is too small to fill the device otherwise."""
MIN_PART = 256
"""Keys below which cutting costs more (a second pass over partial outputs) than it gains."""
HEADS_PER_PROGRAM = 16
"""Query heads of one KV head that one program of SGLang's grouped decode kernel computes."""


@dataclass(frozen=True)
class DecodePlan:
    """What the decode kernels of all layers read in one step."""

    index: ResidencyIndex
    parts: torch.Tensor
    """`[layers, Q]` int32, into how many parts each sequence is cut."""
    partial: tuple[torch.Tensor, torch.Tensor]
    """Outputs and sums of the parts; all layers use them one after the other."""


class TritonProvider(NoWindows):
    """SGLang's Triton attention over cells.

    Args:
        memory: arena, residency and rows.
        shape: the queries.
        kernels: SGLang's.
        kv_splits: parts that one sequence's keys may be cut into in any batch; in small ones they may be more.
    """

    on_device = True
    lists = torch.int64

    def __init__(self, memory: Memory, shape: HeadShape, kernels: AttentionKernels, *, kv_splits: int = 8) -> None:
        self._memory = memory
        self._keys, self._values = memory.arena[:, 0], memory.arena[:, 1]
        self._heads = shape.num_heads // memory.groups
        self._kv_splits = kv_splits
        device = memory.arena.device
        self._cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._index = DeviceIndex(memory, self.lists)
        self._extend: tuple[ExtendBatch, ResidencyIndex, torch.Tensor] | None = None
        self._decode: DecodePlan | None = None
        per_kv_head = max(1, self._heads // self._keys.shape[1])
        self._tiles = -(-self._heads // min(HEADS_PER_PROGRAM, per_kv_head))
        self._room = self._new_room(0)
        self._fixed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._extend_kernel, self._decode_kernel = kernels

    def invalidate(self, row: int) -> None:
        self._index.invalidate(row)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def plan_extend(self, batch: ExtendBatch) -> None:
        for request in batch.requests:
            self._index.invalidate(request.row)
        rows, begins = [r.row for r in batch.requests], [r.begin for r in batch.requests]
        index = look_up(self._memory, torch.int64, rows, begins, batch.rows, batch.prefix_lens)
        # Sequence g * B + b has its queries at g * T + first row of b.
        total = batch.requests[-1].tokens.stop
        starts = (batch.seq_lens - batch.prefix_lens).cumsum(0)
        groups = torch.arange(self._memory.groups, device=starts.device)[:, None] * total
        starts = torch.nn.functional.pad((groups + starts).flatten(), (1, 0))
        self._extend = (batch, index, starts)

    def extend(
        self,
        planes: slice,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        observe: Observe,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._extend is not None
        batch, index, starts = self._extend
        lists, groups = index.at(self._memory.layer_of(planes)), self._memory.groups
        total = batch.requests[-1].tokens.stop
        q, k, v = (split_groups(x[:total], groups) for x in (queries, keys, values))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if batch.want_lse else None
        scales = self._memory.scales_of(planes)
        self._extend_kernel(
            q,
            k,
            v,
            out,
            self._keys,
            self._values,
            starts,
            lists.indptr,
            lists.indices,
            None,  # custom mask
            True,  # causal
            None,
            max(request.count for request in batch.requests),
            scales.key,
            scales.value,
            sm_scale=scale,
            lse_extend=lse,
        )
        return with_rows(join_groups(out, groups), queries.shape[0]), join_lse(lse, groups)

    # -- decode -----------------------------------------------------------------------------------------------------

    def plan_decode(self, batch: DecodeBatch) -> None:
        index = self._index.step(batch)
        sequences = index.indptr.shape[1] - 1
        most = self._most_parts(sequences)
        parts = count_parts(index.indptr, sequences * self._tiles, self._cores, most)
        if batch.recorded:
            assert self._fixed is not None
            fixed, room = self._fixed
            self._decode = DecodePlan(index, fixed[:, :sequences].copy_(parts), self._partials(room, sequences))
            return
        if self._room.numel() < self._partial_size(sequences):
            self._room = self._new_room(sequences)
        self._decode = DecodePlan(index, parts, self._partials(self._room, sequences))

    def decode(self, planes: slice, queries: torch.Tensor, scale: float) -> torch.Tensor:
        assert self._decode is not None
        layer = self._memory.layer_of(planes)
        lists = self._decode.index.at(layer)
        q = split_groups(queries, self._memory.groups)
        out = torch.empty_like(q)
        scales = self._memory.scales_of(planes)
        self._decode_kernel(
            q,
            self._keys,
            self._values,
            out,
            lists.indptr,
            lists.indices,
            *self._decode.partial,
            self._decode.parts[layer],
            self._decode.partial[0].shape[2],
            scale,
            scales.key,
            scales.value,
        )
        return join_groups(out, self._memory.groups)

    def init_graphs(self, max_batch: int) -> None:
        self._index.reserve(max_batch)
        sequences = self._memory.groups * max_batch
        shape = (self._memory.num_layers, sequences)
        parts = torch.ones(shape, dtype=torch.int32, device=self._memory.arena.device)
        self._fixed = (parts, self._new_room(sequences))

    def fits_graph(self, rows: list[int], lengths: list[int]) -> bool:
        return self._index.fits(rows, lengths)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _most_parts(self, sequences: int) -> int:
        """Parts that one sequence of a batch may be cut into: a power of two above `kv_splits`, as each is compiled."""
        wanted = -(-PROGRAMS_PER_CORE * self._cores // max(1, sequences * self._tiles))
        most = self._kv_splits
        while most < min(wanted, MAX_PARTS):
            most *= 2
        return most

    def _partial_size(self, sequences: int) -> int:
        """Numbers that the parts of a batch leave: outputs and sums."""
        dim = int(self._memory.arena.shape[-1])
        return sequences * self._heads * self._most_parts(sequences) * (dim + 1)

    def _new_room(self, sequences: int) -> torch.Tensor:
        """Room for the parts of any batch of up to so many sequences, float32."""
        most = max(self._partial_size(count) for count in range(sequences + 1))
        return torch.empty(most, dtype=torch.float32, device=self._memory.arena.device)

    def _partials(self, room: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In `room`, outputs `[Q, H / G, parts, D]` and sums `[Q, H / G, parts]`."""
        shape, dim = (sequences, self._heads, self._most_parts(sequences)), int(self._memory.arena.shape[-1])
        sums = shape[0] * shape[1] * shape[2]
        outputs, rest = torch.split(room[: sums * (dim + 1)], [sums * dim, sums])
        return outputs.view(*shape, dim), rest.view(shape)


def count_parts(indptr: torch.Tensor, programs: int, cores: int, most: int) -> torch.Tensor:
    """Into how many parts to cut each sequence, `[layers, Q]` int32, decided on the device.

    Parts of one layer are of about equal size, so that a long sequence does not run on alone.

    Args:
        indptr: `[layers, Q + 1]` int32.
        programs: programs of one layer if nothing is cut.
        cores: multiprocessors.
        most: limit.
    """
    wanted = min(most, max(1, -(-PROGRAMS_PER_CORE * cores // programs)))
    lengths = indptr.diff(dim=1)
    size = (-(-lengths.amax(1, keepdim=True) // wanted)).clamp(min=MIN_PART)
    return (-(-lengths // size)).clamp(1, most).to(torch.int32)
