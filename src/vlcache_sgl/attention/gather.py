"""Cells collected in one place, and attention over what was collected, in plain torch."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlcache_sgl.memory.scales import Scales, as_bytes


class Gather:
    """Collects cells in one reused buffer: fresh memory of this size would be paged in anew each time.

    Args:
        arena: `[cells + 1, 2, heads_per_cell, head_dim]`.
        dtype: of queries, in which keys and values are attended to.
    """

    def __init__(self, arena: torch.Tensor, dtype: torch.dtype) -> None:
        self._flat = as_bytes(arena).flatten(1)
        self._stored = arena.dtype
        self._dtype = dtype
        self._shape = arena.shape[1:]
        self._scratch = torch.empty((0, self._flat.shape[1]), dtype=self._flat.dtype, device=self._flat.device)

    @property
    def cell_bytes(self) -> int:
        """Of a cell that is attended to."""
        return self._flat.shape[1] * self._dtype.itemsize

    def __call__(self, cells: torch.Tensor, scales: Scales) -> torch.Tensor:
        """`cells` `[...]` int32 -> `[..., 2, heads_per_cell, head_dim]` as numbers; valid until the next call."""
        count = cells.numel()
        if count > self._scratch.shape[0]:
            self._scratch = self._flat.new_empty((count, self._flat.shape[1]))
        out = self._scratch[:count]
        torch.index_select(self._flat, 0, cells.reshape(-1), out=out)
        return scales.load(out.view(self._stored).view(*cells.shape, *self._shape), self._dtype)


def attend(queries: torch.Tensor, both: torch.Tensor, counts: torch.Tensor, scale: float) -> torch.Tensor:
    """`queries` `[b, H, D]` over keys and values `[G, b, n, 2, heads, D]`, of which `counts` `[G, b]` are valid."""
    batch, num_heads, dim = queries.shape
    groups, _, length, _, heads, _ = both.shape
    both = both.view(groups * batch, length, 2, heads, dim)
    # The query heads of a KV head become rows of one small query: no key is read twice.
    per_head = num_heads // (groups * heads)
    q = queries.view(batch, groups, heads, per_head, dim).transpose(0, 1).reshape(groups * batch, heads, per_head, dim)
    mask = None
    if bool((counts != length).any()):
        seen = torch.arange(length, device=q.device)[None] < counts.reshape(-1, 1)
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        mask = mask[:, None, None, :]
    out = scaled_dot_product_attention(
        q, both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.view(groups, batch, heads * per_head, dim).transpose(0, 1).reshape(batch, num_heads, dim)
