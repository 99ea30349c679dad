"""Sketch scores in plain torch: the reference, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

FACTOR_BYTES = 2
"""One float16 behind the bits."""


def sketch_scores(queries: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `vlcache_kernels.sketch_scores.sketch_scores`.

    What each value of each byte adds to each query is computed once, looked up and summed: no bit is ever unpacked.
    """
    batch, _, dim = queries.shape
    count, kv_heads, size = rows.shape[1], codes.shape[1], dim // 8
    every = torch.arange(256, device=codes.device)
    signs = ((every >> torch.arange(8, device=codes.device)[:, None]) & 1).float() * 2 - 1  # [8, 256]
    by_head = queries.float().view(batch, kv_heads, -1, size, 8)
    sums = (by_head @ signs).permute(0, 1, 3, 4, 2)  # [B, K, D / 8, 256, H / K]
    own = codes.index_select(0, rows.reshape(-1)).view(batch, count, kv_heads, size + FACTOR_BYTES)
    packed, factor = own.split([size, FACTOR_BYTES], dim=-1)
    first = torch.arange(0, 256 * batch * kv_heads * size, 256, dtype=torch.int32, device=codes.device)
    bags = packed + first.view(batch, 1, kv_heads, size)
    logits = embedding_bag(bags.view(-1, size), sums.reshape(-1, sums.shape[-1]), mode="sum")
    logits = logits.view(batch, count, kv_heads, -1) * factor.contiguous().view(torch.float16)
    by_query: torch.Tensor = logits.flatten(2).transpose(1, 2).contiguous()
    return by_query
