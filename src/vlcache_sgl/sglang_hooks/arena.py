"""The arena, seen by SGLang as its KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, unwrap_write_loc

from vlcache_sgl.memory.arena import Arena
from vlcache_sgl.memory.layers import Window
from vlcache_sgl.memory.scales import UNSCALED, Scales
from vlcache_sgl.sglang_hooks.facades import AttentionLayer


class _NoSlots(Sequence[torch.Tensor]):
    """In the place of SGLang's lists of buffers: whoever wants to index by slot would get somebody else's cell."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, layer: Any) -> Any:
        raise RuntimeError("with --kv-policy keys and values lie in cells, which slots do not number")

    def __iter__(self) -> Any:
        return self[0]


class KVArena(MHATokenToKVPool):
    """SGLang's `size` is the number of *virtual slots*; the memory is the `num_cells` cells of `arena`.

    Args:
        groups: cells per (layer, token): 1, or the number of KV heads.
        layer_ids: the layers among whose tokens policies choose; None: all, from 0.
        window: layers that attend to the last tokens only.
    """

    def __init__(
        self,
        *,
        num_cells: int,
        groups: int,
        layer_ids: Sequence[int] | None = None,
        window: Window | None = None,
        **pool_arguments: Any,
    ) -> None:
        self._num_cells = num_cells
        self._groups = groups
        self._layer_ids = layer_ids
        self._window = window
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
            window=self._window,
        )
        self.k_buffer = self.v_buffer = _NoSlots()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        half = self.arena.nbytes // 2
        return half, half

    def set_kv_buffer(
        self, layer: AttentionLayer, loc_info: Any, cache_k: torch.Tensor, cache_v: torch.Tensor, *_: Any
    ) -> None:
        slots, _, _ = unwrap_write_loc(loc_info)
        where = self.arena.layer(layer.layer_id)
        self.arena.set_scales(where, scales_of(layer))
        self.arena.write(self.arena.write_cells(slots)[where.planes], cache_k, cache_v, where)

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
