"""Into how many parts SGLang's Triton decode kernel cuts the keys of each sequence, and where the parts' results go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_kernels.residency_index import ResidencyIndex

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
    """What the decode kernels of all layers of a kind read in one step."""

    index: ResidencyIndex
    parts: torch.Tensor
    """`[lists, Q]` int32, into how many parts each sequence is cut."""
    partial: tuple[torch.Tensor, torch.Tensor]
    """Outputs and sums of the parts; all layers use them one after the other."""


class Parts:
    """Plans the decode steps of layers with equal heads.

    Args:
        heads: query heads of a sequence, that is of a cell.
        kv_heads: KV heads of a cell.
        dim: head size.
        kv_splits: parts that one sequence's keys may be cut into in any batch; in small ones they may be more.
        device: where the results go.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, kv_splits: int, device: torch.device) -> None:
        self._heads, self._dim, self._kv_splits, self._device = heads, dim, kv_splits, device
        self._cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        per_kv_head = max(1, heads // kv_heads)
        self._tiles = -(-heads // min(HEADS_PER_PROGRAM, per_kv_head))
        self._room = self._new_room(0)
        self._fixed: tuple[torch.Tensor, torch.Tensor] | None = None

    def reserve(self, lists: int, sequences: int) -> None:
        """Lay out what captured graphs read, for `lists` lists of up to `sequences` sequences."""
        parts = torch.ones((lists, sequences), dtype=torch.int32, device=self._device)
        self._fixed = (parts, self._new_room(sequences))

    def plan(self, index: ResidencyIndex, recorded: bool) -> DecodePlan:
        """One step over these lists; where it is `recorded`, at fixed addresses."""
        sequences = index.indptr.shape[1] - 1
        parts = count_parts(index.indptr, sequences * self._tiles, self._cores, self._most_parts(sequences))
        if recorded:
            assert self._fixed is not None
            fixed, room = self._fixed
            return DecodePlan(index, fixed[:, :sequences].copy_(parts), self._partials(room, sequences))
        if self._room.numel() < self._partial_size(sequences):
            self._room = self._new_room(sequences)
        return DecodePlan(index, parts, self._partials(self._room, sequences))

    def _most_parts(self, sequences: int) -> int:
        """Parts that one sequence of a batch may be cut into: a power of two above `kv_splits`, as each is compiled."""
        wanted = -(-PROGRAMS_PER_CORE * self._cores // max(1, sequences * self._tiles))
        most = self._kv_splits
        while most < min(wanted, MAX_PARTS):
            most *= 2
        return most

    def _partial_size(self, sequences: int) -> int:
        """Numbers that the parts of a batch leave: outputs and sums."""
        return sequences * self._heads * self._most_parts(sequences) * (self._dim + 1)

    def _new_room(self, sequences: int) -> torch.Tensor:
        """Room for the parts of any batch of up to so many sequences, float32."""
        most = max(self._partial_size(count) for count in range(sequences + 1))
        return torch.empty(most, dtype=torch.float32, device=self._device)

    def _partials(self, room: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In `room`, outputs `[Q, H / G, parts, D]` and sums `[Q, H / G, parts]`."""
        shape, dim = (sequences, self._heads, self._most_parts(sequences)), self._dim
        sums = shape[0] * shape[1] * shape[2]
        outputs, rest = torch.split(room[: sums * (dim + 1)], [sums * dim, sums])
        return outputs.view(*shape, dim), rest.view(shape)


def count_parts(indptr: torch.Tensor, programs: int, cores: int, most: int) -> torch.Tensor:
    """Into how many parts to cut each sequence, `[lists, Q]` int32, decided on the device.

    Parts of one list are of about equal size, so that a long sequence does not run on alone.

    Args:
        indptr: `[lists, Q + 1]` int32.
        programs: programs of one layer if nothing is cut.
        cores: multiprocessors.
        most: limit.
    """
    wanted = min(most, max(1, -(-PROGRAMS_PER_CORE * cores // programs)))
    lengths = indptr.diff(dim=1)
    size = (-(-lengths.amax(1, keepdim=True) // wanted)).clamp(min=MIN_PART)
    return (-(-lengths // size)).clamp(1, most).to(torch.int32)
