"""Store new keys and values of one layer into the arena, through residency, K and V in one pass."""

from __future__ import annotations

import torch

from vlcache_kernels.arena_write import naive
from vlcache_kernels.checks import (
    Backend,
    check_cells,
    check_device,
    check_float,
    check_index,
    check_shape,
    use_triton,
)

__all__ = ["arena_write"]


def arena_write(
    arena: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    residency: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    backend: Backend = "auto",
) -> None:
    """Write token t's K and V into the cells that its virtual slot has in one layer.

    KV head h of token t goes to ``arena[residency[h // heads_per_cell, slots[t]], :, h % heads_per_cell]``.  Changes
    `arena` only.  Slots may repeat only if they are padding (slot 0, cell 0): which of equal slots wins is undefined.
    A slot without a cell (-1) is skipped.

    Args:
        arena: `[num_cells, 2, heads_per_cell, D]` float, 8-bit floats too, index 0 = K, 1 = V; what is in a cell is
            contiguous, cells may be wider than that.
        keys, values: `[T, K, D]` float, converted to the arena's type.
        slots: `[T]` int32 or int64 virtual slots.
        residency: `[G, num_slots]` int32, the rows of this layer's planes (``residency[layer * G : (layer + 1) * G]``),
            ``G = K / heads_per_cell``.
        key_scale, value_scale: what keys and values are divided by before they are converted.
        backend: "auto" takes Triton on a GPU and the reference elsewhere.
    """
    check_shape("arena", arena, (None, 2, None, None))
    _, _, heads_per_cell, head_dim = arena.shape
    check_shape("residency", residency, (None, None))
    tokens, num_kv_heads = slots.numel(), residency.shape[0] * heads_per_cell
    check_shape("slots", slots, (tokens,))
    check_shape("keys", keys, (tokens, num_kv_heads, head_dim))
    check_shape("values", values, (tokens, num_kv_heads, head_dim))
    check_cells("arena", arena)
    for name, tensor in (("keys", keys), ("values", values)):
        check_float(name, tensor)
    check_index("slots", slots)
    check_index("residency", residency)
    if not arena[:1].is_contiguous():
        raise ValueError("what is in a cell of the arena must be contiguous")
    check_device(arena.device, keys=keys, values=values, slots=slots, residency=residency)
    if use_triton(backend, arena.device) and tokens:
        from vlcache_kernels.arena_write import triton

        triton.arena_write(arena, keys, values, slots, residency, key_scale, value_scale)
    else:
        naive.arena_write(arena, keys, values, slots, residency, key_scale, value_scale)
