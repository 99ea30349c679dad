"""Attention in float64 by its formula, which knows nothing of cells."""

from __future__ import annotations

import torch


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: torch.Tensor) -> torch.Tensor:
    """`q` `[t, H, D]`, `k`, `v` `[n, K, D]`, `visible` bool `[t, n]` or `[K, t, n]`; float64 `[t, H, D]`."""
    group = q.shape[1] // k.shape[1]
    k64 = k.double().repeat_interleave(group, 1)
    v64 = v.double().repeat_interleave(group, 1)
    logits = torch.einsum("thd,nhd->htn", q.double(), k64) * scale
    if visible.dim() == 3:
        visible = visible.repeat_interleave(group, 0)
    return torch.einsum("htn,nhd->thd", logits.masked_fill(~visible, -torch.inf).softmax(-1), v64)
