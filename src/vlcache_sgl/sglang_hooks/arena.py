"""The one memory that all layers share, seen by SGLang as its KV pool."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

from vlcache_sgl.memory.residency import Residency


class KVArena(MHATokenToKVPool):
    """``arena[cell] = (K, V)`` for all layers; `residency` says which cell holds a token in a layer.

    SGLang's `size` is the number of *virtual slots*; the memory is `num_cells` cells.

    Attributes:
        arena: `[num_cells + 1, 2, heads_per_cell, head_dim]`, K at index 0 and V at 1; cell 0 is padding.
        groups: cells per (layer, token): 1, or the number of KV heads.
    """

    def __init__(self, *, num_cells: int, groups: int, **pool_arguments: Any) -> None:
        self.num_cells = num_cells
        self.groups = groups
        super().__init__(**pool_arguments)

    def _create_buffers(self) -> None:
        if self.head_num % self.groups:
            raise ValueError(f"{self.head_num} KV heads cannot be divided into {self.groups} groups")
        if self.v_head_dim != self.head_dim:
            raise ValueError("keys and values of different width have no common cell")
        self.heads_per_cell = self.head_num // self.groups
        self.num_planes = self.layer_num * self.groups
        # Zeros, not empty: the padding cell is read (and masked) where batches are ragged, and 0 * NaN is NaN.
        self.arena = torch.zeros(
            (self.num_cells + 1, 2, self.heads_per_cell, self.head_dim), dtype=self.store_dtype, device=self.device
        )
        self.residency = Residency(self.num_planes, self.size, self.num_cells, self.device)
        self.k_buffer = [self.arena[:, 0]] * self.layer_num
        self.v_buffer = [self.arena[:, 1]] * self.layer_num

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell: K and V of one token in one plane."""
        return int(self.arena[0].numel() * self.arena.element_size())

    def get_kv_size_bytes(self) -> tuple[int, int]:
        half = self.arena.numel() * self.arena.element_size() // 2
        return half, half

    def planes_of(self, layer_id: int) -> slice:
        """The planes of a layer, as a slice of `residency.table`."""
        first = (layer_id - self.start_layer) * self.groups
        return slice(first, first + self.groups)

    def write(self, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k` and `v` `[tokens, kv_heads, head_dim]` in `cells` `[groups, tokens]` of one layer."""
        tokens = k.shape[0]
        shape = (tokens, self.groups, self.heads_per_cell, self.head_dim)
        keys = k.view(shape).transpose(0, 1).to(self.dtype)
        values = v.view(shape).transpose(0, 1).to(self.dtype)
        self.arena[:, 0][cells] = keys
        self.arena[:, 1][cells] = values

    def write_cells(self, slots: torch.Tensor) -> torch.Tensor:
        """Cells `[planes, tokens]` int64 to write `slots` to; slots freed meanwhile write to the padding cell.

        Under overlap scheduling the last step of a request that has ended is still in flight when its slots go.
        """
        return self.residency.table[:, slots].clamp(min=0).to(torch.int64)

    def set_kv_buffer(self, layer: Any, loc_info: Any, cache_k: torch.Tensor, cache_v: torch.Tensor, *_: Any) -> None:
        slots, _, _ = unwrap_write_loc(loc_info)
        self.write(self.write_cells(slots)[self.planes_of(layer.layer_id)], cache_k, cache_v)

    def get_cpu_copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a compressed KV cache has no host copy")

    def load_cpu_copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a compressed KV cache has no host copy")

    def move_kv_cache(self, *_: Any) -> None:
        raise RuntimeError("virtual slots are not moved")
