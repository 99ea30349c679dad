"""The arena, seen by SGLang as its KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, unwrap_write_loc

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.scales import UNSCALED, Scales
from vlcache_sgl.sglang_hooks.facades import AttentionLayer


class KVArena(MHATokenToKVPool):
    """SGLang's `size` is the number of *virtual slots*; the memory is the `num_cells` cells of `arena`.

    Args:
        groups: cells per (layer, token): 1, or the number of KV heads.
        layer_ids: which layers of the model keep their tokens here; None: all, from 0.
    """

    def __init__(
        self, *, num_cells: int, groups: int, layer_ids: Sequence[int] | None = None, **pool_arguments: Any
    ) -> None:
        self._num_cells = num_cells
        self._groups = groups
        self._layer_ids = layer_ids
        super().__init__(**pool_arguments)

    def _create_buffers(self) -> None:
        if self.v_head_dim != self.head_dim:
            raise ValueError("keys and values of different width have no common cell")
        self.arena = Arena(
            num_cells=self._num_cells,
            num_slots=self.size,
            num_layers=self.layer_num,
            kv_heads=self.head_num,
            head_dim=self.head_dim,
            groups=self._groups,
            dtype=self.dtype,  # SGLang stores 8-bit floats as bytes, see `Arena.raw`
            device=self.device,
            layer_ids=self._layer_ids,
        )
        self.k_buffer = [self.arena.cells[:, 0]] * self.layer_num
        self.v_buffer = [self.arena.cells[:, 1]] * self.layer_num

    def get_kv_size_bytes(self) -> tuple[int, int]:
        half = self.arena.nbytes // 2
        return half, half

    def set_kv_buffer(
        self, layer: AttentionLayer, loc_info: Any, cache_k: torch.Tensor, cache_v: torch.Tensor, *_: Any
    ) -> None:
        slots, _, _ = unwrap_write_loc(loc_info)
        planes = self.arena.planes_of(layer.layer_id)
        self.arena.set_scales(planes, scales_of(layer))
        self.arena.write(self.arena.write_cells(slots)[planes], cache_k, cache_v, self.arena.scales_of(planes))

    def get_cpu_copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a compressed KV cache has no host copy")

    def load_cpu_copy(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a compressed KV cache has no host copy")

    def move_kv_cache(self, *_: Any) -> None:
        raise RuntimeError("virtual slots are not moved")


def scales_of(layer: AttentionLayer) -> Scales:
    """What the checkpoint, or a file of scales, says of a layer's 8-bit keys and values."""
    if layer.k_scale is None or layer.v_scale is None:
        return UNSCALED
    pairs = ((layer.k_scale_float, layer.k_scale), (layer.v_scale_float, layer.v_scale))
    return Scales(*(float(given if number is None else number) for number, given in pairs))


def arena_of(pool: Any) -> KVArena:
    """The arena in SGLang's KV pool: of a model that has other layers too it is a part of it."""
    arena = pool.full_kv_pool if isinstance(pool, HybridLinearKVPool) else pool
    assert isinstance(arena, KVArena)
    return arena
