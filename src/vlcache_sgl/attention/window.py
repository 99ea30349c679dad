"""Attention of layers that see the last tokens only, in plain torch.

What such a layer keeps of a request ends with its last tokens without a gap, so that a place in the list of kept cells,
counted from its end, is a distance between tokens.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlcache_sgl.attention.gather import Gather, attend
from vlcache_sgl.memory.decode_index import DecodeIndex, RowCells
from vlcache_sgl.memory.layers import LayerCells
from vlcache_sgl.memory.scales import Scales


def last_of_prefix(gather: Gather, prefix: RowCells, layer: LayerCells, scales: Scales) -> torch.Tensor:
    """`[P, 2, K, D]`, keys and values of the last tokens of a request's prefix, no more than the window holds."""
    assert layer.window is not None
    counts = prefix.counts[layer.planes]
    end = int(counts[0])
    assert bool((counts == end).all()), "planes of a window keep the same tokens"
    both = gather(prefix.cells[layer.planes, max(0, end - layer.window) : end], scales)  # [G, P, 2, heads, D]
    return both.permute(1, 2, 0, 3, 4).flatten(2, 3).clone()


def extend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: torch.Tensor | None,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of new tokens over those in front of them, at most `window` tokens back.

    Args:
        queries: `[t, H, D]`.
        keys, values: `[t, K, D]`, the new tokens' own.
        prefix: `[P, 2, K, D]`, of the tokens just in front of them.
        scale: factor of the logits.

    Returns:
        `[t, H, D]`.
    """
    earlier = 0 if prefix is None else prefix.shape[0]
    if prefix is not None:
        keys, values = torch.cat([prefix[:, 0], keys]), torch.cat([prefix[:, 1], values])
    at = torch.arange(keys.shape[0], device=keys.device)
    own = at[earlier:, None]
    visible = (at <= own) & (at >= own - window)
    out = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=visible,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def decode(
    queries: torch.Tensor, index: DecodeIndex, layer: LayerCells, gather: Gather, scale: float, scales: Scales
) -> torch.Tensor:
    """One new token per request, itself and at most a window back; `[B, H, D]` to `[B, H, D]`."""
    assert layer.window is not None
    counts = index.counts[layer.planes]
    seen = counts.clamp(max=layer.window + 1)
    places = (counts - seen).unsqueeze(-1) + torch.arange(int(seen.max()), device=queries.device)
    cells = index.cells[layer.planes].gather(2, places.clamp(max=index.cells.shape[2] - 1))
    return attend(queries, gather(cells, scales), seen, scale)
