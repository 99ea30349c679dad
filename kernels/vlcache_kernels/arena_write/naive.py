"""Arena write in plain torch: the reference, and what runs on a CPU."""

from __future__ import annotations

import torch


def arena_write(
    arena: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    residency: torch.Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    """See `vlcache_kernels.arena_write.arena_write`."""
    _, _, heads_per_cell, head_dim = arena.shape
    tokens, group = keys.shape[0], residency.shape[0]
    cells = residency.index_select(1, slots.to(torch.int64)).T.reshape(-1).to(torch.int64)  # [T * G]
    keys, values = (x if by == 1.0 else x / by for x, by in ((keys, key_scale), (values, value_scale)))
    pair = torch.stack((keys, values), dim=1).view(tokens, 2, group, heads_per_cell, head_dim).transpose(1, 2)
    pair = pair.reshape(tokens * group, 2, heads_per_cell, head_dim).to(arena.dtype)
    resident = cells >= 0
    if bool(resident.all()):
        arena[cells] = pair
    else:
        arena[cells[resident]] = pair[resident]
